"""Size classes: c10/core/AllocatorConfig.h and get_allocation_size, round_size, should_split of the allocator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragscope.allocator.sizes import round_size, segment_size, should_split

KIB, MIB = 1024, 1024**2


@pytest.mark.parametrize(
    ("requested", "block"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (1024, 1024), (1025, 1536), (MIB - 511, MIB), (MIB, MIB),
     (MIB + 1, MIB + 512), (10 * MIB - 1, 10 * MIB), (2**40 + 1, 2**40 + 512)],
)  # fmt: skip
def test_requests_are_rounded_up_to_512(requested: int, block: int) -> None:
    assert round_size(requested) == block


@pytest.mark.parametrize(
    ("rounded", "segment"),
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
def test_segments_by_request(rounded: int, segment: int) -> None:
    assert segment_size(rounded) == segment


@pytest.mark.parametrize(
    ("rounded", "remaining", "split"),
    [
        (512, 512, True),
        (MIB, 512, True),  # small pool: every remainder is a block
        (512, 0, False),
        (MIB + 512, MIB, False),  # large pool: only more than 1 MiB is worth keeping
        (MIB + 512, MIB + 512, True),
        (20 * MIB, 0, False),
    ],
)
def test_remainders_worth_keeping(rounded: int, remaining: int, split: bool) -> None:
    assert should_split(rounded, remaining) is split


@given(st.integers(1, 2**50))
def test_a_segment_always_holds_the_request(requested: int) -> None:
    rounded = round_size(requested)
    assert requested <= rounded < requested + 512 or rounded == 512
    assert rounded % 512 == 0
    assert segment_size(rounded) >= rounded
    assert segment_size(rounded) % (2 * MIB) == 0
