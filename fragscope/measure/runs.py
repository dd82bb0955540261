"""The contiguous stretches of memory that are held at one time."""

from __future__ import annotations

import numpy as np

from fragscope.measure.segments import Ints


class LiveRuns:
    """Runs of held memory in address order: an ordinary segment is one, an expandable one has one or more.

    Runs of one expandable segment that touch are joined, since a block may lie across both.
    """

    def __init__(self) -> None:
        self._start: Ints = np.empty(0, dtype=np.int64)
        self._stop: Ints = np.empty(0, dtype=np.int64)
        self._segment: Ints = np.empty(0, dtype=np.int64)

    def add(self, addr: int, size: int, segment: int, *, joins: bool) -> None:
        """Memory of a segment that comes from the driver; it joins its neighbours of the same segment or does not."""
        at = int(np.searchsorted(self._start, addr))
        start, stop, first, last = addr, addr + size, at, at  # replaces runs first to last, last not included
        if joins and at > 0 and self._segment[at - 1] == segment and self._stop[at - 1] == addr:
            start, first = int(self._start[at - 1]), at - 1
        if joins and at < len(self._start) and self._segment[at] == segment and self._start[at] == stop:
            stop, last = int(self._stop[at]), at + 1
        self._replace(first, last, [(start, stop)], segment)

    def cut(self, addr: int, size: int, segment: int) -> None:
        """Memory of a segment, which lies in one of its runs, goes back to the driver."""
        at = int(np.searchsorted(self._start, addr, side="right")) - 1
        # Damaged decisions may have segments on top of each other.
        while at >= 0 and (self._segment[at] != segment or self._stop[at] < addr + size):
            at -= 1
        if at >= 0:
            parts = [(int(self._start[at]), addr), (addr + size, int(self._stop[at]))]
            self._replace(at, at + 1, [p for p in parts if p[0] < p[1]], segment)

    def rows_of(self, addr: Ints, size: Ints) -> Ints:
        """Segment that holds all of each block, -1 where none does; int64 like ``addr``."""
        if len(self._start) == 0:
            return np.full(len(addr), -1, dtype=np.int64)
        at = np.searchsorted(self._start, addr, side="right") - 1
        inside = (at >= 0) & (addr + size <= self._stop[np.maximum(at, 0)])
        return np.where(inside, self._segment[np.maximum(at, 0)], -1)

    def _replace(self, first: int, last: int, runs: list[tuple[int, int]], segment: int) -> None:
        new = np.array(runs, dtype=np.int64).reshape(-1, 2)
        self._start = np.concatenate([self._start[:first], new[:, 0], self._start[last:]])
        self._stop = np.concatenate([self._stop[:first], new[:, 1], self._stop[last:]])
        self._segment = np.concatenate(
            [self._segment[:first], np.full(len(new), segment, dtype=np.int64), self._segment[last:]]
        )
