"""Size classes of the native allocator. Source: c10/core/AllocatorConfig.h, c10/cuda/CUDACachingAllocator.cpp."""

from __future__ import annotations

from fragscope.units import MIB

MIN_BLOCK = 512  # kMinBlockSize: every block is a multiple
SMALL_SIZE = 1 * MIB  # kSmallSize: largest rounded request served by the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer: segment size of the small pool
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own size
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer (large_segment_size from 2.11 on)
ROUND_LARGE = 2 * MIB  # kRoundLarge: granularity of those segments
TOO_LARGE = 2**60  # refused before the allocator is asked (kMaxAllocSize in CUDACachingAllocator::allocate)


def round_size(size: int) -> int:
    """Block bytes for a request of ``size`` bytes, before a larger block is taken unsplit."""
    if size < MIN_BLOCK:
        return MIN_BLOCK
    return -(-size // MIN_BLOCK) * MIN_BLOCK


def segment_size(rounded: int) -> int:
    """Bytes asked of the driver for a rounded request that no cached block serves."""
    if rounded <= SMALL_SIZE:
        return SMALL_SEGMENT
    if rounded < MIN_LARGE_ALLOC:
        return LARGE_SEGMENT
    return -(-rounded // ROUND_LARGE) * ROUND_LARGE


def should_split(rounded: int, remaining: int) -> bool:
    """Whether a block's remainder becomes a free block of its own."""
    return remaining >= MIN_BLOCK if rounded <= SMALL_SIZE else remaining > SMALL_SIZE
