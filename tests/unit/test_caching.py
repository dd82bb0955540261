"""The allocator model by example: the behaviour of c10/cuda/CUDACachingAllocator.cpp.

Pools are in test_pools, expandable segments in test_expandable, what differs between releases in test_rules.
"""

from __future__ import annotations

import pytest

from fragscope.allocator import CachingAllocator, OutOfMemoryError, parse_conf, rules_for
from fragscope.trace import DecisionKind

MIB = 2**20
GIB = 2**30
SIDE = 0x5100  # another stream
THIRD = 0x5200
D = DecisionKind


def allocator(
    conf: str = "", release: str = "2.11", total: int = 80 * GIB, capacity: int | None = None
) -> CachingAllocator:
    rules = rules_for(release).rules
    return CachingAllocator(total, total if capacity is None else capacity, rules, parse_conf(conf, rules))


def decided(a: CachingAllocator, start: int = 0) -> list[tuple[DecisionKind, int]]:
    """Kind and bytes of the decisions from row ``start`` on."""
    d = a.decisions(start)
    return [(D(kind), size) for kind, size in zip(d.kind.tolist(), d.size.tolist(), strict=True)]


def blocks(a: CachingAllocator) -> list[list[tuple[int, str]]]:
    """Bytes and state of the blocks of every segment, in the order in which the segments were taken."""
    taken = a.decisions().addr[a.decisions().kind == D.SEGMENT_ALLOC].tolist()
    segments = sorted(a.segments(), key=lambda s: taken.index(s.addr))
    return [[(size, state) for _, size, state in s.blocks] for s in segments]


def cache(a: CachingAllocator, *mebibytes: int) -> None:
    """Idle segments of these sizes; takes ids from 1000 on."""
    ids = [1000 + n for n in range(len(mebibytes))]
    for id_, size in zip(ids, mebibytes, strict=True):
        a.malloc(id_, size * MIB)
    for id_ in ids:
        a.free(id_)


# --- segments and blocks ------------------------------------------------------------------------------------------


def test_a_first_small_request_takes_a_2_mib_segment_and_splits_its_front_off() -> None:
    a = allocator()
    addr = a.malloc(0, 400)
    assert decided(a) == [(D.SEGMENT_ALLOC, 2 * MIB), (D.ALLOC, 512)]
    assert a.decisions().addr.tolist() == [addr, addr]
    block = a.block(0)
    assert (block.addr, block.size, block.requested, block.stream) == (addr, 512, 400, 0)
    assert blocks(a) == [[(512, "allocated"), (2 * MIB - 512, "free")]]


def test_a_first_medium_request_takes_a_20_mib_segment() -> None:
    a = allocator()
    a.malloc(0, 3 * MIB)
    assert blocks(a) == [[(3 * MIB, "allocated"), (17 * MIB, "free")]]


def test_large_segment_size_changes_that() -> None:
    a = allocator("large_segment_size_mb:32")
    a.malloc(0, 3 * MIB)
    assert blocks(a) == [[(3 * MIB, "allocated"), (29 * MIB, "free")]]


def test_a_request_of_10_mib_takes_a_segment_of_its_own_size() -> None:
    a = allocator()
    a.malloc(0, 10 * MIB)
    a.malloc(1, 11 * MIB)
    assert blocks(a) == [[(10 * MIB, "allocated")], [(12 * MIB, "allocated")]]  # 1 MiB is too little to split off


def test_the_next_request_is_cut_from_the_rest() -> None:
    a = allocator()
    first = a.malloc(0, 400)
    assert a.malloc(1, 1000) == first + 512
    assert [kind for kind, _ in decided(a)] == [D.SEGMENT_ALLOC, D.ALLOC, D.ALLOC]


def test_a_remainder_too_small_to_keep_goes_to_the_program() -> None:
    a = allocator()
    cache(a, 16)
    a.malloc(0, 15 * MIB)
    assert (a.block(0).size, a.block(0).requested) == (16 * MIB, 15 * MIB)
    assert (a.now.allocated, a.now.requested) == (16 * MIB, 15 * MIB)


def test_the_smallest_sufficient_block_is_taken() -> None:
    a = allocator()
    addresses = [a.malloc(n, size * MIB) for n, size in enumerate((30, 14, 20))]
    for n in range(3):
        a.free(n)
    assert a.malloc(3, 13 * MIB) == addresses[1]


def test_small_and_large_requests_never_share_segments() -> None:
    a = allocator()
    cache(a, 3)
    a.malloc(0, MIB)
    assert a.segment_count == 2


def test_the_rounded_request_decides_which_it_is() -> None:
    a = allocator("roundup_power2_divisions:1")
    a.malloc(0, MIB)
    assert blocks(a) == [[(MIB, "allocated"), (MIB, "free")]]
    a = allocator("roundup_power2_divisions:2")
    a.malloc(0, MIB - 1)  # the next step above half a MiB and three quarters
    a.malloc(1, MIB + 1)  # 1.5 MiB
    assert blocks(a) == [
        [(MIB, "allocated"), (MIB, "free")],
        [(3 * MIB // 2, "allocated"), (20 * MIB - 3 * MIB // 2, "free")],
    ]


def test_streams_never_share_blocks() -> None:
    a = allocator()
    cache(a, 3)
    a.malloc(0, 3 * MIB, SIDE)
    assert a.segment_count == 2


def test_a_freed_block_merges_with_idle_neighbours() -> None:
    a = allocator()
    for n in range(3):
        a.malloc(n, 512)
    a.free(0)
    a.free(2)
    assert blocks(a) == [[(512, "free"), (512, "allocated"), (2 * MIB - 1024, "free")]]
    a.free(1)
    assert blocks(a) == [[(2 * MIB, "free")]]


def test_segments_never_merge_with_each_other() -> None:
    a = allocator()
    first, _, second, _ = (a.malloc(n, MIB) for n in range(4))
    assert second == first + 2 * MIB, "side by side"
    for n in range(4):
        a.free(n)
    assert blocks(a) == [[(2 * MIB, "free")], [(2 * MIB, "free")]]


def test_empty_cache_returns_whole_segments_large_ones_first() -> None:
    a = allocator()
    for n, size in enumerate((400, 3 * MIB, 30 * MIB)):
        a.malloc(n, size)
    a.free(0)
    a.free(1)
    start = a.decided
    a.empty_cache()
    assert decided(a, start) == [(D.SEGMENT_FREE, 20 * MIB), (D.SEGMENT_FREE, 2 * MIB)]
    assert a.now.reserved == 30 * MIB
    assert a.calls.sync == 1


def test_it_returns_small_ones_before_large_ones_and_those_of_low_streams_first() -> None:
    a = allocator()
    for n, (size, stream) in enumerate([(12, SIDE), (14, 0), (10, SIDE), (16, 0)]):
        a.malloc(n, size * MIB, stream)
    for n in range(4):
        a.free(n)
    start = a.decided
    a.empty_cache()
    assert [size // MIB for _, size in decided(a, start)] == [14, 16, 10, 12]


def test_a_live_block_strands_its_segment() -> None:
    a = allocator()
    a.malloc(0, 512)
    a.malloc(1, MIB)
    a.free(1)
    assert a.now.stranded == 2 * MIB - 512
    assert a.releasable == 0
    a.empty_cache()
    assert a.now.reserved == 2 * MIB


def test_an_allocation_that_is_not_held_has_no_block() -> None:
    a = allocator()
    a.malloc(0, 512)
    a.free(0)
    for id_ in (-1, 0, 99):
        with pytest.raises(KeyError):
            a.block(id_)


def test_what_was_freed_already_is_a_lost_free() -> None:
    a = allocator()
    a.malloc(0, 512)
    a.free(0)
    a.free(0)
    assert a.lost_frees == 1
    assert a.now.allocated == 0


# --- what is counted ----------------------------------------------------------------------------------------------


def test_statistics_are_those_of_torch() -> None:
    a = allocator()
    a.malloc(0, 400)  # 2 MiB segment, 512 of it
    a.malloc(1, 3 * MIB)  # 20 MiB segment
    a.free(0)
    stats = a.statistics()
    # current, peak, allocated, freed
    assert stats["allocation.all"] == (1, 2, 2, 1)
    assert stats["allocation.small"] == (0, 1, 1, 1)
    assert stats["segment.all"] == (2, 2, 2, 0)
    assert stats["allocated_bytes.all"] == (3 * MIB, 3 * MIB + 512, 3 * MIB + 512, 512)
    assert stats["requested_bytes.all"] == (3 * MIB, 3 * MIB + 400, 3 * MIB + 400, 400)
    assert stats["reserved_bytes.all"] == (22 * MIB, 22 * MIB, 22 * MIB, 0)
    assert stats["reserved_bytes.large"] == (20 * MIB, 20 * MIB, 20 * MIB, 0)
    assert stats["inactive_split.all"] == (1, 2, 2, 1)
    assert stats["inactive_split_bytes.all"] == (17 * MIB, 19 * MIB - 512, 19 * MIB - 512, 2 * MIB - 512)


def test_every_onlooker_has_peaks_of_its_own() -> None:
    a = allocator()
    whole = a.watch()
    a.malloc(0, 30 * MIB)
    a.free(0)
    phase = a.watch()
    a.malloc(1, 20 * MIB)
    a.reset_program_peaks()
    a.free(1)
    assert a.peaks(whole).requested == 30 * MIB
    assert a.peaks(phase).requested == 20 * MIB
    assert a.statistics()["requested_bytes.all"][1] == 20 * MIB, "held when the program reset them"
    a.reset_program_peaks()
    assert a.statistics()["requested_bytes.all"][1] == 0
    assert (a.peaks(whole).reserved, a.peak_segments(whole)) == (30 * MIB, 1)


def test_decisions_name_the_request_that_was_served() -> None:
    a = allocator()
    a.row = 7
    a.malloc(3, 400)
    a.row = 8
    a.free(3)
    d = a.decisions()
    assert d.request.tolist() == [7, 7, 8, 8]
    assert d.id.tolist() == [-1, 3, 3, 3]


def test_without_a_log_only_counters_are_kept() -> None:
    a = CachingAllocator(GIB, GIB, rules_for("2.11").rules, logging=False)
    a.malloc(0, 400)
    assert (a.decided, len(a.decisions()), a.now.allocated) == (0, 0, 512)


# --- other streams ------------------------------------------------------------------------------------------------


def test_a_free_of_a_block_used_elsewhere_waits_until_memory_is_asked_for() -> None:
    a = allocator()
    a.malloc(0, 3 * MIB)
    a.record_stream(0, SIDE)
    start = a.decided
    a.free(0)
    assert decided(a, start) == [(D.FREE_REQUESTED, 3 * MIB)]
    assert (a.now.requested, a.now.allocated, a.now.active) == (0, 0, 3 * MIB)
    assert blocks(a) == [[(3 * MIB, "pending"), (17 * MIB, "free")]]
    a.uses_done(0)
    assert a.decided == start + 1, "finished work is noticed only when memory is asked for"
    a.malloc(1, 400)
    assert decided(a, start)[1] == (D.FREE_COMPLETED, 3 * MIB)
    assert a.now.active == 512


def test_until_then_the_block_is_not_handed_out() -> None:
    a = allocator()
    addr = a.malloc(0, 18 * MIB)
    a.record_stream(0, SIDE)
    a.free(0)
    assert a.malloc(1, 18 * MIB) != addr
    a.uses_done(0)
    assert a.malloc(2, 18 * MIB) == addr, "the request that notices may have it"


def test_frees_complete_in_the_order_in_which_work_was_finished() -> None:
    a = allocator()
    for n in range(3):
        a.malloc(n, 512)
        a.record_stream(n, SIDE)
    for n in range(3):
        a.free(n)
    for n in (2, 0, 1):
        a.uses_done(n)
    a.malloc(3, 512)
    d = a.decisions()
    assert d.id[d.kind == D.FREE_COMPLETED].tolist() == [2, 0, 1]


def test_several_streams_and_several_uses_are_one_wait() -> None:
    a = allocator()
    a.malloc(0, 512)
    for stream in (SIDE, THIRD, SIDE):
        a.record_stream(0, stream)
    a.free(0)
    a.uses_done(0)
    a.uses_done(0)
    a.malloc(1, 512)
    assert [kind for kind, _ in decided(a)].count(D.FREE_COMPLETED) == 1
    assert a.now.active == 512


def test_a_use_on_its_own_stream_defers_nothing() -> None:
    a = allocator()
    a.malloc(0, 400, SIDE)
    a.record_stream(0, SIDE)
    a.free(0)
    assert a.now.active == 0


def test_empty_cache_waits_for_other_streams() -> None:
    a = allocator()
    a.malloc(0, 3 * MIB)
    a.record_stream(0, SIDE)
    a.free(0)
    a.empty_cache()
    assert (a.now.active, a.now.reserved) == (0, 0)


def test_uses_of_what_nobody_freed_are_ignored() -> None:
    a = allocator()
    a.malloc(0, 400)
    a.uses_done(0)
    a.record_stream(0, SIDE)
    a.free(0)
    a.malloc(1, 400)
    assert a.now.active == 1024, "what was done before the free is not what the free waits for"
    assert a.now.allocated == 512


# --- running out --------------------------------------------------------------------------------------------------


def test_before_giving_up_everything_cached_is_returned() -> None:
    a = allocator(capacity=40 * MIB)
    cache(a, 30)
    start = a.decided
    a.malloc(0, 36 * MIB)
    assert decided(a, start) == [(D.SEGMENT_FREE, 30 * MIB), (D.SEGMENT_ALLOC, 36 * MIB), (D.ALLOC, 36 * MIB)]
    assert (a.retries, a.ooms) == (1, 0)


def test_an_oom_says_what_was_asked_and_what_is_left() -> None:
    a = allocator(capacity=40 * MIB)
    a.malloc(0, 20 * MIB)
    cache(a, 14)
    start = a.decided
    a.row = 5
    with pytest.raises(OutOfMemoryError) as caught:
        a.malloc(1, 21 * MIB + 1, SIDE)
    e = caught.value
    assert (e.requested, e.rounded, e.segment, e.stream, e.free) == (
        21 * MIB + 1, 21 * MIB + 512, 22 * MIB, SIDE, 20 * MIB,
    )  # fmt: skip
    assert decided(a, start) == [(D.SEGMENT_FREE, 14 * MIB), (D.OOM, 21 * MIB + 512)]
    assert a.decisions().addr[-1] == 20 * MIB, "the driver's free bytes"
    assert (a.retries, a.ooms, a.first_oom) == (1, 1, 5)
    assert a.block(0).size == 20 * MIB


def test_the_free_of_a_request_that_failed_is_nothing() -> None:
    a = allocator(capacity=40 * MIB)
    with pytest.raises(OutOfMemoryError):
        a.malloc(0, 60 * MIB)
    start = a.decided
    a.record_stream(0, SIDE)
    a.free(0)
    a.uses_done(0)
    assert (a.decided, a.lost_frees) == (start, 0)


def test_the_pool_is_not_searched_again_after_the_release() -> None:
    """A deferred free that the retry completes could serve the request, but only driver memory is tried."""
    a = allocator(capacity=20 * MIB)
    a.malloc(0, 2 * MIB)
    place = a.malloc(1, 16 * MIB)
    a.record_stream(1, SIDE)
    a.free(1)
    with pytest.raises(OutOfMemoryError):
        a.malloc(2, 9 * MIB)
    assert a.now.active == 2 * MIB
    assert a.malloc(3, 9 * MIB) == place


def test_an_absurd_size_is_refused_without_a_trace() -> None:
    a = allocator()
    cache(a, 1)
    start = a.decided
    with pytest.raises(OutOfMemoryError):
        a.malloc(0, 2**60)
    assert a.decided == start
    assert (a.retries, a.ooms, a.now.reserved) == (0, 0, 2 * MIB)


# --- memory limit -------------------------------------------------------------------------------------------------


def test_a_memory_fraction_limits_reserved_bytes() -> None:
    a = allocator()
    a.set_memory_fraction(0.25)  # of 80 GiB
    assert a.limit == 20 * GIB
    a.malloc(0, 20 * GIB)
    with pytest.raises(OutOfMemoryError) as caught:
        a.malloc(1, 1)
    assert caught.value.free == 60 * GIB, "the driver has it"


def test_within_the_limit_cached_memory_is_returned_for_a_request() -> None:
    a = allocator(total=400 * MIB)
    a.set_memory_fraction(0.1)
    cache(a, 30)
    a.malloc(0, 20 * MIB, SIDE)
    assert (a.retries, a.now.reserved) == (1, 20 * MIB)


def test_a_key_of_the_conf_sets_the_limit_at_the_start() -> None:
    assert allocator("per_process_memory_fraction:0.25", total=400 * MIB).limit == 100 * MIB
    assert allocator("per_process_memory_fraction:1.0", total=400 * MIB).limit is None


# --- throw_on_cudamalloc_oom --------------------------------------------------------------------------------------

THROW = "throw_on_cudamalloc_oom:True"


def test_it_refuses_what_exceeds_the_device_before_anything_is_released() -> None:
    a = allocator(THROW, "2.12", total=100 * MIB)
    cache(a, 60)
    start = a.decided
    with pytest.raises(OutOfMemoryError):
        a.malloc(0, 42 * MIB, SIDE)
    assert a.decided == start
    assert (a.rejections, a.ooms, a.retries, a.calls.sync, a.first_oom) == (1, 0, 0, 0, 0)
    assert a.now.reserved == 60 * MIB
    a.malloc(1, 40 * MIB, SIDE)
    assert a.now.reserved == 100 * MIB


def test_cached_memory_serves_as_ever() -> None:
    a = allocator(THROW, "2.12", total=100 * MIB)
    cache(a, 100)
    a.malloc(0, 60 * MIB)
    assert a.rejections == 0


def test_the_fraction_it_refuses_by_follows_the_settings() -> None:
    """The limit that was in force from the start on stays; the share of the conf holds from the next request on."""
    a = allocator(THROW, "2.12", total=100 * MIB)
    a.set_conf(parse_conf(f"{THROW},per_process_memory_fraction:0.5", a.rules, a.conf))
    assert a.limit is None
    with pytest.raises(OutOfMemoryError):
        a.malloc(0, 52 * MIB)
    assert a.rejections == 1
    a.malloc(1, 50 * MIB)


def test_a_limit_is_looked_at_first() -> None:
    a = allocator(f"{THROW},per_process_memory_fraction:0.5", "2.12", total=100 * MIB)
    with pytest.raises(OutOfMemoryError):
        a.malloc(0, 52 * MIB)
    assert (a.rejections, a.ooms) == (0, 1)


# --- max_split_size -----------------------------------------------------------------------------------------------

SPLIT_32 = "max_split_size_mb:32"


def test_smaller_requests_do_not_get_blocks_of_max_split_size_and_more() -> None:
    a = allocator(SPLIT_32)
    cache(a, 32, 30)
    a.malloc(0, 20 * MIB)
    a.malloc(1, 20 * MIB)
    assert blocks(a) == [
        [(32 * MIB, "free")],
        [(20 * MIB, "allocated"), (10 * MIB, "free")],  # below it: split as ever
        [(20 * MIB, "allocated")],
    ]


def test_larger_requests_get_them_unsplit_if_less_than_20_mib_are_wasted() -> None:
    a = allocator(SPLIT_32)
    cache(a, 60)
    a.malloc(0, 40 * MIB)
    assert a.segment_count == 2, "20 MiB are too many"
    a.malloc(1, 40 * MIB + 1)
    assert (a.segment_count, a.block(1).size) == (2, 60 * MIB)


def test_max_non_split_rounding_sets_how_much_may_be_wasted() -> None:
    a = allocator(f"{SPLIT_32},max_non_split_rounding_mb:40")
    cache(a, 100)
    a.malloc(0, 60 * MIB)
    a.malloc(1, 60 * MIB + 1)
    assert (a.block(0).size, a.block(1).size) == (60 * MIB, 100 * MIB)


def test_only_the_smallest_sufficient_block_is_tested() -> None:
    """The one that is refused is not followed by a search for another, which could only be larger."""
    a = allocator(SPLIT_32)
    cache(a, 64, 90)
    a.malloc(0, 34 * MIB)
    assert a.segment_count == 3


def test_oversize_blocks_and_segments_are_counted() -> None:
    a = allocator(SPLIT_32)
    a.malloc(0, 32 * MIB)
    a.malloc(1, 31 * MIB)  # a segment of 32 MiB; the last MiB is not split off
    a.malloc(2, 30 * MIB)
    a.free(0)
    assert a.statistics()["oversize_allocations"] == (1, 2, 2, 1)
    assert a.statistics()["oversize_segments"] == (2, 2, 2, 0)
    a.empty_cache()
    assert a.statistics()["oversize_segments"] == (1, 2, 2, 1)


def test_for_lack_of_memory_the_smallest_oversize_segment_that_suffices_is_returned_first() -> None:
    a = allocator(SPLIT_32, capacity=160 * MIB)
    cache(a, 70, 60, 20)
    start = a.decided
    a.malloc(0, 34 * MIB)
    assert decided(a, start) == [(D.SEGMENT_FREE, 60 * MIB), (D.SEGMENT_ALLOC, 34 * MIB), (D.ALLOC, 34 * MIB)]
    assert (a.retries, a.calls.sync) == (0, 0), "the rest stays cached"


def test_if_none_suffices_the_largest_ones_are_returned_until_enough_is() -> None:
    a = allocator(SPLIT_32, capacity=140 * MIB)
    cache(a, 36, 32, 40, 20)
    start = a.decided
    a.malloc(0, 70 * MIB)
    assert decided(a, start) == [
        (D.SEGMENT_FREE, 40 * MIB),
        (D.SEGMENT_FREE, 36 * MIB),
        (D.SEGMENT_ALLOC, 70 * MIB),
        (D.ALLOC, 70 * MIB),
    ]
    assert a.retries == 0


def test_what_is_smaller_or_of_another_stream_is_returned_only_with_everything_else() -> None:
    a = allocator(SPLIT_32, capacity=100 * MIB)
    cache(a, 36, 20)
    a.malloc(0, 40 * MIB, SIDE)
    a.free(0)
    start = a.decided
    a.malloc(1, 60 * MIB)
    freed = [size // MIB for kind, size in decided(a, start) if kind == D.SEGMENT_FREE]
    assert freed == [36, 20, 40]
    assert a.retries == 1


# --- garbage collection -------------------------------------------------------------------------------------------


def collecting(threshold: float) -> CachingAllocator:
    """The threshold is a share of a limit of 200 MiB."""
    a = allocator(f"garbage_collection_threshold:{threshold}", total=400 * MIB)
    a.set_memory_fraction(0.5)
    return a


def age(a: CachingAllocator, id: int, searches: int = 1) -> None:
    """Search the large free list without taking from the default stream's blocks; ids from ``id`` on."""
    for n in range(searches):
        a.malloc(id + n, 2 * MIB, SIDE)


def test_beyond_the_threshold_idle_segments_older_than_the_average_are_returned() -> None:
    a = collecting(0.5)
    age(a, 10)  # a segment of 20 MiB for that stream
    a.malloc(0, 40 * MIB)
    a.malloc(1, 30 * MIB)
    a.free(0)
    age(a, 11)
    a.free(1)  # one search younger
    start = a.decided
    a.malloc(2, 12 * MIB, THIRD)
    assert a.now.reserved == 62 * MIB + 40 * MIB, "90 MiB are not beyond the threshold"
    a.malloc(3, 14 * MIB, THIRD)
    assert decided(a, start) == [
        (D.SEGMENT_ALLOC, 12 * MIB),
        (D.ALLOC, 12 * MIB),
        (D.SEGMENT_FREE, 40 * MIB),
        (D.SEGMENT_ALLOC, 14 * MIB),
        (D.ALLOC, 14 * MIB),
    ]
    assert a.retries == 0


def test_all_of_an_age_are_returned_even_if_fewer_would_do() -> None:
    a = collecting(0.5)
    cache(a, 60, 44)
    a.malloc(0, 12 * MIB, THIRD)
    assert a.now.reserved == 12 * MIB


def test_younger_ones_follow_until_enough_is_returned() -> None:
    a = collecting(0.5)
    age(a, 10)
    a.malloc(0, 20 * MIB)
    a.malloc(1, 100 * MIB)
    a.free(0)
    age(a, 11)
    a.free(1)
    start = a.decided
    a.malloc(2, 12 * MIB, THIRD)  # 40 MiB too many, of which the older one has 20
    assert [size // MIB for kind, size in decided(a, start) if kind == D.SEGMENT_FREE] == [20, 100]


def test_segments_that_are_split_or_small_are_not_collected() -> None:
    a = collecting(0.2)
    cache(a, 1)
    a.malloc(0, 30 * MIB)
    a.malloc(1, 4 * MIB)  # 16 MiB of its segment are idle
    start = a.decided
    a.malloc(2, 12 * MIB, THIRD)
    assert [kind for kind, _ in decided(a, start)] == [D.SEGMENT_ALLOC, D.ALLOC]


def test_a_request_that_the_cache_serves_collects_nothing() -> None:
    a = collecting(0.2)
    cache(a, 60, 30)
    a.malloc(0, 30 * MIB)
    assert a.now.reserved == 90 * MIB


def test_without_a_limit_nothing_is_collected() -> None:
    a = allocator("garbage_collection_threshold:0.1", total=400 * MIB)
    cache(a, 200)
    a.malloc(0, 12 * MIB, THIRD)
    assert a.now.reserved == 212 * MIB
