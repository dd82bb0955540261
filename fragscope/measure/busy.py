"""How much of what goes back to the driver only as a whole was in use: ordinary segments, pages of expandable ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fragscope.measure.lifetimes import Lifetimes
from fragscope.measure.segments import Ints


@dataclass(frozen=True, slots=True)
class Busy:
    """Every change of the active bytes in a unit of memory, which is an ordinary segment or a page.

    Pages that one block covers wholly are one unit while it lives. Rows are sorted by ``addr``, then position; each
    column int64 of shape ``(n,)``.

    Attributes:
        segment: row in the ``SegmentTable``.
        addr: first byte of the unit.
        size: bytes of the unit.
        position: of the decision that made the change.
        before: active bytes until then.
        after: active bytes since.
    """

    segment: Ints
    addr: Ints
    size: Ints
    position: Ints
    before: Ints
    after: Ints

    @property
    def stranded_change(self) -> Ints:
        """Bytes by which each row changes what is idle in units in use; stranded, but for private pools with users."""
        later = np.where(self.after > 0, self.size - self.after, 0)
        return later - np.where(self.before > 0, self.size - self.before, 0)

    def spans(self) -> tuple[Ints, Ints, Ints]:
        """When units were in use.

        Returns:
            ``(row, since, until)``, int64: a row of this table for the unit, position of the decision from which on,
            and of the one up to which it held active bytes (``-1``: to the end).
        """
        starts, ends = (self.before == 0) & (self.after > 0), (self.before > 0) & (self.after == 0)
        row = np.flatnonzero(starts)
        until = np.full(len(row), -1, dtype=np.int64)
        # In each unit starts and ends alternate, so the n-th end belongs to the span whose start precedes it.
        span = np.cumsum(starts) - 1
        until[span[ends]] = self.position[ends]
        return row, self.position[row], until


def busy(lives: Lifetimes, *, whole_pages: bool = True) -> Busy:
    """Find the changes, from the blocks alone.

    Args:
        lives: of a Trace.
        whole_pages: with the pages that one block covers wholly; nothing in them is ever idle beside it.
    """
    segment, addr, size, amount, block = _parts(lives, whole_pages)
    born, died = lives.blocks.born[block], lives.blocks.died[block]
    ended = np.flatnonzero(died < lives.end)
    part = np.concatenate([np.arange(len(block)), ended])
    position = np.concatenate([born, died[ended]])
    change = np.concatenate([amount, -amount[ended]])
    order = np.lexsort((position, addr[part]))
    part, position, change = part[order], position[order], change[order]
    unit = addr[part]
    # Memory is idle when it goes back, so a unit that comes again at the same address begins at zero.
    after = running_sums(unit, change)
    return Busy(segment[part], unit, size[part], position, after - change, after)


def running_sums(key: Ints, change: Ints) -> Ints:
    """Running sum of the changes with the same key; int64 like ``change``, the keys ascending."""
    total = np.cumsum(change)
    first = np.searchsorted(key, key, side="left")  # where each key's rows begin
    return total - np.where(first > 0, total[first - 1], 0) if len(total) else total


def _parts(lives: Lifetimes, whole_pages: bool) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Which units each block lies in: segment, address and size of the unit, bytes of the block in it, block."""
    segments, blocks = lives.segments, lives.blocks
    page = segments.page[blocks.segment]
    plain = np.flatnonzero(page == 0)
    home = blocks.segment[plain]
    parts = [(home, segments.addr[home], segments.size[home], blocks.size[plain], plain)]
    paged = np.flatnonzero(page > 0)
    if len(paged):
        parts += _pages(lives, paged, page[paged], whole_pages)
    columns = zip(*parts, strict=True)
    segment, addr, size, amount, block = (np.concatenate(column) for column in columns)
    return segment, addr, size, amount, block


def _pages(lives: Lifetimes, block: Ints, page: Ints, whole_pages: bool) -> list[tuple[Ints, Ints, Ints, Ints, Ints]]:
    """The pages at the two ends of each block, and those between them as one unit."""
    blocks = lives.blocks
    home = blocks.segment[block]
    base = lives.segments.addr[home]
    start = blocks.addr[block] - base
    stop = start + blocks.size[block]
    first = start // page
    last = np.maximum((stop - 1) // page, first)
    several = np.flatnonzero(last > first)

    def unit(chosen: Ints, number: Ints, count: Ints, amount: Ints) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        size = page[chosen]
        return home[chosen], base[chosen] + number * size, count * size, amount, block[chosen]

    one = np.ones(len(block), dtype=np.int64)
    out = [
        unit(np.arange(len(block)), first, one, np.minimum(stop, (first + 1) * page) - start),
        unit(several, last[several], one[several], (stop - last * page)[several]),
    ]
    between = np.flatnonzero(last - first > 1)
    if whole_pages and len(between):
        count = (last - first - 1)[between]
        out.append(unit(between, first[between] + 1, count, count * page[between]))
    return out
