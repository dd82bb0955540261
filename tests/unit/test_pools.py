"""Private pools by example: MemPool, use_mem_pool, and what an open scope or a stream capture changes."""

from __future__ import annotations

import pytest

from fragscope.allocator import CachingAllocator, OutOfMemoryError, parse_conf, rules_for
from fragscope.trace import DecisionKind

MIB = 2**20
GIB = 2**30
SIDE = 0x5100  # another stream
POOL, OTHER = 1, 2
D = DecisionKind


def allocator(conf: str = "", release: str = "2.11", capacity: int = 80 * GIB) -> CachingAllocator:
    rules = rules_for(release).rules
    return CachingAllocator(80 * GIB, capacity, rules, parse_conf(conf, rules))


def cache(a: CachingAllocator, id: int, size: int, pool: int) -> int:
    """An idle segment of a pool; returns its address."""
    addr = a.malloc(id, size, pool=pool)
    a.free(id)
    return addr


def kinds(a: CachingAllocator, start: int = 0) -> list[DecisionKind]:
    return [D(kind) for kind in a.decisions(start).kind]


def by_pool(a: CachingAllocator) -> list[tuple[int, int]]:
    """Pool and bytes of every segment."""
    return sorted((s.pool, s.size) for s in a.segments())


# --- whose memory -------------------------------------------------------------------------------------------------


def test_a_pools_memory_serves_its_own_requests_only() -> None:
    a = allocator()
    a.create_pool(POOL)
    a.create_pool(OTHER)
    place = cache(a, 0, 30 * MIB, POOL)
    a.malloc(1, 30 * MIB)
    a.malloc(2, 30 * MIB, pool=OTHER)
    assert by_pool(a) == [(0, 30 * MIB), (POOL, 30 * MIB), (OTHER, 30 * MIB)]
    assert a.malloc(3, 30 * MIB, pool=POOL) == place


def test_a_block_goes_back_to_the_pool_it_came_from() -> None:
    a = allocator()
    a.create_pool(POOL)
    a.open_scope(POOL)
    place = a.malloc(0, 30 * MIB, pool=POOL)
    a.close_scope()
    a.free(0)
    assert a.malloc(1, 30 * MIB) != place
    assert a.malloc(2, 30 * MIB, pool=POOL) == place


def test_small_and_large_requests_and_streams_are_kept_apart_in_every_pool() -> None:
    a = allocator()
    a.create_pool(POOL)
    a.malloc(0, 3 * MIB, pool=POOL)
    a.malloc(1, 400, pool=POOL)
    a.malloc(2, 3 * MIB, SIDE, POOL)
    assert by_pool(a) == [(POOL, 2 * MIB), (POOL, 20 * MIB), (POOL, 20 * MIB)]


def test_decisions_name_the_pool() -> None:
    a = allocator()
    a.create_pool(OTHER)
    a.malloc(0, 400, pool=OTHER)
    a.free(0)
    assert a.decisions().pool.tolist() == [OTHER] * 4


# --- how long it is kept ------------------------------------------------------------------------------------------


def test_empty_cache_does_not_return_what_a_held_pool_has() -> None:
    a = allocator()
    a.create_pool(POOL)
    cache(a, 0, 30 * MIB, POOL)
    assert (a.now.pool_idle, a.now.stranded, a.releasable) == (30 * MIB, 0, 0)
    a.empty_cache()
    a.empty_cache(POOL)
    assert a.now.reserved == 30 * MIB


def test_idle_bytes_beside_live_blocks_are_the_pools_too() -> None:
    a = allocator()
    a.create_pool(POOL)
    a.malloc(0, 3 * MIB, pool=POOL)
    assert (a.now.pool_idle, a.now.stranded) == (17 * MIB, 0)
    a.release_pool(POOL)
    assert (a.now.pool_idle, a.now.stranded, a.releasable) == (0, 17 * MIB, 0)
    a.free(0)
    assert (a.now.pool_idle, a.now.stranded, a.releasable) == (0, 0, 20 * MIB)


def test_a_released_pool_gives_back_what_is_idle_and_later_the_rest() -> None:
    a = allocator()
    a.create_pool(POOL)
    cache(a, 0, 30 * MIB, POOL)
    a.malloc(1, 14 * MIB, pool=POOL)
    a.malloc(2, 400, pool=POOL)
    a.free(2)
    a.release_pool(POOL)
    assert (a.releasable, a.now.stranded) == (2 * MIB, 16 * MIB)
    a.empty_cache()
    assert a.now.reserved == 30 * MIB
    a.free(1)
    a.empty_cache()
    assert a.now.reserved == 0


def test_small_segments_of_a_released_pool_go_back_before_large_ones() -> None:
    a = allocator()
    a.create_pool(POOL)
    cache(a, 0, 30 * MIB, POOL)
    cache(a, 1, 400, POOL)
    cache(a, 2, 12 * MIB, 0)
    cache(a, 3, 400, 0)
    a.release_pool(POOL)
    start = a.decided
    a.empty_cache()
    d = a.decisions(start)
    freed = list(zip(d.pool.tolist(), (d.size // MIB).tolist(), strict=True))
    assert freed == [(0, 12), (0, 2), (POOL, 2), (POOL, 30)], "the default pool first, large before small there"


def test_a_released_pool_can_be_emptied_alone() -> None:
    a = allocator()
    a.create_pool(POOL)
    cache(a, 0, 30 * MIB, POOL)
    cache(a, 1, 12 * MIB, 0)
    a.malloc(2, 400)
    a.record_stream(2, SIDE)
    a.free(2)
    a.release_pool(POOL)
    a.empty_cache(POOL)
    assert by_pool(a) == [(0, 2 * MIB), (0, 12 * MIB)]
    assert a.now.active == 512, "it waits for the streams of that pool only"


def test_every_scope_is_a_user_that_has_to_be_released() -> None:
    a = allocator()
    a.create_pool(POOL)
    a.open_scope(POOL)
    cache(a, 0, 30 * MIB, POOL)
    a.close_scope()
    a.release_pool(POOL)
    a.empty_cache()
    assert a.now.pool_idle == 30 * MIB, "the MemPool itself is left"
    a.release_pool(POOL)
    a.empty_cache()
    assert a.now.reserved == 0


def test_for_lack_of_memory_released_pools_are_emptied_and_held_ones_are_not() -> None:
    a = allocator(capacity=60 * MIB)
    for pool in (POOL, OTHER):
        a.create_pool(pool)
        cache(a, pool, 20 * MIB, pool)
    a.release_pool(POOL)
    a.malloc(0, 40 * MIB)
    assert by_pool(a) == [(0, 40 * MIB), (OTHER, 20 * MIB)]
    with pytest.raises(OutOfMemoryError):
        a.malloc(3, 2 * MIB)


# --- use_on_oom ---------------------------------------------------------------------------------------------------


def lending(conf: str = "", capacity: int = 40 * MIB, idle: int = 30 * MIB) -> CachingAllocator:
    """A pool that helps out, with one idle segment."""
    a = allocator(conf, capacity=capacity)
    a.create_pool(POOL, use_on_oom=True)
    cache(a, 100, idle, POOL)
    return a


def test_a_pool_may_lend_when_the_driver_has_no_more() -> None:
    a = lending()
    a.malloc(0, 10 * MIB)
    start = a.decided
    a.malloc(1, 20 * MIB)
    assert kinds(a, start) == [D.ALLOC]
    assert a.decisions().pool[-1] == POOL, "the block stays the pool's"
    assert (a.retries, a.block(1).size) == (0, 20 * MIB)
    a.free(1)
    assert a.now.pool_idle == 30 * MIB


def test_before_that_cached_memory_and_the_driver_are_asked() -> None:
    a = lending()
    cache(a, 0, 10 * MIB, 0)
    a.malloc(1, 10 * MIB)
    assert by_pool(a) == [(0, 10 * MIB), (POOL, 30 * MIB)]
    a.malloc(2, 10 * MIB)
    assert a.now.pool_idle == 20 * MIB


def test_it_lends_before_cached_memory_is_returned() -> None:
    a = lending(capacity=44 * MIB)
    cache(a, 0, 12 * MIB, 0)
    a.malloc(1, 20 * MIB)
    assert (a.retries, a.releasable) == (0, 12 * MIB)


def test_it_lends_to_default_requests_only() -> None:
    a = lending()
    a.create_pool(OTHER)
    with pytest.raises(OutOfMemoryError):
        a.malloc(0, 20 * MIB, pool=OTHER)


def test_it_lends_on_its_own_stream_only() -> None:
    a = lending()
    with pytest.raises(OutOfMemoryError):
        a.malloc(0, 20 * MIB, SIDE)


def test_other_pools_do_not_lend() -> None:
    a = allocator(capacity=40 * MIB)
    a.create_pool(POOL)
    cache(a, 0, 30 * MIB, POOL)
    with pytest.raises(OutOfMemoryError):
        a.malloc(1, 20 * MIB)


def test_what_is_lent_is_split_as_without_expandable_segments() -> None:
    a = lending(idle=22 * MIB)
    a.set_conf(parse_conf("expandable_segments:True", a.rules))
    a.malloc(0, 21 * MIB)
    assert a.block(0).size == 22 * MIB, "1 MiB is too little for a block of the large pool"


# --- no_split -----------------------------------------------------------------------------------------------------


def test_a_pool_without_splitting_hands_out_whole_segments() -> None:
    a = allocator()
    a.create_pool(POOL, no_split=True)
    a.malloc(0, 3 * MIB, pool=POOL)
    a.malloc(1, 400, pool=POOL)
    assert (a.block(0).size, a.block(1).size) == (20 * MIB, 2 * MIB)
    assert (a.now.allocated, a.now.requested, a.now.pool_idle) == (22 * MIB, 3 * MIB + 400, 0)
    a.malloc(2, 3 * MIB)
    assert a.block(2).size == 3 * MIB, "of the default pool"


# --- open scopes --------------------------------------------------------------------------------------------------
# Up to 2.12 any open scope keeps finished frees from being looked at and memory from being released; from 2.13 on only
# a stream capture does.


def test_a_free_in_a_scope_waits_until_it_is_closed_and_then_not_for_streams_noted_in_it() -> None:
    a = allocator(release="2.12")
    a.malloc(0, 3 * MIB)
    a.open_scope(POOL)
    a.record_stream(0, SIDE)
    a.free(0)
    a.malloc(1, 400, pool=POOL)
    assert a.now.active == 3 * MIB + 512
    a.close_scope()
    start = a.decided
    a.malloc(2, 400)
    assert kinds(a, start)[0] == D.FREE_COMPLETED


def test_streams_noted_before_the_scope_are_waited_for_after_it() -> None:
    a = allocator(release="2.12")
    a.malloc(0, 3 * MIB)
    a.record_stream(0, SIDE)
    a.open_scope(POOL)
    a.free(0)
    a.close_scope()
    a.malloc(1, 400)
    assert a.now.active == 3 * MIB + 512
    a.uses_done(0)
    a.malloc(2, 400)
    assert a.now.active == 1024


def test_from_2_13_on_a_scope_changes_none_of_this() -> None:
    a = allocator(release="2.13")
    a.malloc(0, 3 * MIB)
    a.open_scope(POOL)
    a.record_stream(0, SIDE)
    a.free(0)
    a.malloc(1, 400, pool=POOL)
    assert a.now.active == 3 * MIB + 512, "the work is not done"
    a.uses_done(0)
    a.malloc(2, 400, pool=POOL)
    assert a.now.active == 1024


@pytest.mark.parametrize(("release", "fails"), [("2.9", True), ("2.12", True), ("2.13", False), ("2.14", False)])
def test_in_a_scope_nothing_cached_is_returned_for_a_request_up_to_2_12(release: str, fails: bool) -> None:
    a = allocator(release=release, capacity=40 * MIB)
    cache(a, 0, 30 * MIB, 0)
    a.open_scope(POOL)
    if fails:
        with pytest.raises(OutOfMemoryError):
            a.malloc(1, 20 * MIB, pool=POOL)
        assert (a.retries, a.calls.sync, a.now.reserved) == (0, 0, 30 * MIB)
        a.close_scope()
        a.malloc(2, 20 * MIB, pool=POOL)
    else:
        a.malloc(1, 20 * MIB, pool=POOL)
    assert (a.retries, a.now.reserved) == (1, 20 * MIB)


@pytest.mark.parametrize(("release", "kept"), [("2.12", 12 * MIB), ("2.13", 0)])
def test_empty_cache_in_a_scope_returns_only_released_pools_up_to_2_12(release: str, kept: int) -> None:
    a = allocator(release=release)
    cache(a, 0, 12 * MIB, 0)
    a.create_pool(OTHER)
    cache(a, 1, 14 * MIB, OTHER)
    a.release_pool(OTHER)
    a.open_scope(POOL)
    a.empty_cache()
    assert a.now.reserved == kept


@pytest.mark.parametrize("release", ["2.12", "2.13"])
def test_segments_of_max_split_size_are_returned_in_a_scope_as_well(release: str) -> None:
    a = allocator("max_split_size_mb:32", release, capacity=80 * MIB)
    a.create_pool(POOL)
    a.open_scope(POOL)
    cache(a, 0, 70 * MIB, POOL)
    a.malloc(1, 40 * MIB, pool=POOL)
    assert (a.retries, by_pool(a)) == (0, [(POOL, 40 * MIB)])


# --- stream captures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["2.11", "2.13"])
def test_in_a_capture_frees_wait_and_nothing_cached_is_returned_in_any_release(release: str) -> None:
    a = allocator(release=release, capacity=40 * MIB)
    cache(a, 0, 20 * MIB, 0)
    a.malloc(1, 400)
    a.record_stream(1, SIDE)
    a.create_pool(POOL)
    a.begin_capture()
    a.free(1)
    a.uses_done(1)
    with pytest.raises(OutOfMemoryError):
        a.malloc(2, 30 * MIB, pool=POOL)
    assert (a.retries, a.now.active, a.now.reserved) == (0, 512, 22 * MIB)
    a.empty_cache()
    assert a.now.reserved == 22 * MIB
    a.end_capture()
    a.malloc(3, 30 * MIB, pool=POOL)
    assert (a.retries, a.now.active, a.now.reserved) == (1, 30 * MIB, 30 * MIB)


def test_streams_noted_in_a_capture_are_not_waited_for_after_it() -> None:
    a = allocator(release="2.13")
    a.malloc(0, 3 * MIB)
    a.begin_capture()
    a.record_stream(0, SIDE)
    a.free(0)
    assert a.now.active == 3 * MIB
    a.end_capture()
    a.malloc(1, 400)
    assert a.now.active == 512


@pytest.mark.parametrize(("release", "returned"), [("2.12", True), ("2.13", False)])
def test_segments_of_max_split_size_are_not_returned_in_a_capture_from_2_13(release: str, returned: bool) -> None:
    a = allocator("max_split_size_mb:32", release, capacity=80 * MIB)
    cache(a, 0, 70 * MIB, 0)
    a.begin_capture()
    if returned:
        a.malloc(1, 40 * MIB)
    else:
        with pytest.raises(OutOfMemoryError):
            a.malloc(1, 40 * MIB)
    assert (a.retries, a.now.reserved) == (0, 40 * MIB if returned else 70 * MIB)
