"""The memory map: what every byte of reserved address space was at every event, as a small raster.

Addresses run upwards with the gaps between segments left out, events run to the right. A cell is a range of addresses
during a range of events; what it shows is decided by areas, not by a sample inside it, so a hole cannot fall between
two samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from fragscope.measure import Lifetimes, busy
from fragscope.measure.segments import Ints

Shares = npt.NDArray[np.float64]

HOLE_SHARE = 1 / 16
"""From this share of a cell on, stranded bytes show."""
_CHUNK = 100_000  # rectangles drawn at once: 16 corners each, 26 MB


class CellState(IntEnum):
    """What a cell shows. The order is that of the page's colours."""

    NOT_RESERVED = 0
    RELEASABLE = 1
    """Mostly idle in wholly idle segments, or in wholly idle pages of expandable ones."""
    BASE = 2
    """Mostly blocks handed out before the phase."""
    PHASE = 3
    """Mostly blocks handed out inside the phase."""
    BASE_WITH_HOLES = 4
    """Like ``BASE``, at least ``HOLE_SHARE`` of the cell stranded."""
    PHASE_WITH_HOLES = 5
    """Like ``PHASE``, at least ``HOLE_SHARE`` of the cell stranded."""
    STRANDED = 6
    """Mostly idle bytes in segments or pages that an active block keeps from being returned."""
    POOL_IDLE = 7
    """Mostly idle bytes in private pools that have users, which keep them from being returned."""


@dataclass(frozen=True, slots=True)
class AddressRanges:
    """Addresses that were ever reserved in a window, with the gaps left out.

    Attributes:
        start: int64, first address of each contiguous range, ascending.
        size: int64, bytes of each range.
        offset: int64, where each range begins once the gaps are left out.
    """

    start: Ints
    size: Ints
    offset: Ints

    @property
    def extent(self) -> int:
        """Bytes of all ranges."""
        return int(self.size.sum())

    def place(self, addr: Ints) -> Ints:
        """Offsets of addresses that lie in the ranges."""
        at = np.searchsorted(self.start, addr, side="right") - 1
        return self.offset[at] + addr - self.start[at]


@dataclass(frozen=True, slots=True)
class Canvas:
    """What a memory map covers and how finely.

    Attributes:
        ranges: the vertical axis.
        rows: request rows, the horizontal axis.
        phase_begin: request row from which on a block counts as the phase's own.
        bytes_per_cell: height of a cell.
        most_columns: fewer are used where there are fewer rows.
    """

    ranges: AddressRanges
    rows: slice
    phase_begin: int
    bytes_per_cell: float
    most_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells, at least one each."""
        columns = min(self.most_columns, self.rows.stop - self.rows.start)
        return max(1, int(np.ceil(self.ranges.extent / self.bytes_per_cell))), max(1, columns)

    @property
    def events_per_cell(self) -> float:
        """Width of a cell, at least 1."""
        return max(1, int(self.rows.stop) - int(self.rows.start)) / self.shape[1]


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """A raster of memory over events.

    Attributes:
        cells: uint8 ``CellState``, shape ``canvas.shape``; row 0 holds the lowest addresses, column 0 the first events.
        canvas: what it covers.
    """

    cells: npt.NDArray[np.uint8]
    canvas: Canvas


def address_ranges(lives: Lifetimes, rows: slice) -> AddressRanges:
    """The address space reserved at any time while the request rows were served."""
    begin, end = _in_rows(lives, lives.pieces.born, lives.pieces.died)
    seen = (begin < rows.stop) & (end > rows.start)
    start, size = lives.pieces.addr[seen], lives.pieces.size[seen]
    order = np.argsort(start, kind="stable")
    start, stop = start[order], (start + size)[order]
    if len(start) == 0:
        return AddressRanges(start, start, start)
    reach = np.maximum.accumulate(stop)
    first = np.concatenate([[True], start[1:] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    start, size = start[first], reach[last] - start[first]
    return AddressRanges(start, size, np.cumsum(size) - size)


def memory_map(lives: Lifetimes, canvas: Canvas) -> MemoryMap:
    """Draw what lived where."""
    return MemoryMap(_decide(cell_shares(lives, canvas)), canvas)


@dataclass(frozen=True, slots=True)
class CellShares:
    """Which share of each cell's area was what; each float64 of the canvas's shape, 0 to 1.

    What is reserved and none of the others is releasable.

    Attributes:
        reserved: held from the driver.
        stranded: idle, in segments or pages that hold an active block.
        pool_idle: idle, in private pools that have users.
        base: in active blocks handed out before the phase.
        phase: in active blocks handed out since.
    """

    reserved: Shares
    stranded: Shares
    pool_idle: Shares
    base: Shares
    phase: Shares


@dataclass(frozen=True, slots=True)
class _Areas:
    """Rectangles of memory over request rows; each int64 of shape ``(n,)``."""

    begin: Ints
    end: Ints
    addr: Ints
    size: Ints
    pool: Ints

    def only(self, chosen: npt.NDArray[np.bool_]) -> _Areas:
        return _Areas(*(getattr(self, name)[chosen] for name in _Areas.__slots__))


def cell_shares(lives: Lifetimes, canvas: Canvas) -> CellShares:
    """Measure what filled each cell."""
    blocks, pool_of = lives.blocks, lives.segments.pool
    live = _areas(lives, blocks.born, blocks.died, blocks.addr, blocks.size, pool_of[blocks.segment])
    ours = live.begin >= canvas.phase_begin
    base, phase = _draw(live.only(~ours), canvas), _draw(live.only(ours), canvas)
    pieces = lives.pieces
    held = _areas(lives, pieces.born, pieces.died, pieces.addr, pieces.size, pool_of[pieces.segment])
    units = busy(lives)
    row, since, until = units.spans()
    until = np.where(until < 0, lives.end, until)
    in_use = _areas(lives, since, until, units.addr[row], units.size[row], pool_of[units.segment[row]])
    stranded, pool_idle = _draw(in_use, canvas) - base - phase, np.zeros(canvas.shape)
    if len(lives.holds):
        kept_live = _draw(_while_held(lives, live), canvas)
        pool_idle = _draw(_while_held(lives, held), canvas) - kept_live
        stranded -= _draw(_while_held(lives, in_use), canvas) - kept_live
    return CellShares(_draw(held, canvas), stranded, pool_idle, base, phase)


def _areas(lives: Lifetimes, born: Ints, died: Ints, addr: Ints, size: Ints, pool: Ints) -> _Areas:
    begin, end = _in_rows(lives, born, died)
    return _Areas(begin, end, addr, size, pool)


def _while_held(lives: Lifetimes, areas: _Areas) -> _Areas:
    """The parts of areas that lie in private pools while these had users: none, one or several of each."""
    holds, rows = lives.holds, len(lives.upto) + 1
    # Spans of a pool follow each other, so their ends and beginnings are ascending in (pool, row).
    first = np.searchsorted(holds.pool * rows + holds.until, areas.pool * rows + areas.begin, side="right")
    last = np.searchsorted(holds.pool * rows + holds.since, areas.pool * rows + areas.end, side="left")
    count = np.maximum(last - first, 0)
    area = np.repeat(np.arange(len(count)), count)
    span = np.arange(len(area)) - np.repeat(np.cumsum(count) - count, count) + first[area]
    begin, end = np.maximum(areas.begin[area], holds.since[span]), np.minimum(areas.end[area], holds.until[span])
    return _Areas(begin, end, areas.addr[area], areas.size[area], areas.pool[area])


def _draw(areas: _Areas, canvas: Canvas) -> Shares:
    """The share of each cell that areas cover, which do not overlap."""
    rows = canvas.rows
    begin, end = np.clip(areas.begin, rows.start, rows.stop), np.clip(areas.end, rows.start, rows.stop)
    shown = (begin < end) & (areas.size > 0)
    begin, end, addr, size = begin[shown], end[shown], areas.addr[shown], areas.size[shown]
    low = canvas.ranges.place(addr)
    x0, x1 = (begin - rows.start) / canvas.events_per_cell, (end - rows.start) / canvas.events_per_cell
    y0, y1 = low / canvas.bytes_per_cell, (low + size) / canvas.bytes_per_cell
    return _coverage((x0, x1), (y0, y1), canvas.shape)


def _in_rows(lives: Lifetimes, born: Ints, died: Ints) -> tuple[Ints, Ints]:
    """From positions to request rows: visible after the row that made it until before the row that ended it."""
    row = np.append(lives.request, len(lives.upto))
    return row[born], row[died]


def _coverage(x: tuple[Shares, Shares], y: tuple[Shares, Shares], shape: tuple[int, int]) -> Shares:
    """Area that rectangles, given by their lower and upper edges, cover in each cell of a grid with unit cells.

    The share of cell i that lies beyond a coordinate p is a running sum of two numbers, so a rectangle is the running
    sum, along both axes, of 16 numbers at its corners: exact, and independent of how large rectangles are.
    """
    height, width = shape
    grid = np.zeros((height + 2) * (width + 2))
    for start in range(0, len(x[0]), _CHUNK):
        part = slice(start, start + _CHUNK)
        x_at, x_weight = _edges(x[0][part], x[1][part], width)
        y_at, y_weight = _edges(y[0][part], y[1][part], height)
        at = y_at[:, :, None] * (width + 2) + x_at[:, None, :]
        weight = y_weight[:, :, None] * x_weight[:, None, :]
        grid += np.bincount(at.ravel(), weights=weight.ravel(), minlength=grid.size)
    area: Shares = grid.reshape(height + 2, width + 2).cumsum(axis=0).cumsum(axis=1)
    return np.clip(area[:height, :width], 0.0, 1.0)


def _edges(low: Shares, high: Shares, cells: int) -> tuple[Ints, Shares]:
    at, weight = [], []
    for edge, sign in ((low, 1.0), (high, -1.0)):
        cell = np.clip(np.floor(edge).astype(np.int64), 0, cells)
        inside = np.clip(edge - cell, 0.0, 1.0)
        at += [cell, cell + 1]
        weight += [sign * (1 - inside), sign * inside]
    return np.stack(at, axis=1), np.stack(weight, axis=1)


def _decide(shares: CellShares) -> npt.NDArray[np.uint8]:
    live, stranded, kept = shares.base + shares.phase, shares.stranded, shares.pool_idle
    releasable, nothing = shares.reserved - live - stranded - kept, 1 - shares.reserved
    own = shares.phase > shares.base
    tiny = 1e-6  # running sums leave rounding errors of this order at most
    holes = stranded >= HOLE_SHARE
    out = np.where(own, CellState.PHASE, CellState.BASE)
    out = np.where(holes, np.where(own, CellState.PHASE_WITH_HOLES, CellState.BASE_WITH_HOLES), out)
    most = np.maximum(np.maximum(releasable, nothing), kept)
    idle = (most > live) & ~(holes & (live > tiny))
    kind = np.where(releasable >= nothing, CellState.RELEASABLE, CellState.NOT_RESERVED)
    out = np.where(idle, np.where((kept >= most) & (kept > tiny), CellState.POOL_IDLE, kind), out)
    out = np.where((stranded >= 0.5 - tiny) | (holes & (live <= tiny)), CellState.STRANDED, out)
    return out.astype(np.uint8)
