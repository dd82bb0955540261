"""The page of ``fragscope run --sweep``: how the peak of each variant grows with a size, and the largest that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d
from bokeh.models.annotations import Span

from fragscope.report.colors import line_name, placeholder
from fragscope.report.drawing import Drawing, label_at, new_plot, pack, unit_for
from fragscope.report.shell import page
from fragscope.results import Curve, SweepResults
from fragscope.units import format_bytes, mib

_HEIGHT = 320
_WIDE = 20  # a range whose ends are so many times apart has a logarithmic axis


@dataclass(frozen=True, slots=True)
class Line:
    """One variant: its letter and colour in the figure, and its row of the table."""

    letter: str
    color: str
    variant: str
    largest: str
    peak: str
    why: str
    bad: bool


@dataclass(frozen=True, slots=True)
class Section:
    """Variants of one scenario and preset under the same settings."""

    anchor: str
    title: str
    settings: tuple[str, ...]
    lines: tuple[Line, ...]
    drawing: Drawing | None
    alternative: str


def render(found: SweepResults) -> str:
    """The whole page as one string."""
    groups: dict[tuple[str, ...], list[Curve]] = {}
    for curve in found.curves:
        key = (curve.name.rpartition("/")[0], curve.conf, curve.torch, curve.card)
        groups.setdefault(key, []).append(curve)
    sections = [_section(number, found, curves) for number, curves in enumerate(groups.values())]
    return page(
        "sweep.html",
        {},
        parameter=found.parameter,
        sections=sections,
        complete=found.complete,
        facts=(
            ("sizes", f"{found.low:,} to {found.high:,}"),
            ("step", f"{found.step:,}"),
            ("command", " ".join(found.command)[:300]),
        ),
        draws=any(s.drawing for s in sections),
    )


def _section(number: int, found: SweepResults, curves: list[Curve]) -> Section:
    first = curves[0]
    lines = tuple(_line(n, curve, complete=found.complete) for n, curve in enumerate(curves))
    words = "; ".join(f"{line.letter} {line.variant}: {line.largest}" for line in lines)
    settings = (f"conf {first.conf or 'default'}", f"rules of torch {first.torch}", first.card)
    return Section(
        anchor=f"s{number + 1}",
        title=first.name.rpartition("/")[0],
        settings=(*settings, f"{format_bytes(first.capacity)} for segments"),
        lines=lines,
        drawing=_drawing(found, curves),
        alternative=f"Peak reserved over {found.parameter}. Largest that fits: {words}.",
    )


def _line(number: int, curve: Curve, *, complete: bool) -> Line:
    at = {p.size: p for p in curve.points}
    largest = "none" if curve.largest is None else f"{curve.largest:,}"
    peak = "-" if curve.largest is None else mib(at[curve.largest].peak_reserved)
    rest = curve.limited_by or "every size tried fits" if complete else "not finished"
    why = curve.refuted or curve.problem or rest
    if complete and curve.untried_above is not None and why == curve.limited_by:
        why += f"; nothing above {curve.untried_above:,} was tried"
    return Line(
        letter=chr(ord("A") + number % 26),
        color=line_name(number),
        variant=curve.name.rpartition("/")[2],
        largest="no answer" if curve.problem or curve.refuted else largest,
        peak=peak,
        why=why,
        bad=bool(curve.refuted or (curve.problem and not curve.declared)),
    )


def _drawing(found: SweepResults, curves: list[Curve]) -> Drawing | None:
    """Peak reserved of what came to its end; None where nothing did."""
    reached = [[p for p in curve.points if p.reached] for curve in curves]
    sizes = [p.size for points in reached for p in points]
    if not sizes:
        return None
    highest = max(p.peak_reserved for points in reached for p in points)
    unit, unit_name = unit_for(highest)
    logarithmic = found.high > _WIDE * found.low
    right, top = float(max(sizes)) * (1.3 if logarithmic else 1.02), max(highest, 1) / unit * 1.15
    plot = new_plot(
        _HEIGHT,
        x_range=Range1d(start=float(min(sizes)) if logarithmic else 0.0, end=right),
        y_range=Range1d(start=0, end=top),
        x_axis_type="log" if logarithmic else "linear",
    )
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    plot.xaxis.axis_label = found.parameter
    plot.yaxis.axis_label = f"peak reserved ({unit_name})"
    plot.xaxis.ticker.desired_num_ticks = 4  # more run into each other on a telephone
    for number, (curve, points) in enumerate(zip(curves, reached, strict=True)):
        if points:
            _draw(plot, number, curve, points, unit, unit_name, found.parameter)
    capacity = curves[0].capacity / unit
    if capacity < top:
        plot.add_layout(Span(location=capacity, dimension="width", line_color=placeholder("bad"), line_dash="dotted"))
        label = label_at(right, capacity, "room for segments", "bad")
        label.update(text_align="right", x_offset=-6, y_offset=2)
        plot.add_layout(label)
    return pack(plot, _HEIGHT)


def _draw(plot: Any, number: int, curve: Curve, points: Any, unit: int, unit_name: str, parameter: str) -> None:
    color = placeholder(line_name(number))
    source = ColumnDataSource({
        "size": np.array([p.size for p in points]),
        "reserved": np.array([p.peak_reserved for p in points]) / unit,
        "allocated": np.array([p.peak_allocated for p in points]) / unit,
    })  # fmt: skip
    line = plot.line("size", "reserved", source=source, color=color, line_width=2)
    plot.scatter("size", "reserved", source=source, color=color, size=4)
    last = points[-1]
    label = label_at(float(last.size), last.peak_reserved / unit, chr(ord("A") + number % 26), line_name(number))
    label.update(x_offset=5, y_offset=-6 + 12 * (number % 3 - 1))  # curves may end at the same place
    plot.add_layout(label)
    if curve.largest is not None and curve.limited_by:
        plot.add_layout(
            Span(location=curve.largest, dimension="height", line_color=color, line_dash="dashed", line_width=1)
        )
    tips = [
        (parameter, "@size{0,0}"), ("allocated", f"@allocated{{0,0.000}} {unit_name}"),
        ("reserved", f"@reserved{{0,0.000}} {unit_name}"),
    ]  # fmt: skip
    plot.add_tools(HoverTool(renderers=[line], line_policy="nearest", visible=False, tooltips=tips))
