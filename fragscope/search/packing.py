"""Packing lives into one address range: where each could have been if everything had been known beforehand.

Finding the lowest range is NP-hard (dynamic storage allocation), so these are heuristics: place one life after the
other at the lowest address that is free as long as it lives, in an order that puts the hard ones first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_EACH, _PAIR = 40e-6, 0.7e-9  # seconds a life, and a pair of lives, about; they set the order of work, not its result
_SWEEP = 8e-6
_RESTARTS = 8
_PULLS = 12
_WIDTHS = (0.6, 2.0)  # of size classes in restarts, as powers of two
_SEED = 20_070_000  # any; the same for the same answer


@dataclass(frozen=True, slots=True)
class Lives:
    """What lived when; each column int64 of shape ``(n,)``, in order of their start.

    Two lives overlap where each starts before the other's end.

    Attributes:
        start: when it began to live; ascending.
        end: when it no longer lived; above ``start``.
        size: bytes.
    """

    start: Ints
    end: Ints
    size: Ints

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True, slots=True)
class Packing:
    """A place for each life; bytes.

    Attributes:
        name: the heuristic that found it.
        offset: int64, shape ``(n,)``: where each life lies.
        height: first byte above all of them.
    """

    name: str
    offset: Ints
    height: int


@dataclass(frozen=True, slots=True)
class Packed:
    """The best of several packings.

    Attributes:
        best: the lowest; of equally low ones the first.
        tried: the heuristics that were tried and the heights that they reached.
        skipped: those for which the budget was too small.
    """

    best: Packing
    tried: tuple[tuple[str, int], ...]
    skipped: tuple[str, ...]


def pack(lives: Lives, enough: int, budget: float = 20.0) -> Packed:
    """Pack by several heuristics and keep the best.

    Args:
        lives: what is to be packed.
        enough: a height that cannot be improved, or need not be; the search ends there.
        budget: about how many seconds on a common core. Work is counted, not timed, so that the same budget gives the
            same answer everywhere. The first heuristic runs in any case.
    """
    lifetime = lives.end - lives.start
    by_size = np.lexsort((lives.start, -lifetime, -lives.size))
    by_area = np.lexsort((lives.start, -lives.size.astype(np.float64) * lifetime))
    search = _Search(lives, enough, budget)
    search.offer("best fit in order of time", len(lives) * _SWEEP, lambda: best_fit(lives), always=True)
    search.first_fit("largest first", by_size)
    search.first_fit("largest power of two first, then by start", _classes(lives, lives.start))
    search.first_fit("largest power of two first, then longest lived", _classes(lives, -lifetime))
    search.first_fit("largest size times lifetime first", by_area)
    search.pull("what reached the top first", by_size)
    random = np.random.default_rng(_SEED)
    for number in range(_RESTARTS):
        width, shift = random.uniform(*_WIDTHS), random.uniform()
        then, name = ((lives.start, "by start"), (-lifetime, "longest lived"))[number % 2]
        search.first_fit(f"largest class {number + 1} first, then {name}", _classes(lives, then, width, shift))
    return search.answer()


def _classes(lives: Lives, then: Ints, width: float = 1.0, shift: float = 0.0) -> Ints:
    """Order by size classes ``width`` powers of two wide, the largest first, and within one by another column."""
    return np.lexsort((then, -np.floor(np.log2(lives.size) / width + shift)))


class _Search:
    """The packings so far."""

    def __init__(self, lives: Lives, enough: int, budget: float) -> None:
        self._lives, self._enough, self._left = lives, enough, budget
        self._best: Packing | None = None
        self._tried: list[tuple[str, int]] = []
        self._skipped: list[str] = []

    def first_fit(self, name: str, order: Ints) -> bool:
        """Try an order for ``first_fit``; says whether it is the best so far."""
        cost = len(self._lives) * _EACH + len(self._lives) ** 2 * _PAIR
        return self.offer(name, cost, lambda: first_fit(self._lives, order))

    def offer(self, name: str, cost: float, make: Callable[[], Ints], *, always: bool = False) -> bool:
        """Try a heuristic, if the budget allows and there is something to gain; says whether it is the best so far."""
        if self._best is not None and self._best.height <= self._enough:
            return False
        if cost > self._left and not always:
            self._skipped.append(name)
            return False
        self._left -= cost
        offset = make()
        height = int((offset + self._lives.size).max(initial=0))
        self._tried.append((name, height))
        if self._best is None or height < self._best.height:
            self._best = Packing(name, offset, height)
            return True
        return False

    def pull(self, name: str, order: Ints) -> None:
        """Place what reached the top before everything else, again and again while that helps."""
        for number in range(_PULLS):
            assert self._best is not None
            high = self._best.offset + self._lives.size == self._best.height
            front = high[order]
            order = np.concatenate([order[front], order[~front]])
            if not self.first_fit(f"{name} ({number + 1})", order):
                break

    def answer(self) -> Packed:
        assert self._best is not None
        return Packed(self._best, tuple(self._tried), tuple(self._skipped))


def first_fit(lives: Lives, order: Ints) -> Ints:
    """Place one life after the other at the lowest address that is free as long as it lives.

    Args:
        lives: what is to be placed.
        order: row numbers, first to last.

    Returns:
        int64, shape ``(n,)``: where each lies.
    """
    n = len(lives)
    out = np.zeros(n, dtype=np.int64)
    # Times as numbers of starts: small integers, and comparisons are what takes time.
    starts = np.arange(n, dtype=np.int32)
    ends = np.searchsorted(lives.start, lives.end).astype(np.int32)
    start, end = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.int32)  # of what is placed, in address order
    low, high = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    sizes = lives.size.tolist()
    for placed, row in enumerate(order.tolist()):
        size = sizes[row]
        near = np.flatnonzero((start[:placed] < ends[row]) & (end[:placed] > starts[row]))
        at = 0
        if len(near):
            top = np.maximum.accumulate(high[near])
            below = low[near]
            if below[0] < size:
                fits = below[1:] - top[:-1] >= size
                first = int(fits.argmax()) if len(fits) else 0
                at = int(top[first]) if len(fits) and fits[first] else int(top[-1])
        out[row] = at
        to = int(np.searchsorted(low[:placed], at))
        for column, value in ((start, starts[row]), (end, ends[row]), (low, at), (high, at + size)):
            column[to + 1 : placed + 1] = column[to:placed]
            column[to] = value
    return out


def best_fit(lives: Lives) -> Ints:
    """Place lives in order of time, each into the smallest hole that is free when it begins.

    What an allocator could do that sees one request at a time, in a single range from which nothing goes back.

    Returns:
        int64, shape ``(n,)``: where each lies.
    """
    out = np.zeros(len(lives), dtype=np.int64)
    holes: list[tuple[int, int]] = []  # bytes, address
    by_start: dict[int, int] = {}
    by_end: dict[int, int] = {}
    height = 0

    def drop(at: int) -> int:
        size = by_start.pop(at)
        del by_end[at + size]
        del holes[bisect_left(holes, (size, at))]
        return size

    def add(at: int, size: int) -> None:
        insort(holes, (size, at))
        by_start[at] = size
        by_end[at + size] = at

    leaving = np.argsort(lives.end, kind="stable").tolist()
    ends, sizes = lives.end.tolist(), lives.size.tolist()
    gone = 0
    for row, begin in enumerate(lives.start.tolist()):
        while gone < len(leaving) and ends[leaving[gone]] <= begin:
            at, size = int(out[leaving[gone]]), sizes[leaving[gone]]
            gone += 1
            if at + size in by_start:
                size += drop(at + size)
            if at in by_end:
                at = by_end[at]
                size += drop(at)
            add(at, size)
        size = sizes[row]
        found = bisect_left(holes, (size, -1))
        if found < len(holes):
            room, at = holes[found]
            drop(at)
            if room > size:
                add(at + size, room - size)
        else:
            at = height
            if height in by_end:  # the hole at the top grows
                at = by_end[height]
                drop(at)
            height = at + size
        out[row] = at
    return out
