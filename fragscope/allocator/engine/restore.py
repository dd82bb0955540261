"""Putting an allocator into the state that a recording began with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fragscope.allocator.engine.blocks import (
    change_active,
    is_held,
    is_split,
    link,
    log,
    new_block,
    new_segment,
    put_idle,
    put_unmapped,
)
from fragscope.allocator.engine.counters import (
    ACTIVE,
    ACTIVE_BYTES,
    ALLOCATED_BYTES,
    ALLOCATION,
    INACTIVE_SPLIT,
    INACTIVE_SPLIT_BYTES,
    LIVE_REQUESTED,
    OVERSIZE_ALLOCATIONS,
    OVERSIZE_SEGMENTS,
    POOL_IDLE,
    REQUESTED_BYTES,
    SEGMENT_COUNT,
    up,
    up_class,
    up_reserved,
)
from fragscope.allocator.engine.driver import follow
from fragscope.allocator.engine.kinds import (
    DECISION_ALLOC,
    DECISION_SEGMENT_ALLOC,
    DECISION_SEGMENT_MAP,
)
from fragscope.allocator.engine.sizes import SMALL_SEGMENT
from fragscope.allocator.engine.state import (
    ADDR,
    ALLOCATED,
    ID,
    IDLE,
    MAX_SPLIT,
    NONE,
    REQUEST,
    REQUESTED,
    RESERVED,
    SEG_ADDR,
    SEG_LIST,
    SEG_SIZE,
    SEGMENTS,
    SIZE,
    STATE,
    TIE,
    UNMAPPED,
    USED,
    State,
)
from fragscope.allocator.ranges import AddressRange
from fragscope.trace import SegmentState
from fragscope.trace.sizes import driver_pages


def restore(
    s: State, segments: Sequence[SegmentState], held: Sequence[tuple[int, int, int]], ranges: Sequence[AddressRange]
) -> None:
    """Let an empty allocator hold these segments; blocks that are pending are restored as allocated.

    Blocks count as made in the order of their addresses, segments likewise, and none has an age: recordings do not
    tell, and up to 2.11 nothing but garbage collection asks.

    Args:
        s: with room for all of it.
        segments: in address order, blocks covering each; expandable ones are contiguous mapped ranges.
        held: row, id and requested bytes of each block that is not free, in address order.
        ranges: the addresses that each mapped range lies in, in the order of the ranges.
    """
    s.n[REQUEST] = max(s.n[REQUEST], 0)
    row = s.n[REQUEST]
    for segment in segments:
        kind = DECISION_SEGMENT_MAP if segment.expandable else DECISION_SEGMENT_ALLOC
        log(s, kind, NONE, segment.addr, segment.size, segment.stream, segment.pool)
    remaining = iter(held)
    homes = iter(ranges)
    reserved: AddressRange | None = None
    open_range: _Range | None = None
    for segment in segments:
        if not segment.expandable:
            _ordinary(s, segment, remaining)
            continue
        home = next(homes)
        if open_range is None or home is not reserved:
            if open_range is not None:
                _close(s, open_range)
            reserved, open_range = home, _new_range(s, home)
        _mapped(s, segment, open_range, remaining)
    if open_range is not None:
        _close(s, open_range)
    s.n[REQUEST] = row


@dataclass(slots=True)
class _Range:
    """An expandable segment that is being laid out.

    Attributes:
        number: of the segment.
        last: its last block so far.
        end: where that ends.
    """

    number: int
    last: int
    end: int


def _new_range(s: State, reserved: AddressRange) -> _Range:
    """The expandable segment with these addresses."""
    which = 2 * reserved.pool + int(reserved.page != SMALL_SEGMENT)
    number = new_segment(s, reserved.size, reserved.stream, which, reserved.page)
    s.t[SEG_ADDR][number] = reserved.addr
    return _Range(number, NONE, reserved.addr)


def _ordinary(s: State, segment: SegmentState, held: Iterator[tuple[int, int, int]]) -> None:
    which = 2 * segment.pool + int(segment.size != SMALL_SEGMENT)
    number = new_segment(s, segment.size, segment.stream, which, 0)
    s.t[SEG_ADDR][number] = segment.addr
    follow(s, segment.addr, segment.size)
    _reserve(s, which, segment.size)
    up_class(s, SEGMENT_COUNT, which, 1)
    if segment.size >= s.n[MAX_SPLIT]:
        up(s, OVERSIZE_SEGMENTS, 1)
    if is_held(s, which):
        up(s, POOL_IDLE, segment.size)
    _blocks(s, segment, number, which, NONE, held)


def _mapped(s: State, segment: SegmentState, within: _Range, held: Iterator[tuple[int, int, int]]) -> None:
    which = s.t[SEG_LIST][within.number]
    if segment.addr > within.end:
        _unmapped(s, within, segment.addr)
    _reserve(s, which, segment.size)
    within.last = _blocks(s, segment, within.number, which, within.last, held)
    within.end = segment.addr + segment.size


def _unmapped(s: State, within: _Range, end: int) -> None:
    block = new_block(s, within.number, within.end, end - within.end, UNMAPPED, NONE)
    link(s, within.last, block, NONE)
    put_unmapped(s, block)
    within.last = block


def _close(s: State, within: _Range) -> None:
    end = s.t[SEG_ADDR][within.number] + s.t[SEG_SIZE][within.number]
    if end > within.end:
        _unmapped(s, within, end)


def _reserve(s: State, which: int, size: int) -> None:
    s.n[USED] += driver_pages(size)  # it was there, whatever capacity a replay is asked for
    s.n[RESERVED] += size
    s.t[SEGMENTS][which // 2] += 1
    up_reserved(s, which, size)


def _blocks(
    s: State, segment: SegmentState, number: int, which: int, last: int, held: Iterator[tuple[int, int, int]]
) -> int:
    """The blocks of a segment or mapped range, linked behind ``last``; returns the last one."""
    t = s.t
    made = []
    tie = NONE
    for addr, size, _ in segment.blocks:
        block = new_block(s, number, addr, size, IDLE, tie)
        tie = t[TIE][block]
        link(s, last, block, NONE)
        last = block
        made.append(block)
    for block, (_, size, state) in zip(made, segment.blocks, strict=True):
        if state == "free":
            put_idle(s, block)
            if is_split(s, block) and not segment.expandable:
                up_class(s, INACTIVE_SPLIT, which, 1)
                up_class(s, INACTIVE_SPLIT_BYTES, which, size)
            continue
        row, id_, requested = next(held)
        t[STATE][block] = ALLOCATED
        t[ID][block] = id_
        t[REQUESTED][block] = requested
        s.where[id_] = block
        change_active(s, number, size)
        s.n[REQUEST] = row
        log(s, DECISION_ALLOC, id_, t[ADDR][block], t[SIZE][block], segment.stream, segment.pool)
        up_class(s, ALLOCATION, which, 1)
        up_class(s, ALLOCATED_BYTES, which, size)
        up_class(s, ACTIVE, which, 1)
        up_class(s, ACTIVE_BYTES, which, size)
        up_class(s, REQUESTED_BYTES, which, requested)
        up(s, LIVE_REQUESTED, requested)
        if size >= s.n[MAX_SPLIT]:
            up(s, OVERSIZE_ALLOCATIONS, 1)
    return last
