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
    RESERVED_BYTES,
    SEGMENT_COUNT,
    up,
    up_class,
)
from fragscope.allocator.engine.driver import follow, pages
from fragscope.allocator.engine.expandable import SEGMENT_MAP, range_size
from fragscope.allocator.engine.memory import SEGMENT_ALLOC
from fragscope.allocator.engine.requests import ALLOC
from fragscope.allocator.engine.sizes import SMALL_SEGMENT, SMALL_SIZE
from fragscope.allocator.engine.state import (
    ADDR,
    ALLOCATED,
    ID,
    IDLE,
    LARGE_SEGMENT,
    MAX_SPLIT,
    NONE,
    REQUEST,
    REQUESTED,
    RESERVED,
    SEG_ADDR,
    SEG_LIST,
    SEG_REGION,
    SEG_SIZE,
    SEG_STREAM,
    SEGMENTS,
    SIZE,
    STATE,
    TIE,
    UNMAPPED,
    USED,
    State,
)
from fragscope.trace import SegmentState


def restore(
    s: State, segments: Sequence[SegmentState], held: Sequence[tuple[int, int, int]], maps: Sequence[int]
) -> None:
    """Let an empty allocator hold these segments; blocks that are pending are restored as allocated.

    Blocks count as made in the order of their addresses, segments likewise, and none has an age: recordings do not
    tell, and up to 2.11 nothing but garbage collection asks.

    Args:
        s: with room for all of it.
        segments: in address order, blocks covering each; expandable ones are contiguous mapped ranges.
        held: row, id and requested bytes of each block that is not free, in address order.
        maps: addresses of mappings to come: an expandable segment begins below its lowest mapped range if something is
            mapped there later.
    """
    s.n[REQUEST] = max(s.n[REQUEST], 0)
    row = s.n[REQUEST]
    for segment in segments:
        kind = SEGMENT_MAP if segment.expandable else SEGMENT_ALLOC
        log(s, kind, NONE, segment.addr, segment.size, segment.stream, segment.pool)
    remaining = iter(held)
    open_range: _Range | None = None
    for segment in segments:
        if not segment.expandable:
            _ordinary(s, segment, remaining)
            continue
        if open_range is None or not open_range.may_hold(s, segment):
            if open_range is not None:
                _close(s, open_range)
            open_range = _new_range(s, segment, segments, maps, open_range)
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

    def may_hold(self, s: State, segment: SegmentState) -> bool:
        """Whether a mapped range lies within it."""
        t = s.t
        same = t[SEG_STREAM][self.number] == segment.stream and t[SEG_LIST][self.number] // 2 == segment.pool
        return bool(same and segment.addr < t[SEG_ADDR][self.number] + t[SEG_SIZE][self.number])


def _new_range(
    s: State, first: SegmentState, segments: Sequence[SegmentState], maps: Sequence[int], before: _Range | None
) -> _Range:
    """The expandable segment that a mapped range begins: no two overlap, and each is as long as the device is large."""
    reach = range_size(s, SMALL_SEGMENT)
    lowest = 0 if before is None else s.t[SEG_ADDR][before.number] + s.t[SEG_SIZE][before.number]
    base = min((m for m in maps if max(lowest, first.addr - reach) < m < first.addr), default=first.addr)
    of_this = [
        r for r in segments
        if r.expandable and (r.stream, r.pool) == (first.stream, first.pool) and base <= r.addr < base + reach
    ]  # fmt: skip
    page = SMALL_SEGMENT if any(_is_small(s, r) for r in of_this) else s.n[LARGE_SEGMENT]
    which = 2 * first.pool + int(page != SMALL_SEGMENT)
    number = new_segment(s, range_size(s, page), first.stream, which, page)
    s.t[SEG_ADDR][number] = base
    return _Range(number, NONE, base)


def _is_small(s: State, segment: SegmentState) -> bool:
    """The small pool maps pages of 2 MiB and holds small blocks; other ranges are multiples of the large segment."""
    has_small = any(state != "free" and size <= SMALL_SIZE for _, size, state in segment.blocks)
    return bool(has_small or segment.size % s.n[LARGE_SEGMENT])


def _ordinary(s: State, segment: SegmentState, held: Iterator[tuple[int, int, int]]) -> None:
    which = 2 * segment.pool + int(segment.size != SMALL_SEGMENT)
    number = new_segment(s, segment.size, segment.stream, which, 0)
    s.t[SEG_ADDR][number] = segment.addr
    s.t[SEG_REGION][number] = follow(s, segment.addr, segment.size)
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
    s.n[USED] += pages(size)  # it was there, whatever capacity a replay is asked for
    s.n[RESERVED] += size
    s.t[SEGMENTS][which // 2] += 1
    up_class(s, RESERVED_BYTES, which, size)


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
        log(s, ALLOC, id_, t[ADDR][block], t[SIZE][block], segment.stream, segment.pool)
        up_class(s, ALLOCATION, which, 1)
        up_class(s, ALLOCATED_BYTES, which, size)
        up_class(s, ACTIVE, which, 1)
        up_class(s, ACTIVE_BYTES, which, size)
        up_class(s, REQUESTED_BYTES, which, requested)
        up(s, LIVE_REQUESTED, requested)
        if size >= s.n[MAX_SPLIT]:
            up(s, OVERSIZE_ALLOCATIONS, 1)
    return last
