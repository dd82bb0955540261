"""What a program held at the moment that a metric speaks of, by call stack."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fragscope.measure import Holder, Lifetimes, Timeline, holders_at, lifetimes, raw_holders_at, timeline
from fragscope.trace import ASKING, NO_STACK, DecisionKind, Stack, Trace, load_trace

_SERIES = {
    "peak_requested": "requested",
    "peak_allocated": "allocated",
    "peak_reserved": "reserved_peak",
    "peak_hbm": "reserved_peak",
    "transient": "allocated",
}
"""Whose peak a metric is about; the others are about the end."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A case's Trace and what is read out of it once.

    Attributes:
        asked: by stack, how many requests for memory the program made in all, and for how many bytes.
    """

    trace: Trace
    lives: Lifetimes
    series: Timeline
    asked: dict[Stack, tuple[int, int]]

    @classmethod
    def of(cls, file: Path) -> Recorded:
        """Read a case's Trace.

        Raises:
            InputFileError: it cannot be used.
        """
        trace = load_trace(file)
        lives = lifetimes(trace)
        return cls(trace, lives, timeline(trace, lives), _asked(trace))


@dataclass(frozen=True, slots=True)
class Moment:
    """What was held at a moment.

    Attributes:
        holders: one for each stack.
        requested: sizes to compare are those asked for, and not those of blocks.
        place: the stack of the request at which the peak was reached; empty where the moment is the end.
    """

    holders: tuple[Holder, ...]
    requested: bool
    place: Stack


def held(recorded: Recorded, metric: str) -> Moment:
    """What was held at the moment that a metric speaks of: the first time of its peak, or the end."""
    trace, series = recorded.trace, recorded.series
    rows = series.measured or slice(0, len(trace.requests))
    row, place = rows.stop - 1, ()
    if metric in _SERIES:
        values = getattr(series, _SERIES[metric])[rows]
        if metric == "peak_hbm":
            values = values + series.raw[rows]
        row = rows.start + int(np.argmax(values))
        place = _stack_at(trace, row)
    holders = holders_at(trace, row, recorded.lives)
    if metric == "peak_hbm":
        holders += raw_holders_at(trace, row)
    return Moment(holders, metric == "peak_requested", place)


def held_at_failure(recorded: Recorded) -> Moment | None:
    """What was held when the last request for memory failed that did, and the stack of that request."""
    if not len(recorded.series.oom):
        return None
    row = int(recorded.series.oom[-1])
    place = _stack_at(recorded.trace, row)
    return Moment(holders_at(recorded.trace, row, recorded.lives), requested=False, place=place)


def _stack_at(trace: Trace, row: int) -> Stack:
    stack = int(trace.requests.stack[row])
    return () if stack == NO_STACK else trace.stacks[stack]


def _asked(trace: Trace) -> dict[Stack, tuple[int, int]]:
    r, d = trace.requests, trace.decisions
    wanted = np.isin(r.kind, ASKING)
    if d is not None:
        wanted[d.request[d.kind == DecisionKind.OOM]] = False
    count, size = Counter[int](), Counter[int]()
    for stack, asked in zip(r.stack[wanted].tolist(), r.size[wanted].tolist(), strict=True):
        count[stack] += 1
        size[stack] += asked
    return {trace.stacks[stack]: (count[stack], size[stack]) for stack in count}
