"""Size classes. Source: c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp."""

from __future__ import annotations

from fragscope.allocator.engine.state import DIVISIONS, LARGE_SEGMENT, State

MIB = 1 << 20
MIN_BLOCK = 512  # kMinBlockSize: every block is a multiple
SMALL_SIZE = MIB  # kSmallSize: largest rounded request that the small pool serves
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer: segment of the small pool
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own size
ROUND_LARGE = 2 * MIB  # kRoundLarge: granularity of those segments
TOO_LARGE = 1 << 60  # refused before the allocator is asked (kMaxAllocSize)
_FIRST_INTERVAL = 20  # log2 of kSmallSize: slot 0 is everything below 2 MiB
_LAST_INTERVAL = 15  # kRoundUpPowerOfTwoIntervals - 1: 32 GiB and more


def floor_log2(x: int) -> int:
    """Position of the highest bit of a positive number."""
    bits = 0
    for step in (32, 16, 8, 4, 2, 1):
        if x >> step:
            x >>= step
            bits += step
    return bits


def round_size(s: State, size: int) -> int:
    """Block bytes for a request of ``size`` bytes, before a larger block is taken unsplit."""
    if size < MIN_BLOCK:
        return MIN_BLOCK
    highest = floor_log2(size)
    divisions = s.n[DIVISIONS + min(_LAST_INTERVAL, max(0, highest - _FIRST_INTERVAL))]
    if divisions > 1 and size > MIN_BLOCK * divisions:
        power = 1 << highest
        if size == power:
            return size
        step = power >> floor_log2(divisions)
        if step == 0:
            return 2 * power
        rounded: int = size // step * step
        return rounded if rounded == size else rounded + step
    return (size + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK


def segment_size(s: State, rounded: int) -> int:
    """Bytes asked of the driver for a rounded request that no cached block serves."""
    return segment_bytes(rounded, s.n[LARGE_SEGMENT])


def segment_bytes(rounded: int, large_segment: int) -> int:
    """The same under a given ``large_segment_size``."""
    if rounded <= SMALL_SIZE:
        return SMALL_SEGMENT
    if rounded < MIN_LARGE_ALLOC:
        return large_segment
    return (rounded + ROUND_LARGE - 1) // ROUND_LARGE * ROUND_LARGE


def page_bytes(rounded: int, large_segment: int) -> int:
    """Bytes of the pages that are mapped for a rounded request where none of it is mapped yet."""
    page = SMALL_SEGMENT if rounded <= SMALL_SIZE else large_segment
    return (rounded + page - 1) // page * page
