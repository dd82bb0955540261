"""What must hold after any sequence of calls, for the rules of every kind of release and settings of every kind."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fragscope.allocator import CachingAllocator, Counters, OutOfMemoryError, Rules, parse_conf, rules_for
from fragscope.allocator.engine.driver import ANY_TOP
from fragscope.trace import DecisionKind, SegmentState

MIB = 2**20
STREAMS = (0, 0x5100, 0x5200)
POOLS = 4  # private ones, at most
EDGES = [
    1, 511, 512, 513, MIB - 1, MIB, MIB + 1, 2 * MIB, 10 * MIB - 512, 10 * MIB - 1, 10 * MIB, 10 * MIB + 1, 20 * MIB,
]  # fmt: skip
sizes = st.one_of(st.sampled_from(EDGES), st.integers(1, 4096), st.integers(1, 3 * MIB), st.integers(1, 40 * MIB))

addresses = st.integers(ANY_TOP // (2 * MIB) - 200, ANY_TOP // (2 * MIB) + 300).map(lambda n: n * 2 * MIB)
given_addresses = st.tuples(
    st.lists(st.tuples(addresses, st.sampled_from([2, 20]).map(lambda n: n * MIB)), max_size=8),
    st.lists(addresses, max_size=2),
)
"""Of segments (address and bytes) and of mappings, as a recording gives them: where modelled segments are too."""


@st.composite
def confs(draw: st.DrawFn, rules: Rules) -> dict[str, str]:
    """Keys and values of a conf string of a release."""
    large = draw(st.sampled_from([20, 20, 12, 32])) if "large_segment_size_mb" in rules.conf_keys else 20
    least = 21 if rules.release == "2.9" else large  # up to 2.9 max_split_size_mb must be above 20
    values = {
        "expandable_segments": st.sampled_from(["True", "False"]),
        "garbage_collection_threshold": st.sampled_from(["0.2", "0.6", "0.9"]),
        "large_segment_size_mb": st.just(str(large)),
        "max_non_split_rounding_mb": st.sampled_from([str(max(least, 21)), "64"]),
        "max_split_size_mb": st.sampled_from([str(least), "32", "40"]),
        "per_process_memory_fraction": st.sampled_from(["0.005", "0.02", "0.5", "1.0"]),
        "roundup_power2_divisions": st.sampled_from(["1", "4", "8", "[1:4,2:2,8:8]", "[4:2,16:1,>:4]"]),
        "throw_on_cudamalloc_oom": st.sampled_from(["True", "False"]),
    }
    known = {key: value for key, value in values.items() if key in rules.conf_keys}
    chosen = draw(st.fixed_dictionaries({}, optional=known))
    if large != 20:
        chosen["large_segment_size_mb"] = str(large)
    return chosen


def text_of(conf: dict[str, str]) -> str:
    return ",".join(f"{key}:{value}" for key, value in conf.items())


@dataclass(frozen=True)
class Idle:
    """Idle bytes, sorted by what keeps them."""

    releasable: int = 0
    stranded: int = 0
    pool_idle: int = 0


class Allocator(RuleBasedStateMachine):
    """Calls as a program makes them; ``release`` is set by the test."""

    release = "2.11"
    total = 4100 * MIB
    live = Bundle("live")

    @initialize(
        data=st.data(),
        capacity=st.sampled_from([16, 32, 80, 200, 4000]),
        fraction=st.sampled_from([None, None, 0.005, 0.02, 0.5, 1.0]),
    )
    def start(self, data: st.DataObject, capacity: int, fraction: float | None) -> None:
        self.rules_ = rules_for(self.release).rules
        self.conf = data.draw(confs(self.rules_))
        self.model = CachingAllocator(
            self.total, capacity * MIB, self.rules_, parse_conf(text_of(self.conf), self.rules_), fraction
        )
        segments, maps = data.draw(given_addresses)
        self.model.give_addresses(segments, maps)
        if data.draw(st.booleans()):
            self.model.begin_process(ANY_TOP, data.draw(st.sampled_from([-1, 0, 2, 8])))
        self.capacity = capacity * MIB
        self.held: dict[int, tuple[int, int, int]] = {}  # address, block bytes and requested bytes
        self.waiting: dict[int, int] = {}  # freed and not completed; requested bytes
        self.users: dict[int, int] = {}  # of every private pool so far
        self.scopes: list[int] = []
        self.capturing = False
        self.pages: dict[int, int] = {}  # address -> bytes of every mapped page
        self.seen = Counters()  # largest values between calls
        self.next_id = 0
        self.whole = self.model.watch()

    @property
    def looks_away(self) -> bool:
        return self.capturing or (self.rules_.scopes_defer and bool(self.scopes))

    def held_pools(self) -> list[int]:
        return [pool for pool, users in self.users.items() if users]

    def note(self, start: int) -> list[DecisionKind]:
        """Follow the decisions of one call; pages are those of the small pool, or of ``large_segment_size_mb``."""
        d = self.model.decisions(start)
        large = int(self.conf.get("large_segment_size_mb", 20)) * MIB
        for kind, id_, addr, size in zip(*(c.tolist() for c in (d.kind, d.id, d.addr, d.size)), strict=True):
            if kind == DecisionKind.FREE_COMPLETED:
                self.waiting.pop(id_, None)
            elif kind == DecisionKind.SEGMENT_MAP:
                mapped_small = self.model.statistics()["reserved_bytes.small"][2] - self.mapped_small
                page = 2 * MIB if mapped_small else large
                assert size % page == 0
                for at in range(addr, addr + size, page):
                    assert at not in self.pages
                    self.pages[at] = page
            elif kind == DecisionKind.SEGMENT_UNMAP:
                at = addr
                while at < addr + size:
                    at += self.pages.pop(at)
                assert at == addr + size, "whole pages"
        return [DecisionKind(kind) for kind in d.kind]

    # --- calls

    @rule(target=live, data=st.data(), size=sizes, stream=st.sampled_from(STREAMS))
    def malloc(self, data: st.DataObject, size: int, stream: int) -> int:
        model = self.model
        pool = data.draw(st.sampled_from([0, 0, *self.held_pools()]))
        id_ = self.next_id
        self.next_id += 1
        start, retries, rejections = model.decided, model.retries, model.rejections
        self.mapped_small = model.statistics()["reserved_bytes.small"][2]
        try:
            addr = model.malloc(id_, size, stream, pool)
        except OutOfMemoryError as e:
            assert e.segment >= e.rounded >= size
            kinds = self.note(start)
            if model.rejections > rejections:
                assert DecisionKind.OOM not in kinds
                assert self.conf.get("throw_on_cudamalloc_oom") == "True"
            else:
                assert kinds[-1] == DecisionKind.OOM
                assert model.retries == retries + (not self.looks_away)
                if not self.looks_away and not self.pages:
                    assert model.releasable == 0, "everything that could be released was released"
        else:
            block = model.block(id_)
            assert (block.addr, block.requested, block.stream) == (addr, size, stream)
            assert block.size >= size
            assert addr % 512 == block.size % 512 == 0
            self.held[id_] = addr, block.size, size
            kinds = self.note(start)
            assert kinds[-1] == DecisionKind.ALLOC
        assert sum(kind in (DecisionKind.ALLOC, DecisionKind.OOM) for kind in kinds) <= 1
        return id_

    @rule(id_=consumes(live))
    def free(self, id_: int) -> None:
        start = self.model.decided
        held = self.held.pop(id_, None)
        if held is not None:
            self.waiting[id_] = held[2]
        self.model.free(id_)
        kinds = self.note(start)
        assert kinds == [DecisionKind.FREE_REQUESTED, DecisionKind.FREE_COMPLETED][: len(kinds)]
        assert bool(kinds) is (held is not None), "the free of a request that failed is nothing"
        assert self.model.lost_frees == 0

    @rule(id_=live, stream=st.sampled_from(STREAMS))
    def record_stream(self, id_: int, stream: int) -> None:
        self.model.record_stream(id_, stream)

    @rule(data=st.data())
    def uses_done(self, data: st.DataObject) -> None:
        if self.waiting:
            self.model.uses_done(data.draw(st.sampled_from(sorted(self.waiting))))

    @rule()
    def empty_cache(self) -> None:
        start = self.model.decided
        self.model.empty_cache()
        self.note(start)
        if not self.looks_away:
            assert self.model.releasable == 0
            assert not self.waiting, "it waits for all streams"

    @rule(fraction=st.sampled_from([0.005, 0.02, 0.6, 1.0]))
    def set_memory_fraction(self, fraction: float) -> None:
        self.model.set_memory_fraction(fraction)

    @rule(on=st.booleans())
    def set_expandable_segments(self, on: bool) -> None:
        self.conf["expandable_segments"] = str(on)
        self.model.set_conf(parse_conf(text_of(self.conf), self.rules_, self.model.conf))

    # --- pools

    @precondition(lambda self: len(self.users) < POOLS)
    @rule(use_on_oom=st.booleans(), no_split=st.booleans())
    def create_pool(self, use_on_oom: bool, no_split: bool) -> None:
        pool = len(self.users) + 1
        self.model.create_pool(pool, use_on_oom=use_on_oom, no_split=no_split)
        self.users[pool] = 1

    @precondition(lambda self: len(self.users) < POOLS or self.held_pools())
    @rule(data=st.data())
    def open_scope(self, data: st.DataObject) -> None:
        new = [len(self.users) + 1] if len(self.users) < POOLS else []
        pool = data.draw(st.sampled_from([*self.held_pools(), *new]))
        self.model.open_scope(pool)
        self.users[pool] = self.users.get(pool, 0) + 1
        self.scopes.append(pool)

    @precondition(lambda self: self.scopes)
    @rule()
    def close_scope(self) -> None:
        self.model.close_scope()
        self.scopes.pop()

    @rule()
    def begin_or_end_capture(self) -> None:
        if self.capturing:
            self.model.end_capture()
        else:
            self.model.begin_capture()
        self.capturing = not self.capturing

    def to_release(self) -> list[int]:
        """Pools with a user that is no open scope."""
        return [pool for pool, users in self.users.items() if users > self.scopes.count(pool)]

    @precondition(lambda self: self.to_release())
    @rule(data=st.data())
    def release_pool(self, data: st.DataObject) -> None:
        pool = data.draw(st.sampled_from(self.to_release()))
        self.model.release_pool(pool)
        self.users[pool] -= 1

    @precondition(lambda self: self.users and not self.looks_away)  # PyTorch refuses it then
    @rule(data=st.data())
    def empty_pool(self, data: st.DataObject) -> None:
        pool = data.draw(st.sampled_from(sorted(self.users)))
        before = self.others(pool)
        start = self.model.decided
        self.model.empty_cache(pool)
        self.note(start)
        assert self.users[pool] == 0 or self.model.decided == start
        assert self.others(pool) == before

    def others(self, pool: int) -> list[tuple[int, int]]:
        """Address and bytes of the segments and mapped ranges of other pools."""
        return [(s.addr, s.size) for s in self.model.segments() if s.pool != pool]

    # --- what must hold

    @invariant()
    def blocks_tile_their_segments(self) -> None:
        end = -1
        for segment in self.model.segments():
            assert segment.addr >= end, "two segments at one address"
            at = segment.addr
            previous = ""
            for addr, size, state in segment.blocks:
                assert addr == at
                assert size > 0
                assert not (previous == state == "free"), "two neighbouring free blocks"
                at, previous = addr + size, state
            end = segment.addr + segment.size
            assert at == end

    @invariant()
    def mapped_ranges_are_the_pages_that_were_mapped(self) -> None:
        pages = dict(self.pages)
        for segment in self.model.segments():
            if segment.expandable:
                at = segment.addr
                while at < segment.addr + segment.size:
                    at += pages.pop(at)
                assert at == segment.addr + segment.size
        assert not pages

    @invariant()
    def live_blocks_are_where_they_were_handed_out(self) -> None:
        blocks = {addr: (size, state) for s in self.model.segments() for addr, size, state in s.blocks}
        for addr, size, _ in self.held.values():
            assert blocks[addr] == (size, "allocated")
        states = [state for _, state in blocks.values()]
        assert states.count("allocated") == len(self.held)
        assert states.count("pending") == len(self.waiting)

    def idle(self, segment: SegmentState) -> Idle:
        """The idle bytes of a segment: of private pools with users, in whole free segments or pages, or neither."""
        free = [(addr, size) for addr, size, state in segment.blocks if state == "free"]
        in_all = sum(size for _, size in free)
        if self.users.get(segment.pool):
            return Idle(pool_idle=in_all)
        if segment.expandable:
            whole = sum(
                length
                for page, length in self.pages.items()
                if any(addr <= page and page + length <= addr + size for addr, size in free)
            )
        else:
            whole = in_all if len(free) == len(segment.blocks) else 0
        return Idle(releasable=whole, stranded=in_all - whole)

    @invariant()
    def reserved_is_requested_internal_releasable_stranded_and_pool_idle(self) -> None:
        now = self.model.now
        idle = [self.idle(segment) for segment in self.model.segments()]
        releasable, stranded, pool_idle = (sum(getattr(i, f.name) for i in idle) for f in fields(Idle))
        assert (self.model.releasable, now.stranded, now.pool_idle) == (releasable, stranded, pool_idle)
        internal = now.active - now.requested
        assert now.reserved == now.requested + internal + releasable + stranded + pool_idle
        assert internal >= now.active - now.allocated
        assert 0 <= now.requested <= now.allocated <= now.active <= now.reserved

    @invariant()
    def counters_are_what_the_blocks_add_up_to(self) -> None:
        now = self.model.now
        segments = self.model.segments()
        by_state = {"allocated": 0, "pending": 0, "free": 0}
        for segment in segments:
            for _, size, state in segment.blocks:
                by_state[state] += size
        split = [
            size
            for s in segments
            for _, size, state in s.blocks
            if len(s.blocks) > 1 and state == "free" and not s.expandable
        ]
        assert now.requested == sum(requested for _, _, requested in self.held.values())
        assert now.allocated == by_state["allocated"]
        assert now.active == by_state["allocated"] + by_state["pending"]
        assert now.reserved == sum(by_state.values())
        assert now.inactive_split == sum(split)
        statistics = {name: values[0] for name, values in self.model.statistics().items()}
        assert statistics["allocation.all"] == len(self.held)
        assert statistics["active.all"] == len(self.held) + len(self.waiting)
        assert statistics["requested_bytes.all"] == now.requested + sum(self.waiting.values())
        assert statistics["inactive_split.all"] == len(split)
        assert statistics["segment.all"] == self.model.segment_count == sum(not s.expandable for s in segments)
        limit = int(self.conf.get("max_split_size_mb", 2**40)) * MIB
        assert statistics["oversize_allocations"] == sum(size >= limit for _, size, _ in self.held.values())
        assert statistics["oversize_segments"] == sum(s.size >= limit and not s.expandable for s in segments)

    @invariant()
    def statistics_are_conserved(self) -> None:
        statistics = self.model.statistics()
        for name, (current, peak, up, down) in statistics.items():
            assert 0 <= current == up - down, name
            assert peak >= current
        for name in {name.rpartition(".")[0] for name in statistics if name.endswith(".all")}:
            both = zip(statistics[f"{name}.small"], statistics[f"{name}.large"], strict=True)
            small_and_large = [small + large for small, large in both]
            current, peak, up, down = statistics[f"{name}.all"]
            assert [current, up, down] == [small_and_large[n] for n in (0, 2, 3)], name
            assert peak <= small_and_large[1]

    @invariant()
    def peaks_are_never_below_what_was_seen(self) -> None:
        now, peak = self.model.now, self.model.peaks(self.whole)
        self.seen = Counters(*(max(getattr(self.seen, f.name), getattr(now, f.name)) for f in fields(Counters)))
        for field in fields(Counters):
            assert getattr(peak, field.name) >= getattr(self.seen, field.name)

    @invariant()
    def memory_is_the_devices(self) -> None:
        assert self.model.now.reserved == self.model.used_memory <= self.capacity
        assert self.model.free_memory == self.capacity - self.model.used_memory

    @invariant()
    def without_pools_stranded_is_torchs_inactive_split(self) -> None:
        if not self.pages and not self.users:
            assert self.model.now.stranded == self.model.now.inactive_split

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        while self.scopes:
            self.close_scope()
        if self.capturing:
            self.begin_or_end_capture()
        for pool in self.users:
            for _ in range(self.users[pool]):
                self.model.release_pool(pool)
        for id_ in self.held:
            self.model.free(id_)
        self.model.empty_cache()
        assert self.model.now == Counters()
        assert (self.model.segments(), self.model.segment_count, self.model.used_memory) == ((), 0, 0)
        assert all(values[0] == 0 for values in self.model.statistics().values())


class LimitedAllocator(Allocator):
    """With a memory fraction that never changes, reserved bytes in segments never exceed it."""

    def set_memory_fraction(self, fraction: float) -> None:
        """Not a rule here."""

    @invariant()
    def reserved_stays_within_the_limit(self) -> None:
        if self.model.limit is not None and not self.has_mapped():
            assert self.model.now.reserved <= self.model.limit

    def has_mapped(self) -> bool:
        """Whether any page was ever mapped; a mapping is held against the limit with less than it takes."""
        return DecisionKind.SEGMENT_MAP in self.model.decisions().kind.tolist()


@pytest.mark.parametrize("release", ["2.9", "2.11", "2.12", "2.13", "2.14"])
@pytest.mark.parametrize("machine", [Allocator, LimitedAllocator])
def test_invariants(release: str, machine: type[Allocator]) -> None:
    made = type(f"{machine.__name__}_{release}", (machine,), {"release": release})
    run_state_machine_as_test(
        made, settings=settings(max_examples=30, stateful_step_count=40, deadline=None, derandomize=False)
    )
