"""The grid's formula and its inversion against counting."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fragscope.thresholds import ctas, most_tokens

SMALL = {"top_k": st.integers(1, 9), "experts": st.integers(1, 40), "tile": st.integers(1, 33)}


def worst_tiles(rows: int, experts: int, tile: int) -> int:
    """The most tiles of any distribution of rows over experts, by dynamic programming over the experts."""
    best = [0] + [-1] * rows
    for _ in range(experts):
        best = [
            max(best[taken] + -(-(total - taken) // tile) for taken in range(total + 1) if best[taken] >= 0)
            for total in range(rows + 1)
        ]
    return best[rows]


@given(rows=st.integers(0, 60), experts=st.integers(1, 6), tile=st.integers(1, 12))
def test_a_launch_is_as_large_as_the_worst_routing_needs(rows, experts, tile):
    assert ctas(rows, 1, experts, tile) == worst_tiles(rows, experts, tile)


@given(limit=st.integers(0, 120), **SMALL)
def test_the_largest_number_of_tokens_is_the_last_that_the_grid_has_room_for(limit, top_k, experts, tile):
    tokens = 0
    while ctas(tokens + 1, top_k, experts, tile) <= limit:
        tokens += 1
    assert most_tokens(top_k, experts, tile, limit) == tokens


@given(top_k=st.integers(1, 64), experts=st.integers(1, 4096), tile=st.sampled_from([8, 16, 32, 64, 128, 192, 256]))
def test_one_token_more_overflows_the_real_grid(top_k, experts, tile):
    tokens = most_tokens(top_k, experts, tile)
    assert ctas(tokens, top_k, experts, tile) <= 65_535 < ctas(tokens + 1, top_k, experts, tile)
