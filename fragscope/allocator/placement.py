"""What a recording tells about the driver's address space, for a replay that needs segments it never saw.

Up to torch 2.11 addresses decide between equal-size blocks. The rule by which the driver places segments
(``engine.driver``) begins from what the process holds already, which the first segment's address gives away, and from
when the driver moves a block of its own, which is fitted: the moment that explains the recorded order of segments best.
Seen on one machine type: H100 80GB HBM3, driver 580.159.04, CUDA 13.0, Linux x86-64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fragscope.allocator.engine.blocks import new_segment
from fragscope.allocator.engine.driver import MIB, REGION, begin_process, place_segment, remove_segment
from fragscope.allocator.engine.state import ALLOCS, SEG_ADDR, SEG_FIRST
from fragscope.allocator.engine.tables import new_state
from fragscope.trace import DecisionKind, RequestKind, Trace

_EVENTS = 400  # of segments, from the start on; later ones say little about the start
_MOMENTS = 64  # the move came before one of the first segments, where it came at all
_SMALL_SEGMENT = 2 * MIB


@dataclass(frozen=True, slots=True)
class DriverStart:
    """Where a process's address space begins.

    Attributes:
        base: address of the region that the driver holds itself.
        move_at: requests for memory after which the driver moves its block; 0: before the first, -1: never.
        order: share of pairs of recorded segments, alive together, whose order follows from this.
    """

    base: int
    move_at: int
    order: float


@dataclass(frozen=True, slots=True)
class _Event:
    taken: bool
    addr: int
    size: int
    allocs: int  # requests for memory up to this one


def fitted_start(trace: Trace) -> DriverStart | None:
    """What explains the recorded addresses best; None where the first one is like none seen."""
    events = _segment_events(trace)
    if not events or trace.initial:
        return None
    first = events[0]
    best: DriverStart | None = None
    taken = [e for e in events if e.taken]
    for moment in (None, *range(min(len(taken), _MOMENTS))):
        move_at = -1 if moment is None else 0 if moment == 0 else taken[moment].allocs - 1
        base = _base(first.addr, first.size, moved_before=moment == 0)
        if base is None:
            return None
        order = _order(events, _predicted(events, base, move_at))
        if best is None or order > best.order:
            best = DriverStart(base, move_at, order)
    return best


def _segment_events(trace: Trace) -> list[_Event]:
    d = trace.decisions
    if d is None:
        return []
    rows = np.flatnonzero((d.kind == DecisionKind.SEGMENT_ALLOC) | (d.kind == DecisionKind.SEGMENT_FREE))[:_EVENTS]
    allocs = np.cumsum(trace.requests.kind == RequestKind.ALLOC)
    return [
        _Event(kind == DecisionKind.SEGMENT_ALLOC, addr, size, int(allocs[request]))
        for kind, addr, size, request in zip(
            d.kind[rows].tolist(), d.addr[rows].tolist(), d.size[rows].tolist(), d.request[rows].tolist(), strict=True
        )
    ]


def _base(first: int, size: int, *, moved_before: bool) -> int | None:
    """Address of the driver's own region, from where the first segment came to lie."""
    needed = -(-size // REGION) * REGION
    offset = first % REGION // MIB
    if size == _SMALL_SEGMENT and offset == 30:
        return first - 414 * MIB
    if size <= 24 * MIB and offset == 8:
        return first - 488 * MIB
    if offset:
        return None
    if not moved_before:
        return first + needed
    return first + needed - 416 * MIB if needed < 416 * MIB else first + needed + 512 * MIB


def _predicted(events: list[_Event], base: int, move_at: int) -> list[int]:
    """Where the rule puts each segment that was taken."""
    s = new_state(1, 1, compiled=False, columns=2 * len(events) + 64)
    begin_process(s, base, move_at)
    numbers: dict[int, int] = {}  # recorded address -> segment
    out = []
    for event in events:
        if event.taken:
            s.n[ALLOCS] = event.allocs
            number = numbers[event.addr] = new_segment(s, event.size, 0, 0, 0)
            s.t[SEG_ADDR][number] = place_segment(s, event.size)
            s.t[SEG_FIRST][number] = 0
            out.append(s.t[SEG_ADDR][number])
        else:
            number = numbers.pop(event.addr, -1)
            if number < 0:  # taken before the recording began
                continue
            remove_segment(s, number)
            s.t[SEG_FIRST][number] = -1
    return out


def _order(events: list[_Event], predicted: list[int]) -> float:
    """Share of pairs of segments of one pool, alive together, that lie in the predicted order."""
    pairs = right = position = 0
    alive: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for event in events:
        pool = alive[event.size > _SMALL_SEGMENT]
        if not event.taken:
            pool.pop(event.addr, None)
            continue
        guess = predicted[position]
        position += 1
        pairs += len(pool)
        right += sum((guess < other) == (event.addr < addr) for addr, other in pool.items())
        pool[event.addr] = guess
    return right / pairs if pairs else 1.0
