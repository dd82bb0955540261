"""A Trace's requests in the form that the allocator's loop reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fragscope.allocator.placement import DriverStart, fitted_start
from fragscope.allocator.recorded import failed_rows, most_held, total_of
from fragscope.trace import DecisionKind, RequestKind, Trace


@dataclass(frozen=True, slots=True)
class Tape:
    """A Trace's requests in the form that the allocator's loop reads, made once for many replays.

    Attributes:
        trace: where they come from.
        kind, id, size, stream, pool: columns; ids are 0, 1, 2, ...
        names: the Trace's id of each, None where they are the same.
        allocations: how many ids there are.
        segments: address and bytes of each recorded segment, in order.
        maps: address of each recorded mapping, in order.
        starts: what the recorded addresses tell of the driver (``placement``), once that was asked.
        settled: whether releases that the recording shows are told apart into ``empty_cache()`` and the allocator's
            own.
        total: bytes of memory of the device that the Trace was recorded on, None while that is not known.
        failed: rows of requests that failed when recorded.
        held: most bytes held from the driver at once when recorded, None for bare requests.
        event: the recording's row of each row, None where they are the same.
    """

    trace: Trace
    kind: Any
    id: Any
    size: Any
    stream: Any
    pool: Any
    names: Any
    allocations: int
    segments: tuple[tuple[int, int], ...]
    maps: tuple[int, ...]
    settled: bool
    total: int | None
    failed: Any
    held: int | None
    event: Any = None
    starts: list[DriverStart | None] = field(default_factory=list)

    def driver_start(self) -> DriverStart | None:
        """Where the driver's address space begins, fitted to the recorded addresses."""
        if not self.starts:
            self.starts.append(fitted_start(self.trace))
        return self.starts[0]

    def event_of(self, row: int) -> int:
        """The recording's row of a row."""
        return row if self.event is None else int(self.event[row])

    @property
    def columns(self) -> tuple[Any, Any, Any, Any, Any]:
        """What the loop reads."""
        return self.kind, self.id, self.size, self.stream, self.pool


def tape_of(trace: Trace) -> Tape:
    """A Trace's requests as a Tape; whether its releases are settled is seen when it is played."""
    requests = trace.requests
    names = None
    id_ = np.array(requests.id, dtype=np.int64)
    if len(id_) and (int(id_.min()) < -1 or int(id_.max()) >= 2 * len(id_)):
        names, id_ = np.unique(id_, return_inverse=True)
        id_ = id_.astype(np.int64)
    else:
        id_[id_ < 0] = len(id_) and int(id_.max()) + 1  # requests about no allocation name one that is never made
    segments: tuple[tuple[int, int], ...] = ()
    maps: tuple[int, ...] = ()
    if trace.decisions is not None:
        d = trace.decisions
        taken, mapped = d.kind == DecisionKind.SEGMENT_ALLOC, d.kind == DecisionKind.SEGMENT_MAP
        segments = tuple(zip(d.addr[taken].tolist(), d.size[taken].tolist(), strict=True))
        maps = tuple(d.addr[mapped].tolist())
    return Tape(
        trace=trace,
        kind=np.array(requests.kind, dtype=np.int64),
        id=id_,
        size=np.array(requests.size, dtype=np.int64),
        stream=np.array(requests.stream, dtype=np.int64),
        pool=np.array(requests.pool, dtype=np.int64),
        names=names,
        allocations=int(id_.max()) + 1 if len(id_) else 0,
        segments=segments,
        maps=maps,
        settled=not trace.count(RequestKind.RELEASE_SEEN),
        total=total_of(trace),
        failed=failed_rows(trace),
        held=most_held(trace),
    )
