"""Expandable segments: address ranges into which pages are mapped and from which they are unmapped.

The pages of a segment need not be remembered one by one: a page is mapped exactly where its block is not unmapped.
"""

from __future__ import annotations

from fragscope.allocator.engine.blocks import (
    drop_block,
    drop_segment,
    link,
    log,
    merge,
    new_block,
    new_segment,
    put_idle,
    put_unmapped,
    take_idle,
    take_unmapped,
)
from fragscope.allocator.engine.counters import down_reserved, up_reserved
from fragscope.allocator.engine.driver import give_memory, place_first_mapping, place_range, take_memory
from fragscope.allocator.engine.free_lists import first_from, following
from fragscope.allocator.engine.kinds import (
    DECISION_SEGMENT_MAP,
    DECISION_SEGMENT_UNMAP,
)
from fragscope.allocator.engine.sizes import SMALL_SEGMENT
from fragscope.allocator.engine.state import (
    ADDR,
    DRIVER_ALLOCS,
    DRIVER_FREES,
    IDLE,
    KEY_STREAM,
    LARGE_SEGMENT,
    LIST,
    NEXT,
    NEXT_MAP,
    PREV,
    RESERVED,
    SEG_ADDR,
    SEG_PAGE,
    SEG_STREAM,
    SEGMENT,
    SEGMENTS,
    SIZE,
    STATE,
    TIE,
    TOTAL,
    UNMAPPED,
    UNMAPPED_ROOT,
    State,
)


def map_for(s: State, which: int, rounded: int, stream: int) -> int:
    """A block of at least ``rounded`` bytes in an expandable segment, taken out of its free list; -1 if memory lacks.

    Memory that was mapped before the driver ran out stays, as a cached block (``try_allocate_expandable_block``).
    """
    t = s.t
    block = _lowest_candidate(s, which, rounded, stream)
    if block < 0:
        block = _new_range(s, which, stream)
    if t[STATE][block] == UNMAPPED and not _map(s, block, min(t[SIZE][block], rounded)):
        return -1
    while t[SIZE][block] < rounded:
        following_block = t[NEXT][block]
        if following_block < 0:  # larger than the address range; no device has that much
            return -1
        missing = min(rounded - t[SIZE][block], t[SIZE][following_block])
        if not _map(s, following_block, missing):
            return -1
        block = following_block  # which has absorbed the block before it
    take_idle(s, block)
    return block


def _lowest_candidate(s: State, which: int, rounded: int, stream: int) -> int:
    """The lowest run of idle and unmapped blocks, not beginning inside another, that could hold the request."""
    t = s.t
    unmapped = first_from(s, UNMAPPED_ROOT, which, stream, 0, 0, 0)
    while unmapped >= 0 and t[KEY_STREAM][unmapped] == stream:
        earlier = t[PREV][unmapped]
        start = earlier if earlier >= 0 and t[STATE][earlier] == IDLE else unmapped
        size, at = 0, start
        while at >= 0 and size < rounded and (t[STATE][at] == IDLE or t[STATE][at] == UNMAPPED):
            size += t[SIZE][at]
            at = t[NEXT][at]
        if size >= rounded:
            found: int = start
            return found
        unmapped = following(s, unmapped)
    return -1


def range_size(total: int, page: int) -> int:
    """Bytes of addresses that an expandable segment reserves, with such pages: nine eighths of the device's memory."""
    reach = total + total // 8
    size: int = (reach + page - 1) // page * page
    return size


def _new_range(s: State, which: int, stream: int) -> int:
    """A new expandable segment; returns the unmapped block that covers it."""
    t, n = s.t, s.n
    page = SMALL_SEGMENT if which % 2 == 0 else n[LARGE_SEGMENT]
    size = range_size(n[TOTAL], page)
    addr = place_range(s, size)
    segment = new_segment(s, size, stream, which, page)
    t[SEG_ADDR][segment] = addr
    block = new_block(s, segment, addr, size, UNMAPPED, -1)
    link(s, -1, block, -1)
    put_unmapped(s, block)
    return block


def _map(s: State, block: int, size: int) -> bool:
    """Map pages for the first ``size`` bytes of an unmapped block; all of them or none."""
    t, n = s.t, s.n
    segment = t[SEGMENT][block]
    which = t[LIST][block]
    page = t[SEG_PAGE][segment]
    addr = t[ADDR][block]
    pages = (size + page - 1) // page
    for taken in range(pages):
        if not take_memory(s, page):
            for _ in range(taken):
                give_memory(s, page)
            return False
    mapped = pages * page
    take_unmapped(s, block)
    if t[PREV][block] < 0 and t[NEXT][block] < 0:
        addr = place_first_mapping(s, segment)
        t[SEG_ADDR][segment] = addr
        t[ADDR][block] = addr
    t[STATE][block] = IDLE
    if mapped < t[SIZE][block]:
        rest = new_block(s, segment, addr + mapped, t[SIZE][block] - mapped, UNMAPPED, t[TIE][block])
        link(s, block, rest, t[NEXT][block])
        put_unmapped(s, rest)
        t[SIZE][block] = mapped
    merge(s, block, t[PREV][block])
    merge(s, block, t[NEXT][block])
    put_idle(s, block)
    n[RESERVED] += mapped
    n[DRIVER_ALLOCS] += 1
    n[NEXT_MAP] += 1
    up_reserved(s, which, mapped)
    log(s, DECISION_SEGMENT_MAP, -1, addr, mapped, t[SEG_STREAM][segment], which // 2)
    return True


def unmap(s: State, block: int) -> None:
    """Unmap the whole pages inside an idle block, which is in its free list; what is left of it stays there."""
    t, n = s.t, s.n
    segment = t[SEGMENT][block]
    which = t[LIST][block]
    page = t[SEG_PAGE][segment]
    start, size = t[ADDR][block], t[SIZE][block]
    base = t[SEG_ADDR][segment]
    first = (start - base + page - 1) // page
    stop = (start - base + size) // page
    if first >= stop:
        return
    take_idle(s, block)
    for _ in range(first, stop):
        give_memory(s, page)
    addr, unmapped = base + first * page, (stop - first) * page
    before = addr - start
    after = size - before - unmapped
    tie = t[TIE][block]
    t[ADDR][block] = addr
    t[SIZE][block] = unmapped
    t[STATE][block] = UNMAPPED
    if before > 0:
        head = new_block(s, segment, start, before, IDLE, tie)
        link(s, t[PREV][block], head, block)
        put_idle(s, head)
    if after > 0:
        tail = new_block(s, segment, addr + unmapped, after, IDLE, tie)
        link(s, block, tail, t[NEXT][block])
        put_idle(s, tail)
    merge(s, block, t[PREV][block])
    merge(s, block, t[NEXT][block])
    put_unmapped(s, block)
    n[RESERVED] -= unmapped
    n[DRIVER_FREES] += 1
    t[SEGMENTS][which // 2] -= 1
    down_reserved(s, which, unmapped)
    log(s, DECISION_SEGMENT_UNMAP, -1, addr, unmapped, t[SEG_STREAM][segment], which // 2)
    if t[PREV][block] < 0 and t[NEXT][block] < 0:
        take_unmapped(s, block)
        drop_block(s, block)
        drop_segment(s, segment)
