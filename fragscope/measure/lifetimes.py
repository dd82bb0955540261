"""When each segment and each block lived, read out of a Trace's decisions.

Everything else in this room is arithmetic over these tables. They are made from the decisions alone, without the
allocator model, so that what is computed from them is a second opinion on the model's own counters.

Times here are *positions*: how many decisions had been made. A block born at position 7 exists after decision 7, that
is, in ``born < position``; what never ends has the position ``len(decisions)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fragscope.errors import InputFileError, UsageError
from fragscope.measure.pools import Holds, pool_holds
from fragscope.measure.runs import LiveRuns
from fragscope.measure.segments import Ints, PieceTable, SegmentTable, require, segments_and_pieces
from fragscope.trace import UNKNOWN_SIZE, DecisionKind, Decisions, RequestKind, Trace

_TOTAL_LIMIT = 2**62  # all sizes together; sums below this cannot overflow int64


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
        pieces: the memory they held.
        blocks: every block handed out.
        holds: when private pools had users.
        end: the position after the last decision; also the death of what outlives the Trace.
        upto: int64, shape ``(requests,)``: position after the last decision made for this request row or an earlier.
        request: int64, shape ``(decisions,)``: request row of each decision; of all that stood when recording began
            the first row.
        stood: decisions that stand for what the recording began with.
    """

    segments: SegmentTable
    pieces: PieceTable
    blocks: BlockTable
    holds: Holds
    end: int
    upto: Ints
    request: Ints
    stood: int


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
    request = np.array(decisions.request, dtype=np.int64)
    require(np.diff(request, prepend=0) >= 0, "serves an earlier request than the one before it")
    _check_sizes(decisions)
    stood = int(np.searchsorted(request, trace.requests.start_rows))
    request[:stood] = 0
    segments, pieces = segments_and_pieces(trace, decisions, stood)
    blocks = _blocks(trace, decisions, segments, pieces)
    upto = np.searchsorted(request, np.arange(len(trace.requests)), side="right")
    return Lifetimes(
        segments, pieces, blocks, pool_holds(trace, decisions, stood), len(decisions), upto, request, stood
    )


def _check_sizes(decisions: Decisions) -> None:
    moves = (decisions.kind != DecisionKind.OOM) & (decisions.kind != DecisionKind.FREE_REQUESTED)
    sizes = np.where(moves, decisions.size, 0)
    require(sizes >= 0, "has a negative size")
    addresses = np.where(moves, decisions.addr, 0)
    require((addresses >= 0) & (addresses < _TOTAL_LIMIT), "has an address that no device has")
    if float(np.sum(sizes, dtype=np.float64)) >= _TOTAL_LIMIT:
        raise InputFileError("the trace", "is inconsistent: its sizes are larger than any device")


def _blocks(trace: Trace, decisions: Decisions, segments: SegmentTable, pieces: PieceTable) -> BlockTable:
    born = np.flatnonzero(decisions.kind == DecisionKind.ALLOC)
    ids = decisions.id[born]
    by_id = np.argsort(ids, kind="stable")
    known = ids[by_id]
    unique = np.ones(len(known), dtype=bool)
    unique[1:] = known[1:] != known[:-1]
    require(unique, "hands out memory for an id that has lived already", born[by_id])

    def ending(kind: DecisionKind, what: str) -> Ints:
        """Position of each block's decision of this kind."""
        out = np.full(len(born), len(decisions), dtype=np.int64)
        rows = np.flatnonzero(decisions.kind == kind)
        if len(rows):
            at, found = _find(known, decisions.id[rows])
            require(found, f"{what} memory that nobody had", rows)
            block = by_id[at]
            out[block] = rows
            require(out[block] == rows, f"{what} memory that is {what.rstrip('s')}d again later", rows)
            require(born[block] < rows, f"{what} memory before it is handed out", rows)
        return out

    released = ending(DecisionKind.FREE_REQUESTED, "frees")
    died = ending(DecisionKind.FREE_COMPLETED, "reuses")
    require((died == len(decisions)) | (released < died), "completes a free that nobody asked for", died)
    addr, size = decisions.addr[born].astype(np.int64), decisions.size[born].astype(np.int64)
    segment = _home(decisions, segments, pieces, born, addr, size)
    segment_died = segments.died[segment]
    require((segment_died == len(decisions)) | (died < segment_died), "returns a segment that is in use", segment_died)
    asked = np.flatnonzero(np.isin(trace.requests.kind, (RequestKind.ALLOC, RequestKind.HELD)))
    asked_ids = trace.requests.id[asked]
    order = np.argsort(asked_ids, kind="stable")
    at, found = _find(asked_ids[order], ids)
    require(found, "hands out memory that nobody asked for", born)
    requested = trace.requests.size[asked][order][at].astype(np.int64)
    require((requested >= 0) & (requested <= size), "hands out less memory than was asked for", born)
    return BlockTable(ids.astype(np.int64), addr, size, requested, segment, born, released, died)


def _find(known: Ints, wanted: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Where each wanted id stands among the sorted known ones, and whether it does."""
    if len(known) == 0:
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return at, known[at] == wanted


def _home(decisions: Decisions, segments: SegmentTable, pieces: PieceTable, born: Ints, addr: Ints, size: Ints) -> Ints:
    """Row of the segment that each block lies in.

    Memory comes and goes rarely: between two changes what is there is fixed, and one search places all blocks of that
    time.
    """
    out = np.empty(len(born), dtype=np.int64)
    ends = np.flatnonzero(pieces.died < len(decisions))
    piece = np.concatenate([np.arange(len(pieces.born)), ends])
    at = np.concatenate([pieces.born, pieces.died[ends]])
    arrives = np.arange(len(piece)) < len(pieces.born)
    order = np.lexsort((pieces.addr[piece], at))
    piece, at, arrives = piece[order], at[order], arrives[order]
    cuts = np.searchsorted(born, np.append(at, len(decisions))).tolist()
    require(np.arange(len(born)) >= cuts[0], "hands out memory before there is a segment", born)
    row = pieces.segment[piece]
    changes = (arrives, pieces.addr[piece], pieces.size[piece], row, segments.page[row] > 0)
    live = LiveRuns()
    for number, (comes, start, length, segment, is_expandable) in enumerate(
        zip(*(c.tolist() for c in changes), strict=True)
    ):
        if comes:
            live.add(start, length, segment, joins=is_expandable)
        else:
            live.cut(start, length, segment)
        here = slice(cuts[number], cuts[number + 1])
        if here.start < here.stop:
            home = live.rows_of(addr[here], size[here])
            require(home >= 0, "hands out memory outside every segment", born[here])
            out[here] = home
    return out
