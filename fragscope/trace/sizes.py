"""Sizes that follow from a request and the conf alone: c10/core/AllocatorConfig.h, c10/cuda/CUDACachingAllocator.cpp.

The allocator model runs these functions compiled; reading a recording that began late needs them too.
"""

from __future__ import annotations

MIN_BLOCK = 512  # kMinBlockSize: every block is a multiple
SMALL_SIZE = 1 << 20  # kSmallSize: largest rounded request that the small pool serves; rests up to this stay unsplit
SMALL_SEGMENT = 2 << 20  # kSmallBuffer: segment of the small pool, and page of its expandable segments
LARGE_SEGMENT = 20 << 20  # kLargeBuffer: large_segment_size where the conf does not name it
DRIVER_PAGE = 2 << 20  # physical granularity of cudaMalloc and cuMemCreate
_FIRST_INTERVAL = 20  # log2 of kSmallSize: slot 0 is everything below 2 MiB
_LAST_INTERVAL = 15  # kRoundUpPowerOfTwoIntervals - 1: 32 GiB and more


def driver_pages(size: int) -> int:
    """Bytes of device memory that ``size`` bytes take of the driver."""
    return (size + DRIVER_PAGE - 1) // DRIVER_PAGE * DRIVER_PAGE


def floor_log2(x: int) -> int:
    """Position of the highest bit of a positive number."""
    bits = 0
    for step in (32, 16, 8, 4, 2, 1):
        if x >> step:
            x >>= step
            bits += step
    return bits


def interval_of(size: int) -> int:
    """Which of the 16 intervals of ``roundup_power2_divisions`` a request of ``size`` bytes is in."""
    return min(_LAST_INTERVAL, max(0, floor_log2(size) - _FIRST_INTERVAL))


def block_bytes(size: int, divisions: int) -> int:
    """Block bytes for a request of ``size`` bytes, before a larger block is taken unsplit.

    Args:
        size: bytes asked for.
        divisions: steps between powers of two in the request's interval; 0 and 1 are none.
    """
    if size < MIN_BLOCK:
        return MIN_BLOCK
    if divisions > 1 and size > MIN_BLOCK * divisions:
        highest = floor_log2(size)
        power = 1 << highest
        if size == power:
            return size
        step = power >> floor_log2(divisions)
        if step == 0:
            return 2 * power
        rounded: int = size // step * step
        return rounded if rounded == size else rounded + step
    return (size + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK
