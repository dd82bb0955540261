"""The compiled loop against the interpreted one: the same source, and nothing may depend on which of them runs it."""

from __future__ import annotations

import sys
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from fragscope.allocator import (
    CachingAllocator,
    Replay,
    ReplaySettings,
    Tape,
    parse_conf,
    replay,
    rules_for,
    settle,
    tape_of,
    worth_compiling,
)
from fragscope.allocator.engine.compiled import can_compile, compile_now, is_compiled_before
from fragscope.trace import DecisionKind, Observation, RequestKind, RequestLog, Trace

pytestmark = pytest.mark.skipif(not can_compile(), reason="numba is not installed")

MIB = 2**20
TOTAL = 640 * MIB
STREAMS = (0, 0x5100, 0x5200)
POOLS = ((0, 0), (0, 1), (0, 2), (3, 0))
K = RequestKind

CONFS = {
    "default": "",
    "oversize": "max_split_size_mb:32,max_non_split_rounding_mb:40",
    "collecting": "garbage_collection_threshold:0.4,roundup_power2_divisions:[1:4,4:2,>:1]",
    "expandable": "expandable_segments:True",
    "expandable pages of 32 MiB": "expandable_segments:True,large_segment_size_mb:32,max_split_size_mb:40",
    "refusing": "throw_on_cudamalloc_oom:True,per_process_memory_fraction:0.7",
}
SINCE = {"expandable pages of 32 MiB": (2, 11), "refusing": (2, 12)}
RELEASES = ((2, 9), (2, 11), (2, 12), (2, 13), (2, 14))


class Author:
    """Writes random requests of every kind, as programs make them, from a seed.

    Args:
        seed: decides everything.
        spread: distance between the ids of two allocations.
        confs: what ``SETTINGS`` requests change to; without any there are none.
    """

    def __init__(self, seed: int, *, spread: int = 1, confs: tuple[str, ...] = ()) -> None:
        self.random = Random(seed)
        self.spread = spread
        self.confs = confs
        self.log = RequestLog()
        self.live: list[int] = []
        self.freed: list[int] = []
        self.raw: list[tuple[int, int]] = []
        self.next_id = 0
        self.users = dict.fromkeys(range(1, len(POOLS)), 0)
        self.scopes: list[int] = []
        self.in_phase = self.in_capture = False

    def write(self, requests: int) -> Trace:
        while len(self.log) < requests:
            self.step()
        return Trace(
            self.log.finish(),
            phases=("", "measured"),
            pools=POOLS,
            observations=(Observation("torch.cuda.mem_get_info"),),
            confs=self.confs,
        )

    def id(self, number: int) -> int:
        return 17 * (self.spread > 1) + self.spread * number

    def size(self) -> int:
        random = self.random
        edge = random.choice((512, MIB, 2 * MIB, 10 * MIB, 20 * MIB, 32 * MIB)) + random.choice((-512, -1, 0, 1))
        return random.choice((random.randint(1, 4096), random.randint(1, 3 * MIB), random.randint(1, 60 * MIB), edge))

    def raw_request(self) -> None:
        """Memory of the driver itself is taken, or given back."""
        if self.raw and self.random.random() < 0.5:
            id_, size = self.raw.pop(self.random.randrange(len(self.raw)))
            self.log.append(K.RAW_FREE, id=id_, size=size)
            return
        id_, size = self.id(self.next_id), self.size()
        self.next_id += 1
        self.raw.append((id_, size))
        self.log.append(K.RAW_ALLOC, id=id_, size=size)

    def held(self) -> list[int]:
        return [pool for pool, users in self.users.items() if users]

    def step(self) -> None:
        """One request, or two that belong together."""
        random, log = self.random, self.log
        choice = random.random()
        if choice < 0.45:
            self.allocate()
        elif choice < 0.80 and self.live:
            id_ = self.live.pop(random.randrange(len(self.live)))
            self.freed.append(id_)
            log.append(K.FREE, id=id_)
        elif choice < 0.86 and self.live:
            log.append(K.RECORD_STREAM, id=random.choice(self.live), stream=random.choice(STREAMS))
        elif choice < 0.90 and self.freed:
            log.append(K.USES_DONE, id=random.choice(self.freed[-10:]))
        elif choice < 0.905:
            self.raw_request()
        elif choice < 0.91:
            log.append(K.EMPTY_CACHE, pool=random.choice((0, 0, 0, *self.users)))
        elif choice < 0.92:
            log.append(random.choice((K.EMPTY_CACHE, K.OBSERVATION)))
            self.allocate()
        elif choice < 0.98:
            self.pool_request()
        else:
            self.rare_request()

    def allocate(self) -> None:
        id_ = self.id(self.next_id)
        self.next_id += 1
        pool = self.random.choice((0, 0, *self.held()))
        self.log.append(K.ALLOC, id=id_, size=self.size(), stream=self.random.choice(STREAMS), pool=pool)
        self.live.append(id_)

    def pool_request(self) -> None:
        random, log = self.random, self.log
        pool = random.choice(tuple(self.users))
        free_users = self.users[pool] - self.scopes.count(pool)
        kind = random.choice((K.POOL_CREATE, K.SCOPE_OPEN, K.SCOPE_CLOSE, K.SCOPE_CLOSE, K.POOL_RELEASE))
        if kind in (K.POOL_CREATE, K.SCOPE_OPEN):
            log.append(kind, pool=pool, size=random.randrange(4) if kind == K.POOL_CREATE else 0)
            self.users[pool] += 1
            self.scopes += [pool] * (kind == K.SCOPE_OPEN)
        elif kind == K.SCOPE_CLOSE and self.scopes:
            log.append(kind, pool=self.scopes.pop())
        elif kind == K.POOL_RELEASE and free_users:
            log.append(kind, pool=pool)
            self.users[pool] -= 1

    def rare_request(self) -> None:
        random, log = self.random, self.log
        kind = random.choice((K.MEMORY_FRACTION, K.OBSERVATION, K.SETTINGS, K.CAPTURE_BEGIN, K.PHASE_BEGIN, K.FREE))
        if kind == K.MEMORY_FRACTION:
            log.append(kind, size=random.choice((300, 700, 900, 1000)) * 10**6)
        elif kind == K.SETTINGS and self.confs:
            log.append(kind, size=random.randrange(len(self.confs)))
        elif kind == K.CAPTURE_BEGIN:
            log.append(K.CAPTURE_END if self.in_capture else kind)
            self.in_capture = not self.in_capture
        elif kind == K.PHASE_BEGIN:
            log.append(K.PHASE_END if self.in_phase else kind, phase=1)
            self.in_phase = not self.in_phase
        elif kind == K.FREE:
            log.append(kind, id=self.id(self.next_id))  # of what is allocated later or never
        elif kind == K.OBSERVATION:
            log.append(kind)


def settings(release: str = "2.11", conf: str = "", capacity: int = 400 * MIB) -> ReplaySettings:
    return ReplaySettings(rules_for(release), "made up", TOTAL, capacity, conf)


def both(trace: Trace | Tape, settings: ReplaySettings, **wanted: bool) -> tuple[Replay, Replay]:
    return replay(trace, settings, compiled=False, **wanted), replay(trace, settings, compiled=True, **wanted)


def assert_same(interpreted: Replay, compiled: Replay) -> None:
    ours, theirs = interpreted.trace.decisions, compiled.trace.decisions
    assert (ours is None) is (theirs is None)
    if ours is not None and theirs is not None:
        for column in ("kind", "request", "id", "addr", "size", "stream", "pool"):
            assert np.array_equal(getattr(ours, column), getattr(theirs, column)), column
    assert interpreted.whole == compiled.whole
    assert interpreted.measured == compiled.measured
    assert interpreted.ooms == compiled.ooms
    assert interpreted.assumptions == compiled.assumptions
    assert interpreted.trace.placement == compiled.trace.placement


def test_requests_of_every_kind_that_programs_make_are_written() -> None:
    written = {kind for seed in range(4) for kind in Author(seed, confs=("",)).write(3000).requests.kind.tolist()}
    recorded = {K.RELEASE_SEEN, K.START, K.HELD, K.NON_TORCH}  # in recordings only
    assert written == set(RequestKind) - recorded


@pytest.mark.parametrize(
    ("release", "conf"),
    [(f"{major}.{minor}", c) for major, minor in RELEASES for c in CONFS if (major, minor) >= SINCE.get(c, (2, 9))],
)
def test_decisions_and_counters_are_the_same(release: str, conf: str) -> None:
    trace = Author(len(release + conf)).write(1500)
    interpreted, compiled = both(trace, settings(release, CONFS[conf]))
    assert_same(interpreted, compiled)
    assert interpreted.whole.allocs == trace.count(RequestKind.ALLOC)


@pytest.mark.parametrize("seed", range(4))
def test_settings_that_change_on_the_way_change_both(seed: int) -> None:
    confs = tuple(CONFS[name] for name in ("default", "expandable", "collecting"))
    trace = Author(seed, confs=confs).write(2000)
    assert trace.count(RequestKind.SETTINGS) > 0
    assert_same(*both(trace, settings()))


def test_tables_grow_alike() -> None:
    """Thousands of live blocks in every class and stream, uses of most of them, and a release of all at once."""
    random, log = Random(7), RequestLog()
    for id_ in range(6000):
        size = random.choice((512, 4096, 700_000, 2 * MIB))
        log.append(K.ALLOC, id=id_, size=size, stream=random.choice(STREAMS), pool=random.randrange(4))
        if random.random() < 0.6:
            log.append(K.RECORD_STREAM, id=id_, stream=random.choice(STREAMS))
    for id_ in random.sample(range(6000), 4000):
        log.append(K.FREE, id=id_)
    log.append(K.EMPTY_CACHE)
    log.append(K.ALLOC, id=6000, size=512)
    trace = Trace(log.finish(), pools=POOLS)
    for conf in ("", "expandable_segments:True"):
        interpreted, compiled = both(trace, settings("2.13", conf, capacity=2**40))
        assert_same(interpreted, compiled)
        assert interpreted.ooms == ()
        assert interpreted.trace.decisions is not None
        assert len(interpreted.trace.decisions) > 6000 + 2 * 4000


def test_ids_need_not_be_dense() -> None:
    dense = replay(Author(3).write(1500), settings(), compiled=False)
    interpreted, compiled = both(Author(3, spread=10**9).write(1500), settings())
    assert_same(interpreted, compiled)
    ours, theirs = dense.trace.decisions, compiled.trace.decisions
    assert ours is not None
    assert theirs is not None
    named = np.where(ours.id < 0, ours.id, 17 + 10**9 * ours.id)
    assert np.array_equal(theirs.id, named)
    assert np.array_equal(theirs.addr, ours.addr)
    assert compiled.whole == dense.whole


def test_without_decisions_the_counters_are_the_same() -> None:
    trace = Author(5).write(2000)
    full = replay(trace, settings(capacity=120 * MIB), compiled=True)
    interpreted, compiled = both(trace, settings(capacity=120 * MIB), decisions=False)
    assert_same(interpreted, compiled)
    assert compiled.trace.decisions is None
    assert (compiled.whole, compiled.measured) == (full.whole, full.measured)
    assert len(full.ooms) > 1
    assert compiled.ooms == full.ooms, "sizes are rounded as those in the log of the other"


def test_both_end_with_the_first_request_that_fails() -> None:
    trace = Author(5).write(2000)
    interpreted, compiled = both(trace, settings(capacity=120 * MIB), stop_at_oom=True)
    assert_same(interpreted, compiled)
    assert len(compiled.ooms) == 1
    decisions = compiled.trace.decisions
    assert decisions is not None
    assert decisions.request[-1] == compiled.ooms[0].event


def churn(seed: int) -> Trace:
    """Large requests around the edge of 200 MiB; some come after an ``empty_cache()``."""
    random, log = Random(seed), RequestLog()
    live: dict[int, int] = {}
    for id_ in range(1500):
        size = random.randint(MIB, 60 * MIB)
        while sum(live.values()) + size > 150 * MIB or random.random() < 0.3 * bool(live):
            gone = random.choice(list(live))
            del live[gone]
            log.append(K.FREE, id=gone)
        log.append(K.EMPTY_CACHE if random.random() < 0.1 else K.OBSERVATION)
        log.append(K.ALLOC, id=id_, size=size, stream=random.choice(STREAMS))
        live[id_] = size
    return Trace(log.finish(), observations=(Observation("torch.cuda.mem_get_info"),))


def seen(trace: Trace, settings: ReplaySettings) -> Trace:
    """As a snapshot would show it: memory went back directly before an allocation, and who returned it is not said."""
    trace = replay(trace, settings, compiled=False).trace
    assert trace.decisions is not None
    kind, request = trace.requests.kind.copy(), trace.decisions.request.copy()
    returned = np.isin(trace.decisions.kind, (DecisionKind.SEGMENT_FREE, DecisionKind.SEGMENT_UNMAP))
    for row in np.flatnonzero(kind[1:] == K.ALLOC).tolist():
        is_own = kind[row] == K.OBSERVATION and bool(np.any(returned & (request == row + 1)))
        is_programs = kind[row] == K.EMPTY_CACHE and bool(np.any(request == row))
        if is_own or is_programs:
            kind[row] = K.RELEASE_SEEN
            request[request == row] = row + 1
    requests, decisions = replace(trace.requests, kind=kind), replace(trace.decisions, request=request)
    return replace(trace, requests=requests, decisions=decisions, placement="recorded")


def settle_with(monkeypatch: pytest.MonkeyPatch, *, compiled: bool) -> None:
    """The compiled loop, or the interpreted one, tells releases apart, however few requests there are."""
    monkeypatch.setattr(sys.modules["fragscope.allocator.replay"], "worth_compiling", lambda requests: compiled)


@pytest.mark.parametrize("release", ["2.11", "2.14"])
def test_releases_are_settled_alike(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of those that a recording shows were the program's own, and which the allocator's."""
    recorded = settings(release, capacity=200 * MIB)
    tape = tape_of(seen(churn(11), recorded))
    assert not tape.settled
    kinds = []
    for compiled in (False, True):
        settle_with(monkeypatch, compiled=compiled)
        settled = settle(tape, recorded)
        assert settled.settled
        kinds.append(settled.kind.tolist())
    assert kinds[0] == kinds[1]
    shown = [row for row, kind in enumerate(tape.kind.tolist()) if kind == K.RELEASE_SEEN]
    assert {kinds[0][row] for row in shown} == {0, K.EMPTY_CACHE}
    for outcome in both(tape, recorded, verify=True):
        assert outcome.verify is not None
        assert outcome.verify.mismatches == 0
    assert_same(*both(settled, settings(release, capacity=300 * MIB)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("release", [K.EMPTY_CACHE, K.OBSERVATION])
def test_the_order_in_which_segments_went_back_tells_who_returned_them(
    release: RequestKind, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``empty_cache()`` goes through a free list from its smallest block; before an OOM the largest goes first."""
    log = RequestLog()
    for id_, size in enumerate((30 * MIB, 40 * MIB)):
        log.append(K.ALLOC, id=id_, size=size)
    for id_ in range(2):
        log.append(K.FREE, id=id_)
    log.append(release)
    log.append(K.ALLOC, id=2, size=80 * MIB)
    trace = Trace(log.finish(), observations=(Observation("torch.cuda.mem_get_info"),))
    recorded = settings("2.13", "max_split_size_mb:20", capacity=100 * MIB)
    shown = seen(trace, recorded)
    assert shown.decisions is not None
    gave = shown.decisions.size[shown.decisions.kind == DecisionKind.SEGMENT_FREE].tolist()
    assert gave == ([30 * MIB, 40 * MIB] if release == K.EMPTY_CACHE else [40 * MIB, 30 * MIB])
    settle_with(monkeypatch, compiled=compiled)
    assert settle(tape_of(shown), recorded).kind[4] == (K.EMPTY_CACHE if release == K.EMPTY_CACHE else 0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("conf", ["default", "expandable"])
def test_what_is_tried_and_taken_back_leaves_nothing_behind(conf: str, compiled: bool) -> None:
    """Before each allocation a release is tried; the tables grow on the way, while something is tried too."""
    random, log = Random(3), RequestLog()
    live: list[int] = []
    freed: list[int] = []
    for id_ in range(900):
        log.append(K.ALLOC, id=id_, size=random.choice((512, 700_000, 3 * MIB)), stream=random.choice(STREAMS))
        live.append(id_)
        if random.random() < 0.3:
            log.append(K.RECORD_STREAM, id=id_, stream=STREAMS[1])
        if random.random() < 0.4:
            gone = live.pop(random.randrange(len(live)))
            log.append(K.FREE, id=gone)
            freed.append(gone)
        if freed and random.random() < 0.2:
            log.append(K.USES_DONE, id=freed.pop(random.randrange(len(freed))))
    requests = log.finish()
    columns = tuple(
        np.array(c, dtype=np.int64) if compiled else c.tolist()
        for c in (requests.kind, requests.id, requests.size, requests.stream, requests.pool)
    )
    rows = len(requests)
    rules = rules_for("2.11").rules

    def new() -> CachingAllocator:
        a = CachingAllocator(2**40, 2**40, rules, parse_conf(CONFS[conf], rules), compiled=compiled)
        a.prepare(900, 1)
        return a

    def seen(a: CachingAllocator) -> object:
        return a.decided, a.statistics(), a.segments(), a.calls, [a.decisions().addr.tolist()[-9:]]

    plain, trying = new(), new()
    plain.decide(columns, 0, rows)
    for row in range(rows):
        if requests.kind[row] == K.ALLOC and row % 5 == 0:
            met = seen(trying)
            before = trying.saved(int(requests.id[row]))
            trying.row = row
            trying.empty_cache()
            trying.decide(columns, row, row + 1)
            tried = seen(trying)
            other = trying.exchange(before)
            assert seen(trying) == met
            trying.decide(columns, row, row + 1)
            chosen = seen(trying)
            own = trying.exchange(other)
            assert seen(trying) == tried
            trying.exchange(own)
            assert seen(trying) == chosen
        else:
            trying.decide(columns, row, row + 1)
    assert seen(trying) == seen(plain)
    ours, theirs = trying.decisions(), plain.decisions()
    for column in ("kind", "request", "id", "addr", "size", "stream", "pool"):
        assert np.array_equal(getattr(ours, column), getattr(theirs, column)), column
    assert len(trying._s.t[0]) > 2 * 520, "the tables grew"


@pytest.mark.parametrize("seed", range(3))
def test_addresses_of_a_recording_are_followed_alike(seed: int) -> None:
    """A replay's own decisions are the recording: first under its settings, then under others."""
    recorded = replay(Author(seed).write(1500), settings("2.13"), compiled=False).trace
    assert recorded.decisions is not None
    shifted = replace(recorded.decisions, addr=recorded.decisions.addr - 2**36)
    recorded = replace(recorded, decisions=shifted, placement="recorded")
    interpreted, compiled = both(recorded, settings("2.13"), verify=True)
    assert_same(interpreted, compiled)
    assert compiled.trace.placement == "recorded"
    assert interpreted.verify == compiled.verify
    interpreted, compiled = both(recorded, settings("2.11", capacity=300 * MIB))
    assert_same(interpreted, compiled)
    assert compiled.trace.placement == "modelled"


def test_the_allocator_itself_can_run_the_compiled_loop() -> None:
    rules = rules_for("2.14").rules
    a = CachingAllocator(TOTAL, TOTAL, rules, parse_conf("", rules), compiled=True)
    a.prepare(2, 1)
    columns = tuple(np.array(c, dtype=np.int64) for c in ([1, 1, 2], [0, 1, 0], [400, 3 * MIB, 0], [0] * 3, [0] * 3))
    kind, id_, size, stream, pool = columns
    assert a.decide((kind, id_, size, stream, pool), 0, 3) == 3
    assert (a.now.requested, a.now.reserved, a.segment_count) == (3 * MIB, 22 * MIB, 2)
    assert [len(s.blocks) for s in a.segments()] == [1, 2]


def test_what_was_compiled_is_kept() -> None:
    compile_now()
    assert is_compiled_before()


def test_the_compiled_loop_serves_where_it_saves_more_than_its_start_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes about a second and compiling a minute, shared out or not; a request saves about 18.5 µs."""
    module = sys.modules["fragscope.allocator.compiling"]
    monkeypatch.setattr(module, "can_compile", lambda: True)
    monkeypatch.setattr(module, "is_compiled_before", lambda: True)
    assert [worth_compiling(n) for n in (50_000, 60_000)] == [False, True]
    assert [worth_compiling(n, jobs=4) for n in (200_000, 240_000)] == [False, True]
    monkeypatch.setattr(module, "is_compiled_before", lambda: False)
    assert [worth_compiling(n) for n in (3_000_000, 3_500_000)] == [False, True]
    monkeypatch.setattr(module, "can_compile", lambda: False)
    assert not worth_compiling(10**9)
