"""Counters, as ``torch.cuda.memory_stats()`` keeps them and a few of fragscope's own.

A slot holds the sum of increases, the sum of decreases and the largest difference of the two since the last reset.
Torch's slots come in threes: all, small pool, large pool. Source: c10/core/CachingDeviceAllocator.h (DeviceStats).
"""

from __future__ import annotations

from fragscope.allocator.engine.state import DOWN, PEAK, STATISTICS, UP, State

ALLOCATION = 0
SEGMENT_COUNT = 3
ACTIVE = 6
INACTIVE_SPLIT = 9
ALLOCATED_BYTES = 12
RESERVED_BYTES = 15
ACTIVE_BYTES = 18
INACTIVE_SPLIT_BYTES = 21
REQUESTED_BYTES = 24
OVERSIZE_ALLOCATIONS = 27
OVERSIZE_SEGMENTS = 28
LIVE_REQUESTED = 29  # bytes asked for and not freed by the program; torch's go down only when a free completes
STRANDED = 30  # idle bytes that a live block keeps from being returned
POOL_IDLE = 31  # idle bytes of private pools that have users
RAW_BYTES = 32  # device memory that the program took past the allocator
HBM_BYTES = 33  # reserved plus that
SLOTS = 34

TORCH_NAMES = {
    "allocation": ALLOCATION,
    "segment": SEGMENT_COUNT,
    "active": ACTIVE,
    "inactive_split": INACTIVE_SPLIT,
    "allocated_bytes": ALLOCATED_BYTES,
    "reserved_bytes": RESERVED_BYTES,
    "active_bytes": ACTIVE_BYTES,
    "inactive_split_bytes": INACTIVE_SPLIT_BYTES,
    "requested_bytes": REQUESTED_BYTES,
}


def up(s: State, slot: int, amount: int) -> None:
    """Raise one slot."""
    t = s.t
    t[UP][slot] += amount
    now = t[UP][slot] - t[DOWN][slot]
    t[PEAK][slot] = max(t[PEAK][slot], now)


def up_idle(s: State, slot: int, amount: int) -> None:
    """Raise one slot without a peak: what a request takes again at once was never idle (``note_peak``)."""
    s.t[UP][slot] += amount


def note_peak(s: State, slot: int) -> None:
    """The value as it stands may be the peak."""
    t = s.t
    now = t[UP][slot] - t[DOWN][slot]
    t[PEAK][slot] = max(t[PEAK][slot], now)


def down(s: State, slot: int, amount: int) -> None:
    """Lower one slot."""
    s.t[DOWN][slot] += amount


def up_class(s: State, slot: int, which: int, amount: int) -> None:
    """Raise a torch counter for all and for the size class of free list ``which``."""
    up(s, slot, amount)
    if s.n[STATISTICS]:
        up(s, slot + 1 + which % 2, amount)


def down_class(s: State, slot: int, which: int, amount: int) -> None:
    """Lower a torch counter for all and for the size class of free list ``which``."""
    down(s, slot, amount)
    if s.n[STATISTICS]:
        down(s, slot + 1 + which % 2, amount)


def up_reserved(s: State, which: int, amount: int) -> None:
    """More is held from the driver for free list ``which``."""
    up_class(s, RESERVED_BYTES, which, amount)
    up(s, HBM_BYTES, amount)


def down_reserved(s: State, which: int, amount: int) -> None:
    """Less is."""
    down_class(s, RESERVED_BYTES, which, amount)
    down(s, HBM_BYTES, amount)


def count_up(s: State, slot: int, which: int, amount: int) -> None:
    """Raise a counter that nothing but torch's statistics need."""
    if s.n[STATISTICS]:
        up_class(s, slot, which, amount)


def count_down(s: State, slot: int, which: int, amount: int) -> None:
    """Lower a counter that nothing but torch's statistics need."""
    if s.n[STATISTICS]:
        down_class(s, slot, which, amount)


def change_class(s: State, slot: int, which: int, amount: int) -> None:
    """Raise or lower by a signed amount."""
    if amount > 0:
        up_class(s, slot, which, amount)
    elif amount < 0:
        down_class(s, slot, which, -amount)
