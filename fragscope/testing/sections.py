"""What a failing test's report says about its memory. Names come from anywhere; control characters are escaped."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import numpy as np

from fragscope.errors import printable
from fragscope.gate.render import comparison_line
from fragscope.measure import Holder, holders_at, lifetimes, timeline
from fragscope.testing.measuring import Comparison, Measurement, Phase, decided
from fragscope.trace import Frame, Stack
from fragscope.units import format_bytes

TITLE = "fragscope"

_SHOWN_HOLDERS = 5
_SHOWN_FRAMES = 3
_RUNNER = ("/_pytest/", "/pluggy/")
_NOT_THEIRS = ("/torch/", "/fragscope/")
_SERIES = {
    "peak_requested": "requested",
    "peak_allocated": "allocated",
    "peak_reserved": "reserved",
    "peak_hbm": "hbm",
    "transient": "allocated",
}
"""Whose peak a metric is about; the others are about the end."""


def headline(comparisons: tuple[Comparison, ...]) -> str:
    """One line for a test that is over its budget."""
    over = [f"{c.metric} {format_bytes(c.value)} of {format_bytes(c.bound.bytes)}" for c in comparisons if c.over]
    return f"GPU memory over budget: {', '.join(over)}"


def section(measurement: Measurement, comparisons: tuple[Comparison, ...], root: Path) -> str:
    """Every limit with its value, who held the memory, and what is uncertain.

    Args:
        measurement: of the test.
        comparisons: its values and limits, the worst first; empty where it has no budget.
        root: paths below it are shown relative to it.
    """
    lines = []
    for c in comparisons:
        word = "over" if c.over else "within"
        name = f"phase {c.phase.name}" if c.phase.name else ""
        lines.append(comparison_line(word, name, c.metric, c.bound.bytes, c.value, c.bound.place))
    metric = comparisons[0].metric if comparisons else "peak_allocated"
    phase = comparisons[0].phase if comparisons else measurement.phases[0]
    lines += _holders(measurement, phase, metric, root)
    lines += [printable(caveat) for caveat in measurement.caveats]
    lines.append(_under(measurement))
    return "\n".join(lines)


def _under(measurement: Measurement) -> str:
    s = measurement.settings
    conf = f"conf '{printable(s.conf, 120)}'" if s.conf else "the default conf"
    return f"recorded on {measurement.where}; its own requests under {conf}, rules of torch {s.rules.rules.release}"


def _holders(measurement: Measurement, phase: Phase, metric: str, root: Path) -> list[str]:
    trace = decided(phase, measurement.settings).trace
    lives = lifetimes(trace)
    series = timeline(trace, lives)
    rows = series.measured or slice(0, len(trace.requests))
    if rows.start == rows.stop:
        return ["nothing was asked of the GPU's allocator"]
    row, moment = rows.stop - 1, "at the end"
    if metric in _SERIES:
        values = getattr(series, _SERIES[metric])[rows]
        row, moment = rows.start + int(np.argmax(values)), f"at the peak of {_SERIES[metric]} bytes"
    holders = holders_at(trace, row, lives)
    if not holders:
        return [f"held {moment}: nothing"]
    total, blocks = sum(h.bytes for h in holders), sum(h.blocks for h in holders)
    lines = [f"held {moment}: {format_bytes(total)} in {_count(blocks)}"]
    lines += [_holder(h, root) for h in holders[:_SHOWN_HOLDERS]]
    rest = holders[_SHOWN_HOLDERS:]
    if rest:
        size, more = sum(h.bytes for h in rest), sum(h.blocks for h in rest)
        lines.append(f"  {format_bytes(size):>14}  {_count(more)}  from {len(rest):,} other places")
    return lines


def _holder(holder: Holder, root: Path) -> str:
    where = " < ".join(_frame(frame, root) for frame in _their_frames(holder.stack)) or "no call stack was recorded"
    return f"  {format_bytes(holder.bytes):>14}  {_count(holder.blocks)}  {where}"


def _their_frames(stack: Stack) -> Stack:
    """The innermost frames that are neither torch's nor of what called the test."""
    inside = tuple(takewhile(lambda frame: not any(part in frame.file for part in _RUNNER), stack))
    theirs = tuple(frame for frame in inside if not any(part in frame.file for part in _NOT_THEIRS))
    return (theirs or inside or stack)[:_SHOWN_FRAMES]


def _frame(frame: Frame, root: Path) -> str:
    return printable(f"{frame.file.removeprefix(f'{root}/')}:{frame.line} ({frame.function})", 200)


def _count(blocks: int) -> str:
    return f"{blocks:,} block{'s' * (blocks != 1)}"
