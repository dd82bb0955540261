"""Which bytes a tensor covers, and whether two tensors share one. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_TRIES = 4096
"""Steps of the search for a common byte; only views of one storage with unlike strides come near it."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes ``start`` to ``end``, all of them or those of a strided view.

    Attributes:
        start: first byte that is covered.
        end: one past the last byte that is covered.
        run: bytes that lie together at each step; ``end - start`` where nothing between is left out.
        steps: (stride in bytes, count) of the repetitions of a run, widest stride first; empty where all are covered.
    """

    start: int
    end: int
    run: int
    steps: tuple[tuple[int, int], ...] = ()

    @property
    def dense(self) -> bool:
        """Whether every byte between start and end is covered."""
        return not self.steps


def extent_of(start: int, shape: Iterable[int], strides: Iterable[int], itemsize: int) -> Extent | None:
    """The bytes of a tensor whose first element is at ``start``; strides count elements. None if it has none."""
    dims = []
    for count, stride in zip(shape, strides, strict=True):
        if count == 0:
            return None
        if count > 1 and stride:  # a stride of 0 repeats the same element
            dims.append((stride * itemsize, count))
    dims.sort()
    run = itemsize
    left: list[tuple[int, int]] = []
    for stride, count in dims:
        if not left and stride <= run:
            run += stride * (count - 1)
        else:
            left.append((stride, count))
    left.reverse()
    end = start + run + sum(stride * (count - 1) for stride, count in left)
    return Extent(start, end, run, tuple(left))


def share_a_byte(a: Extent, b: Extent) -> bool:
    """Whether two extents have a byte in common.

    Looks for a step of each, so that the runs there overlap: strides times differences of steps make up the distance
    between the starts, within the length of a run. Where that takes too many tries the answer is yes.
    """
    if a.start >= b.end or b.start >= a.end:
        return False
    if a.dense and b.dense:
        return True
    # a.start + sum(stride x i) + u == b.start + sum(stride x j) + v, with 0 <= u < a.run and 0 <= v < b.run.
    ranges: dict[int, list[int]] = {}  # stride -> least and most of the sum of its i - j
    for stride, count in a.steps:
        ranges.setdefault(stride, [0, 0])[1] += count - 1
    for stride, count in b.steps:
        ranges.setdefault(stride, [0, 0])[0] -= count - 1
    dims = [(stride, low, high) for stride, (low, high) in sorted(ranges.items())]
    reaches = [(-(b.run - 1), a.run - 1)]  # what u - v and the narrower strides can bridge
    for stride, low, high in dims:
        least, most = reaches[-1]
        reaches.append((least + stride * low, most + stride * high))
    tries = 0

    def bridged(position: int, distance: int) -> bool:
        """Whether the ``position`` narrowest strides, and the runs, can make up the distance."""
        nonlocal tries
        tries += 1
        if tries > _TRIES:
            return True
        least, most = reaches[position]
        if not least <= distance <= most:
            return False
        if position == 0:
            return True
        stride, low, high = dims[position - 1]
        least, most = reaches[position - 1]
        first = max(low, -((most - distance) // stride))
        last = min(high, (distance - least) // stride)
        return any(bridged(position - 1, distance - stride * k) for k in range(first, last + 1))

    return bridged(len(dims), b.start - a.start)
