"""The page of ``fragscope thresholds``: a table of limits, and for each model what a launch needs over its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d
from bokeh.models.annotations import Span

from fragscope.allocator import ReplaySettings
from fragscope.report.colors import placeholder
from fragscope.report.drawing import Drawing, label_at, new_plot, pack, unit_for
from fragscope.report.shell import page
from fragscope.thresholds import PADDING, UPSTREAM_CAP, Thresholds
from fragscope.units import format_bytes, mib

HEADINGS = (
    "model", "launch grid", "memory", "upstream cap", "binds", "largest", "its peak", "recommended", "its peak",
)  # fmt: skip
_HEIGHT = 300
_LABEL_STEP = 17  # pixels between the words of two limits


@dataclass(frozen=True, slots=True)
class Section:
    """One model on the page.

    Attributes:
        anchor: its name in addresses.
        found: its limits.
        facts: ``(word, value)`` above the figure.
        drawing: the figure.
        alternative: the figure in words.
    """

    anchor: str
    found: Thresholds
    facts: tuple[tuple[str, str], ...]
    drawing: Drawing
    alternative: str


def render(found: Sequence[Thresholds], settings: ReplaySettings) -> str:
    """The whole page as one string."""
    return page(
        "thresholds.html",
        {"cells": _cells},
        sections=[_section(number, f, settings.capacity) for number, f in enumerate(found)],
        headings=HEADINGS,
        facts=(
            ("tile", f"{found[0].tile} rows"),
            ("free memory", format_bytes(settings.capacity)),
            ("card", settings.card),
            ("allocator rules", f"torch {settings.rules.torch}"),
            ("conf", settings.conf or "default"),
        ),
        cap=f"{UPSTREAM_CAP:,}",
        padding=PADDING,
        draws=True,
    )


def _cells(f: Thresholds) -> tuple[str, ...]:
    """The cells of a model's row after its name: tokens, and peaks in MiB."""
    return (
        f"{f.grid[f.tile]:,}", f"{f.memory:,}", f"{UPSTREAM_CAP:,}", f.binds, f"{f.largest:,}",
        mib(f.at_largest.reserved), f"{f.chunk:,}", mib(f.at_chunk.reserved),
    )  # fmt: skip


def _section(number: int, f: Thresholds, free: int) -> Section:
    m = f.model
    facts = (
        ("experts", f"{m.experts:,}, {m.top_k} a token"),
        ("hidden, width", f"{m.hidden:,}, {m.intermediate:,}"),
        ("largest launch", f"{f.largest:,} tokens, {format_bytes(f.at_largest.reserved)}"),
        ("recommended", f"{f.chunk:,} tokens, {format_bytes(f.at_chunk.reserved)}"),
        *((f"grid, tile {tile}", f"{tokens:,} tokens") for tile, tokens in f.grid.items()),
    )
    last = f.curve[-1]
    alternative = (
        f"Peak reserved of one launch of {m.name} over its tokens: {format_bytes(f.at_chunk.reserved)} for the "
        f"recommended {f.chunk:,}, {format_bytes(f.at_largest.reserved)} for the largest allowed, {f.largest:,}, and "
        f"{format_bytes(last.reserved)} for {last.tokens:,}."
    )
    return Section(f"m{number + 1}", f, facts, peak_figure(f, free), alternative)


def peak_figure(f: Thresholds, free: int) -> Drawing:
    """Peak reserved over the tokens of one launch, with the limits as upright lines and free memory as a level one."""
    tokens = np.array([p.tokens for p in f.curve])
    reserved = np.array([p.reserved for p in f.curve])
    unit, unit_name = unit_for(int(reserved.max()))
    right, top = float(tokens[-1]), float(reserved.max()) / unit * 1.3
    plot = new_plot(_HEIGHT, x_range=Range1d(start=0, end=right * 1.02), y_range=Range1d(start=0, end=top))
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    plot.xaxis.axis_label = "tokens of one launch"
    plot.yaxis.axis_label = f"peak reserved ({unit_name})"
    plot.xaxis.ticker.desired_num_ticks = 4  # more run into each other on a telephone
    source = ColumnDataSource({
        "tokens": tokens,
        "ctas": np.array([p.ctas for p in f.curve]),
        "reserved": reserved / unit,
        "requested": np.array([p.requested for p in f.curve]) / unit,
    })  # fmt: skip
    line = plot.line("tokens", "reserved", source=source, color=placeholder("line-1"), line_width=2)
    _mark_limits(plot, f, right, top)
    if free / unit < top:
        plot.add_layout(
            Span(location=free / unit, dimension="width", line_color=placeholder("bad"), line_dash="dotted")
        )
        label = label_at(right, free / unit, "free memory", "bad")
        label.update(text_align="right", x_offset=-6, y_offset=-17)  # below the line, where the curve is above it
        plot.add_layout(label)
    tips = [
        ("tokens", "@tokens{0,0}"), ("CTAs", "@ctas{0,0}"), ("requested", f"@requested{{0,0.000}} {unit_name}"),
        ("reserved", f"@reserved{{0,0.000}} {unit_name}"),
    ]  # fmt: skip
    plot.add_tools(HoverTool(renderers=[line], line_policy="nearest", mode="vline", visible=False, tooltips=tips))
    return pack(plot, _HEIGHT)


def _mark_limits(plot: Any, f: Thresholds, right: float, top: float) -> None:
    """An upright line for each limit within the axis, its word at a height of its own: the curve rises to the right."""
    limits = [("recommended", f.chunk, "good"), ("upstream cap", UPSTREAM_CAP, "caution"), ("memory", f.memory, "bad"),
              ("launch grid", f.grid[f.tile], "ink")]  # fmt: skip
    shown = sorted((limit for limit in limits if 0 < limit[1] <= right), key=lambda limit: -limit[1])
    for number, (word, tokens, color) in enumerate(shown):
        dash = "solid" if word == f.binds else "dashed"
        plot.add_layout(Span(location=tokens, dimension="height", line_color=placeholder(color), line_dash=dash))
        label = label_at(tokens, top, word, color)
        on_the_left = tokens > right / 2
        label.update(
            text_align="right" if on_the_left else "left",
            x_offset=-4 if on_the_left else 4,
            y_offset=-_LABEL_STEP * (number + 1),
            background_fill_color=placeholder("paper"),
            background_fill_alpha=0.8,
        )
        plot.add_layout(label)
