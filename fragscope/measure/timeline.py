"""The byte counters after every request, computed from decisions alone."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fragscope.measure.lifetimes import Ints, Lifetimes, lifetimes
from fragscope.trace import DecisionKind, RequestKind, Requests, Trace


@dataclass(frozen=True, slots=True)
class Level:
    """Counters at one moment, or the largest value of each over a range of rows; bytes, as in the design's word list.

    Largest values of different counters need not have occurred together.
    """

    requested: int
    allocated: int
    active: int
    reserved: int
    stranded: int
    releasable: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Counters after each request was served.

    Always ``reserved = requested + internal + releasable + stranded``. Stranded and releasable say what
    ``empty_cache()`` would leave and return now; they do not prove that a program would run out of memory.

    Attributes:
        requested: int64, shape ``(requests,)``, bytes asked for and not freed. (Torch's ``requested_bytes`` falls only
            when a deferred free completes, as ``active`` does here.)
        allocated: int64, bytes in blocks handed out and not freed by the program.
        active: int64, allocated plus blocks whose free waits for another stream.
        reserved: int64, bytes held from the driver.
        stranded: int64, idle bytes in segments that hold an active block.
        releasable: int64, bytes of wholly idle segments.
        stranded_peak: int64, largest ``stranded`` while this request was being served. One request can complete
            deferred frees and then use their memory, so this may exceed the value after it.
        releasable_peak: int64, likewise for ``releasable``.
        oom: int64, shape ``(failed,)``, rows of the requests that failed.
        measured: rows of the measured phase from its begin mark to its end mark, None where none is marked.
    """

    requested: Ints
    allocated: Ints
    active: Ints
    reserved: Ints
    stranded: Ints
    releasable: Ints
    stranded_peak: Ints
    releasable_peak: Ints
    oom: Ints
    measured: slice | None

    @property
    def internal(self) -> Ints:
        """Rounding and unsplit remainders after each request: active minus requested; int64 bytes.

        While a freed block waits for another stream, its requested bytes count here too.
        """
        return self.active - self.requested

    def at(self, row: int) -> Level:
        """The counters after request ``row`` was served."""
        return Level(*(int(getattr(self, f.name)[row]) for f in fields(Level)))

    def peak(self, rows: slice | None = None) -> Level:
        """The largest value of each counter while the rows were served (default: all); zeros for no rows."""
        chosen = slice(None) if rows is None else rows
        columns = (
            self.requested, self.allocated, self.active, self.reserved, self.stranded_peak, self.releasable_peak,
        )  # fmt: skip
        return Level(*(int(column[chosen].max(initial=0)) for column in columns))


def timeline(trace: Trace, lives: Lifetimes | None = None) -> Timeline:
    """Compute the counters after every request row.

    Args:
        trace: with the decisions of a replay.
        lives: ``lifetimes(trace)`` where the caller has it.

    Raises:
        UsageError: the decisions lack block sizes, or there are none.
        InputFileError: the decisions contradict each other.
    """
    lives = lifetimes(trace) if lives is None else lives
    segments, blocks = lives.segments, lives.blocks
    count = lives.end

    def series(*terms: tuple[Ints, Ints]) -> Ints:
        """Running sum over decisions of signed bytes at positions; entry k is the value after k decisions."""
        change = np.zeros(count + 1, dtype=np.int64)
        for position, amount in terms:
            within = position < count
            np.add.at(change, position[within] + 1, amount[within])
        return np.cumsum(change)

    reserved = series((segments.born, segments.size), (segments.died, -segments.size))
    requested = series((blocks.born, blocks.requested), (blocks.released, -blocks.requested))
    allocated = series((blocks.born, blocks.size), (blocks.released, -blocks.size))
    active = series((blocks.born, blocks.size), (blocks.died, -blocks.size))
    stranded = series(_stranded_changes(lives))
    # A new segment is idle until its first block is cut from it, in the same malloc; nobody can release it between.
    releasable = reserved - active - stranded
    assert trace.decisions is not None
    settled = np.ones(count + 1, dtype=bool)
    settled[1:] = trace.decisions.kind != DecisionKind.SEGMENT_ALLOC
    return Timeline(
        requested=requested[lives.upto],
        allocated=allocated[lives.upto],
        active=active[lives.upto],
        reserved=reserved[lives.upto],
        stranded=stranded[lives.upto],
        releasable=releasable[lives.upto],
        stranded_peak=_largest_while_served(stranded, lives.upto),
        releasable_peak=_largest_while_served(np.where(settled, releasable, 0), lives.upto),
        oom=np.asarray(trace.decisions.request[trace.decisions.kind == DecisionKind.OOM], dtype=np.int64),
        measured=measured_rows(trace.requests),
    )


def _stranded_changes(lives: Lifetimes) -> tuple[Ints, Ints]:
    """Positions and signed bytes by which stranded memory changes; a segment in use strands what is idle."""
    segment, position, before, after = lives.busy()
    size = lives.segments.size[segment]
    return position, np.where(after > 0, size - after, 0) - np.where(before > 0, size - before, 0)


def _largest_while_served(after: Ints, upto: Ints) -> Ints:
    """Largest value of a series within each row's decisions; the value so far where a row has none."""
    if len(upto) == 0:
        return after[:0]
    first = np.concatenate([[0], upto[:-1]])  # position before the row's first decision
    return np.maximum(after[upto], np.maximum.reduceat(after, np.minimum(first + 1, upto)))


def measured_rows(requests: Requests) -> slice | None:
    """Rows of the measured phase: the last one that ended, or one still open when the recording did.

    The slice begins at the begin mark, after which the counters are the base, and includes the end mark.
    """
    found: slice | None = None
    begin: int | None = None
    marks = np.flatnonzero((requests.kind == RequestKind.PHASE_BEGIN) | (requests.kind == RequestKind.PHASE_END))
    for row in marks.tolist():
        if requests.kind[row] == RequestKind.PHASE_BEGIN:
            begin = row
        elif begin is not None:
            found, begin = slice(begin, row + 1), None
    return found if begin is None else slice(begin, len(requests))
