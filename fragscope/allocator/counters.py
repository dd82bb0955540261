"""Byte counters of an allocator, now and at their peaks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Counters:
    """Bytes at one moment, or the largest bytes of each counter over a phase.

    Attributes:
        requested: asked for and not freed by the program.
        allocated: in blocks handed out and not freed by the program.
        active: allocated plus blocks whose free waits for another stream.
        reserved: held from the driver.
        stranded: idle, in segments that a live block keeps from being returned.
        inactive_split: idle, in segments that are split; torch's ``inactive_split_bytes``.
    """

    requested: int = 0
    allocated: int = 0
    active: int = 0
    reserved: int = 0
    stranded: int = 0
    inactive_split: int = 0


NAMES = ("requested", "allocated", "active", "reserved", "stranded", "inactive_split")


class Meter:
    """Mutable counters with peaks; a peak is the largest value since the last reset, as in torch's statistics."""

    __slots__ = (
        *NAMES, *(f"peak_{n}" for n in NAMES), "peak_segments", "program_peak_allocated", "program_peak_reserved",
        "segments",
    )  # fmt: skip

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    requested: int
    allocated: int
    active: int
    reserved: int
    stranded: int
    inactive_split: int
    segments: int
    peak_requested: int
    peak_allocated: int
    peak_active: int
    peak_reserved: int
    peak_stranded: int
    peak_inactive_split: int
    peak_segments: int
    program_peak_allocated: int
    """Peak since the program itself last reset it; phases leave it alone."""
    program_peak_reserved: int

    def handed_out(self, block: int, requested: int) -> None:
        """A block was handed out."""
        self.requested += requested
        self.allocated += block
        self.active += block
        self.peak_requested = max(self.peak_requested, self.requested)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.program_peak_allocated = max(self.program_peak_allocated, self.allocated)
        self.peak_active = max(self.peak_active, self.active)

    def reserve(self, size: int) -> None:
        """A segment was taken from the driver."""
        self.reserved += size
        self.segments += 1
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.program_peak_reserved = max(self.program_peak_reserved, self.reserved)
        self.peak_segments = max(self.peak_segments, self.segments)

    def strand(self, change: int) -> None:
        """Idle bytes in segments with live blocks grew or shrank."""
        self.stranded += change
        self.peak_stranded = max(self.peak_stranded, self.stranded)

    def split(self, change: int) -> None:
        """Idle bytes in split segments grew or shrank."""
        self.inactive_split += change
        self.peak_inactive_split = max(self.peak_inactive_split, self.inactive_split)

    def now(self) -> Counters:
        """The counters as they stand."""
        return Counters(*(getattr(self, n) for n in NAMES))

    def peak(self) -> Counters:
        """The largest value of each counter since the last reset."""
        return Counters(*(getattr(self, f"peak_{n}") for n in NAMES))

    def reset_peak(self) -> None:
        """Peaks start over from the values as they stand."""
        for name in (*NAMES, "segments"):
            setattr(self, f"peak_{name}", getattr(self, name))

    def reset_program_peak(self) -> None:
        """``torch.cuda.reset_peak_memory_stats()``: the program's own view of peaks starts over."""
        self.program_peak_allocated = self.allocated
        self.program_peak_reserved = self.reserved
