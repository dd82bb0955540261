"""Device memory in pages, and the addresses that the driver, or a recording, gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragscope.allocator import CachingAllocator, OutOfMemoryError, rules_for
from fragscope.allocator.engine import driver, tables
from fragscope.allocator.engine.blocks import drop_segment, new_segment
from fragscope.allocator.engine.state import ALLOCS, DEPARTED, SEG_ADDR, SEG_FIRST

MIB = 2**20
TOP = driver.ANY_TOP


class Driver:
    """The model's driver by itself: segments with a size and no blocks."""

    def __init__(self, recorded: list[tuple[int, int]] | None = None) -> None:
        self._s = tables.with_given(tables.new_state(1, 1, compiled=False), recorded or [], [])
        self._segments: dict[int, tuple[int, int]] = {}  # address -> bytes, column

    def begin(self, base: int, move_at: int) -> None:
        driver.begin_process(self._s, base, move_at)

    def count(self, allocs: int) -> None:
        """So many requests for memory were made by now."""
        self._s.n[ALLOCS] = allocs

    def reserve(self, addr: int, size: int) -> None:
        """An expandable segment's range, recorded there."""
        self._s = tables.with_given(self._s, [], [addr])
        segment = new_segment(self._s, size, 0, 1, 20 * MIB)
        self._s.t[SEG_ADDR][segment] = driver.place_range(self._s, size)
        assert driver.place_first_mapping(self._s, segment) == addr
        self._s.t[SEG_ADDR][segment] = addr
        self._s.t[SEG_FIRST][segment] = 0
        self._segments[addr] = size, segment

    def place(self, size: int) -> int:
        t = self._s.t
        segment = new_segment(self._s, size, 0, 1, 0)
        addr = driver.place_segment(self._s, size)
        t[SEG_ADDR][segment] = addr
        t[SEG_FIRST][segment] = 0
        for other, (length, _) in self._segments.items():
            assert addr + size <= other or other + length <= addr, "two segments at one address"
        self._segments[addr] = size, segment
        return addr

    def remove(self, addr: int) -> None:
        _, segment = self._segments.pop(addr)
        driver.remove_segment(self._s, segment)
        drop_segment(self._s, segment)

    @property
    def departed(self) -> bool:
        """Whether an address was needed that the recording does not have."""
        return bool(self._s.n[DEPARTED])


# --- how much there is --------------------------------------------------------------------------------------------


def allocator(capacity: int) -> CachingAllocator:
    return CachingAllocator(100 * MIB, capacity, rules_for("2.11").rules)


def test_memory_is_counted_in_pages_of_2_mib() -> None:
    s = tables.new_state(100 * MIB, 10 * MIB, compiled=False)
    assert driver.take_memory(s, 3 * MIB)
    assert driver.take_memory(s, 6 * MIB)
    assert not driver.take_memory(s, 1)
    driver.give_memory(s, 3 * MIB)
    assert not driver.take_memory(s, 5 * MIB)
    assert driver.take_memory(s, 4 * MIB)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    a = allocator(10 * MIB)
    with pytest.raises(OutOfMemoryError):
        a.malloc(0, 12 * MIB)
    assert (a.used_memory, a.free_memory) == (0, 10 * MIB)
    a.malloc(1, 10 * MIB)
    with pytest.raises(OutOfMemoryError):
        a.malloc(2, 1)


def test_released_memory_can_be_had_again() -> None:
    a = allocator(10 * MIB)
    addr = a.malloc(0, 10 * MIB)
    a.free(0)
    a.empty_cache()
    assert a.free_memory == 10 * MIB
    assert a.malloc(1, 10 * MIB) == addr


# --- where it is --------------------------------------------------------------------------------------------------


def test_segments_share_a_region_from_its_low_end() -> None:
    rule = Driver()
    first = rule.place(2 * MIB)
    assert rule.place(20 * MIB) == first + 2 * MIB
    assert first % (32 * MIB) == 0


def test_a_new_region_lies_below_older_ones() -> None:
    rule = Driver()
    first = rule.place(20 * MIB)
    assert rule.place(20 * MIB) == first - 32 * MIB


def test_a_region_is_as_long_as_its_first_segment_needs() -> None:
    rule = Driver()
    first = rule.place(34 * MIB)
    assert rule.place(30 * MIB) == first + 34 * MIB
    assert rule.place(2 * MIB) == first - 32 * MIB


def test_the_newest_region_with_room_is_taken_not_the_best_fitting_one() -> None:
    rule = Driver()
    older = rule.place(20 * MIB)
    newer = rule.place(22 * MIB)
    assert rule.place(4 * MIB) == newer + 22 * MIB
    assert rule.place(8 * MIB) == older + 20 * MIB, "the newer one has 6 MiB left"


def test_the_smallest_sufficient_hole_is_taken() -> None:
    rule = Driver()
    a = rule.place(10 * MIB)
    rule.place(2 * MIB)
    c = rule.place(4 * MIB)
    rule.place(16 * MIB)
    rule.remove(a)
    rule.remove(c)
    assert rule.place(4 * MIB) == c
    assert rule.place(4 * MIB) == a


def test_of_equal_holes_the_lowest_is_taken() -> None:
    rule = Driver()
    a, _, c, _ = (rule.place(8 * MIB) for _ in range(4))
    rule.remove(c)
    rule.remove(a)
    assert rule.place(8 * MIB) == a


def test_freed_segments_merge_into_one_hole() -> None:
    rule = Driver()
    a, b, c, _ = (rule.place(8 * MIB) for _ in range(4))
    for addr in (a, c, b):
        rule.remove(addr)
    assert rule.place(24 * MIB) == a


def test_an_empty_region_is_given_up() -> None:
    rule = Driver()
    first = rule.place(20 * MIB)
    rule.place(20 * MIB)
    rule.remove(first)
    assert rule.place(200 * MIB) < first - 32 * MIB


def test_a_gap_of_exactly_the_length_is_skipped() -> None:
    rule = Driver()
    a, b, c, d = (rule.place(30 * MIB) for _ in range(4))
    assert (a, d) == (b + 32 * MIB, c - 32 * MIB)
    rule.remove(b)
    assert rule.place(30 * MIB) == d - 32 * MIB
    rule.remove(c)
    assert rule.place(30 * MIB) == a - 32 * MIB, "the top of a gap of 64 MiB"


sizes = st.sampled_from([2, 4, 12, 20, 22, 30, 32, 34, 64, 100]).map(lambda n: n * MIB)
steps = st.lists(st.one_of(sizes, st.floats(0, 0.999)), max_size=60)
"""Bytes to place, or (a share) which of the standing segments to remove."""


class PlainDriver:
    """The rule as it is written down, over ranges instead of holes: what is taken is known, what is free follows."""

    def __init__(self) -> None:
        self.regions: list[tuple[int, int, dict[int, int]]] = []  # newest first: address, bytes, segments

    def place(self, size: int) -> int:
        for start, length, taken in self.regions:
            holes = [(end - begin, begin) for begin, end in gaps(start, start + length, taken) if end - begin >= size]
            if holes:
                addr = min(holes)[1]
                taken[addr] = size
                return addr
        length = -(-size // (32 * MIB)) * 32 * MIB
        between = gaps(0, TOP, {start: reach for start, reach, _ in self.regions})
        addr = max(end - length for begin, end in between if end - begin > length)
        self.regions.insert(0, (addr, length, {addr: size}))
        return addr

    def remove(self, addr: int) -> None:
        for _, _, taken in self.regions:
            taken.pop(addr, None)
        self.regions = [region for region in self.regions if region[2]]


def gaps(begin: int, end: int, taken: dict[int, int]) -> list[tuple[int, int]]:
    """Begin and end of the ranges between those taken (address -> bytes)."""
    edges = [begin]
    for addr in sorted(taken):
        edges += [addr, addr + taken[addr]]
    edges.append(end)
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


@given(steps)
def test_addresses_are_those_of_the_rule(steps: list[int | float]) -> None:
    rule, plain = Driver(), PlainDriver()
    standing: list[int] = []
    for step in steps:
        if isinstance(step, int):
            standing.append(rule.place(step))
            assert standing[-1] == plain.place(step)
        elif standing:
            gone = standing.pop(int(step * len(standing)))
            rule.remove(gone)
            plain.remove(gone)


# --- following a recording ----------------------------------------------------------------------------------------

RECORDED = [(0x7F00_0000_0000, 2 * MIB), (0x7F00_1000_0000, 20 * MIB), (0x7F00_0000_0000, 2 * MIB)]


def test_a_recordings_addresses_are_given_in_order() -> None:
    recording = Driver(RECORDED)
    assert recording.place(2 * MIB) == RECORDED[0][0]
    assert recording.place(20 * MIB) == RECORDED[1][0]
    recording.remove(RECORDED[0][0])
    assert recording.place(2 * MIB) == RECORDED[2][0]
    assert not recording.departed


def test_another_size_departs_from_the_recording() -> None:
    recording = Driver(RECORDED)
    recording.place(2 * MIB)
    elsewhere = recording.place(4 * MIB)
    assert recording.departed
    assert not RECORDED[0][0] <= elsewhere < RECORDED[0][0] + 2 * MIB
    assert recording.place(20 * MIB) != RECORDED[1][0], "the recording does not come back"


def test_an_address_that_is_not_free_here_departs_from_the_recording() -> None:
    recording = Driver(RECORDED)
    recording.place(2 * MIB)
    recording.place(20 * MIB)
    third = recording.place(2 * MIB)  # when recorded, the first segment was gone by now
    assert recording.departed
    assert third != RECORDED[0][0]


@pytest.mark.parametrize("shift", [-2 * MIB, 2 * MIB])
def test_a_range_that_reaches_into_a_standing_one_departs(shift: int) -> None:
    recording = Driver([(0x7F00_0000_0000, 4 * MIB), (0x7F00_0000_0000 + shift, 4 * MIB)])
    recording.place(4 * MIB)
    recording.place(4 * MIB)
    assert recording.departed


def test_more_segments_than_recorded_are_placed_by_the_rule() -> None:
    recording = Driver([])
    first = recording.place(2 * MIB)
    assert recording.departed
    assert recording.place(2 * MIB) == first + 2 * MIB


def test_the_rule_goes_on_in_the_regions_that_the_recorded_segments_stand_in() -> None:
    base = TOP - 32 * MIB
    recording = Driver([(base, 20 * MIB)])
    recording.place(20 * MIB)
    assert recording.place(12 * MIB) == base + 20 * MIB
    assert recording.departed
    recording.remove(base)
    assert recording.place(20 * MIB) == base


def test_a_segment_that_reaches_into_the_next_region_shows_that_they_are_one() -> None:
    """No block spans two regions (where cudaMalloc puts segments, as observed)."""
    base = TOP - 64 * MIB
    recording = Driver([(base, 2 * MIB), (base + 62 * MIB, 2 * MIB), (base + 20 * MIB, 30 * MIB)])
    for size in (2, 2, 30):
        recording.place(size * MIB)
    assert recording.place(14 * MIB) == base + 2 * MIB, "18 MiB are free below it, 12 MiB above"
    assert recording.place(12 * MIB) == base + 50 * MIB
    assert recording.place(4 * MIB) == base + 16 * MIB
    assert recording.place(2 * MIB) == base - 32 * MIB
    for addr in (base + 20 * MIB, base + 50 * MIB, base + 16 * MIB):
        recording.remove(addr)
    assert recording.place(46 * MIB) == base + 16 * MIB, "one hole across what were two regions"


def test_a_segment_from_unknown_ground_into_a_known_region_shows_that_it_begins_lower() -> None:
    base = TOP - 64 * MIB
    recording = Driver([(base + 60 * MIB, 4 * MIB), (base + 16 * MIB, 40 * MIB)])
    recording.place(4 * MIB)
    recording.place(40 * MIB)
    assert recording.place(4 * MIB) == base + 56 * MIB
    assert recording.place(16 * MIB) == base


def test_a_region_made_of_several_is_as_old_as_the_oldest() -> None:
    base = TOP - 96 * MIB
    older, newer, newest = (base, 20 * MIB), (base + 64 * MIB, 20 * MIB), (base + 50 * MIB, 2 * MIB)
    recording = Driver([older, newer, newest, (base + 20 * MIB, 20 * MIB)])
    for size in (20, 20, 2, 20):
        recording.place(size * MIB)
    assert recording.place(8 * MIB) == base + 84 * MIB, "the newer of the two that are left"


def test_a_segment_where_the_driver_held_a_block_shows_that_it_has_moved() -> None:
    recording = Driver([(TOP + 414 * MIB, 2 * MIB), (TOP + 100 * MIB, 64 * MIB)])
    recording.begin(TOP, move_at=5)
    recording.place(2 * MIB)
    recording.place(64 * MIB)
    assert recording.place(30 * MIB) == TOP, "the smaller of the two holes that the moved block left"
    recording.count(9)
    for _ in range(30):
        recording.place(20 * MIB)  # none of them where another stands


def test_a_segment_where_the_driver_never_freed_a_block_leaves_the_rest_of_it_taken() -> None:
    recording = Driver([(TOP + 100 * MIB, 64 * MIB)])
    recording.begin(TOP, move_at=-1)
    recording.place(64 * MIB)
    assert recording.place(64 * MIB) == TOP - 64 * MIB
    recording.remove(TOP + 100 * MIB)
    assert recording.place(64 * MIB) == TOP + 100 * MIB


def test_modelled_segments_stay_clear_of_recorded_address_ranges() -> None:
    base = TOP - 32 * MIB
    recording = Driver([(base, 20 * MIB)])
    recording.place(20 * MIB)
    recording.reserve(base + 20 * MIB, 40 * MIB)
    recording.reserve(base - 90 * MIB, 60 * MIB)
    assert recording.place(2 * MIB) == base - 128 * MIB, "the highest place of 32 MiB below both ranges"


@given(steps, st.integers(0, 60))
def test_a_recording_may_end_anywhere(steps: list[int | float], known: int) -> None:
    """What the rule put somewhere, up to some segment, is enough to know where it puts the rest."""
    plain = PlainDriver()
    standing: list[int] = []
    expected: list[tuple[int, int]] = []
    for step in steps:
        if isinstance(step, int):
            expected.append((plain.place(step), step))
            standing.append(expected[-1][0])
        elif standing:
            plain.remove(standing.pop(int(step * len(standing))))
    recording = Driver(expected[:known])
    placed: list[int] = []
    standing = []
    for step in steps:
        if isinstance(step, int):
            placed.append(recording.place(step))
            standing.append(placed[-1])
        elif standing:
            recording.remove(standing.pop(int(step * len(standing))))
    assert placed == [addr for addr, _ in expected]
    assert recording.departed is (len(expected) > known)
