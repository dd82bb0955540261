"""Size classes: c10/core/AllocatorConfig.h and get_allocation_size, round_size, should_split of the allocator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragscope.allocator import CachingAllocator, Conf, parse_conf, rules_for
from fragscope.allocator.engine import sizes
from fragscope.allocator.engine.state import DIVISIONS, LARGE_SEGMENT, State
from fragscope.allocator.engine.tables import new_state

KIB, MIB, GIB = 1024, 1024**2, 1024**3
RULES = rules_for("2.14").rules


def settings_of(conf: Conf) -> State:
    """The tables of an allocator with these settings, as far as sizes depend on them."""
    s = new_state(1, 1, compiled=False)
    for slot, divisions in enumerate(conf.roundup_power2_divisions):
        s.n[DIVISIONS + slot] = divisions
    s.n[LARGE_SEGMENT] = conf.large_segment_size
    return s


def rounded(size: int, conf: str = "") -> int:
    return sizes.round_size(settings_of(parse_conf(conf, RULES)), size)


def segment(rounded: int, conf: str = "") -> int:
    return sizes.segment_size(settings_of(parse_conf(conf, RULES)), rounded)


# --- blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "block"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (1024, 1024), (1025, 1536), (MIB - 511, MIB), (MIB, MIB),
     (MIB + 1, MIB + 512), (10 * MIB - 1, 10 * MIB), (2**40 + 1, 2**40 + 512)],
)  # fmt: skip
def test_requests_are_rounded_up_to_512(requested: int, block: int) -> None:
    assert rounded(requested) == block


@pytest.mark.parametrize(
    ("requested", "block"),
    [
        (MIB + 1, MIB + 256 * KIB),  # a quarter of 1 MiB is the step up to 2 MiB
        (MIB + 256 * KIB, MIB + 256 * KIB),
        (1200 * KIB, 1280 * KIB),
        (4 * MIB, 4 * MIB),  # powers of two stay
        (5 * MIB + 1, 6 * MIB),
        (7 * MIB + 1, 8 * MIB),
        (2049, 2560),  # 512, 1024, 1536 above 2048
        (2048, 2048),  # not more than 512 a step: whole 512s as ever
        (1025, 1536),
        (300, 512),
    ],
)
def test_with_four_divisions_there_are_four_sizes_between_powers_of_two(requested: int, block: int) -> None:
    assert rounded(requested, "roundup_power2_divisions:4") == block


def test_one_division_is_none() -> None:
    assert rounded(5 * MIB + 1, "roundup_power2_divisions:1") == 5 * MIB + 512


LISTED = "roundup_power2_divisions:[2:2,4:8,16:1,64:4,>:2]"


@pytest.mark.parametrize(
    ("requested", "block"),
    [
        (MIB + 1, MIB + 512 * KIB),  # below the first interval named: as in it
        (600 * KIB, 768 * KIB),
        (2 * MIB + 1, 3 * MIB),  # [2, 4) MiB in two
        (4 * MIB + 1, 4 * MIB + 512 * KIB),  # [4, 8) MiB in eight
        (8 * MIB + 1, 8 * MIB + 512),  # [8, 16) MiB: not named, between two that are
        (17 * MIB + 1, 17 * MIB + 512),  # [16, 32) MiB: one division is none
        (64 * MIB + 1, 80 * MIB),  # [64, 128) MiB in four
        (128 * MIB + 1, 192 * MIB),  # above the last interval named
        (33 * GIB, 48 * GIB),  # 32 GiB and more share the last interval
        (65 * GIB, 96 * GIB),
    ],
)
def test_intervals_have_divisions_of_their_own(requested: int, block: int) -> None:
    assert rounded(requested, LISTED) == block


divisions = st.sampled_from([0, 1, 2, 4, 8, 16, 64, 1024])


@given(st.one_of(st.integers(1, 64 * MIB), st.integers(1, 2**50)), st.lists(divisions, min_size=16, max_size=16))
def test_a_block_is_the_next_step_of_its_interval(requested: int, table: list[int]) -> None:
    """Steps are the power of two below the request, plus whole parts of it; or multiples of 512."""
    power = 2 ** (requested.bit_length() - 1)
    interval = 0
    while interval < 15 and requested >= 2 * MIB << interval:
        interval += 1
    parts = table[interval]
    if parts > 1 and requested > 512 * parts:
        expected = min(
            power + power * part // parts for part in range(parts + 1) if power + power * part // parts >= requested
        )
    else:
        expected = 512 * max(1, -(-requested // 512))
    s = settings_of(Conf(roundup_power2_divisions=tuple(table)))
    assert sizes.round_size(s, requested) == expected
    assert expected % 512 == 0


# --- segments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounded", "size"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),  # still small
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),  # the bound is strict: 10 MiB gets a segment of its own size
        (10 * MIB + 512, 12 * MIB),
        (20 * MIB, 20 * MIB),
        (20 * MIB + 512, 22 * MIB),
        (939_524_096, 939_524_096),
    ],
)
def test_segments_by_request(rounded: int, size: int) -> None:
    assert segment(rounded) == size


@pytest.mark.parametrize(
    ("rounded", "size"),
    [(MIB, 2 * MIB), (MIB + 512, 32 * MIB), (10 * MIB - 512, 32 * MIB), (10 * MIB, 10 * MIB), (30 * MIB, 30 * MIB)],
)
def test_large_segment_size_is_for_requests_below_10_mib(rounded: int, size: int) -> None:
    assert segment(rounded, "large_segment_size_mb:32") == size


@given(st.integers(1, 2**50), st.integers(11, 64))
def test_a_segment_always_holds_the_request(requested: int, large: int) -> None:
    s = settings_of(Conf(large_segment_size=large * MIB))
    block = sizes.round_size(s, requested)
    assert requested <= block < requested + 512 or block == 512
    size = sizes.segment_size(s, block)
    assert size >= block
    assert size % (2 * MIB) == 0 or size == large * MIB


# --- remainders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("idle", "requested", "block"),
    [
        (MIB, MIB - 512, MIB - 512),  # small pool: every remainder is a block
        (MIB, MIB, MIB),
        (12 * MIB, 11 * MIB, 12 * MIB),  # large pool: only more than 1 MiB is worth keeping
        (12 * MIB, 11 * MIB - 512, 11 * MIB - 512),
        (12 * MIB, 12 * MIB, 12 * MIB),
    ],
)
def test_remainders_worth_keeping(idle: int, requested: int, block: int) -> None:
    a = CachingAllocator(GIB, GIB, RULES)
    a.malloc(0, idle)
    a.malloc(1, MIB)  # in the small pool it takes the rest of the segment
    a.free(0)
    a.malloc(2, requested)
    assert a.block(2).size == block


@given(st.integers(1, 2**62))
def test_the_highest_bit_is_found(number: int) -> None:
    assert sizes.floor_log2(number) == number.bit_length() - 1
