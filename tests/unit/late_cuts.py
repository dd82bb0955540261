"""Traces that began late: cut off from a longer one, and the model's own counters at each of their events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from driven_traces import Driven, as_recorded

from fragscope.allocator import CachingAllocator, Counters, Replay, ReplaySettings, Tape, replay
from fragscope.trace import DecisionKind, DecisionLog, RequestKind, RequestLog, SegmentState, Trace


class Watched:
    """A replay of which the model's own counters were read after every request.

    Attributes:
        replay: the outcome.
        now: the counters, by request row.
        segments: what the model held after every ``every``-th request, by request row.
    """

    def __init__(self, trace: Trace | Tape, settings: ReplaySettings, every: int = 97) -> None:
        self.now: list[Counters] = []
        self.segments: dict[int, tuple[SegmentState, ...]] = {}
        serve = CachingAllocator.decide

        def decide(allocator: CachingAllocator, columns: Any, row: int, rows: int) -> int:
            if row == 0:
                self.now.clear()
                self.segments.clear()
            while row < rows:
                self.now += [allocator.now] * (row - len(self.now))
                if row and row % every == 0:
                    self.segments[row - 1] = as_recorded(allocator.segments())
                after = serve(allocator, columns, row, row + 1)
                if after == row:  # the replay serves it, and goes on behind it
                    return row
                row = after
            return rows

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CachingAllocator, "decide", decide)
            self.replay: Replay = replay(trace, settings, compiled=False)
        self.now += [self.replay.whole.end] * (len(self.replay.trace.requests) - len(self.now))


def cut(made: Driven, at: int, stood: tuple[SegmentState, ...], users: dict[int, int]) -> tuple[Trace, int]:
    """What a driven allocator did from a request row on, as if recording had begun there.

    Args:
        made: the allocator after the whole program.
        at: the row.
        stood: its segments then.
        users: users of each private pool then.

    Returns:
        The Trace, and how many rows of it come before those of the program.
    """
    whole = made.trace
    r, d = whole.requests, whole.decisions
    assert d is not None
    earlier = d.request < at
    asked = {int(r.id[row]): row for row in np.flatnonzero(r.kind[:at] == RequestKind.ALLOC)}
    ids = {}  # by address
    for row in np.flatnonzero(earlier & (d.kind == DecisionKind.ALLOC)).tolist():
        ids[int(d.addr[row])] = int(d.id[row])
    log, decided = RequestLog(), DecisionLog()
    decided.request = log.append(RequestKind.START)
    for s in stood:
        kind = DecisionKind.SEGMENT_MAP if s.expandable else DecisionKind.SEGMENT_ALLOC
        decided.append(kind, -1, s.addr, s.size, s.stream, s.pool)
    without_users = {s.pool for s in stood if s.pool and not users[s.pool]}
    for pool, count in users.items():
        for _ in range(count + (pool in without_users)):
            log.append(RequestKind.POOL_CREATE, pool=pool)
    held = [(s, *block) for s in stood for block in s.blocks if block[2] != "free"]
    for s, addr, size, _ in held:
        columns = {"id": ids[addr], "size": int(r.size[asked[ids[addr]]]), "stream": s.stream, "pool": s.pool}
        decided.request = log.append(RequestKind.HELD, **columns)
        decided.append(DecisionKind.ALLOC, ids[addr], addr, size, s.stream, s.pool)
    for s, addr, size, state in held:
        if state == "pending":
            log.append(RequestKind.RECORD_STREAM, id=ids[addr], stream=0x7700)
            decided.request = log.append(RequestKind.FREE, id=ids[addr])
            decided.append(DecisionKind.FREE_REQUESTED, ids[addr], addr, size, s.stream, s.pool)
    for pool in sorted(without_users):
        log.append(RequestKind.POOL_RELEASE, pool=pool)
    before = len(log)
    names = ("id", "size", "stream", "pool", "phase")
    for row in range(at, len(r)):
        log.append(RequestKind(int(r.kind[row])), **{name: int(getattr(r, name)[row]) for name in names})
    for row in np.flatnonzero(~earlier).tolist():
        decided.request = int(d.request[row]) - at + before
        columns = {name: int(getattr(d, name)[row]) for name in ("id", "addr", "size", "stream", "pool")}
        decided.append(DecisionKind(int(d.kind[row])), *columns.values())
    late = replace(whole, requests=log.finish(), decisions=decided.finish(), initial=stood, placement="recorded")
    return late, before
