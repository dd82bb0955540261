"""How fast a recording is read and replayed, beside the floor: decoding the pickle alone.

``nox -s bench``: the group's relative column is the figure to quote, never the seconds.
"""

from __future__ import annotations

import lzma
import pickle
from pathlib import Path

import pytest

from fragscope.allocator import ReplaySettings, card_named, replay, rules_for
from fragscope.measure import timeline
from fragscope.trace import load_trace, write_trace

RECORDING = Path(__file__).parents[1] / "data" / "traces" / "oom-default.pickle.xz"  # 75,099 events
CARD = card_named("h100-80gb")
SETTINGS = ReplaySettings(rules_for("2.11.0"), CARD.name, CARD.total, CARD.free, memory_fraction=0.2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bench") / "snapshot.pickle"
    file.write_bytes(lzma.decompress(RECORDING.read_bytes()))
    return file


@pytest.fixture(scope="module")
def packed(plain: Path) -> Path:
    file = plain.with_suffix(".fscope")
    write_trace(replay(load_trace(plain), SETTINGS).trace, file)
    return file


@pytest.mark.benchmark(group="a recording of 75,099 events")
def test_floor_pickle_load(benchmark, plain):
    data = plain.read_bytes()
    benchmark(pickle.loads, data)


@pytest.mark.benchmark(group="a recording of 75,099 events")
def test_read_snapshot_safely(benchmark, plain):
    benchmark(load_trace, plain)


@pytest.mark.benchmark(group="a recording of 75,099 events")
def test_read_fscope(benchmark, packed):
    benchmark(load_trace, packed)


@pytest.mark.benchmark(group="a recording of 75,099 events")
def test_replay(benchmark, plain):
    trace = load_trace(plain)
    benchmark(replay, trace, SETTINGS)


@pytest.mark.benchmark(group="a recording of 75,099 events")
def test_replay_and_verify(benchmark, plain):
    trace = load_trace(plain)
    result = benchmark(replay, trace, SETTINGS, verify=True)
    assert result.verify is not None and result.verify.mismatches == 0


@pytest.mark.benchmark(group="a recording of 75,099 events")
def test_timeline(benchmark, packed):
    benchmark(timeline, load_trace(packed))
