"""How large blocks were that a late recording began with, where only what was served elsewhere later tells.

A block of the large pool keeps a rest of up to 1 MiB that was not worth splitting off. Once the block behind it is
gone, that rest looks idle in a recording that begins then. If the model would serve a request from idle memory behind
such a block and the recording shows another place, that memory was too small, so the block was larger: by how much at
least follows from the request. Each such place is found by replaying under the recorded settings.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fragscope.allocator.caching import CachingAllocator
from fragscope.allocator.engine.sizes import MIN_BLOCK, SMALL_SEGMENT, SMALL_SIZE
from fragscope.trace import DecisionKind, Decisions, SegmentState, Trace

_MOST_TRIES = 64  # replays of a recording that is not followed even so

Play = Callable[[tuple[SegmentState, ...], int | None], CachingAllocator]
"""Serves a Trace's requests from such a start, all of them or those before a row."""


def fitted_start(trace: Trace, play: Play) -> tuple[SegmentState, ...]:
    """What stood when a recording began, its blocks as large as its decisions tell."""
    assert trace.decisions is not None
    start = trace.initial
    if not any(_rests(segment) for segment in start):
        return start
    row = _first_elsewhere(trace.decisions, play(start, None).decisions())
    grown: dict[int, int] = {}
    for _ in range(_MOST_TRIES):
        if row is None:
            break
        tried = _grown(trace, start, row, play(start, row), grown)
        if tried is None:
            break
        later = _first_elsewhere(trace.decisions, play(tried, None).decisions())
        if later is not None and later <= row:
            break
        start, row = tried, later
    return start


def _first_elsewhere(recorded: Decisions, modelled: Decisions) -> int | None:
    """The request that the model is the first to serve elsewhere, None if there is none."""
    theirs, ours = (np.flatnonzero(d.kind == DecisionKind.ALLOC) for d in (recorded, modelled))
    both = min(len(theirs), len(ours))
    theirs, ours = theirs[:both], ours[:both]
    parts = np.flatnonzero(
        (recorded.request[theirs] != modelled.request[ours]) | (recorded.addr[theirs] != modelled.addr[ours])
    )
    return int(recorded.request[theirs[parts[0]]]) if len(parts) else None


def _grown(
    trace: Trace, start: tuple[SegmentState, ...], row: int, met: CachingAllocator, grown: dict[int, int]
) -> tuple[SegmentState, ...] | None:
    """The start with the block before the memory that the model would take for a request made larger; None if none is.

    Args:
        trace: as recorded.
        start: what is taken to have stood.
        row: of the request.
        met: the allocator before it.
        grown: bytes that blocks, by address, were made larger so far.
    """
    size, stream, pool = (int(c[row]) for c in (trace.requests.size, trace.requests.stream, trace.requests.pool))
    chosen = met.cached(size, stream, pool, 1)
    if not chosen:
        return None
    too_much = chosen[0].size - met.rounded(size) + MIN_BLOCK
    number = bisect_right(start, chosen[0].addr, key=lambda s: s.addr) - 1
    segment = start[number] if number >= 0 else None
    at = None if segment is None else _rests(segment).get(chosen[0].addr)
    if segment is None or at is None:
        return None
    (addr, length, state), (behind, room, idle) = segment.blocks[at], segment.blocks[at + 1]
    grown[addr] = grown.get(addr, 0) + too_much
    if grown[addr] > SMALL_SIZE or room - too_much <= SMALL_SIZE:
        return None
    blocks = list(segment.blocks)
    blocks[at : at + 2] = [(addr, length + too_much, state), (behind + too_much, room - too_much, idle)]
    return (*start[:number], replace(segment, blocks=tuple(blocks)), *start[number + 1 :])


def _rests(segment: SegmentState) -> dict[int, int]:
    """Idle memory of which a part may belong to the block before it: its address, and that block's place."""
    if segment.expandable or segment.size == SMALL_SEGMENT:
        return {}
    pairs = enumerate(pairwise(segment.blocks))
    return {later[0]: at for at, (block, later) in pairs if block[2] != "free" and later[2] == "free"}
