"""Comparing a model's decisions with recorded ones.

Compared are every address, every segment taken or returned, every completion of a free, every OOM, and the segments and
blocks at the end. Not compared, because they are the driver's and not the allocator's: the addresses of new segments,
which the replay takes from the recording.
"""

from __future__ import annotations

from dataclasses import dataclass

from fragscope.allocator.caching import CachingAllocator
from fragscope.trace import UNKNOWN_SIZE, DecisionKind, Decisions, SegmentState, Trace


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
    ours, theirs = _rows(modelled), _rows(recorded)
    mismatches = 0
    first: Difference | None = None
    for position in range(max(len(ours), len(theirs))):
        a = theirs[position] if position < len(theirs) else None
        b = ours[position] if position < len(ours) else None
        if not _same(a, b):
            mismatches += 1
            if first is None:
                event = (a or b or (0, -1))[1]
                first = Difference(event, _describe(a), _describe(b))
    compared = max(len(ours), len(theirs))
    if trace.final is not None:
        end_compared, end_wrong, end_first = _compare_final(trace.final, allocator)
        compared += end_compared
        mismatches += end_wrong
        first = first or end_first
    return Verification(compared, mismatches, first)


_Row = tuple[int, int, int, int, int, int]  # kind, request, id, address, bytes, stream


def _rows(d: Decisions) -> list[_Row]:
    columns = (d.kind, d.request, d.id, d.addr, d.size, d.stream)
    return _in_canonical_order(list(zip(*(c.tolist() for c in columns), strict=True)))


def _in_canonical_order(rows: list[_Row]) -> list[_Row]:
    """Sort runs of frees completed together: their order is that of a hash table and changes no layout."""
    completed = int(DecisionKind.FREE_COMPLETED)
    start = 0
    while start < len(rows):
        stop = start + 1
        if rows[start][0] == completed:
            while stop < len(rows) and rows[stop][0] == completed and rows[stop][1] == rows[start][1]:
                stop += 1
            rows[start:stop] = sorted(rows[start:stop])
        start = stop
    return rows


def _same(recorded: _Row | None, modelled: _Row | None) -> bool:
    if recorded is None or modelled is None:
        return False
    kind, request, id_, addr, size, stream = recorded
    if (kind, request, id_, stream) != (modelled[0], modelled[1], modelled[2], modelled[5]):
        return False
    if size not in (UNKNOWN_SIZE, modelled[4]):
        return False
    # An OOM's address field holds the driver's free bytes, which other users of the card move.
    return kind == DecisionKind.OOM or addr == modelled[3]


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
