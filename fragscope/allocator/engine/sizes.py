"""Size classes. Source: c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp."""

from __future__ import annotations

from fragscope.allocator.engine.state import DIVISIONS, LARGE_SEGMENT, State
from fragscope.trace.sizes import MIN_BLOCK, SMALL_SEGMENT, SMALL_SIZE, block_bytes, floor_log2, interval_of

__all__ = [
    "MIN_BLOCK", "SMALL_SEGMENT", "SMALL_SIZE", "TOO_LARGE", "floor_log2", "page_bytes", "round_size", "segment_bytes",
    "segment_size",
]  # fmt: skip

MIB = 1 << 20
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own size
ROUND_LARGE = 2 * MIB  # kRoundLarge: granularity of those segments
TOO_LARGE = 1 << 60  # refused before the allocator is asked (kMaxAllocSize)


def round_size(s: State, size: int) -> int:
    """Block bytes for a request of ``size`` bytes, before a larger block is taken unsplit."""
    return block_bytes(size, s.n[DIVISIONS + interval_of(size)])


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
