"""Comparing a model's decisions with recorded ones.

Compared are every address, every segment taken or returned, every completion of a free, every OOM, and the segments and
blocks at the end. Not compared, because they are the driver's and not the allocator's: the addresses of new segments,
which the replay takes from the recording.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fragscope.allocator.caching import CachingAllocator
from fragscope.trace import UNKNOWN_SIZE, DecisionKind, Decisions, SegmentState, Trace

Ints = npt.NDArray[np.int64]
_Row = tuple[int, int, int, int, int, int]  # kind, request, id, address, bytes, stream
_AT_ONCE = 1 << 20  # rows compared at once; more would take more memory and no less time


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where model and recording part.

    Attributes:
        event: row of the request being served, -1 for the end state.
        recorded: what the recording shows.
        modelled: what the model did.
        around: the request and the state it met, a line each.
        likely: the likely reason.
    """

    event: int
    recorded: str
    modelled: str
    around: tuple[str, ...] = ()
    likely: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """Outcome of a comparison.

    Attributes:
        compared: decisions and end-state blocks compared.
        mismatches: how many differ.
        first: the first difference, if any.
    """

    compared: int
    mismatches: int
    first: Difference | None


def compare(trace: Trace, modelled: Decisions, allocator: CachingAllocator) -> Verification:
    """Compare the decisions of a replay with those recorded in the Trace, and the end states."""
    recorded = trace.decisions
    assert recorded is not None
    ours, theirs = _order(modelled), _order(recorded)
    both, compared = min(len(modelled), len(recorded)), max(len(modelled), len(recorded))
    mismatches, at = compared - both, both
    for start in range(0, both, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, both))
        wrong = np.flatnonzero(_differing(recorded, theirs[part], modelled, ours[part]))
        if len(wrong):
            at = min(at, start + int(wrong[0]))
            mismatches += len(wrong)
    first: Difference | None = None
    if mismatches:
        a, b = _row(recorded, theirs, at), _row(modelled, ours, at)
        first = Difference((a or b or (0, -1))[1], _describe(a), _describe(b))
    if trace.final is not None:
        end_compared, end_wrong, end_first = _compare_final(trace.final, allocator)
        compared += end_compared
        mismatches += end_wrong
        first = first or end_first
    return Verification(compared, mismatches, first)


def _order(d: Decisions) -> Ints:
    """Rows with runs of frees completed together sorted: their order is that of a hash table and changes no layout."""
    order = np.arange(len(d))
    completed = d.kind == DecisionKind.FREE_COMPLETED
    goes_on = np.zeros(len(d), dtype=bool)  # the run of the row before
    goes_on[1:] = completed[1:] & completed[:-1] & (d.request[1:] == d.request[:-1])
    in_run = goes_on.copy()
    in_run[:-1] |= goes_on[1:]
    rows = np.flatnonzero(in_run)
    run = np.cumsum(~goes_on[rows])
    order[rows] = rows[np.lexsort((d.stream[rows], d.size[rows], d.addr[rows], d.id[rows], run))]
    return order


def _differing(recorded: Decisions, theirs: Ints, modelled: Decisions, ours: Ints) -> npt.NDArray[np.bool_]:
    """Which of two equally long choices of rows do not agree, position by position."""
    kind, size, addr = recorded.kind[theirs], recorded.size[theirs], recorded.addr[theirs]
    wrong: npt.NDArray[np.bool_] = kind != modelled.kind[ours]
    wrong |= (size != UNKNOWN_SIZE) & (size != modelled.size[ours])
    # An OOM's address field holds the driver's free bytes, which other users of the card move.
    wrong |= (kind != DecisionKind.OOM) & (addr != modelled.addr[ours])
    for name in ("request", "id", "stream"):
        wrong |= getattr(recorded, name)[theirs] != getattr(modelled, name)[ours]
    return wrong


def _row(d: Decisions, order: Ints, position: int) -> _Row | None:
    """A row of the ordered decisions, None past their end."""
    if position >= len(order):
        return None
    at = order[position]
    return int(d.kind[at]), int(d.request[at]), int(d.id[at]), int(d.addr[at]), int(d.size[at]), int(d.stream[at])


def _describe(row: _Row | None) -> str:
    if row is None:
        return "nothing more"
    kind, _, id_, addr, size, stream = row
    name = DecisionKind(kind).name.lower()
    who = f" for allocation {id_}" if id_ >= 0 else ""
    how_much = "" if size == UNKNOWN_SIZE else f" of {size} B"
    return f"{name}{how_much} at {addr:#x}{who} on stream {stream:#x}"


def _compare_final(
    recorded: tuple[SegmentState, ...], allocator: CachingAllocator
) -> tuple[int, int, Difference | None]:
    def flat(segments: tuple[SegmentState, ...]) -> set[tuple[int, int, int, int, int, str]]:
        return {(s.addr, s.size, s.stream, addr, size, state) for s in segments for addr, size, state in s.blocks}

    theirs, ours = flat(recorded), flat(allocator.segments())
    wrong = theirs ^ ours
    first = None
    if wrong:
        at = min(wrong, key=lambda b: b[3])
        first = Difference(
            -1,
            _describe_block(at) if at in theirs else "no such block at the end",
            _describe_block(at) if at in ours else "no such block at the end",
        )
    return len(theirs), len(wrong), first


def _describe_block(block: tuple[int, int, int, int, int, str]) -> str:
    segment, segment_bytes, _, addr, size, state = block
    return f"{state} block of {size} B at {addr:#x} in the segment of {segment_bytes} B at {segment:#x} at the end"
