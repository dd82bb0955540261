"""When each segment and each block lived, read out of a Trace's decisions.

Everything else in this room is arithmetic over these two tables. They are made from the decisions alone, without the
allocator model, so that what is computed from them is a second opinion on the model's own counters.

Times here are *positions*: how many decisions had been made. A block born at position 7 exists after decision 7, that
is, in ``born < position``; what never ends has the position ``len(decisions)``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fragscope.errors import InputFileError, UsageError
from fragscope.trace import UNKNOWN_SIZE, DecisionKind, Decisions, RequestKind, Trace

Ints = npt.NDArray[np.int64]

_TOTAL_LIMIT = 2**62  # all sizes together; sums below this cannot overflow int64


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """Segments in the order in which they came from the driver; each column int64 of shape ``(n,)``.

    Attributes:
        addr: first byte.
        size: bytes.
        stream: raw stream handle.
        pool: index into ``Trace.pools``.
        born: position of the decision that took it.
        died: position of the decision that returned it.
    """

    addr: Ints
    size: Ints
    stream: Ints
    pool: Ints
    born: Ints
    died: Ints


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Blocks in the order in which they were handed out; each column int64 of shape ``(n,)``.

    Attributes:
        id: lifetime id.
        addr: first byte.
        size: bytes of the block.
        requested: bytes the program asked for.
        segment: row in the ``SegmentTable``.
        born: position of the decision that handed it out.
        released: position of the decision that noted the program's free.
        died: position of the decision that made it free to be handed out again.
    """

    id: Ints
    addr: Ints
    size: Ints
    requested: Ints
    segment: Ints
    born: Ints
    released: Ints
    died: Ints


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """What lived when.

    Attributes:
        segments: every segment.
        blocks: every block handed out.
        end: the position after the last decision; also the death of what outlives the Trace.
        upto: int64, shape ``(requests,)``: position after the last decision made for this request row or an earlier.
        request: int64, shape ``(decisions,)``: request row of each decision.
    """

    segments: SegmentTable
    blocks: BlockTable
    end: int
    upto: Ints
    request: Ints

    def busy(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Bytes of each segment that are active, at every change.

        Returns:
            ``(segment, position, before, after)``, int64, sorted by segment, then position: at ``position`` the active
            bytes of ``segment`` went from ``before`` to ``after``.
        """
        blocks = self.blocks
        ended = blocks.died < self.end
        segment = np.concatenate([blocks.segment, blocks.segment[ended]])
        position = np.concatenate([blocks.born, blocks.died[ended]])
        change = np.concatenate([blocks.size, -blocks.size[ended]])
        order = np.lexsort((position, segment))
        segment, position, change = segment[order], position[order], change[order]
        total = np.cumsum(change)
        first = np.searchsorted(segment, segment, side="left")  # where each segment's rows begin
        offset = np.where(first > 0, total[first - 1], 0) if len(total) else total
        after = total - offset
        return segment, position, after - change, after


def lifetimes(trace: Trace) -> Lifetimes:
    """Read when each segment and block lived.

    Raises:
        UsageError: the Trace has no decisions, or only recorded ones, which lack block sizes; replay it first.
        InputFileError: the decisions contradict each other; names the first decision that does.
    """
    decisions = trace.decisions
    if decisions is None:
        raise UsageError("the trace holds requests only; replay it first")
    if bool(np.any((decisions.kind == DecisionKind.ALLOC) & (decisions.size == UNKNOWN_SIZE))):
        raise UsageError("the trace's decisions lack block sizes, as PyTorch's recordings do; replay it first")
    request = np.asarray(decisions.request, dtype=np.int64)
    _require(np.diff(request, prepend=0) >= 0, "serves an earlier request than the one before it")
    _check_sizes(decisions)
    segments = _segments(decisions)
    blocks = _blocks(trace, decisions, segments)
    upto = np.searchsorted(request, np.arange(len(trace.requests)), side="right")
    return Lifetimes(segments, blocks, len(decisions), upto, request)


def _require(fine: npt.NDArray[np.bool_], what: str, at: Ints | None = None) -> None:
    """Refuse the Trace at the first decision that is not fine; ``at`` gives positions where rows are not decisions."""
    if not bool(np.all(fine)):
        row = int(np.argmin(fine))
        raise InputFileError("the trace", f"is inconsistent: decision {row if at is None else int(at[row])} {what}")


def _check_sizes(decisions: Decisions) -> None:
    moves = (decisions.kind != DecisionKind.OOM) & (decisions.kind != DecisionKind.FREE_REQUESTED)
    sizes = np.where(moves, decisions.size, 0)
    _require(sizes >= 0, "has a negative size")
    addresses = np.where(moves, decisions.addr, 0)
    _require((addresses >= 0) & (addresses < _TOTAL_LIMIT), "has an address that no device has")
    if float(np.sum(sizes, dtype=np.float64)) >= _TOTAL_LIMIT:
        raise InputFileError("the trace", "is inconsistent: its sizes are larger than any device")


def _segments(decisions: Decisions) -> SegmentTable:
    """Match each segment's return with its arrival: at one address they alternate."""
    took, gave = DecisionKind.SEGMENT_ALLOC, DecisionKind.SEGMENT_FREE
    rows = np.flatnonzero((decisions.kind == took) | (decisions.kind == gave))
    order = np.argsort(decisions.addr[rows], kind="stable")
    rows = rows[order]
    addr, size, is_alloc = decisions.addr[rows], decisions.size[rows], decisions.kind[rows] == took
    same = np.zeros(len(rows), dtype=bool)  # the row before is about the same address
    same[1:] = addr[1:] == addr[:-1]
    _require(is_alloc | same, "returns a segment that was not there", rows)
    alternates = np.ones(len(rows), dtype=bool)
    alternates[1:] = ~same[1:] | (is_alloc[1:] != is_alloc[:-1])
    _require(alternates, "takes or returns a segment twice", rows)
    fits = np.ones(len(rows), dtype=bool)
    fits[1:] = is_alloc[1:] | (size[1:] == size[:-1])
    _require(fits, "returns a segment of another size than was taken", rows)
    follows = np.zeros(len(rows), dtype=bool)
    follows[:-1] = same[1:]  # a return follows, since the rows of one address alternate
    died = np.full(len(rows), len(decisions), dtype=np.int64)
    died[:-1][follows[:-1]] = rows[1:][follows[:-1]]
    born = rows[is_alloc]
    in_time = np.argsort(born, kind="stable")
    born = born[in_time]
    return SegmentTable(
        addr=decisions.addr[born].astype(np.int64),
        size=decisions.size[born].astype(np.int64),
        stream=decisions.stream[born].astype(np.int64),
        pool=decisions.pool[born].astype(np.int64),
        born=born.astype(np.int64),
        died=died[is_alloc][in_time],
    )


def _blocks(trace: Trace, decisions: Decisions, segments: SegmentTable) -> BlockTable:
    born = np.flatnonzero(decisions.kind == DecisionKind.ALLOC)
    ids = decisions.id[born]
    by_id = np.argsort(ids, kind="stable")
    known = ids[by_id]
    unique = np.ones(len(known), dtype=bool)
    unique[1:] = known[1:] != known[:-1]
    _require(unique, "hands out memory for an id that has lived already", born[by_id])

    def ending(kind: DecisionKind, what: str) -> Ints:
        """Position of each block's decision of this kind."""
        out = np.full(len(born), len(decisions), dtype=np.int64)
        rows = np.flatnonzero(decisions.kind == kind)
        if len(rows):
            at, found = _find(known, decisions.id[rows])
            _require(found, f"{what} memory that nobody had", rows)
            block = by_id[at]
            out[block] = rows
            _require(out[block] == rows, f"{what} memory that is {what.rstrip('s')}d again later", rows)
            _require(born[block] < rows, f"{what} memory before it is handed out", rows)
        return out

    released = ending(DecisionKind.FREE_REQUESTED, "frees")
    died = ending(DecisionKind.FREE_COMPLETED, "reuses")
    _require((died == len(decisions)) | (released < died), "completes a free that nobody asked for", died)
    addr, size = decisions.addr[born].astype(np.int64), decisions.size[born].astype(np.int64)
    segment = _home(decisions, segments, born, addr, size)
    segment_died = segments.died[segment]
    _require((segment_died == len(decisions)) | (died < segment_died), "returns a segment that is in use", segment_died)
    asked = np.flatnonzero(trace.requests.kind == RequestKind.ALLOC)
    asked_ids = trace.requests.id[asked]
    order = np.argsort(asked_ids, kind="stable")
    at, found = _find(asked_ids[order], ids)
    _require(found, "hands out memory that nobody asked for", born)
    requested = trace.requests.size[asked][order][at].astype(np.int64)
    _require((requested >= 0) & (requested <= size), "hands out less memory than was asked for", born)
    return BlockTable(ids.astype(np.int64), addr, size, requested, segment, born, released, died)


def _find(known: Ints, wanted: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Where each wanted id stands among the sorted known ones, and whether it does."""
    if len(known) == 0:
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return at, known[at] == wanted


def _home(decisions: Decisions, segments: SegmentTable, born: Ints, addr: Ints, size: Ints) -> Ints:
    """Row of the segment that each block lies in.

    Segments change rarely: between two changes the live ones are fixed, and one search places all blocks of that time.
    """
    out = np.empty(len(born), dtype=np.int64)
    changes = [(int(p), i, True) for i, p in enumerate(segments.born)]
    changes += [(int(p), i, False) for i, p in enumerate(segments.died) if p < len(decisions)]
    changes.sort()
    starts: list[tuple[int, int]] = []  # live segments: address, row
    cuts = np.searchsorted(born, [c[0] for c in changes] + [len(decisions)])
    _require(np.arange(len(born)) >= cuts[0], "hands out memory before there is a segment", born)
    for number, (_, row, arrives) in enumerate(changes):
        entry = (int(segments.addr[row]), row)
        if arrives:
            insort(starts, entry)
        else:
            del starts[bisect_left(starts, entry)]
        here = slice(int(cuts[number]), int(cuts[number + 1]))
        if here.start == here.stop:
            continue
        live = np.array(starts, dtype=np.int64).reshape(-1, 2)
        place = np.searchsorted(live[:, 0], addr[here], side="right") - 1
        inside = place >= 0
        home = live[np.maximum(place, 0), 1] if len(live) else np.zeros(len(place), dtype=np.int64)
        inside &= addr[here] + size[here] <= segments.addr[home] + segments.size[home]
        _require(inside, "hands out memory outside every segment", born[here])
        out[here] = home
    return out
