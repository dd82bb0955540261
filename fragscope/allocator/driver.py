"""Where segments come from: device memory in bytes, and the addresses the driver gives.

Up to torch 2.11 equal-size free blocks are ordered by address, so a model needs addresses. Two sources: a recording's
own, and ``TopDownPlacement``, the rule observed for cudaMalloc on Linux x86-64 (H100 80GB, driver 580): regions of
32 MiB multiples, newer regions below older ones, inside a region the smallest sufficient hole at its low end.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Protocol

from fragscope.units import MIB

GRANULARITY = 2 * MIB
REGION = 32 * MIB
TOP = 0x7F00_0000_0000  # any 32 MiB-aligned address: only the order of addresses matters


class Placement(Protocol):
    """Gives addresses to segments."""

    def place(self, size: int) -> int:
        """Address for a new segment of ``size`` bytes."""

    def remove(self, addr: int, size: int) -> None:
        """The segment at ``addr`` is gone."""


class Device:
    """Memory that segments are taken from.

    Attributes:
        total: bytes of device memory in all; memory fractions refer to it.
        capacity: bytes that segments may take together: what is free once the context stands.
        used: bytes that segments take now, in the driver's 2 MiB pages.
    """

    def __init__(self, total: int, capacity: int, placement: Placement | None = None) -> None:
        self.total = total
        self.capacity = capacity
        self.used = 0
        self.placement = placement or TopDownPlacement()

    @property
    def free(self) -> int:
        """Bytes the driver would still give."""
        return self.capacity - self.used

    def malloc(self, size: int) -> int | None:
        """``cudaMalloc``: an address, or None where the memory is not there."""
        pages = _pages(size)
        if pages > self.free:
            return None
        self.used += pages
        return self.placement.place(size)

    def release(self, addr: int, size: int) -> None:
        """``cudaFree``."""
        self.used -= _pages(size)
        self.placement.remove(addr, size)


def _pages(size: int) -> int:
    return -(-size // GRANULARITY) * GRANULARITY


class TopDownPlacement:
    """The driver's placement rule, from an empty address space (see the module's docstring).

    What a process already holds when torch's first segment arrives is not modelled, nor are allocations that torch does
    not see; both can change which of two segments lies lower.
    """

    def __init__(self) -> None:
        self._regions: list[_Region] = []  # oldest first
        self._at: dict[int, _Region] = {}

    def place(self, size: int) -> int:
        """The smallest sufficient hole of the newest region that has one, at its low end; else a new region."""
        for region in reversed(self._regions):
            addr = region.take(size)
            if addr is not None:
                self._at[addr] = region
                return addr
        length = -(-size // REGION) * REGION
        region = _Region(self._gap_end(length) - length, length)
        self._regions.append(region)
        addr = region.take(size)
        assert addr is not None
        self._at[addr] = region
        return addr

    def remove(self, addr: int, size: int) -> None:
        """Merge the freed range with free neighbours; a wholly free region disappears."""
        region = self._at.pop(addr, None)
        if region is None:
            return  # a segment from a recording, placed before this rule took over
        region.give(addr, size)
        if region.is_free:
            self._regions.remove(region)

    def keep_clear(self, addr: int, size: int) -> None:
        """Treat a range as taken by something that is not this rule's."""
        base = addr // REGION * REGION
        end = -(-(addr + size) // REGION) * REGION
        region = _Region(base, end - base)
        region.holes.clear()
        self._regions.insert(0, region)

    def _gap_end(self, length: int) -> int:
        """End of the highest gap between regions that is strictly longer than ``length``."""
        end = TOP
        for region in sorted(self._regions, key=lambda r: -r.base):
            if end - (region.base + region.length) > length:
                return end
            end = min(end, region.base)
        return end


class _Region:
    """A reserved address range carved into segments."""

    def __init__(self, base: int, length: int) -> None:
        self.base = base
        self.length = length
        self.holes: list[tuple[int, int]] = [(base, length)]  # (address, bytes), ascending

    @property
    def is_free(self) -> bool:
        return self.holes == [(self.base, self.length)]

    def take(self, size: int) -> int | None:
        fits = [(length, addr) for addr, length in self.holes if length >= size]
        if not fits:
            return None
        length, addr = min(fits)
        self.holes.remove((addr, length))
        if length > size:
            self.holes.append((addr + size, length - size))
            self.holes.sort()
        return addr

    def give(self, addr: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self.holes, (addr, size)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self.holes = merged


class RecordedPlacement:
    """A recording's own addresses, as long as the same sizes are asked for in the same order.

    From the first difference on (another size, or an address whose former segment this replay still holds),
    ``TopDownPlacement`` goes on around the segments that stand.

    Attributes:
        departed: whether a difference was met.
    """

    def __init__(self, segments: Sequence[tuple[int, int]]) -> None:
        self._recorded = segments  # (address, bytes) in the order taken
        self._next = 0
        self._standing: dict[int, int] = {}
        self._order: list[int] = []  # their addresses, ascending
        self._rule = TopDownPlacement()
        self.departed = False

    def place(self, size: int) -> int:
        """The recorded address, or a modelled one after the first difference."""
        if not self.departed and self._next < len(self._recorded):
            addr, recorded_size = self._recorded[self._next]
            if recorded_size == size and self._is_clear(addr, size):
                self._next += 1
                self._standing[addr] = size
                insort(self._order, addr)
                return addr
        if not self.departed:
            self.departed = True
            for addr, length in self._standing.items():
                self._rule.keep_clear(addr, length)
        return self._rule.place(size)

    def _is_clear(self, addr: int, size: int) -> bool:
        """Whether no segment stands there: a recording gives an address again only after it was freed *there*."""
        at = bisect_left(self._order, addr)
        if at < len(self._order) and self._order[at] < addr + size:
            return False
        return at == 0 or self._order[at - 1] + self._standing[self._order[at - 1]] <= addr

    def remove(self, addr: int, size: int) -> None:
        """Forget a segment."""
        if self._standing.pop(addr, None) is None:
            self._rule.remove(addr, size)
        else:
            del self._order[bisect_left(self._order, addr)]
