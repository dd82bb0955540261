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

from fragscope.measure import Lifetimes
from fragscope.measure.lifetimes import Ints

Shares = npt.NDArray[np.float64]

HOLE_SHARE = 1 / 16
"""From this share of a cell on, stranded bytes show."""
_CHUNK = 100_000  # rectangles drawn at once: 16 corners each, 26 MB


class CellState(IntEnum):
    """What a cell shows. The order is that of the page's colours."""

    NOT_RESERVED = 0
    RELEASABLE = 1
    """Mostly idle in wholly idle segments."""
    BASE = 2
    """Mostly blocks handed out before the phase."""
    PHASE = 3
    """Mostly blocks handed out inside the phase."""
    BASE_WITH_HOLES = 4
    """Like ``BASE``, at least ``HOLE_SHARE`` of the cell stranded."""
    PHASE_WITH_HOLES = 5
    """Like ``PHASE``, at least ``HOLE_SHARE`` of the cell stranded."""
    STRANDED = 6
    """Mostly idle bytes in segments that an active block keeps from being returned."""


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
    begin, end = _in_rows(lives, lives.segments.born, lives.segments.died)
    seen = (begin < rows.stop) & (end > rows.start)
    start, size = lives.segments.addr[seen], lives.segments.size[seen]
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
    return MemoryMap(_decide(*cell_shares(lives, canvas)), canvas)


def cell_shares(lives: Lifetimes, canvas: Canvas) -> tuple[Shares, Shares, Shares, Shares]:
    """Which share of each cell's area was what.

    Returns:
        ``(reserved, in_use, base, phase)``, float64 of the canvas's shape, 0 to 1: reserved at all; in a segment that
        holds an active block; in active blocks handed out before the phase; in those handed out since.
    """
    rows, segments, blocks = canvas.rows, lives.segments, lives.blocks

    def draw(born: Ints, died: Ints, addr: Ints, size: Ints) -> Shares:
        begin, end = _in_rows(lives, born, died)
        begin, end = np.clip(begin, rows.start, rows.stop), np.clip(end, rows.start, rows.stop)
        shown = (begin < end) & (size > 0)
        begin, end, addr, size = begin[shown], end[shown], addr[shown], size[shown]
        low = canvas.ranges.place(addr)
        x0, x1 = (begin - rows.start) / canvas.events_per_cell, (end - rows.start) / canvas.events_per_cell
        y0, y1 = low / canvas.bytes_per_cell, (low + size) / canvas.bytes_per_cell
        return _coverage((x0, x1), (y0, y1), canvas.shape)

    segment, since, until = _in_use(lives)
    first_row = lives.request[blocks.born] if len(blocks.born) else blocks.born
    ours = first_row >= canvas.phase_begin

    def draw_blocks(chosen: npt.NDArray[np.bool_]) -> Shares:
        return draw(blocks.born[chosen], blocks.died[chosen], blocks.addr[chosen], blocks.size[chosen])

    return (
        draw(segments.born, segments.died, segments.addr, segments.size),
        draw(since, until, segments.addr[segment], segments.size[segment]),
        draw_blocks(~ours),
        draw_blocks(ours),
    )


def _in_rows(lives: Lifetimes, born: Ints, died: Ints) -> tuple[Ints, Ints]:
    """From positions to request rows: visible after the row that made it until before the row that ended it."""
    row = np.append(lives.request, len(lives.upto))
    return row[born], row[died]


def _in_use(lives: Lifetimes) -> tuple[Ints, Ints, Ints]:
    """Spans in which a segment holds active blocks: segment, first position, position of the end."""
    segment, position, before, after = lives.busy()
    starts, ends = (before == 0) & (after > 0), (before > 0) & (after == 0)
    since = position[starts]
    until = np.full(len(since), lives.end, dtype=np.int64)
    # Per segment starts and ends alternate, so the n-th end belongs to the span whose start precedes it.
    span = np.cumsum(starts) - 1
    until[span[ends]] = position[ends]
    return segment[starts], since, until


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


def _decide(reserved: Shares, in_use: Shares, base: Shares, phase: Shares) -> npt.NDArray[np.uint8]:
    live = base + phase
    stranded, releasable, nothing = in_use - live, reserved - in_use, 1 - reserved
    own = phase > base
    tiny = 1e-6  # running sums leave rounding errors of this order at most
    holes = stranded >= HOLE_SHARE
    out = np.where(own, CellState.PHASE, CellState.BASE)
    out = np.where(holes, np.where(own, CellState.PHASE_WITH_HOLES, CellState.BASE_WITH_HOLES), out)
    idle = (np.maximum(releasable, nothing) > live) & ~(holes & (live > tiny))
    out = np.where(idle, np.where(releasable >= nothing, CellState.RELEASABLE, CellState.NOT_RESERVED), out)
    out = np.where((stranded >= 0.5 - tiny) | (holes & (live <= tiny)), CellState.STRANDED, out)
    return out.astype(np.uint8)
