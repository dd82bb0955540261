"""Expandable segments by example: which pages are mapped, which are unmapped, and what that leaves."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fragscope.allocator import CachingAllocator, OutOfMemoryError, parse_conf, rules_for
from fragscope.trace import DecisionKind

MIB = 2**20
GIB = 2**30
SIDE = 0x5100  # another stream
ON, OFF = "expandable_segments:True", "expandable_segments:False"
D = DecisionKind
MAP, UNMAP, ALLOC = D.SEGMENT_MAP, D.SEGMENT_UNMAP, D.ALLOC


def allocator(
    conf: str = ON, release: str = "2.11", total: int = 80 * GIB, capacity: int | None = None
) -> CachingAllocator:
    rules = rules_for(release).rules
    return CachingAllocator(total, total if capacity is None else capacity, rules, parse_conf(conf, rules))


def decided(a: CachingAllocator, start: int = 0) -> list[tuple[DecisionKind, int, int]]:
    """Kind, place and bytes of the decisions from row ``start`` on, without frees.

    Places and bytes are in MiB; places count from the first mapping of all.
    """
    d = a.decisions()
    base = int(d.addr[d.kind == MAP][0])
    rows = zip(d.kind[start:].tolist(), d.addr[start:].tolist(), d.size[start:].tolist(), strict=True)
    return [(D(kind), (addr - base) // MIB, size // MIB) for kind, addr, size in rows if kind in (MAP, UNMAP, ALLOC)]


def blocks(a: CachingAllocator) -> list[list[tuple[int, str]]]:
    """MiB and state of the blocks of every contiguous mapped range, in address order."""
    return [[(size // MIB, state) for _, size, state in s.blocks] for s in a.segments()]


# --- mapping ------------------------------------------------------------------------------------------------------


def test_pages_are_mapped_as_they_are_needed_and_whole_ones_unmapped() -> None:
    a = allocator()
    a.malloc(0, 3 * MIB)
    a.malloc(1, 30 * MIB)
    assert decided(a) == [
        (MAP, 0, 20),
        (ALLOC, 0, 3),
        (MAP, 20, 20),  # the 17 MiB that are left of the first page are used too
        (ALLOC, 3, 30),
    ]
    assert blocks(a) == [[(3, "allocated"), (30, "allocated"), (7, "free")]]
    a.free(1)
    assert (a.releasable, a.now.stranded) == (20 * MIB, 17 * MIB)
    start = a.decided
    a.empty_cache()
    assert decided(a, start) == [(UNMAP, 20, 20)]
    assert blocks(a) == [[(3, "allocated"), (17, "free")]]
    assert (a.releasable, a.now.stranded, a.now.reserved) == (0, 17 * MIB, 20 * MIB)


def test_small_requests_map_2_mib_at_a_time() -> None:
    a = allocator()
    for n in range(3):
        a.malloc(n, MIB)
    assert decided(a) == [(MAP, 0, 2), (ALLOC, 0, 1), (ALLOC, 1, 1), (MAP, 2, 2), (ALLOC, 2, 1)]


def test_large_segment_size_is_the_page_of_large_requests() -> None:
    a = allocator(f"{ON},large_segment_size_mb:32")
    a.malloc(0, 3 * MIB)
    a.malloc(1, 30 * MIB)
    assert decided(a) == [(MAP, 0, 32), (ALLOC, 0, 3), (MAP, 32, 32), (ALLOC, 3, 30)]


def test_large_requests_of_any_size_are_mapped_in_such_pages() -> None:
    a = allocator()
    a.malloc(0, 90 * MIB)
    assert decided(a) == [(MAP, 0, 100), (ALLOC, 0, 90)]


def test_what_is_left_of_a_block_is_kept_from_512_bytes_on() -> None:
    a = allocator()
    a.malloc(0, 20 * MIB - 512)
    assert a.block(0).size == 20 * MIB - 512
    assert [size for segment in a.segments() for _, size, _ in segment.blocks] == [20 * MIB - 512, 512]


def test_every_stream_and_size_class_has_a_range_of_its_own() -> None:
    a = allocator(total=400 * MIB)
    for n, (size, stream) in enumerate([(3 * MIB, 0), (400, 0), (3 * MIB, SIDE), (400, SIDE)]):
        a.malloc(n, size, stream)
    assert sorted((s.stream, s.size // MIB) for s in a.segments()) == [(0, 2), (0, 20), (SIDE, 2), (SIDE, 20)]
    places = sorted(s.addr for s in a.segments())
    assert all(later - earlier >= 450 * MIB for earlier, later in pairwise(places))


def test_a_gap_is_filled_before_the_range_grows() -> None:
    a = allocator()
    for n in range(3):
        a.malloc(n, 20 * MIB)
    a.free(1)
    a.empty_cache()
    assert blocks(a) == [[(20, "allocated")], [(20, "allocated")]]
    start = a.decided
    a.malloc(3, 25 * MIB)
    a.malloc(4, 15 * MIB)
    assert decided(a, start) == [(MAP, 60, 40), (ALLOC, 60, 25), (ALLOC, 85, 15)]
    a.malloc(5, 18 * MIB)
    assert decided(a, start)[-2:] == [(MAP, 20, 20), (ALLOC, 20, 18)]


def test_a_mapping_joins_idle_blocks_on_both_sides() -> None:
    a = allocator()
    for n, size in enumerate((30, 50, 30)):  # [0, 30), [30, 80), [80, 110): 120 MiB are mapped
        a.malloc(n, size * MIB)
    a.free(1)
    a.empty_cache()  # [40, 80)
    assert blocks(a) == [[(30, "allocated"), (10, "free")], [(30, "allocated"), (10, "free")]]
    start = a.decided
    a.malloc(3, 50 * MIB)
    assert decided(a, start) == [(MAP, 40, 40), (ALLOC, 30, 50)]
    assert blocks(a) == [[(30, "allocated"), (50, "allocated"), (30, "allocated"), (10, "free")]]


def test_idle_memory_between_two_gaps_is_used_together_with_them() -> None:
    a = allocator()
    for n in range(4):
        a.malloc(n, 20 * MIB)
    a.free(0)
    a.free(2)
    a.empty_cache()
    a.free(1)  # unmapped, idle, unmapped, allocated
    start = a.decided
    a.malloc(4, 60 * MIB)
    assert decided(a, start) == [(MAP, 0, 20), (MAP, 40, 20), (ALLOC, 0, 60)]


# --- unmapping ----------------------------------------------------------------------------------------------------


def test_pages_that_a_live_block_touches_stay() -> None:
    a = allocator()
    for n, size in enumerate((3, 32, 5)):
        a.malloc(n, size * MIB)
    a.free(1)
    assert (a.releasable, a.now.stranded) == (0, 32 * MIB)
    start = a.decided
    a.empty_cache()
    assert decided(a, start) == []


def test_what_is_left_on_both_sides_of_unmapped_pages_stays_cached() -> None:
    a = allocator()
    for n, size in enumerate((3, 50, 7)):
        a.malloc(n, size * MIB)
    a.free(1)
    a.empty_cache()
    assert blocks(a) == [[(3, "allocated"), (17, "free")], [(13, "free"), (7, "allocated")]]
    start = a.decided
    a.malloc(3, 13 * MIB)
    assert decided(a, start) == [(ALLOC, 40, 13)]


def test_a_range_without_mapped_pages_is_given_up() -> None:
    a = allocator()
    first = a.malloc(0, 3 * MIB)
    a.free(0)
    a.empty_cache()
    assert (a.segments(), a.now.reserved, a.used_memory) == ((), 0, 0)
    assert a.malloc(1, 3 * MIB) != first, "a new range"


def test_ordinary_segments_are_returned_before_pages() -> None:
    a = allocator(OFF)
    a.malloc(0, 30 * MIB)
    a.set_conf(parse_conf(ON, a.rules))
    a.malloc(1, 10 * MIB, SIDE)
    a.malloc(2, 3 * MIB)
    for n in range(3):
        a.free(n)
    start = a.decided
    a.empty_cache()
    assert [D(kind) for kind in a.decisions(start).kind] == [D.SEGMENT_FREE, UNMAP, UNMAP]


# --- the choice of a block ----------------------------------------------------------------------------------------


def test_a_block_that_cannot_grow_is_preferred() -> None:
    a = allocator()
    place = a.malloc(0, 40 * MIB)
    a.malloc(1, 20 * MIB)
    a.malloc(2, 20 * MIB)
    a.free(0)
    a.free(2)  # fits exactly, but all that is unmapped follows it
    assert a.malloc(3, 20 * MIB) == place


def test_among_those_that_cannot_grow_it_is_the_smallest() -> None:
    a = allocator()
    places = [a.malloc(n, size * MIB) for n, size in enumerate((40, 20, 30, 10))]
    a.free(0)
    a.free(2)
    assert a.malloc(4, 30 * MIB) == places[2]


def test_max_split_size_holds_for_them_too_so_that_a_range_can_grow_without_need() -> None:
    a = allocator(f"{ON},max_split_size_mb:32")
    a.malloc(0, 40 * MIB)
    a.malloc(1, 20 * MIB)
    a.free(0)
    start = a.decided
    a.malloc(2, 20 * MIB)
    assert decided(a, start) == [(MAP, 60, 20), (ALLOC, 60, 20)]


def test_idle_memory_at_the_end_is_not_held_back_by_it() -> None:
    """What the search for a cached block refuses, the search for pages to map takes."""
    a = allocator(f"{ON},max_split_size_mb:32")
    a.malloc(0, 40 * MIB)
    a.free(0)
    start = a.decided
    a.malloc(1, 20 * MIB)
    assert decided(a, start) == [(ALLOC, 0, 20)]


# --- running out --------------------------------------------------------------------------------------------------


def test_before_giving_up_idle_pages_are_unmapped() -> None:
    a = allocator(total=400 * MIB, capacity=40 * MIB)
    a.malloc(0, 30 * MIB)
    a.free(0)
    start = a.decided
    a.malloc(1, 30 * MIB, SIDE)
    assert [D(kind) for kind in a.decisions(start).kind] == [UNMAP, MAP, ALLOC]
    assert a.retries == 1


def test_a_mapping_is_made_as_a_whole_or_not_at_all() -> None:
    a = allocator(total=400 * MIB, capacity=50 * MIB)
    with pytest.raises(OutOfMemoryError) as caught:
        a.malloc(0, 50 * MIB)
    assert (caught.value.segment, caught.value.free) == (50 * MIB, 50 * MIB)
    assert (a.now.reserved, a.calls.alloc) == (0, 0)
    a.malloc(1, 40 * MIB)


def test_pages_mapped_before_a_second_mapping_fails_stay() -> None:
    a = allocator(release="2.12", total=400 * MIB, capacity=80 * MIB)
    a.malloc(0, 20 * MIB)
    a.malloc(1, 40 * MIB)
    a.free(0)
    a.empty_cache()
    a.free(1)  # 20 MiB unmapped, 40 MiB idle, the rest unmapped
    a.open_scope(1)  # up to 2.12 this keeps the failing request from releasing everything
    start = a.decided
    with pytest.raises(OutOfMemoryError):
        a.malloc(2, 90 * MIB)
    assert decided(a, start) == [(MAP, 0, 20)]
    assert blocks(a) == [[(60, "free")]]
    a.malloc(3, 60 * MIB)
    assert decided(a, start)[1:] == [(ALLOC, 0, 60)]


def test_a_request_that_no_range_can_hold_leaves_an_empty_range_behind() -> None:
    a = allocator(total=64 * MIB)  # ranges of nine eighths of that, in whole pages: 80 MiB
    for n in range(2):
        with pytest.raises(OutOfMemoryError):
            a.malloc(n, 90 * MIB)
    assert (a.ooms, a.now.reserved, a.segments()) == (2, 0, ())
    a.malloc(2, 60 * MIB)
    assert a.now.reserved == 60 * MIB


def test_a_limit_is_held_against_an_ordinary_segments_size() -> None:
    a = allocator(total=64 * MIB)
    a.set_memory_fraction(0.5)
    a.malloc(0, 12 * MIB)
    a.malloc(1, 12 * MIB)  # 20 MiB are mapped and 12 MiB more would be 32
    assert a.now.reserved == 40 * MIB, "but a page is 20"
    with pytest.raises(OutOfMemoryError):
        a.malloc(2, 18 * MIB)


# --- what is counted ----------------------------------------------------------------------------------------------


def test_expandable_memory_is_no_segment_and_never_inactive_split() -> None:
    a = allocator()
    a.malloc(0, 3 * MIB)
    a.malloc(1, 3 * MIB)
    a.free(0)
    a.malloc(2, 400)
    stats = a.statistics()
    assert stats["segment.all"] == stats["inactive_split.all"] == stats["inactive_split_bytes.all"] == (0, 0, 0, 0)
    assert stats["reserved_bytes.all"] == (22 * MIB, 22 * MIB, 22 * MIB, 0)
    assert (a.segment_count, a.calls.alloc, a.calls.free) == (0, 2, 0)


def test_every_mapping_and_unmapping_is_a_driver_call_however_many_pages_it_has() -> None:
    a = allocator()
    a.malloc(0, 90 * MIB)
    a.free(0)
    a.empty_cache()
    assert (a.calls.alloc, a.calls.free) == (1, 1)


# --- switching ----------------------------------------------------------------------------------------------------


def test_when_it_is_switched_off_expandable_blocks_are_freed_and_unmapped_but_not_used() -> None:
    a = allocator()
    a.malloc(0, 3 * MIB)
    a.malloc(1, 3 * MIB)
    a.free(0)
    a.set_conf(parse_conf(OFF, a.rules, a.conf))
    a.malloc(2, 3 * MIB)
    assert (a.segment_count, a.now.reserved) == (1, 40 * MIB)
    a.free(1)
    a.empty_cache()
    assert a.now.reserved == 20 * MIB
    a.free(2)
    a.empty_cache()
    assert a.now.reserved == 0


def test_when_it_is_switched_on_ordinary_blocks_are_used_first_and_split_finely() -> None:
    a = allocator(OFF)
    place = a.malloc(0, 16 * MIB)
    a.free(0)
    a.set_conf(parse_conf(ON, a.rules, a.conf))
    assert a.malloc(1, 15 * MIB) == place
    assert a.block(1).size == 15 * MIB, "the last MiB is a block of its own"
    assert a.statistics()["inactive_split_bytes.all"][0] == MIB
    a.malloc(2, 15 * MIB)
    assert (a.segment_count, a.now.reserved) == (1, 36 * MIB)


def test_it_stays_as_it_is_where_a_string_does_not_name_it() -> None:
    a = allocator()
    a.set_conf(parse_conf("max_split_size_mb:64", a.rules, a.conf))
    a.malloc(0, 3 * MIB)
    assert (a.segment_count, a.now.reserved) == (0, 20 * MIB)


# --- private pools ------------------------------------------------------------------------------------------------


def test_private_pools_have_ranges_of_their_own_and_give_them_back_when_released() -> None:
    a = allocator()
    a.create_pool(1)
    a.malloc(0, 3 * MIB, pool=1)
    a.malloc(1, 3 * MIB)
    assert sorted((s.pool, s.size // MIB, s.expandable) for s in a.segments()) == [(0, 20, True), (1, 20, True)]
    a.free(0)
    a.empty_cache()
    assert (a.now.pool_idle, a.now.stranded, a.now.reserved) == (20 * MIB, 17 * MIB, 40 * MIB)
    a.release_pool(1)
    assert (a.now.pool_idle, a.now.stranded, a.releasable) == (0, 17 * MIB, 20 * MIB)
    a.empty_cache()
    assert a.now.reserved == 20 * MIB


def test_a_released_pool_lasts_as_long_as_a_block_of_it_lives() -> None:
    """PyTorch counts a pool's segments wrongly here and may forget it while it is in use; the model keeps it."""
    a = allocator()
    a.create_pool(1)
    for n in range(3):
        a.malloc(n, 20 * MIB, pool=1)
    a.release_pool(1)
    for n in range(3):
        a.free(n)
        a.empty_cache()
        assert a.now.reserved == (2 - n) * 20 * MIB


# --- a recording's addresses --------------------------------------------------------------------------------------


def test_a_range_begins_where_the_recording_maps_its_first_page() -> None:
    base, side = 0x7E00_0000_0000, 0x7D00_0000_0000
    a = allocator()
    a.give_addresses([], [base, base + 20 * MIB, side])
    assert a.malloc(0, 3 * MIB) == base
    assert a.malloc(1, 30 * MIB) == base + 3 * MIB
    assert a.malloc(2, 3 * MIB, SIDE) == side
    assert not a.departed
    a.malloc(3, 400)
    assert a.departed, "a range that was not recorded"
