"""Device memory in pages, and the addresses that the driver, or a recording, gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fragscope.allocator import Device, RecordedPlacement, TopDownPlacement

MIB = 2**20


def test_memory_is_counted_in_pages_of_2_mib() -> None:
    device = Device(100 * MIB, 10 * MIB)
    assert device.malloc(3 * MIB) is not None
    assert (device.used, device.free) == (4 * MIB, 6 * MIB)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    device = Device(100 * MIB, 10 * MIB)
    assert device.malloc(12 * MIB) is None
    assert device.used == 0
    assert device.malloc(10 * MIB) is not None
    assert device.malloc(2 * MIB) is None


def test_released_memory_can_be_had_again() -> None:
    device = Device(100 * MIB, 10 * MIB)
    addr = device.malloc(10 * MIB)
    assert addr is not None
    device.release(addr, 10 * MIB)
    assert device.free == 10 * MIB
    assert device.malloc(10 * MIB) == addr


def test_segments_share_a_region_from_its_low_end() -> None:
    rule = TopDownPlacement()
    first = rule.place(2 * MIB)
    assert rule.place(20 * MIB) == first + 2 * MIB
    assert first % (32 * MIB) == 0


def test_a_new_region_lies_below_older_ones() -> None:
    rule = TopDownPlacement()
    first = rule.place(20 * MIB)
    assert rule.place(20 * MIB) == first - 32 * MIB


def test_the_smallest_sufficient_hole_is_taken() -> None:
    rule = TopDownPlacement()
    a = rule.place(10 * MIB)
    rule.place(2 * MIB)
    c = rule.place(4 * MIB)
    rule.place(16 * MIB)
    rule.remove(a, 10 * MIB)
    rule.remove(c, 4 * MIB)
    assert rule.place(4 * MIB) == c
    assert rule.place(4 * MIB) == a


def test_an_empty_region_is_given_back() -> None:
    rule = TopDownPlacement()
    first = rule.place(20 * MIB)
    rule.place(20 * MIB)
    rule.remove(first, 20 * MIB)
    assert rule.place(200 * MIB) < first - 32 * MIB


sizes = st.sampled_from([2, 4, 20, 22, 30, 32, 34, 64, 100]).map(lambda n: n * MIB)


@given(st.lists(st.tuples(sizes, st.booleans()), max_size=60))
def test_placed_segments_never_overlap(steps: list[tuple[int, bool]]) -> None:
    rule = TopDownPlacement()
    standing: dict[int, int] = {}
    for size, drop in steps:
        addr = rule.place(size)
        assert addr % (2 * MIB) == 0
        assert all(addr + size <= a or a + n <= addr for a, n in standing.items())
        standing[addr] = size
        if drop:
            gone = next(iter(standing))
            rule.remove(gone, standing.pop(gone))


RECORDED = [(0x7F00_0000_0000, 2 * MIB), (0x7F00_1000_0000, 20 * MIB), (0x7F00_0000_0000, 2 * MIB)]


def test_a_recordings_addresses_are_given_in_order() -> None:
    placement = RecordedPlacement(RECORDED)
    assert placement.place(2 * MIB) == RECORDED[0][0]
    assert placement.place(20 * MIB) == RECORDED[1][0]
    placement.remove(RECORDED[0][0], 2 * MIB)
    assert placement.place(2 * MIB) == RECORDED[2][0]
    assert not placement.departed


def test_another_size_departs_from_the_recording() -> None:
    placement = RecordedPlacement(RECORDED)
    placement.place(2 * MIB)
    elsewhere = placement.place(4 * MIB)
    assert placement.departed
    assert not RECORDED[0][0] <= elsewhere < RECORDED[0][0] + 2 * MIB
    assert placement.place(20 * MIB) != RECORDED[1][0], "the recording does not come back"


def test_an_address_that_is_not_free_here_departs_from_the_recording() -> None:
    placement = RecordedPlacement(RECORDED)
    placement.place(2 * MIB)
    placement.place(20 * MIB)
    third = placement.place(2 * MIB)  # when recorded, the first segment was gone by now
    assert placement.departed
    assert third != RECORDED[0][0]


def test_a_range_that_reaches_into_a_standing_one_departs() -> None:
    for second in (0x7F00_0000_0000 - 2 * MIB, 0x7F00_0000_0000 + 2 * MIB):
        placement = RecordedPlacement([(0x7F00_0000_0000, 4 * MIB), (second, 4 * MIB)])
        placement.place(4 * MIB)
        placement.place(4 * MIB)
        assert placement.departed


def test_more_segments_than_recorded_are_placed_by_the_rule() -> None:
    placement = RecordedPlacement([])
    first = placement.place(2 * MIB)
    assert placement.place(2 * MIB) == first + 2 * MIB
    placement.remove(first, 2 * MIB)
    assert placement.place(2 * MIB) == first


@given(st.lists(st.tuples(sizes, st.booleans()), max_size=40))
def test_after_departing_nothing_overlaps_what_the_recording_left(steps: list[tuple[int, bool]]) -> None:
    placement = RecordedPlacement([(0x7F00_0000_0000 + n * 6 * MIB, 4 * MIB) for n in range(8)])
    standing = {placement.place(4 * MIB): 4 * MIB for _ in range(8)}
    for size, drop in steps:
        addr = placement.place(size)
        assert all(addr + size <= a or a + n <= addr for a, n in standing.items())
        standing[addr] = size
        if drop:
            gone = next(iter(standing))
            placement.remove(gone, standing.pop(gone))
