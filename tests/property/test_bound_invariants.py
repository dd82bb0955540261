"""What must hold for any lives and any requests."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from requests_of import MIB, random_requests, trace_of

from fragscope.search import Lives, best_fit, bound, first_fit, pack, play_one, subject_of

rows = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=60)


def lives_of(drawn: list[tuple[int, int]]) -> Lives:
    """Lives that begin one after the other, of these durations and sizes."""
    start = np.arange(len(drawn), dtype=np.int64)
    duration, size = (np.array(column, dtype=np.int64) for column in zip(*drawn, strict=True))
    return Lives(start, start + duration, size)


def most_live(lives: Lives) -> int:
    """Counted moment by moment."""
    moments = range(int(lives.end.max()))
    return max(int(lives.size[(lives.start <= m) & (lives.end > m)].sum()) for m in moments)


def check(lives: Lives, offset: Any) -> int:
    """No two lives share a byte at any moment; returns the height. Knows nothing of how they were packed."""
    n = len(lives)
    assert all(at >= 0 for at in offset.tolist())
    for moment in range(int(lives.end.max())):
        here = [i for i in range(n) if lives.start[i] <= moment < lives.end[i]]
        places = sorted((int(offset[i]), int(offset[i] + lives.size[i])) for i in here)
        for (_, high), (low, _) in pairwise(places):
            assert high <= low
    return int((offset + lives.size).max())


@given(drawn=rows, random=st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_packings_do_not_overlap(drawn: list[tuple[int, int]], random: Any) -> None:
    lives = lives_of(drawn)
    order = list(range(len(lives)))
    random.shuffle(order)
    for offset in (best_fit(lives), first_fit(lives, np.array(order))):
        assert most_live(lives) <= check(lives, offset) <= int(lives.size.sum())


@given(drawn=rows)
@settings(max_examples=60, deadline=None)
def test_the_best_packing_is_as_low_as_it_says_and_as_all_that_were_tried(drawn: list[tuple[int, int]]) -> None:
    lives = lives_of(drawn)
    packed = pack(lives, most_live(lives))
    assert check(lives, packed.best.offset) == packed.best.height == min(height for _, height in packed.tried)


@pytest.mark.parametrize("conf", ["", "expandable_segments:True", "max_split_size_mb:21", "roundup_power2_divisions:4"])
@given(seed=st.integers(0, 10**6), streams=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_no_conf_needs_less_than_the_bound(conf: str, seed: int, streams: int) -> None:
    requests = random_requests(seed, 60, [100, 700_000, MIB + 1, 5 * MIB, 11 * MIB, 25 * MIB], streams)
    subject = subject_of(trace_of(*requests), "t")
    b = bound(subject.tape)
    outcome = play_one(subject, conf, compiled=False)
    assert b.lower <= b.lower_apart <= b.lower_kept <= outcome.reserved
    assert b.lower <= b.packed
    assert check(b.lives, b.packing.best.offset) <= b.packed
