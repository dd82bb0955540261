"""The figures of a phase: what an allocator held and did between two marks."""

from __future__ import annotations

from dataclasses import dataclass

from fragscope.allocator.caching import CachingAllocator, DriverCalls
from fragscope.allocator.counters import Counters


@dataclass(frozen=True, slots=True)
class Span:
    """What happened between two marks.

    Attributes:
        name: the phase, ``""`` for the whole Trace.
        base: counters when it began.
        end: counters when it was over.
        peak: the largest value of each counter.
        segments_peak: most segments held at once.
        allocs: requests for memory.
        ooms: failed requests, with those that were refused before the driver was asked.
        retries: requests that released everything cached.
        calls: driver calls.
        reserved_after_empty_cache: reserved bytes that ``empty_cache()`` would leave at its end.
    """

    name: str
    base: Counters
    end: Counters
    peak: Counters
    segments_peak: int
    allocs: int
    ooms: int
    retries: int
    calls: DriverCalls
    reserved_after_empty_cache: int

    @property
    def transient(self) -> int:
        """Bytes needed only on the way: peak allocated beyond base and end."""
        return self.peak.allocated - max(self.base.allocated, self.end.allocated)

    @property
    def retained(self) -> int:
        """Allocated bytes the phase left behind (negative where it freed more)."""
        return self.end.allocated - self.base.allocated


class SpanMeter:
    """Takes the figures of a phase of a running allocator."""

    def __init__(self, allocator: CachingAllocator, name: str) -> None:
        self._allocator = a = allocator
        self._name = name
        self._base = a.now
        self._before = (a.failures, a.retries, a.allocs)
        self._calls = a.calls
        self._peaks = a.watch()

    def finish(self) -> Span:
        """The figures from the start of the phase until now."""
        a = self._allocator
        now = a.now
        span = Span(
            name=self._name,
            base=self._base,
            end=now,
            peak=a.peaks(self._peaks),
            segments_peak=a.peak_segments(self._peaks),
            allocs=a.allocs - self._before[2],
            ooms=a.failures - self._before[0],
            retries=a.retries - self._before[1],
            calls=a.calls - self._calls,
            reserved_after_empty_cache=now.reserved - a.releasable,
        )
        self.close()
        return span

    def close(self) -> None:
        """No figures are wanted any more."""
        self._peaks.close()
