"""Which expandable segments the mapped ranges lie in that stood when a recording began.

An expandable segment reserves nine eighths of the device's memory in addresses and maps parts of them. A recording
shows what is mapped, never where a reservation begins, and that decides where the next page is mapped if the first ones
are not. On the driver seen (H100 80GB HBM3, driver 580.159.04, Linux x86-64) reservations lie back to back: where the
lowest ranges of two segments lie a whole number of reservations apart, all segments begin so far apart. Elsewhere, and
where reservations differ in length, a segment begins with its lowest range, or where the recording maps something below
that later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fragscope.allocator.engine.driver import REGION
from fragscope.allocator.engine.expandable import range_size
from fragscope.trace import DecisionKind, SegmentState, Trace

MapAt = tuple[int, int, int]
"""Address, stream and pool of a mapping."""


@dataclass(frozen=True, slots=True)
class AddressRange:
    """Addresses that an expandable segment reserves; bytes."""

    addr: int
    size: int
    stream: int
    pool: int
    page: int

    def may_hold(self, mapped: SegmentState) -> bool:
        """Whether a mapped range can be a part of it."""
        fits = self.addr <= mapped.addr and mapped.addr + mapped.size <= self.addr + self.size
        same = (self.stream, self.pool, self.page) == (mapped.stream, mapped.pool, mapped.page)
        return fits and same and (mapped.addr - self.addr) % self.page == 0


def ranges_of(trace: Trace, total: int) -> list[AddressRange]:
    """What the expandable segments reserve that stood when a Trace's recording began; see ``address_ranges``.

    Args:
        trace: as recorded.
        total: bytes of memory of the device that it was recorded on, whatever card is asked about.
    """
    maps: list[MapAt] = []
    d = trace.decisions
    if d is not None:
        rows = np.flatnonzero(d.kind == DecisionKind.SEGMENT_MAP)
        maps = list(zip(d.addr[rows].tolist(), d.stream[rows].tolist(), d.pool[rows].tolist(), strict=True))
    return address_ranges(trace.initial, maps, total)


def address_ranges(segments: Sequence[SegmentState], maps: Sequence[MapAt], total: int) -> list[AddressRange]:
    """The reservation that each mapped range lies in, in the order of the ranges.

    Args:
        segments: what stood, by address; ordinary ones are passed over.
        maps: mappings to come.
        total: bytes of device memory in all of the device that it was recorded on.
    """
    mapped = [s for s in segments if s.expandable]
    lengths = {(range_size(total, page) + REGION - 1) // REGION * REGION for page in {s.page for s in mapped}}
    stride = max(lengths, default=0)
    origin = _origin(mapped, stride) if len(lengths) == 1 else None
    out: list[AddressRange] = []
    for part in mapped:
        if out and out[-1].may_hold(part) and (origin is None or _cell(out[-1].addr, part.addr, stride) == 0):
            out.append(out[-1])
            continue
        size = range_size(total, part.page)
        lowest = out[-1].addr + out[-1].size if out else 0
        begin = -1 if origin is None else origin + _cell(origin, part.addr, stride) * stride
        if begin < lowest or (part.addr - begin) % part.page:
            begin = _lowest_map(part, maps, max(lowest, part.addr + part.size - size))
        out.append(AddressRange(begin, max(size, part.addr + part.size - begin), part.stream, part.pool, part.page))
    return out


def _cell(origin: int, addr: int, stride: int) -> int:
    return (addr - origin) // stride


def _origin(mapped: Sequence[SegmentState], stride: int) -> int | None:
    """An address from which whole reservations lead to where segments begin; None if nothing shows that they do."""
    lowest: dict[tuple[int, int, int], int] = {}
    for part in mapped:
        lowest.setdefault((part.stream, part.pool, part.page), part.addr)
    places = Counter(addr % stride for addr in lowest.values())
    best = None
    for place, count in places.items():
        if count < 2 or any(_cell(place, s.addr, stride) != _cell(place, s.addr + s.size - 1, stride) for s in mapped):
            continue
        offsets = sum((addr - place) % stride for addr in lowest.values())
        if best is None or (-count, offsets) < best[:2]:
            best = (-count, offsets, place)
    return None if best is None else best[2]


def _lowest_map(part: SegmentState, maps: Sequence[MapAt], above: int) -> int:
    """Where the recording maps lowest below a range, in what may be the same segment."""
    below = [
        addr for addr, stream, pool in maps
        if above <= addr < part.addr and (stream, pool) == (part.stream, part.pool)
        and (part.addr - addr) % part.page == 0
    ]  # fmt: skip
    return min(below, default=part.addr)
