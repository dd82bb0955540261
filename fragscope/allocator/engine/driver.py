"""The driver: how much memory there is, and where it puts segments.

Up to torch 2.11 equal-size free blocks are ordered by address, so a model needs addresses. They come from a recording
as long as it has one for the segment that is asked for; else from the rule observed for cudaMalloc on Linux x86-64
(H100 80GB, driver 580.159.04): *regions* of 32 MiB multiples, each new one in the highest gap strictly longer than it,
inside a region the smallest sufficient hole at its low end, regions searched newest first, a wholly free region given
up.
"""

from __future__ import annotations

from fragscope.allocator.engine.state import (
    ALLOCS,
    BY_ADDR,
    BY_AGE,
    CAPACITY,
    COLUMNS,
    DEPARTED,
    EXPANDABLE_SEGMENTS,
    GIVEN_ADDR,
    GIVEN_MAP,
    GIVEN_MAPS,
    GIVEN_SEGMENTS,
    GIVEN_SIZE,
    HOLE_ADDR,
    HOLE_NEXT,
    HOLE_SIZE,
    MOVE_AT,
    NEXT_MAP,
    NEXT_RANGE,
    NEXT_SEGMENT,
    OWN_BLOCK,
    REGION_ADDR,
    REGION_HOLE,
    REGION_SIZE,
    REGION_USED,
    REGIONS,
    SEG_ADDR,
    SEG_FIRST,
    SEG_SIZE,
    SPARE_HOLE,
    SPARE_HOLES,
    SPARE_REGION,
    SPARE_REGIONS,
    TOP,
    USED,
    State,
)
from fragscope.trace.sizes import driver_pages

MIB = 1 << 20
_OWN_BLOCK = 414 * MIB
_MOVED_BLOCK = 512 * MIB
_ENDLESS = -(1 << 62)  # below the lowest region there is room for all
REGION = 32 << 20
ANY_TOP = 0x7F00_0000_0000  # any 32 MiB-aligned address: only the order of addresses matters
RANGES = 0x6000_0000_0000  # where modelled address ranges of expandable segments begin
RANGE_ALIGNMENT = 1 << 30


def take_memory(s: State, size: int) -> bool:
    """Take device memory if it is there."""
    if s.n[USED] + driver_pages(size) > s.n[CAPACITY]:
        return False
    s.n[USED] += driver_pages(size)
    return True


def give_memory(s: State, size: int) -> None:
    """Give device memory back."""
    s.n[USED] -= driver_pages(size)


def place_segment(s: State, size: int) -> int:
    """Address for a segment of ``size`` bytes."""
    n = s.n
    if n[MOVE_AT] >= 0 and n[ALLOCS] > n[MOVE_AT]:
        _move_own_block(s)
    at = n[NEXT_SEGMENT]
    if n[DEPARTED] == 0 and at < n[GIVEN_SEGMENTS]:
        given: int = s.g[GIVEN_ADDR][at]
        if s.g[GIVEN_SIZE][at] == size and _standing(s, given, size) < 0:
            n[NEXT_SEGMENT] = at + 1
            follow(s, given, size)
            return given
    n[DEPARTED] = 1
    return _take(s, _choose_region(s, size), size)


def place_range(s: State, size: int) -> int:
    """A modelled address for an expandable segment's range of ``size`` bytes; it counts until the first mapping."""
    n = s.n
    step = (size + RANGE_ALIGNMENT - 1) // RANGE_ALIGNMENT * RANGE_ALIGNMENT + RANGE_ALIGNMENT
    modelled: int = n[NEXT_RANGE]
    while _standing(s, modelled, size) >= 0:
        modelled += step
    n[NEXT_RANGE] = modelled + step
    return modelled


def place_first_mapping(s: State, segment: int) -> int:
    """Where an expandable segment begins, now that something is mapped into it: it is mapped at the beginning."""
    t, n = s.t, s.n
    if n[NEXT_MAP] < n[GIVEN_MAPS]:
        given: int = s.g[GIVEN_MAP][n[NEXT_MAP]]
        modelled = t[SEG_ADDR][segment]
        t[SEG_ADDR][segment] = -t[SEG_SIZE][segment]  # out of its own way
        other = _standing(s, given, t[SEG_SIZE][segment])
        t[SEG_ADDR][segment] = modelled
        if other < 0:
            return given
    n[DEPARTED] = 1
    addr: int = t[SEG_ADDR][segment]
    return addr


def _standing(s: State, addr: int, size: int) -> int:
    """A segment that stands there, or -1: a recording gives an address again only after it was freed *there*."""
    t = s.t
    for segment in range(s.n[COLUMNS]):
        begins_before_end = t[SEG_FIRST][segment] >= 0 and t[SEG_ADDR][segment] < addr + size
        if begins_before_end and addr < t[SEG_ADDR][segment] + t[SEG_SIZE][segment]:
            return segment
    return -1


def follow(s: State, addr: int, size: int) -> None:
    """Note a segment that the driver put at ``addr``, so that the rule can go on from there.

    Regions that torch has no segment in are not known, nor is what else lies in those it has. No block spans two
    regions: those that this one reaches into are parts of one, which is as old as the oldest of them. And where it
    stands is nothing else: what the driver was taken to hold there is elsewhere.
    """
    n = s.n
    if n[MOVE_AT] >= 0 and addr < n[OWN_BLOCK] + _OWN_BLOCK and n[OWN_BLOCK] < addr + size:
        _move_own_block(s)  # by now it has
    base = addr // REGION * REGION
    end = (addr + size + REGION - 1) // REGION * REGION
    region = _oldest_region(s, base, end)
    if region < 0:
        region = _new_region(s, base, end - base)
    else:
        _widen(s, region, base, end)
    _take_at(s, region, addr, size)


def _oldest_region(s: State, base: int, end: int) -> int:
    """The oldest of the regions that reach into a range, or -1."""
    t = s.t
    for at in range(s.n[REGIONS]):
        region: int = t[BY_AGE][at]
        if t[REGION_ADDR][region] < end and base < t[REGION_ADDR][region] + t[REGION_SIZE][region]:
            return region
    return -1


def _widen(s: State, region: int, base: int, end: int) -> None:
    """A region covers this range too, and the other regions in it are parts of that one."""
    t = s.t
    if t[REGION_ADDR][region] <= base and end <= t[REGION_ADDR][region] + t[REGION_SIZE][region]:
        return
    first = _regions_up_to(s, base)
    if first > 0:
        below = t[BY_ADDR][first - 1]
        if base < t[REGION_ADDR][below] + t[REGION_SIZE][below]:
            first -= 1
            base = t[REGION_ADDR][below]
    last = _regions_up_to(s, end - 1)
    highest = t[BY_ADDR][last - 1]
    end = max(end, t[REGION_ADDR][highest] + t[REGION_SIZE][highest])
    t[REGION_USED][region] += end - base - t[REGION_SIZE][region]
    known = base
    for at in range(first, last):
        part = t[BY_ADDR][at]
        if t[REGION_ADDR][part] > known:
            _give(s, region, known, t[REGION_ADDR][part] - known)
        known = t[REGION_ADDR][part] + t[REGION_SIZE][part]
        while part != region and t[REGION_HOLE][part] >= 0:
            hole = t[REGION_HOLE][part]
            t[REGION_HOLE][part] = t[HOLE_NEXT][hole]
            _give(s, region, t[HOLE_ADDR][hole], t[HOLE_SIZE][hole])
            _drop_hole(s, hole)
    if end > known:
        _give(s, region, known, end - known)
    t[REGION_ADDR][region] = base
    t[REGION_SIZE][region] = end - base
    for at in range(last - 1, first - 1, -1):
        if t[BY_ADDR][at] != region:
            _drop_region(s, t[BY_ADDR][at])


# --- the observed rule --------------------------------------------------------------------------------------------


def remove_segment(s: State, segment: int) -> None:
    """The segment is gone: its range joins the holes beside it, and a wholly free region is given up."""
    addr = s.t[SEG_ADDR][segment]
    _give(s, _region_of(s, addr), addr, s.t[SEG_SIZE][segment])


def _give(s: State, region: int, addr: int, size: int) -> None:
    t = s.t
    t[REGION_USED][region] -= size
    earlier, later = -1, t[REGION_HOLE][region]
    while later >= 0 and t[HOLE_ADDR][later] < addr:
        earlier, later = later, t[HOLE_NEXT][later]
    joins_earlier = earlier >= 0 and t[HOLE_ADDR][earlier] + t[HOLE_SIZE][earlier] == addr
    joins_later = later >= 0 and addr + size == t[HOLE_ADDR][later]
    if joins_earlier:
        t[HOLE_SIZE][earlier] += size
        if joins_later:
            t[HOLE_SIZE][earlier] += t[HOLE_SIZE][later]
            t[HOLE_NEXT][earlier] = t[HOLE_NEXT][later]
            _drop_hole(s, later)
    elif joins_later:
        t[HOLE_ADDR][later] = addr
        t[HOLE_SIZE][later] += size
    else:
        hole = _new_hole(s, addr, size, later)
        if earlier < 0:
            t[REGION_HOLE][region] = hole
        else:
            t[HOLE_NEXT][earlier] = hole
    if t[REGION_USED][region] == 0:
        _drop_hole(s, t[REGION_HOLE][region])
        _drop_region(s, region)


def _choose_region(s: State, size: int) -> int:
    """The newest region with a sufficient hole, else a new one in the highest gap that is strictly longer than it.

    What is left of a region is a guess where a recording gave it; an expandable segment there shows that it is less.
    """
    t, n = s.t, s.n
    for at in range(n[REGIONS] - 1, -1, -1):
        region: int = t[BY_AGE][at]
        if t[REGION_SIZE][region] - t[REGION_USED][region] >= size:
            hole = _smallest_hole(s, region, size)
            if hole >= 0 and _range_in(s, t[HOLE_ADDR][hole], size) < 0:
                return region
    length = (size + REGION - 1) // REGION * REGION
    end = n[TOP]
    for at in range(n[REGIONS] - 1, -1, -1):
        region = t[BY_ADDR][at]
        end = _below_ranges(s, t[REGION_ADDR][region] + t[REGION_SIZE][region], end, length)
        if end - (t[REGION_ADDR][region] + t[REGION_SIZE][region]) > length:
            return _new_region(s, end - length, length)
        end = min(end, t[REGION_ADDR][region])
    return _new_region(s, _below_ranges(s, _ENDLESS, end, length) - length, length)


def _below_ranges(s: State, begin: int, end: int, length: int) -> int:
    """The end of a gap, or where it goes on below expandable segments if one is in the last ``length`` bytes of it."""
    while end - begin > length:
        segment = _range_in(s, end - length, length)
        if segment < 0:
            return end
        end = s.t[SEG_ADDR][segment] // REGION * REGION
    return end


def _range_in(s: State, addr: int, size: int) -> int:
    """An expandable segment that stands there, or -1; of others the regions tell."""
    return _standing(s, addr, size) if s.n[EXPANDABLE_SEGMENTS] > 0 else -1


def begin_process(s: State, base: int, move_at: int) -> None:
    """What a process on this driver holds before its first segment.

    A region of 416 MiB from ``base`` on, taken but for its last 2 MiB; one of 32 MiB that begins 480 MiB above it, its
    last 24 MiB free; between them and above nothing is free. Once in its life, after ``move_at`` requests for memory
    (0: before the first, -1: never), the driver moves the block of 414 MiB to a place of 512 MiB.
    """
    n = s.n
    n[TOP] = base + 512 * MIB
    n[MOVE_AT] = move_at
    upper = _new_region(s, base + 480 * MIB, REGION)
    _take_at(s, upper, base + 480 * MIB, 8 * MIB)
    between = _new_region(s, base + 416 * MIB, 64 * MIB)
    _take_at(s, between, base + 416 * MIB, 64 * MIB)
    own = _new_region(s, base, 416 * MIB)
    _take_at(s, own, base, _OWN_BLOCK)
    n[OWN_BLOCK] = base
    if move_at == 0:
        _move_own_block(s)


def _move_own_block(s: State) -> None:
    own = s.n[OWN_BLOCK]
    s.n[MOVE_AT] = -1
    _take(s, _choose_region(s, _MOVED_BLOCK), _MOVED_BLOCK)
    _give(s, _region_of(s, own), own, _OWN_BLOCK)


def _region_of(s: State, addr: int) -> int:
    """The region that holds what was placed at an address."""
    region: int = s.t[BY_ADDR][_regions_up_to(s, addr) - 1]
    return region


def _regions_up_to(s: State, addr: int) -> int:
    """How many regions begin at or below an address."""
    t = s.t
    low, high = 0, s.n[REGIONS]
    while low < high:
        middle = (low + high) // 2
        if t[REGION_ADDR][t[BY_ADDR][middle]] <= addr:
            low = middle + 1
        else:
            high = middle
    return low


def _new_region(s: State, addr: int, size: int) -> int:
    t, n = s.t, s.n
    n[SPARE_REGIONS] -= 1
    region: int = t[SPARE_REGION][n[SPARE_REGIONS]]
    t[REGION_ADDR][region] = addr
    t[REGION_SIZE][region] = size
    t[REGION_USED][region] = 0
    t[REGION_HOLE][region] = _new_hole(s, addr, size, -1)
    at = n[REGIONS]
    t[BY_AGE][at] = region
    while at > 0 and t[REGION_ADDR][t[BY_ADDR][at - 1]] > addr:
        t[BY_ADDR][at] = t[BY_ADDR][at - 1]
        at -= 1
    t[BY_ADDR][at] = region
    n[REGIONS] += 1
    return region


def _drop_region(s: State, region: int) -> None:
    t, n = s.t, s.n
    n[REGIONS] -= 1
    for row in (BY_AGE, BY_ADDR):
        order = t[row]
        at = 0
        while order[at] != region:
            at += 1
        for i in range(at, n[REGIONS]):
            order[i] = order[i + 1]
    t[SPARE_REGION][n[SPARE_REGIONS]] = region
    n[SPARE_REGIONS] += 1


def _new_hole(s: State, addr: int, size: int, following: int) -> int:
    t, n = s.t, s.n
    n[SPARE_HOLES] -= 1
    hole: int = t[SPARE_HOLE][n[SPARE_HOLES]]
    t[HOLE_ADDR][hole] = addr
    t[HOLE_SIZE][hole] = size
    t[HOLE_NEXT][hole] = following
    return hole


def _drop_hole(s: State, hole: int) -> None:
    s.t[SPARE_HOLE][s.n[SPARE_HOLES]] = hole
    s.n[SPARE_HOLES] += 1


def _smallest_hole(s: State, region: int, size: int) -> int:
    """The smallest hole of at least ``size`` bytes, the lowest of equals, or -1."""
    t = s.t
    best = -1
    hole = t[REGION_HOLE][region]
    while hole >= 0:
        if t[HOLE_SIZE][hole] >= size and (best < 0 or t[HOLE_SIZE][hole] < t[HOLE_SIZE][best]):
            best = hole
        hole = t[HOLE_NEXT][hole]
    return best


def _take(s: State, region: int, size: int) -> int:
    """Take the low end of the smallest sufficient hole."""
    addr: int = s.t[HOLE_ADDR][_smallest_hole(s, region, size)]
    _take_at(s, region, addr, size)
    return addr


def _take_at(s: State, region: int, addr: int, size: int) -> None:
    """Take a range out of the holes that it reaches into."""
    t, end = s.t, addr + size
    earlier, hole = -1, t[REGION_HOLE][region]
    while hole >= 0 and t[HOLE_ADDR][hole] < end:
        begins, ends, later = t[HOLE_ADDR][hole], t[HOLE_ADDR][hole] + t[HOLE_SIZE][hole], t[HOLE_NEXT][hole]
        if ends > addr:
            t[REGION_USED][region] += min(end, ends) - max(addr, begins)
        if begins < addr:
            if ends > end:
                t[HOLE_NEXT][hole] = _new_hole(s, end, ends - end, later)
            t[HOLE_SIZE][hole] = min(ends, addr) - begins
            earlier = hole
        elif ends > end:
            t[HOLE_ADDR][hole] = end
            t[HOLE_SIZE][hole] = ends - end
        else:
            if earlier < 0:
                t[REGION_HOLE][region] = later
            else:
                t[HOLE_NEXT][earlier] = later
            _drop_hole(s, hole)
        hole = later
