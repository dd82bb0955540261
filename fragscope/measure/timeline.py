"""The byte counters after every request, computed from decisions alone."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fragscope.errors import InputFileError
from fragscope.measure.busy import Busy, busy, running_sums
from fragscope.measure.lifetimes import Lifetimes, lifetimes
from fragscope.measure.segments import Ints
from fragscope.trace import DecisionKind, RequestKind, Requests, Trace
from fragscope.trace.raw import raw_bytes


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
    pool_idle: int
    raw: int
    hbm: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Counters after each request was served.

    Always ``reserved = requested + internal + releasable + stranded + pool_idle``. Stranded and releasable say what
    ``empty_cache()`` would leave and return now; they do not prove that a program would run out of memory.

    What stood when a recording began counts from the first request row on, all of it at once.

    Attributes:
        requested: int64, shape ``(requests,)``, bytes asked for and not freed. (Torch's ``requested_bytes`` falls only
            when a deferred free completes, as ``active`` does here.)
        allocated: int64, bytes in blocks handed out and not freed by the program.
        active: int64, allocated plus blocks whose free waits for another stream.
        reserved: int64, bytes held from the driver.
        stranded: int64, idle bytes in segments, or in pages of expandable ones, that hold an active block.
        releasable: int64, bytes of wholly idle segments and pages.
        pool_idle: int64, idle bytes in private pools that have users; they are neither stranded nor releasable.
        raw: int64, bytes taken of the driver past the allocator (``RAW_ALLOC``), in its pages; samples do not count.
        reserved_peak: int64, largest ``reserved`` while this request was being served. One request can map pages of an
            expandable segment, lack memory for the rest, return everything and then be served or fail.
        stranded_peak: int64, largest ``stranded`` while this request was being served. One request can complete
            deferred frees and then use their memory, so this may exceed the value after it.
        releasable_peak: int64, likewise for ``releasable``. What a request takes from the driver for itself does not
            count before the block is cut from it: nobody can release it between.
        pool_idle_peak: int64, likewise for ``pool_idle``.
        oom: int64, shape ``(failed,)``, rows of the requests that failed.
        measured: rows of the measured phase from its begin mark to its end mark, None where none is marked.
    """

    requested: Ints
    allocated: Ints
    active: Ints
    reserved: Ints
    stranded: Ints
    releasable: Ints
    pool_idle: Ints
    raw: Ints
    reserved_peak: Ints
    stranded_peak: Ints
    releasable_peak: Ints
    pool_idle_peak: Ints
    oom: Ints
    measured: slice | None

    @property
    def internal(self) -> Ints:
        """Rounding and unsplit remainders after each request: active minus requested; int64 bytes.

        While a freed block waits for another stream, its requested bytes count here too.
        """
        return self.active - self.requested

    @property
    def hbm(self) -> Ints:
        """Reserved plus raw after each request; int64 bytes."""
        return self.reserved + self.raw

    def at(self, row: int) -> Level:
        """The counters after request ``row`` was served."""
        return Level(*(int(getattr(self, f.name)[row]) for f in fields(Level)))

    def peak(self, rows: slice | None = None) -> Level:
        """The largest value of each counter while the rows were served (default: all); zeros for no rows."""
        chosen = slice(None) if rows is None else rows
        columns = (
            self.requested, self.allocated, self.active, self.reserved_peak, self.stranded_peak,
            self.releasable_peak, self.pool_idle_peak, self.raw, self.reserved_peak + self.raw,
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
    assert trace.decisions is not None
    clock = _Clock(lives)
    pieces, blocks = lives.pieces, lives.blocks
    reserved = clock.series((pieces.born, pieces.size), (pieces.died, -pieces.size))
    requested = clock.series((blocks.born, blocks.requested), (blocks.released, -blocks.requested))
    allocated = clock.series((blocks.born, blocks.size), (blocks.released, -blocks.size))
    active = clock.series((blocks.born, blocks.size), (blocks.died, -blocks.size))
    stranded, pool_idle = _idle(lives, clock)
    releasable = reserved - active - stranded - pool_idle
    if len(releasable) and int(releasable.min()) < 0:
        raise InputFileError("the trace", "is inconsistent: blocks lie on top of each other, or in memory returned")
    told = int(clock.upto[0]) if lives.stood else 0  # ticks of what stood when recording began, which came before
    for series in (reserved, stranded, releasable, pool_idle):
        series[:told] = 0
    settled = np.ones(clock.end + 1, dtype=bool)
    takes = (trace.decisions.kind == DecisionKind.SEGMENT_ALLOC) | (trace.decisions.kind == DecisionKind.SEGMENT_MAP)
    settled[clock.of(np.flatnonzero(takes)) + 1] = False
    settled[told] = True
    return Timeline(
        requested=requested[clock.upto],
        allocated=allocated[clock.upto],
        active=active[clock.upto],
        reserved=reserved[clock.upto],
        stranded=stranded[clock.upto],
        releasable=releasable[clock.upto],
        pool_idle=pool_idle[clock.upto],
        raw=raw_bytes(trace),
        reserved_peak=_largest_while_served(reserved, clock.upto),
        stranded_peak=_largest_while_served(stranded, clock.upto),
        releasable_peak=_largest_while_served(np.where(settled, releasable, 0), clock.upto),
        pool_idle_peak=_largest_while_served(np.where(settled, pool_idle, 0), clock.upto),
        oom=np.asarray(trace.decisions.request[trace.decisions.kind == DecisionKind.OOM], dtype=np.int64),
        measured=measured_rows(trace.requests),
    )


class _Clock:
    """Ticks at which a counter can change: every decision, and every change of whether a private pool has users.

    The latter changes come before the decisions of their request, of which only an allocation that makes its pool
    has any.

    Attributes:
        end: how many ticks there are.
        upto: int64, shape ``(requests,)``: ticks up to and including those of each request row.
    """

    def __init__(self, lives: Lifetimes) -> None:
        holds = lives.holds
        rows = np.concatenate([holds.since, holds.until])
        self._hold_order = np.argsort(rows, kind="stable")
        self._hold_rows = rows[self._hold_order]
        earlier = np.concatenate([[0], lives.upto])
        self._hold_positions = earlier[self._hold_rows]  # decisions made before
        self._decisions = lives.end
        self.end = lives.end + len(rows)
        self.upto = lives.upto + np.searchsorted(self._hold_rows, np.arange(len(lives.upto)), side="right")

    def of(self, position: Ints) -> Ints:
        """Ticks of decisions; what never happens stays past the end."""
        if len(self._hold_positions) == 0:
            return position
        return position + np.searchsorted(self._hold_positions, position, side="right")

    def of_holds(self) -> tuple[Ints, Ints]:
        """Ticks at which each row of ``Lifetimes.holds`` begins and ends."""
        tick = np.empty(len(self._hold_rows), dtype=np.int64)
        tick[self._hold_order] = self._hold_positions + np.arange(len(tick))
        since, until = np.split(tick, 2)
        return since, until

    def series(self, *terms: tuple[Ints, Ints]) -> Ints:
        """Running sum of signed bytes at positions of decisions; entry k is the value after k ticks."""
        made = [(position < self._decisions, position, amount) for position, amount in terms]
        return self.sums(*((self.of(position[m]), amount[m]) for m, position, amount in made))

    def sums(self, *terms: tuple[Ints, Ints]) -> Ints:
        """Running sum of signed bytes at ticks; entry k is the value after k of them."""
        change = np.zeros(self.end + 1, dtype=np.int64)
        for tick, amount in terms:
            np.add.at(change, tick + 1, amount)
        return np.cumsum(change)


def _idle(lives: Lifetimes, clock: _Clock) -> tuple[Ints, Ints]:
    """Stranded bytes and idle bytes of private pools with users, after every tick."""
    units = busy(lives, whole_pages=False)
    if len(lives.holds) == 0:
        return clock.series((units.position, units.stranded_change)), np.zeros(clock.end + 1, dtype=np.int64)
    ours = np.isin(lives.segments.pool, lives.holds.pool)[units.segment]
    tick, idle, stranded = _idle_of_private(lives, clock, units, np.flatnonzero(ours))
    others = (clock.of(units.position[~ours]), units.stranded_change[~ours])
    return clock.sums(others, (tick, stranded)), clock.sums((tick, idle))


def _idle_of_private(lives: Lifetimes, clock: _Clock, units: Busy, ours: Ints) -> tuple[Ints, Ints, Ints]:
    """Changes of what private pools add to ``pool_idle`` and to stranded: tick, bytes, bytes.

    A pool with users keeps all that is idle in it, whether or not a block is beside it.
    """
    holds, pool_of = lives.holds, lives.segments.pool
    pieces, blocks = lives.pieces, lives.blocks
    piece = np.flatnonzero(np.isin(pool_of[pieces.segment], holds.pool))
    block = np.flatnonzero(np.isin(pool_of[blocks.segment], holds.pool))
    home, home_of_block = pool_of[pieces.segment[piece]], pool_of[blocks.segment[block]]
    since, until = clock.of_holds()
    events = [  # pool, tick, and what changes: idle bytes, stranded bytes, whether there are users
        _event(home, clock.of(pieces.born[piece]), idle=pieces.size[piece]),
        _event(home, clock.of(pieces.died[piece]), idle=-pieces.size[piece]),
        _event(home_of_block, clock.of(blocks.born[block]), idle=-blocks.size[block]),
        _event(home_of_block, clock.of(blocks.died[block]), idle=blocks.size[block]),
        _event(pool_of[units.segment[ours]], clock.of(units.position[ours]), stranded=units.stranded_change[ours]),
        _event(holds.pool, since, users=np.ones(len(since), dtype=np.int64)),
        _event(holds.pool, until, users=-np.ones(len(until), dtype=np.int64)),
    ]
    rows = np.concatenate(events)
    rows = rows[rows[:, 1] < clock.end]
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    pool = rows[:, 0]
    idle, stranded, users = (running_sums(pool, rows[:, i]) for i in (2, 3, 4))
    return rows[:, 1], _changes(pool, idle * users), _changes(pool, stranded * (1 - users))


def _event(
    pool: Ints, tick: Ints, idle: Ints | None = None, stranded: Ints | None = None, users: Ints | None = None
) -> Ints:
    nothing = np.zeros(len(pool), dtype=np.int64)
    return np.stack([pool, tick, *(nothing if x is None else x for x in (idle, stranded, users))], axis=1)


def _changes(key: Ints, value: Ints) -> Ints:
    """Differences of a series to its row before, where that has the same key; else to zero."""
    before = np.zeros(len(value), dtype=np.int64)
    before[1:] = np.where(key[1:] == key[:-1], value[:-1], 0)
    return value - before


def _largest_while_served(after: Ints, upto: Ints) -> Ints:
    """Largest value of a series within each row's ticks; the value so far where a row has none."""
    if len(upto) == 0:
        return after[:0]
    first = np.concatenate([[0], upto[:-1]])  # ticks before the row's first
    served = after[: upto[-1] + 1]  # pools keep their users when the Trace ends
    return np.maximum(after[upto], np.maximum.reduceat(served, np.minimum(first + 1, upto)))


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
