"""The allocator model by example: the behaviour of c10/cuda/CUDACachingAllocator.cpp under the default conf."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from fragscope.allocator import CachingAllocator, Device, OutOfMemoryError, final_state, rules_for
from fragscope.trace import DecisionKind, DecisionLog

MIB = 2**20
GIB = 2**30
BASE = 0x7000_0000_0000
SIDE = 0x5100  # another stream
D = DecisionKind


class Ascending:
    """Every segment lies above the one before, in a place of its own."""

    def __init__(self, step: int = 64 * MIB) -> None:
        self.next = BASE
        self.step = step

    def place(self, size: int) -> int:
        addr, self.next = self.next, self.next + self.step
        return addr

    def remove(self, addr: int, size: int) -> None:
        pass


@dataclass
class Run:
    """An allocator with its log."""

    release: str = "2.11"
    capacity: int = 80 * GIB
    step: int = 64 * MIB
    log: DecisionLog = field(default_factory=DecisionLog)

    def __post_init__(self) -> None:
        device = Device(80 * GIB, self.capacity, Ascending(self.step))
        self.a = CachingAllocator(device, rules_for(self.release).rules, log=self.log)
        self.seen = 0
        self.next_id = 0

    def malloc(self, size: int, stream: int = 0) -> Any:
        self.next_id += 1
        return self.a.malloc(size, stream, self.next_id)

    def decided(self) -> list[tuple[DecisionKind, int, int]]:
        """Kind, address and bytes of what was decided since the last call."""
        rows = self.log.finish()
        new = [(D(rows.kind[n]), int(rows.addr[n]), int(rows.size[n])) for n in range(self.seen, len(self.log))]
        self.seen = len(self.log)
        return new

    def blocks(self) -> list[list[tuple[int, str]]]:
        return [[(size, state) for _, size, state in s.blocks] for s in final_state(self.a)]


def test_a_first_small_request_takes_a_2_mib_segment_and_splits_its_front_off() -> None:
    run = Run()
    block = run.malloc(400)
    assert run.decided() == [(D.SEGMENT_ALLOC, BASE, 2 * MIB), (D.ALLOC, BASE, 512)]
    assert (block.addr, block.size, block.requested) == (BASE, 512, 400)
    assert run.blocks() == [[(512, "allocated"), (2 * MIB - 512, "free")]]


def test_a_first_medium_request_takes_a_20_mib_segment() -> None:
    run = Run()
    run.malloc(3 * MIB)
    assert run.blocks() == [[(3 * MIB, "allocated"), (17 * MIB, "free")]]


def test_a_request_of_10_mib_takes_a_segment_of_its_own_size() -> None:
    run = Run()
    run.malloc(10 * MIB)
    run.malloc(11 * MIB)
    assert run.blocks() == [[(10 * MIB, "allocated")], [(12 * MIB, "allocated")]]  # 1 MiB is too little to split off


def test_the_next_request_is_cut_from_the_rest() -> None:
    run = Run()
    run.malloc(400)
    assert run.malloc(1000).addr == BASE + 512
    assert [d[0] for d in run.decided()] == [D.SEGMENT_ALLOC, D.ALLOC, D.ALLOC]


def test_a_remainder_too_small_to_keep_goes_to_the_program() -> None:
    run = Run()
    big = run.malloc(16 * MIB)
    run.a.free(big)
    block = run.malloc(15 * MIB)
    assert (block.size, block.requested) == (16 * MIB, 15 * MIB)
    assert run.a.meter.allocated == 16 * MIB
    assert run.a.meter.requested == 15 * MIB


def test_the_smallest_sufficient_block_is_taken() -> None:
    run = Run()
    blocks = [run.malloc(size * MIB) for size in (30, 14, 20)]
    for block in blocks:
        run.a.free(block)
    assert run.malloc(13 * MIB).addr == blocks[1].addr


def test_small_and_large_requests_never_share_segments() -> None:
    run = Run()
    run.a.free(run.malloc(3 * MIB))
    run.malloc(MIB)
    assert run.a.meter.segments == 2


def test_streams_never_share_blocks() -> None:
    run = Run()
    run.a.free(run.malloc(3 * MIB, 0))
    run.malloc(3 * MIB, SIDE)
    assert run.a.meter.segments == 2


def test_a_freed_block_merges_with_idle_neighbours() -> None:
    run = Run()
    one, two, three = (run.malloc(512) for _ in range(3))
    run.a.free(one)
    run.a.free(three)
    assert run.blocks() == [[(512, "free"), (512, "allocated"), (2 * MIB - 1024, "free")]]
    run.a.free(two)
    assert run.blocks() == [[(2 * MIB, "free")]]


def test_segments_never_merge_with_each_other() -> None:
    run = Run(step=2 * MIB)
    blocks = [run.malloc(MIB) for _ in range(4)]
    assert run.a.meter.segments == 2
    for block in blocks:
        run.a.free(block)
    assert run.blocks() == [[(2 * MIB, "free")], [(2 * MIB, "free")]]


def test_empty_cache_returns_whole_segments_large_ones_first() -> None:
    run = Run()
    small, large, kept = run.malloc(400), run.malloc(3 * MIB), run.malloc(30 * MIB)
    run.a.free(small)
    run.a.free(large)
    run.decided()
    run.a.empty_cache()
    assert run.decided() == [(D.SEGMENT_FREE, BASE + 64 * MIB, 20 * MIB), (D.SEGMENT_FREE, BASE, 2 * MIB)]
    assert run.a.meter.reserved == 30 * MIB == kept.size
    assert run.a.calls.sync == 1


def test_a_live_block_strands_its_segment() -> None:
    run = Run()
    run.malloc(512)
    run.a.free(run.malloc(MIB))
    assert run.a.meter.stranded == 2 * MIB - 512
    assert run.a.releasable == 0
    run.a.empty_cache()
    assert run.a.meter.reserved == 2 * MIB


# --- other streams ------------------------------------------------------------------------------------------------


def test_a_free_of_a_block_used_elsewhere_waits_until_memory_is_asked_for() -> None:
    run = Run()
    block = run.malloc(3 * MIB)
    run.a.record_stream(block, SIDE)
    run.decided()
    run.a.free(block)
    assert run.decided() == [(D.FREE_REQUESTED, BASE, 3 * MIB)]
    assert (run.a.meter.allocated, run.a.meter.active) == (0, 3 * MIB)
    assert run.blocks() == [[(3 * MIB, "pending"), (17 * MIB, "free")]]
    run.a.uses_done(block.id)
    assert run.decided() == [], "finished work is noticed only when memory is asked for"
    run.malloc(400)
    assert run.decided()[0] == (D.FREE_COMPLETED, BASE, 3 * MIB)


def test_until_then_the_block_is_not_handed_out() -> None:
    run = Run()
    block = run.malloc(18 * MIB)
    run.a.record_stream(block, SIDE)
    run.a.free(block)
    assert run.malloc(18 * MIB).addr != block.addr
    run.a.uses_done(block.id)
    assert run.malloc(18 * MIB).addr == block.addr


def test_a_use_on_its_own_stream_defers_nothing() -> None:
    run = Run()
    block = run.malloc(400, SIDE)
    run.a.record_stream(block, SIDE)
    run.a.free(block)
    assert run.a.meter.active == 0


def test_empty_cache_waits_for_other_streams() -> None:
    run = Run()
    block = run.malloc(3 * MIB)
    run.a.record_stream(block, SIDE)
    run.a.free(block)
    run.a.empty_cache()
    assert (run.a.meter.active, run.a.meter.reserved) == (0, 0)


def test_uses_of_what_nobody_freed_are_ignored() -> None:
    run = Run()
    run.a.uses_done(99)
    run.malloc(400)
    assert run.a.meter.allocated == 512


# --- running out --------------------------------------------------------------------------------------------------


def test_before_giving_up_everything_cached_is_returned() -> None:
    run = Run(capacity=40 * MIB)
    run.a.free(run.malloc(30 * MIB))
    run.decided()
    run.malloc(36 * MIB)
    assert [d[0] for d in run.decided()] == [D.SEGMENT_FREE, D.SEGMENT_ALLOC, D.ALLOC]
    assert (run.a.retries, run.a.ooms) == (1, 0)


def test_an_oom_says_what_was_asked_and_what_is_left() -> None:
    run = Run(capacity=40 * MIB)
    kept = run.malloc(20 * MIB)
    run.a.free(run.malloc(14 * MIB))
    run.decided()
    with pytest.raises(OutOfMemoryError) as caught:
        run.malloc(21 * MIB + 1, SIDE)
    e = caught.value
    assert (e.requested, e.rounded, e.segment, e.stream, e.free) == (
        21 * MIB + 1, 21 * MIB + 512, 22 * MIB, SIDE, 20 * MIB,
    )  # fmt: skip
    assert run.decided() == [(D.SEGMENT_FREE, BASE + 64 * MIB, 14 * MIB), (D.OOM, 20 * MIB, 21 * MIB + 512)]
    assert (run.a.retries, run.a.ooms) == (1, 1)
    assert kept.allocated


def test_the_pool_is_not_searched_again_after_the_release() -> None:
    """A deferred free that the retry completes could serve the request, but only driver memory is tried."""
    run = Run(capacity=20 * MIB)
    pin, used = run.malloc(2 * MIB), run.malloc(16 * MIB)
    place = used.addr
    run.a.record_stream(used, SIDE)
    run.a.free(used)
    with pytest.raises(OutOfMemoryError):
        run.malloc(9 * MIB)
    assert run.a.meter.active == pin.size
    assert run.malloc(9 * MIB).addr == place


def test_a_memory_fraction_limits_reserved_bytes() -> None:
    run = Run()
    run.a.set_memory_fraction(0.25)  # of 80 GiB
    run.malloc(20 * GIB)
    with pytest.raises(OutOfMemoryError):
        run.malloc(1)


def test_a_request_must_release_only_where_neither_cache_nor_driver_serves_it() -> None:
    run = Run(capacity=40 * MIB)
    run.a.free(run.malloc(20 * MIB))
    assert not run.a.must_release(20 * MIB, 0), "cached"
    assert not run.a.must_release(20 * MIB, SIDE), "a new segment fits"
    assert run.a.must_release(22 * MIB, 0)
    run.a.set_memory_fraction(30 * MIB / (80 * GIB))
    assert run.a.must_release(20 * MIB, SIDE)


def test_an_absurd_size_is_refused_without_a_trace() -> None:
    run = Run()
    run.a.free(run.malloc(400))
    run.decided()
    with pytest.raises(OutOfMemoryError):
        run.malloc(2**60)
    assert run.decided() == []
    assert (run.a.retries, run.a.ooms, run.a.meter.reserved) == (0, 0, 2 * MIB)


# --- equal sizes --------------------------------------------------------------------------------------------------


class Given(Ascending):
    """Addresses in the order given."""

    def __init__(self, *addresses: int) -> None:
        self.addresses = list(addresses)

    def place(self, size: int) -> int:
        return self.addresses.pop(0)


@pytest.mark.parametrize(("release", "low_first"), [("2.9", True), ("2.11", True), ("2.13", False), ("2.14", False)])
def test_of_two_equal_segments_the_lower_is_taken_up_to_2_11_and_the_older_from_2_13(
    release: str, low_first: bool
) -> None:
    high, low = BASE + 64 * MIB, BASE
    a = CachingAllocator(Device(GIB, GIB, Given(high, low)), rules_for(release).rules)
    for block in [a.malloc(14 * MIB, id=n) for n in range(2)]:
        a.free(block)
    assert a.malloc(14 * MIB).addr == (low if low_first else high)
    assert a.address_ties == 0, "whole idle segments of one size are interchangeable"


@pytest.mark.parametrize(("release", "ties"), [("2.11", 1), ("2.12", 0), ("2.13", 0)])
def test_a_choice_between_parts_of_different_segments_is_counted_where_addresses_decide(
    release: str, ties: int
) -> None:
    run = Run(release)
    blocks = [run.malloc(9 * MIB) for _ in range(4)]  # two to a segment
    run.a.free(blocks[0])
    run.a.free(blocks[2])
    run.malloc(9 * MIB)
    assert run.a.address_ties == ties


def test_ties_inside_one_segment_do_not_depend_on_the_driver() -> None:
    run = Run("2.11")
    blocks = [run.malloc(512) for _ in range(4)]
    run.a.free(blocks[0])
    run.a.free(blocks[2])
    run.malloc(512)
    assert run.a.address_ties == 0


@pytest.mark.parametrize(("release", "taken"), [("2.11", "front"), ("2.12", "middle"), ("2.13", "front")])
def test_in_2_12_the_block_object_made_first_is_taken(release: str, taken: str) -> None:
    """A split makes a new object for the front and keeps the old one for the rest: a front can be the younger one."""
    run = Run(release)
    first, middle = run.malloc(8 * MIB), run.malloc(4 * MIB)
    run.malloc(8 * MIB)  # the 20 MiB segment is full
    run.a.free(first)
    front = run.malloc(4 * MIB)  # splits the first 8 MiB: a new object, younger than the middle one
    run.malloc(4 * MIB)
    places = {"front": front.addr, "middle": middle.addr}
    run.a.free(front)
    run.a.free(middle)
    assert run.malloc(4 * MIB).addr == places[taken]


def test_ties_inside_one_segment_go_to_the_lower_address_from_2_13() -> None:
    run = Run("2.13")
    blocks = [run.malloc(512) for _ in range(5)]
    run.a.free(blocks[3])
    run.a.free(blocks[1])
    assert run.malloc(512).addr == blocks[1].addr
