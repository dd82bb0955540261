"""Byte counters of an allocator: now, and at their peaks as several onlookers see them."""

from __future__ import annotations

from dataclasses import dataclass

from fragscope.allocator.engine import counters as slots
from fragscope.allocator.engine.state import DOWN, PEAK, UP, State


@dataclass(frozen=True, slots=True)
class Counters:
    """Bytes at one moment, or the largest bytes of each counter over a phase.

    Attributes:
        requested: asked for and not freed by the program.
        allocated: in blocks handed out and not freed by the program.
        active: allocated plus blocks whose free waits for another stream.
        reserved: held from the driver.
        stranded: idle, in segments or pages that a live block keeps from being returned.
        inactive_split: idle, in segments that are split; torch's ``inactive_split_bytes``, which leaves expandable
            segments out.
        pool_idle: idle, in private pools that have users; ``empty_cache()`` does not return it.
        raw: taken of the driver past the allocator (``RAW_ALLOC``), in whole pages of the driver.
        hbm: reserved plus raw.
    """

    requested: int = 0
    allocated: int = 0
    active: int = 0
    reserved: int = 0
    stranded: int = 0
    inactive_split: int = 0
    pool_idle: int = 0
    raw: int = 0
    hbm: int = 0


_SLOTS = (
    slots.LIVE_REQUESTED, slots.ALLOCATED_BYTES, slots.ACTIVE_BYTES, slots.RESERVED_BYTES, slots.STRANDED,
    slots.INACTIVE_SPLIT_BYTES, slots.POOL_IDLE, slots.RAW_BYTES, slots.HBM_BYTES,
)  # fmt: skip
_CLASSES = ("all", "small", "large")


class PeakWatch:
    """Peaks as one onlooker sees them: the largest values since *it* last reset them.

    The allocator keeps one peak per counter. Whoever resets it lets all others take over what it was before.
    """

    def __init__(self, watches: list[PeakWatch], state: State) -> None:
        self._watches = watches
        self._seen = [0] * slots.SLOTS
        watches.append(self)
        self.reset(state)

    def reset(self, s: State) -> None:
        """Peaks start over from the values as they stand."""
        for watch in self._watches:
            watch._seen = watch.slots(s)
        self._seen = [_now(s, slot) for slot in range(slots.SLOTS)]
        for slot, now in enumerate(self._seen):
            s.t[PEAK][slot] = now

    def close(self) -> None:
        """No longer look on; what was seen stays readable until the allocator goes on."""
        if self in self._watches:
            self._watches.remove(self)

    def slots(self, s: State) -> list[int]:
        """The largest value of every slot."""
        return [max(seen, int(s.t[PEAK][slot])) for slot, seen in enumerate(self._seen)]

    def counters(self, s: State) -> Counters:
        """The largest value of each counter."""
        peaks = self.slots(s)
        return Counters(*(peaks[slot] for slot in _SLOTS))

    def segments(self, s: State) -> int:
        """Most segments held at once; expandable ones are not counted."""
        return self.slots(s)[slots.SEGMENT_COUNT]


def counters_now(s: State) -> Counters:
    """The counters as they stand."""
    return Counters(*(_now(s, slot) for slot in _SLOTS))


def segments_now(s: State) -> int:
    """Segments held; expandable ones are not counted."""
    return _now(s, slots.SEGMENT_COUNT)


def statistics(s: State, peaks: PeakWatch) -> dict[str, tuple[int, int, int, int]]:
    """What ``torch.cuda.memory_stats()`` reports of counters: ``name.all`` -> (current, peak, allocated, freed)."""
    seen = peaks.slots(s)
    out = {}
    for name, first in slots.TORCH_NAMES.items():
        for offset, kind in enumerate(_CLASSES):
            out[f"{name}.{kind}"] = _statistic(s, first + offset, seen)
    out["oversize_allocations"] = _statistic(s, slots.OVERSIZE_ALLOCATIONS, seen)
    out["oversize_segments"] = _statistic(s, slots.OVERSIZE_SEGMENTS, seen)
    return out


def _statistic(s: State, slot: int, peaks: list[int]) -> tuple[int, int, int, int]:
    return _now(s, slot), peaks[slot], int(s.t[UP][slot]), int(s.t[DOWN][slot])


def _now(s: State, slot: int) -> int:
    return int(s.t[UP][slot]) - int(s.t[DOWN][slot])
