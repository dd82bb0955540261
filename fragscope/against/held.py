"""What a program held at a moment, by call stack, and which moment a metric speaks of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fragscope.measure import Lifetimes, Timeline, holders_at, lifetimes, raw_holders_at, timeline
from fragscope.trace import ASKING, DecisionKind, Stack, Trace, load_trace

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
        asked: by stack, the rows of requests for memory that were served.
        sizes: by stack, for how many bytes they asked together.
    """

    trace: Trace
    lives: Lifetimes
    series: Timeline
    asked: dict[Stack, list[int]]
    sizes: dict[Stack, int]

    @classmethod
    def of(cls, file: Path) -> Recorded:
        """Read a case's Trace.

        Raises:
            InputFileError: it cannot be used.
        """
        trace = load_trace(file)
        lives = lifetimes(trace)
        r, d = trace.requests, trace.decisions
        served = np.isin(r.kind, ASKING)
        if d is not None:
            served[d.request[d.kind == DecisionKind.OOM]] = False
        asked: dict[Stack, list[int]] = {}
        sizes: Counter[Stack] = Counter()
        for row in np.flatnonzero(served).tolist():
            stack = _stack_at(trace, row)
            asked.setdefault(stack, []).append(row)
            sizes[stack] += int(r.size[row])
        return cls(trace, lives, timeline(trace, lives), asked, sizes)

    @property
    def rows(self) -> slice:
        """Rows of the measured phase."""
        return self.series.measured or slice(0, len(self.trace.requests))

    def stack(self, row: int) -> Stack:
        """Who made a request."""
        return _stack_at(self.trace, row)

    def is_peak(self, metric: str) -> bool:
        """Whether a metric speaks of a peak, and not of the end."""
        return metric in _SERIES

    def row(self, metric: str) -> int:
        """The request after which a metric is read: the first at which its peak is reached, or the last."""
        rows = self.rows
        if metric not in _SERIES:
            return int(rows.stop) - 1
        values = getattr(self.series, _SERIES[metric])[rows]
        if metric == "peak_hbm":
            values = values + self.series.raw[rows]
        return int(rows.start) + int(np.argmax(values))

    @property
    def failed(self) -> int | None:
        """The last request for memory that failed; None where none did."""
        return int(self.series.oom[-1]) if len(self.series.oom) else None

    def holders(self, row: int, metric: str) -> dict[Stack, tuple[int, int, int]]:
        """Bytes and blocks held after a request, by stack, and the bytes asked for.

        The bytes held are those that the metric is about.
        """
        found = holders_at(self.trace, row, self.lives)
        if metric == "peak_hbm":
            found += raw_holders_at(self.trace, row)
        out: dict[Stack, tuple[int, int, int]] = {}
        for holder in found:
            size, blocks, requested = out.get(holder.stack, (0, 0, 0))
            more = holder.requested if metric == "peak_requested" else holder.bytes
            out[holder.stack] = (size + more, blocks + holder.blocks, requested + holder.requested)
        return out


def _stack_at(trace: Trace, row: int) -> Stack:
    return trace.stacks[int(trace.requests.stack[row])]
