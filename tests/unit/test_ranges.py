"""Which reservations mapped ranges lie in. Addresses and distances are those of recordings in tests/data."""

from __future__ import annotations

import pytest

from fragscope.allocator.ranges import AddressRange, address_ranges
from fragscope.trace import SegmentState

MIB = 2**20
TOTAL = 85_017_493_504  # of the H100 that made the recordings
LARGE, SMALL = 20 * MIB, 2 * MIB
FIRST = 0x3_0200_0000  # where their first reservation begins
APART = 0x16_4600_0000  # from one to the next
RESERVED = {SMALL: 45_607 * SMALL, LARGE: 4_561 * LARGE}  # nine eighths of the memory in whole pages


def mapped(addr: int, size: int, page: int = LARGE, stream: int = 0, pool: int = 0) -> SegmentState:
    return SegmentState(addr, size, stream, pool, ((addr, size, "free"),), page)


def begins(*segments: SegmentState, maps: tuple[tuple[int, int, int], ...] = (), total: int = TOTAL) -> list[int]:
    """Where the reservation of each begins."""
    return [r.addr for r in address_ranges(segments, maps, total)]


def test_ordinary_segments_have_none() -> None:
    assert address_ranges([SegmentState(FIRST, SMALL, 0, 0, ((FIRST, SMALL, "free"),))], [], TOTAL) == []


@pytest.mark.parametrize("page", [SMALL, LARGE])
def test_a_reservation_is_nine_eighths_of_the_memory_in_whole_pages(page: int) -> None:
    assert address_ranges([mapped(FIRST, page, page, 5, 1)], [], TOTAL) == [
        AddressRange(FIRST, RESERVED[page], 5, 1, page)
    ]


def test_ranges_of_one_segment_share_it() -> None:
    first, second = address_ranges([mapped(FIRST, LARGE), mapped(FIRST + 3 * LARGE, LARGE)], [], TOTAL)
    assert first is second


@pytest.mark.parametrize(
    "other",
    [mapped(FIRST + 3 * LARGE, LARGE, stream=5), mapped(FIRST + 3 * LARGE, LARGE, pool=1),
     mapped(FIRST + 3 * LARGE, LARGE, SMALL), mapped(FIRST + 3 * LARGE + SMALL, LARGE)],
)  # fmt: skip
def test_what_differs_in_stream_pool_or_page_does_not(other: SegmentState) -> None:
    first, second = address_ranges([mapped(FIRST, LARGE), other], [], TOTAL)
    assert first != second


def test_what_lies_further_away_than_it_is_long_does_not() -> None:
    assert begins(mapped(FIRST, LARGE), mapped(FIRST + RESERVED[LARGE], LARGE)) == [FIRST, FIRST + RESERVED[LARGE]]
    assert len(set(begins(mapped(FIRST, LARGE), mapped(FIRST + RESERVED[LARGE] - LARGE, LARGE)))) == 1


# --- where the first pages are not mapped -------------------------------------------------------------------------


def test_reservations_lie_back_to_back_where_two_show_it() -> None:
    shown = (mapped(FIRST, LARGE), mapped(FIRST + APART, SMALL, SMALL))
    assert begins(*shown, mapped(FIRST + 2 * APART + 5 * LARGE, LARGE, stream=5))[2] == FIRST + 2 * APART
    assert begins(shown[0], mapped(FIRST + 2 * APART + 5 * LARGE, LARGE, stream=5))[1] == FIRST + 2 * APART + 5 * LARGE


def test_two_of_one_stream_are_told_apart_by_that() -> None:
    third, fourth = FIRST + 2 * APART + 20 * LARGE, FIRST + 3 * APART
    shown = (mapped(FIRST, LARGE), mapped(FIRST + APART, SMALL, SMALL))
    assert fourth - third < RESERVED[LARGE]
    assert begins(*shown, mapped(third, LARGE), mapped(fourth, LARGE))[2:] == [FIRST + 2 * APART, fourth]


def test_what_lies_across_two_of_them_shows_that_they_are_not_back_to_back() -> None:
    across = mapped(FIRST + 2 * APART - LARGE, 2 * LARGE, stream=5)
    later = mapped(FIRST + 4 * APART + LARGE, LARGE, stream=6)
    shown = (mapped(FIRST, LARGE), mapped(FIRST + APART, SMALL, SMALL))
    assert begins(*shown, across, later)[3] == later.addr


def test_reservations_of_several_lengths_do_not_show_where_they_lie() -> None:
    """Of 8 GiB nine eighths are 9216 MiB, and 9220 in whole pages of 20 MiB: 288 and 289 times 32 MiB."""
    apart = 9216 * MIB
    shown = (mapped(FIRST, LARGE), mapped(FIRST + apart + 32 * MIB, SMALL, SMALL))
    later = mapped(FIRST + 2 * apart + 32 * MIB + LARGE, LARGE, stream=5)
    assert begins(*shown, later, total=8 * 2**30)[2] == later.addr


def test_elsewhere_a_segment_begins_where_it_is_mapped_lowest_later() -> None:
    part = mapped(FIRST + 5 * LARGE, LARGE)
    assert begins(part) == [part.addr]
    assert begins(part, maps=((FIRST + 2 * LARGE, 0, 0), (FIRST, 0, 0))) == [FIRST]


@pytest.mark.parametrize(
    "elsewhere",
    [(FIRST, 5, 0), (FIRST, 0, 1), (FIRST + SMALL, 0, 0), (FIRST + 8 * LARGE, 0, 0),
     (FIRST + 6 * LARGE - RESERVED[LARGE] - LARGE, 0, 0)],
)  # fmt: skip
def test_mappings_that_cannot_be_of_that_segment_do_not_tell(elsewhere: tuple[int, int, int]) -> None:
    part = mapped(FIRST + 5 * LARGE, LARGE)
    assert begins(part, maps=(elsewhere,)) == [part.addr]


def test_a_mapping_below_the_segment_before_it_is_not_of_this_one() -> None:
    segments = (mapped(FIRST, LARGE, stream=5), mapped(FIRST + RESERVED[LARGE] + 3 * LARGE, LARGE))
    assert begins(*segments, maps=((FIRST + 4 * LARGE, 0, 0),))[1] == segments[1].addr
