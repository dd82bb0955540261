"""Whatever a process did before and does beside, a stretch of its requests is the same Trace."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fragscope.allocator import ReplaySettings, replay, rules_for
from fragscope.trace import DecisionKind, DecisionLog, RequestKind, RequestLog, Requests, Trace, own_requests

MIB = 2**20
ENDLESS = 2**50

Row = tuple[RequestKind, dict[str, int]]


class Program:
    """Random requests of one part of a process; its handles begin where it is told."""

    def __init__(self, choices: random.Random, first_id: int, streams: list[int], pools: list[int]) -> None:
        self.choices, self.next_id = choices, first_id
        self.streams, self.pools = streams, pools
        self.live: list[int] = []
        self.waiting: list[int] = []
        self.scopes: list[int] = []
        self.closed: list[int] = []
        self.failed: list[int] = []  # ids of requests that fail
        self.size = [512, 1000, MIB, 3 * MIB, 9 * MIB + 7, 30 * MIB]

    def row(self) -> Row:
        c = self.choices
        kinds = ["alloc"] * 5 + ["fail"] + ["empty"]
        if self.live:
            kinds += ["free"] * 4 + ["use"] * 2
        if self.waiting:
            kinds += ["done"] * 2
        if self.pools:
            kinds += ["open"]
        if self.scopes:
            kinds += ["close"]
        if self.closed:
            kinds += ["release"]
        match c.choice(kinds):
            case "alloc" | "fail" as what:
                self.next_id += 1
                pool = c.choice([0, *self.scopes])
                (self.live if what == "alloc" else self.failed).append(self.next_id)
                values = {
                    "id": self.next_id,
                    "size": c.choice(self.size),
                    "stream": c.choice(self.streams),
                    "pool": pool,
                }
                return RequestKind.ALLOC, values
            case "free":
                id = self.live.pop(c.randrange(len(self.live)))
                self.waiting.append(id)
                return RequestKind.FREE, {"id": id}
            case "use":
                return RequestKind.RECORD_STREAM, {"id": c.choice(self.live), "stream": c.choice(self.streams)}
            case "done":
                return RequestKind.USES_DONE, {"id": self.waiting.pop(0)}
            case "empty":
                return RequestKind.EMPTY_CACHE, {}
            case "open":
                self.scopes.append(c.choice(self.pools))
                return RequestKind.SCOPE_OPEN, {"pool": self.scopes[-1]}
            case "close":
                self.closed.append(self.scopes.pop())
                return RequestKind.SCOPE_CLOSE, {"pool": self.closed[-1]}
            case _:
                return RequestKind.POOL_RELEASE, {"pool": self.closed.pop(0)}


def trace_of(rows: list[Row], failed: set[int], pools: tuple[tuple[int, int], ...]) -> Trace:
    log, decisions = RequestLog(), DecisionLog()
    for kind, values in rows:
        at = log.append(kind, **values)
        if kind == RequestKind.ALLOC and values["id"] in failed:
            decisions.request = at
            decisions.append(DecisionKind.OOM, -1, 0, values["size"], 0, 0)
    return Trace(log.finish(), decisions.finish(), pools=pools, torch="2.13.0", source="cuda")


def columns(trace: Trace) -> dict[str, list[int]]:
    return {name: getattr(trace.requests, name).tolist() for name in Requests.__slots__}


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 60), st.integers(0, 80))
def test_a_stretch_is_the_same_wherever_it_stands(choices: random.Random, before: int, count: int) -> None:
    seed = choices.randrange(2**32)
    pools = ((0, 0), (0, 1), (2, 0), (0, 3), (4, 0))
    # The same part of a program: alone, and later in a process whose handles are others.
    alone = Program(random.Random(seed), 0, [0, 16, 32], [1, 2])
    placed = Program(random.Random(seed), 10_000, [0, 7000, 6000], [3, 4])
    earlier = Program(choices, 500, [0, 7000, 8000], [1, 2])
    prefix = [earlier.row() for _ in range(before)]
    mine, theirs, foreign = [], [], 0
    for _ in range(count):
        while earlier.live and choices.random() < 0.3:  # memory from before is used and freed in between
            id = earlier.live.pop()
            theirs += [(RequestKind.RECORD_STREAM, {"id": id, "stream": 8000}), (RequestKind.FREE, {"id": id})]
            foreign += 2
        if earlier.scopes and choices.random() < 0.2:
            pool = earlier.scopes.pop()
            theirs += [(RequestKind.SCOPE_CLOSE, {"pool": pool}), (RequestKind.POOL_RELEASE, {"pool": pool})]
            foreign += 2
        mine.append(alone.row())
        theirs.append(placed.row())
    expected = own_requests(trace_of(mine, set(alone.failed), pools))
    failed = {*placed.failed, *earlier.failed}
    found = own_requests(trace_of([*prefix, *theirs], failed, pools), before)
    assert columns(found.trace) == columns(expected.trace)
    assert found.trace.pools == expected.trace.pools
    assert (found.foreign - foreign, found.failed) == (expected.foreign, len(alone.failed))

    under = ReplaySettings(rules_for("2.13.0"), "any", ENDLESS, ENDLESS)
    one, other = (replay(x.trace, under, decisions=False, compiled=False).whole for x in (expected, found))
    assert one == other
    # By itself the stretch never frees what it did not ask for, and nothing of it fails.
    requests = found.trace.requests
    asked = requests.id[requests.kind == RequestKind.ALLOC]
    assert np.array_equal(asked, np.arange(len(asked)))
    assert not other.ooms


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 120), st.floats(0, 1), st.floats(0, 1))
def test_every_cut_of_a_program_is_a_program(choices: random.Random, count: int, one: float, other: float) -> None:
    """Nothing is freed that is not live, no scope closed that is not open, no user taken that is not there."""
    program = Program(choices, 0, [0, 5, 6], [1, 2, 3, 4])
    rows = [program.row() for _ in range(count)]
    begin, end = sorted((int(one * count), int(other * count)))
    pools = ((0, 0), (0, 1), (2, 0), (0, 3), (4, 0))
    own = own_requests(trace_of(rows, set(program.failed), pools), begin, end).trace
    live: set[int] = set()
    seen: set[int] = set()
    users: dict[int, int] = {}
    opened: list[int] = []
    r = own.requests
    for kind, id, pool in zip(r.kind.tolist(), r.id.tolist(), r.pool.tolist(), strict=True):
        match RequestKind(kind):
            case RequestKind.ALLOC:
                live.add(id)
                seen.add(id)
                if pool and not users.get(pool):
                    users[pool] = 1
            case RequestKind.FREE:
                live.remove(id)
            case RequestKind.RECORD_STREAM:
                assert id in live
            case RequestKind.USES_DONE:
                assert id in seen - live
            case RequestKind.POOL_CREATE | RequestKind.SCOPE_OPEN as joins:
                users[pool] = users.get(pool, 0) + 1
                opened += [pool] * (joins == RequestKind.SCOPE_OPEN)
            case RequestKind.SCOPE_CLOSE:
                opened.remove(pool)
            case RequestKind.POOL_RELEASE:
                users[pool] -= 1
                assert users[pool] >= 0
