"""What must hold after any sequence of calls, for the rules of every kind of release."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from fragscope.allocator import CachingAllocator, Device, OutOfMemoryError, final_state, rules_for
from fragscope.trace import DecisionKind, DecisionLog

MIB = 2**20
STREAMS = (0, 0x5100, 0x5200)
EDGES = [
    1,
    511,
    512,
    513,
    MIB - 1,
    MIB,
    MIB + 1,
    2 * MIB,
    10 * MIB - 512,
    10 * MIB - 1,
    10 * MIB,
    10 * MIB + 1,
    20 * MIB,
]
sizes = st.one_of(st.sampled_from(EDGES), st.integers(1, 4096), st.integers(1, 3 * MIB), st.integers(1, 40 * MIB))


class Allocator(RuleBasedStateMachine):
    """Calls as a program makes them; ``release`` is set by the test."""

    release = "2.11"
    live = Bundle("live")

    @initialize(capacity=st.sampled_from([32, 80, 200, 4000]), fraction=st.sampled_from([None, 0.3, 0.5, 0.999, 1.0]))
    def start(self, capacity: int, fraction: float | None) -> None:
        self.total = 4100 * MIB
        self.log = DecisionLog()
        device = Device(self.total, capacity * MIB)
        self.model = CachingAllocator(device, rules_for(self.release).rules, memory_fraction=fraction, log=self.log)
        self.held: dict[int, Any] = {}
        self.waiting: set[int] = set()
        self.next_id = 0

    @rule(target=live, size=sizes, stream=st.sampled_from(STREAMS))
    def malloc(self, size: int, stream: int) -> int:
        self.next_id += 1
        start, retries = len(self.log), self.model.retries
        try:
            self.held[self.next_id] = block = self.model.malloc(size, stream, self.next_id)
        except OutOfMemoryError as e:
            assert self.model.retries == retries + 1
            assert self.model.releasable == 0, "everything that could be released was released"
            assert e.segment >= e.rounded >= size
        else:
            assert block.size >= size
            assert block.addr % 512 == block.size % 512 == 0
            assert block.segment.stream == stream
        kinds = [DecisionKind(k) for k in self.log.finish().kind[start:]]
        assert kinds[-1] in (DecisionKind.ALLOC, DecisionKind.OOM)
        assert sum(k in (DecisionKind.ALLOC, DecisionKind.OOM) for k in kinds) == 1
        self.notice_completed(start)
        return self.next_id

    @rule(id_=consumes(live))
    def free(self, id_: int) -> None:
        block = self.held.pop(id_, None)
        if block is not None:
            used = bool(block.uses)
            self.model.free(block)
            if used:
                self.waiting.add(id_)

    @rule(id_=live, stream=st.sampled_from(STREAMS))
    def record_stream(self, id_: int, stream: int) -> None:
        if id_ in self.held:
            self.model.record_stream(self.held[id_], stream)

    @rule(data=st.data())
    def uses_done(self, data: st.DataObject) -> None:
        if self.waiting:
            self.model.uses_done(data.draw(st.sampled_from(sorted(self.waiting))))

    @rule()
    def empty_cache(self) -> None:
        start = len(self.log)
        self.model.empty_cache()
        self.notice_completed(start)
        assert self.model.releasable == 0
        assert not self.waiting, "it waits for all streams"

    @rule(fraction=st.sampled_from([0.2, 0.6, 1.0]))
    def set_memory_fraction(self, fraction: float) -> None:
        self.model.set_memory_fraction(fraction)

    def notice_completed(self, start: int) -> None:
        rows = self.log.finish()
        done = rows.kind[start:] == DecisionKind.FREE_COMPLETED
        self.waiting -= set(rows.id[start:][done].tolist())

    @invariant()
    def blocks_tile_their_segments(self) -> None:
        for segment in final_state(self.model):
            at = segment.addr
            previous = ""
            for addr, size, state in segment.blocks:
                assert addr == at
                assert size > 0
                assert not (previous == state == "free"), "two neighbouring free blocks"
                at, previous = addr + size, state
            assert at == segment.addr + segment.size

    @invariant()
    def segments_do_not_overlap(self) -> None:
        end = -1
        for segment in final_state(self.model):
            assert segment.addr >= end
            end = segment.addr + segment.size

    @invariant()
    def live_blocks_are_where_they_were_handed_out(self) -> None:
        blocks = {addr: (size, state) for s in final_state(self.model) for addr, size, state in s.blocks}
        for block in self.held.values():
            assert blocks[block.addr] == (block.size, "allocated")
        states = [state for _, state in blocks.values()]
        assert states.count("allocated") == len(self.held)
        assert states.count("pending") == len(self.waiting)

    @invariant()
    def counters_are_what_the_blocks_add_up_to(self) -> None:
        m = self.model.meter
        segments = final_state(self.model)
        by_state = {"allocated": 0, "pending": 0, "free": 0}
        stranded = split = 0
        for segment in segments:
            free = sum(size for _, size, state in segment.blocks if state == "free")
            for _, size, state in segment.blocks:
                by_state[state] += size
            stranded += free if any(state != "free" for _, _, state in segment.blocks) else 0
            split += free if len(segment.blocks) > 1 else 0
        assert m.allocated == by_state["allocated"]
        assert m.active == by_state["allocated"] + by_state["pending"]
        assert m.reserved == sum(s.size for s in segments)
        assert m.segments == len(segments)
        assert m.stranded == stranded
        assert m.inactive_split == split
        assert m.requested == sum(b.requested for b in self.held.values())

    @invariant()
    def reserved_is_requested_internal_releasable_and_stranded(self) -> None:
        m = self.model.meter
        pending = m.active - m.allocated
        internal = m.active - m.requested
        assert m.reserved == m.requested + internal + self.model.releasable + m.stranded
        assert internal >= pending
        assert 0 <= m.requested <= m.allocated <= m.active <= m.reserved

    @invariant()
    def stranded_is_torchs_inactive_split_under_the_default_conf(self) -> None:
        assert self.model.meter.stranded == self.model.meter.inactive_split

    @invariant()
    def memory_stays_within_device_and_limit(self) -> None:
        model = self.model
        assert model.meter.reserved == model.device.used <= model.device.capacity
        assert model.calls.alloc - model.calls.free == model.meter.segments

    @invariant()
    def peaks_are_never_below_the_counters(self) -> None:
        now, peak = self.model.meter.now(), self.model.meter.peak()
        for name in type(now).__dataclass_fields__:
            assert getattr(peak, name) >= getattr(now, name)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        for block in self.held.values():
            self.model.free(block)
        self.model.empty_cache()
        m = self.model.meter
        assert (m.requested, m.allocated, m.active, m.reserved, m.stranded, m.inactive_split, m.segments) == (0,) * 7
        assert self.model.device.used == 0


class LimitedAllocator(Allocator):
    """With a memory fraction that never changes, reserved bytes never exceed it."""

    def set_memory_fraction(self, fraction: float) -> None:  # type: ignore[override]
        """Not a rule here."""

    @invariant()
    def reserved_stays_within_the_limit(self) -> None:
        if self.model.limit is not None:
            assert self.model.meter.reserved <= self.model.limit


@pytest.mark.parametrize("release", ["2.9", "2.11", "2.12", "2.13", "2.14"])
@pytest.mark.parametrize("machine", [Allocator, LimitedAllocator])
def test_invariants(release: str, machine: type[Allocator]) -> None:
    made = type(f"{machine.__name__}_{release}", (machine,), {"release": release})
    run_state_machine_as_test(
        made, settings=settings(max_examples=30, stateful_step_count=40, deadline=None, derandomize=False)
    )
