"""A sweep of confs on one core and on all of them; ``nox -s bench``, the relative column is the figure to quote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fragscope.allocator.engine.compiled import compile_now
from fragscope.search import Given, load_subject, player
from fragscope.search.tune import Player

RECORDING = Path(__file__).parents[1] / "data" / "traces" / "oom-default.pickle.xz"
CONFS = [
    *(f"max_split_size_mb:{20 + 8 * n}" for n in range(25)),
    *(f"expandable_segments:True,large_segment_size_mb:{12 + 2 * n}" for n in range(25)),
]
CORES = len(os.sched_getaffinity(0))
GIVEN = Given(torch="2.11.0", card="h100-80gb", memory_fraction=0.2)


@pytest.fixture(scope="module", params=[1, CORES], ids=["one-core", "all-cores"])
def sweep(request: pytest.FixtureRequest) -> Iterator[Player]:
    compile_now()
    subjects = [load_subject(str(RECORDING), GIVEN)]
    with player(subjects, jobs=request.param, tries=10 * len(CONFS)) as play:
        play(CONFS[:CORES])  # processes have started and loaded
        yield play


@pytest.mark.benchmark(group=f"50 confs over a recording of 75,099 entries, {CORES} cores at hand")
def test_sweep(benchmark, sweep):
    benchmark.pedantic(sweep, (CONFS,), rounds=3)
