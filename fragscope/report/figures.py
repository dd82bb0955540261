"""Bokeh figures: the variants of a group over their phases, and a memory map per variant.

Nothing here carries text from a results file: variants appear as letters, which the page explains beside the figure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    CustomJSHover,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.annotations import BoxAnnotation, Span

from fragscope.measure import decimate
from fragscope.report.colors import line_name, placeholder
from fragscope.report.drawing import Drawing, label_at, new_plot, pack, unit_for
from fragscope.report.memory_map import AddressRanges, Canvas, CellState, MemoryMap, address_ranges, memory_map
from fragscope.report.pools import Places, is_plain, places
from fragscope.report.traces import Recording, first_row

LINE_POINTS = 500
"""Rows kept of each counter; every peak is among them."""
MAP_ROWS = 320
MAP_COLUMNS = 800
_LEAD = 0.04  # share of the phase's length shown before it

STATE_WORDS: dict[CellState, str] = {
    CellState.NOT_RESERVED: "not reserved",
    CellState.RELEASABLE: "releasable: idle in a wholly idle segment or page",
    CellState.BASE: "live since before the phase",
    CellState.PHASE: "live from inside the phase",
    CellState.BASE_WITH_HOLES: "live since before the phase, with stranded holes",
    CellState.PHASE_WITH_HOLES: "live from inside the phase, with stranded holes",
    CellState.STRANDED: "stranded: idle, pinned by a live block",
    CellState.POOL_IDLE: "idle in a private pool that has users",
}


def progress_figure(recordings: list[tuple[str, int, Recording]]) -> Drawing:
    """All variants of a group on one axis: allocated (solid) and reserved (dashed) over the measured phase.

    Where memory was taken past the allocator, reserved plus that is there too (dotted).

    The horizontal axis is the share of each variant's own events, since variants do the same work in very different
    numbers of events; it is not time.

    Args:
        recordings: letter, colour number and Recording of each variant.
    """
    largest = max(int(r.timeline.hbm[r.rows].max(initial=0)) for _, _, r in recordings)
    unit, unit_name = unit_for(largest)
    height = 340
    plot = new_plot(
        height, x_range=Range1d(start=0, end=1), y_range=Range1d(start=0, end=max(largest, 1) / unit * 1.08)
    )
    plot.xaxis.formatter = NumeralTickFormatter(format="0%")
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    plot.xaxis.axis_label = "share of each variant's own events"
    plot.yaxis.axis_label = unit_name
    bases = {int(r.timeline.allocated[r.rows.start]) for _, _, r in recordings}
    if len(bases) == 1:
        _mark_base(plot, bases.pop() / unit)
    peaks = [(letter, number, *_peak(r)) for letter, number, r in recordings]
    for letter, number, recording in recordings:
        _add_lines(plot, (letter, number), recording, (unit, unit_name))
    for (letter, number, share, value), right in zip(peaks, _label_places(peaks, largest), strict=True):
        color = placeholder(line_name(number))
        dot = plot.scatter([share], [value / unit], size=7, color=color, line_color=placeholder("paper"))
        dot.tags = [letter]  # what the page's buttons find a variant's parts by
        label = label_at(share, value / unit, letter, "ink")
        label.update(tags=[letter], x_offset=right, y_offset=6, text_color=color, text_font_style="bold")
        label.update(text_align="left" if share < 0.02 else "right" if share > 0.98 else "center")
        plot.add_layout(label)
    return pack(plot, height)


def has_raw(recording: Recording) -> bool:
    """Whether memory was held past the allocator at any time of the phase."""
    return bool(recording.timeline.raw[recording.rows].any())


def _mark_base(plot: Any, base: float) -> None:
    plot.add_layout(BoxAnnotation(top=base, fill_color=placeholder("muted"), fill_alpha=0.07, line_color=None))
    plot.add_layout(Span(location=base, dimension="width", line_color=placeholder("muted"), line_dash="dotted"))
    label = label_at(0, base, "base", "muted")
    label.update(x_offset=6, y_offset=-17)
    plot.add_layout(label)


def _peak(recording: Recording) -> tuple[float, int]:
    """Where in the phase allocated was largest, as a share, and how much that was."""
    allocated = recording.timeline.allocated[recording.rows]
    row = int(np.argmax(allocated))
    return row / max(len(allocated) - 1, 1), int(allocated[row])


def _label_places(peaks: list[tuple[str, int, float, int]], largest: int) -> list[int]:
    """Horizontal offset of each peak's letter, so that letters of nearby peaks stand side by side."""
    out = []
    for i, (_, _, share, value) in enumerate(peaks):
        near = sum(abs(s - share) < 0.05 and abs(v - value) < 0.05 * max(largest, 1) for _, _, s, v in peaks[:i])
        out.append((-1 if share > 0.9 else 1) * 16 * near)
    return out


def _add_lines(plot: Any, variant: tuple[str, int], recording: Recording, units: tuple[int, str]) -> None:
    (letter, number), (unit, unit_name) = variant, units
    line, rows = recording.timeline, recording.rows
    allocated, reserved = line.allocated[rows], line.reserved[rows]
    kept = np.union1d(decimate(allocated, LINE_POINTS), decimate(reserved, LINE_POINTS))
    is_raw, hbm = has_raw(recording), line.hbm[rows]
    if is_raw:
        kept = np.union1d(kept, decimate(hbm, LINE_POINTS))
    last = max(len(allocated) - 1, 1)
    # A counter holds its value until the next event: each kept row is drawn as a step.
    at = np.repeat(kept, 2)
    x = np.concatenate([at[1:], at[-1:]]) / last
    source = ColumnDataSource(
        {
            "x": x.astype(np.float32),
            "event": (at + rows.start).astype(np.int32),
            "allocated": (allocated[at] / unit).astype(np.float32),
            "reserved": (reserved[at] / unit).astype(np.float32),
            **({"hbm": (hbm[at] / unit).astype(np.float32)} if is_raw else {}),
        }
    )
    color = placeholder(line_name(number))
    dashed = plot.line("x", "reserved", source=source, color=color, line_dash=[5, 4], alpha=0.75)
    solid = plot.line("x", "allocated", source=source, color=color, line_width=2, line_join="round")
    dashed.tags = solid.tags = [letter]
    if is_raw:
        dotted = plot.line("x", "hbm", source=source, color=color, line_dash=[1, 3], line_width=2, alpha=0.75)
        dotted.tags = [letter]
    plot.add_tools(
        HoverTool(
            renderers=[solid],
            line_policy="nearest",
            visible=False,
            tooltips=[
                ("variant", letter),
                ("event", "@event{0,0}"),
                ("allocated", f"@allocated{{0,0.000}} {unit_name}"),
                ("reserved", f"@reserved{{0,0.000}} {unit_name}"),
                *([("with memory past the allocator", f"@hbm{{0,0.000}} {unit_name}")] if is_raw else []),
            ],
        )
    )


def window(recording: Recording) -> slice:
    """Rows a memory map covers: the phase and a little before it."""
    rows = recording.rows
    lead = max(2, round((rows.stop - rows.start) * _LEAD)) if recording.timeline.measured is not None else 0
    return slice(max(first_row(recording.trace), rows.start - lead), rows.stop)


def map_scale(recordings: list[Recording]) -> int:
    """Bytes of address space that the tallest memory map of a group shows; all use its scale."""
    return max((address_ranges(r.lives, window(r)).extent for r in recordings), default=0) or 1


def raster(recording: Recording, scale: int) -> MemoryMap:
    """The memory map of a Recording, with cells as tall as the group's tallest map allows."""
    rows = window(recording)
    ranges = address_ranges(recording.lives, rows)
    begin = recording.rows.start if recording.timeline.measured is not None else rows.start
    return memory_map(recording.lives, Canvas(ranges, rows, begin, scale / MAP_ROWS, MAP_COLUMNS))


def map_figure(recording: Recording, drawn: MemoryMap, scale: int) -> Drawing:
    """A memory map: addresses upwards without the gaps between segments, events to the right.

    Where there is more than ordinary segments of the default pool, pointing at an address says what kind it is.

    Args:
        recording: what it shows.
        drawn: from ``raster``.
        scale: bytes that the vertical axis covers.
    """
    unit, unit_name = unit_for(scale)
    height, canvas = 320, drawn.canvas
    rows, columns = drawn.cells.shape
    plot = new_plot(
        height,
        x_range=Range1d(start=canvas.rows.start, end=max(canvas.rows.stop, canvas.rows.start + 1)),
        y_range=Range1d(start=0, end=scale / unit),
    )
    plot.ygrid.grid_line_color = None
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    plot.xaxis.axis_label = "event"
    plot.xaxis.ticker.desired_num_ticks = 4  # more run into each other on a telephone
    plot.yaxis.axis_label = f"address, gaps left out ({unit_name})"
    image = plot.image(
        image=[drawn.cells],
        x=canvas.rows.start,
        y=0,
        dw=columns * canvas.events_per_cell,
        dh=rows * canvas.bytes_per_cell / unit,
        color_mapper=LinearColorMapper(
            palette=[placeholder(f"cell-{s.value}") for s in CellState], low=-0.5, high=len(CellState) - 0.5
        ),
    )
    if recording.timeline.measured is not None:
        plot.add_layout(
            Span(location=recording.rows.start, dimension="height", line_color=placeholder("ink"), line_dash=[2, 3])
        )
    kinds = None if is_plain(recording.lives) else places(recording.trace, recording.lives, canvas.rows, canvas.ranges)
    _add_map_hover(plot, image, canvas.ranges, unit, kinds)
    return pack(plot, height)


def _add_map_hover(plot: Any, image: Any, ranges: AddressRanges, unit: int, kinds: Places | None) -> None:
    # Addresses stay below 2**53, so a double holds them.
    address = CustomJSHover(
        args={
            "start": ranges.start.astype(np.float64),
            "offset": ranges.offset.astype(np.float64),
            "extent": ranges.extent,
            "unit": unit,
            "places": [] if kinds is None else kinds.offset.astype(np.float64),
            "word": [] if kinds is None else kinds.word.astype(np.int32),
            "words": [] if kinds is None else list(kinds.words),
        },
        code="""
            const at = Math.floor(special_vars.y * unit)
            if (at < 0 || at >= extent) return "outside"
            let i = offset.length - 1
            while (offset[i] > at) i--
            const address = "0x" + (start[i] + at - offset[i]).toString(16)
            let k = places.length - 1
            while (k >= 0 && places[k] > at) k--
            return k < 0 ? address : address + ", " + words[word[k]]
        """,
    )
    words = [STATE_WORDS[s] for s in CellState]
    state = CustomJSHover(args={"words": words}, code="return words[value] ?? ''")
    event = CustomJSHover(code="return Math.floor(special_vars.x).toLocaleString('en')")
    plot.add_tools(
        HoverTool(
            renderers=[image],
            visible=False,
            tooltips=[("state", "@image{custom}"), ("address", "$y{custom}"), ("event", "$x{custom}")],
            formatters={"@image": state, "$y": address, "$x": event},
        )
    )
