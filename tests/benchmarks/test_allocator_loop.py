"""The allocator model's loop: compiled beside interpreted, and beside decoding the snapshot that it replays.

``nox -s bench``: the relative column is the figure to quote, never the seconds. The snapshot of 200,000 entries is a
recording repeated, with call stacks as deep as those of a training step.
"""

from __future__ import annotations

import lzma
import pickle
from pathlib import Path
from typing import Any

import pytest

from fragscope.allocator import ReplaySettings, Tape, card_named, replay, rules_for, settle, tape_of
from fragscope.allocator.engine.compiled import compile_now
from fragscope.trace.snapshot import snapshot_to_trace

RECORDING = Path(__file__).parents[1] / "data" / "traces" / "train_vit-default.pickle.xz"
ENTRIES = 200_000
CARD = card_named("h100-80gb")
SETTINGS = ReplaySettings(rules_for("2.11.0"), CARD.name, CARD.total, CARD.free)
GROUP = "a trace of 200,000 entries"


def long_snapshot(depth: int) -> dict[str, Any]:
    """The recording's entries over and over, each round's live memory freed, with stacks of ``depth`` frames."""
    snapshot = pickle.loads(lzma.decompress(RECORDING.read_bytes()))
    (entries,) = [t for t in snapshot["device_traces"] if t]
    stacks = [
        [{"filename": f"module_{n % 40}.py", "line": n * 7 + k, "name": f"forward_{k}"} for k in range(depth)]
        for n in range(400)
    ]
    out: list[dict[str, Any]] = []
    while len(out) < ENTRIES:
        live: dict[int, dict[str, Any]] = {}
        for number, entry in enumerate(entries):
            if out and entry["action"].startswith("segment"):
                continue  # the segments of the first round serve all
            copied = {**entry, "frames": stacks[number % len(stacks)]}
            out.append(copied)
            if entry["action"] == "alloc":
                live[entry["addr"]] = copied
            elif entry["action"] == "free_completed":
                live.pop(entry["addr"], None)
        for held in live.values():
            out += [{**held, "action": "free_requested"}, {**held, "action": "free_completed"}]
    return {**snapshot, "device_traces": [out], "segments": []}


@pytest.fixture(scope="module")
def snapshot() -> bytes:
    return pickle.dumps(long_snapshot(depth=20))


@pytest.fixture(scope="module")
def tape(snapshot: bytes) -> Tape:
    compile_now()
    return settle(tape_of(snapshot_to_trace(pickle.loads(snapshot), RECORDING)), SETTINGS)


@pytest.mark.benchmark(group=GROUP)
def test_floor_pickle_load(benchmark, snapshot):
    benchmark.pedantic(pickle.loads, (snapshot,), rounds=5)


@pytest.mark.benchmark(group=GROUP)
def test_decide_compiled(benchmark, tape):
    benchmark.pedantic(replay, (tape, SETTINGS), {"decisions": False, "compiled": True}, rounds=5)


@pytest.mark.benchmark(group=GROUP)
def test_decide_interpreted(benchmark, tape):
    benchmark.pedantic(replay, (tape, SETTINGS), {"decisions": False, "compiled": False}, rounds=2)
