"""Which work touched which memory last, address by address. Knows no torch.

Memory that was touched is cut into cells, each of which was touched as one. A cell keeps, for every stream, its last
read and its last write. Older ones tell nothing new: what has no order against them has none against the last one on
the same stream either. A write that covers a cell takes the place of everything that it comes after.

Cells only say where to look; whether two accesses share a byte is told by their extents. So those that a strided access
meets are made one if they are many, and a cell keeps, for every stream, the last access of each of a number of views.
Beyond it they count as one access of all they span: nothing is missed, and parts may be taken to overlap.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fragscope.record.virtual.extent import Extent, share_a_byte

_CELLS = 64
"""Cells that a strided access leaves apart."""
_VIEWS = 64
"""Views of a stream that a cell tells apart."""

Place = tuple[str, int]
"""File and line of the program."""


@dataclass(frozen=True, slots=True)
class Access:
    """One piece of work reads or writes memory.

    Attributes:
        what: operator or kernel.
        where: the program's line, None where none of its frames is running.
        stream: number of the stream.
        tick: position among the work of the stream.
        owner: lifetime id of the allocation it was meant for.
        extent: bytes, by their addresses.
        writes: whether it may write; it may read then, too.
    """

    what: str
    where: Place | None
    stream: int
    tick: int
    owner: int
    extent: Extent
    writes: bool


Clock = list[int]
"""For each stream, how much of its work is known to be over; shorter than the list of streams where it knows none."""

_Views = dict[Extent, Access]
_Last = dict[int, _Views]  # by stream


@dataclass(slots=True)
class _Cell:
    end: int
    reads: _Last
    writes: _Last


class Shadow:
    """The last accesses of all memory."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._cells: list[_Cell] = []

    def touch(self, access: Access, clock: Clock) -> list[Access]:
        """Note an access by work that comes after what its clock says.

        Returns:
            The earlier accesses of the same memory that are not over by then, where one of both writes.
        """
        found: dict[Access, None] = {}
        stream, dense = access.stream, access.extent.dense
        cells = self._cover(access.extent)
        if not dense and len(cells) > _CELLS:
            cells = [self._join(access.extent)]
        for cell in cells:
            for last in (cell.writes, cell.reads) if access.writes else (cell.writes,):
                if len(last) > 1 or stream not in last:
                    _conflicts(last, access, clock, found)
            if not access.writes:
                _keep(cell.reads, access)
                continue
            if dense:
                cell.reads = _not_over(cell.reads, clock)
                cell.writes = _not_over(cell.writes, clock)
            _keep(cell.writes, access)
        if access.writes and dense and len(cells) > 1:
            self._merge(access.extent)
        return list(found)

    def forget(self, extent: Extent, over: Clock) -> None:
        """Whatever touches these bytes next comes after what this clock says."""
        for cell in self._cover(extent):
            cell.reads = _not_over(cell.reads, over)
            cell.writes = _not_over(cell.writes, over)

    def _cover(self, extent: Extent) -> list[_Cell]:
        """The cells that make up an extent exactly; cut, and added, where there are none yet."""
        starts, cells, start, end = self._starts, self._cells, extent.start, extent.end
        first = bisect_right(starts, start) - 1
        if first >= 0 and starts[first] == start and cells[first].end == end:
            return [cells[first]]
        if first < 0 or cells[first].end <= start:
            first += 1
        last, at = first, start
        new_starts: list[int] = []
        new_cells: list[_Cell] = []
        inside: list[_Cell] = []
        while last < len(starts) and starts[last] < end:
            cell, begin = cells[last], starts[last]
            if begin < start:
                new_starts.append(begin)
                new_cells.append(_Cell(start, _copied(cell.reads), _copied(cell.writes)))
                begin = start
            elif begin > at:
                inside.append(_Cell(begin, {}, {}))
                new_starts.append(at)
                new_cells.append(inside[-1])
            at = min(cell.end, end)
            inside.append(_Cell(at, _copied(cell.reads), _copied(cell.writes)) if cell.end > end else cell)
            new_starts.append(begin)
            new_cells.append(inside[-1])
            if cell.end > end:
                new_starts.append(end)
                new_cells.append(cell)
            last += 1
        if at < end:
            inside.append(_Cell(end, {}, {}))
            new_starts.append(at)
            new_cells.append(inside[-1])
        starts[first:last] = new_starts
        cells[first:last] = new_cells
        return inside

    def _join(self, extent: Extent) -> _Cell:
        """One cell in place of those that make up an extent, which knows what they do."""
        first, last = bisect_left(self._starts, extent.start), bisect_left(self._starts, extent.end)
        cells = self._cells[first:last]
        joined = _Cell(extent.end, _joined(c.reads for c in cells), _joined(c.writes for c in cells))
        self._starts[first:last] = [extent.start]
        self._cells[first:last] = [joined]
        return joined

    def _merge(self, extent: Extent) -> None:
        """One cell in place of several that know nothing but the last write."""
        first = bisect_right(self._starts, extent.start) - 1
        last = first
        while last < len(self._starts) and self._starts[last] < extent.end:
            cell = self._cells[last]
            if cell.reads or len(cell.writes) > 1:
                return
            last += 1
        if last - first > 1:
            self._cells[first].end = extent.end
            del self._starts[first + 1 : last]
            del self._cells[first + 1 : last]


def _keep(last: _Last, access: Access) -> None:
    if access.extent.dense:
        last[access.stream] = {access.extent: access}
    else:
        views = last.setdefault(access.stream, {})
        views[access.extent] = access
        last[access.stream] = _bounded(views)


def _bounded(views: _Views) -> _Views:
    """Views of one stream, or one access of all they span where they are too many."""
    if len(views) <= _VIEWS:
        return views
    start, end = min(view.start for view in views), max(view.end for view in views)
    span = Extent(start, end, end - start)
    return {span: replace(max(views.values(), key=lambda access: access.tick), extent=span)}


def _joined(lasts: Iterable[_Last]) -> _Last:
    """What several cells know."""
    out: _Last = {}
    for last in lasts:
        for stream, views in last.items():
            known = out.setdefault(stream, {})
            for view, access in views.items():
                if view not in known or known[view].tick < access.tick:
                    known[view] = access
    return {stream: _bounded(views) for stream, views in out.items()}


def _conflicts(last: _Last, access: Access, clock: Clock, found: dict[Access, None]) -> None:
    for stream, views in last.items():
        if stream == access.stream:
            continue
        done = clock[stream] if stream < len(clock) else 0
        for earlier in views.values():
            if earlier.tick > done and share_a_byte(earlier.extent, access.extent):
                found[earlier] = None


def _not_over(last: _Last, clock: Clock) -> _Last:
    """What is not known to be over."""
    kept: _Last = {}
    for other, views in last.items():
        done = clock[other] if other < len(clock) else 0
        left = {view: access for view, access in views.items() if access.tick > done}
        if left:
            kept[other] = left
    return kept


def _copied(last: _Last) -> _Last:
    return {stream: dict(views) for stream, views in last.items()}
