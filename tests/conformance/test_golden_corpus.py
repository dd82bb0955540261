"""Models against the real allocator binary of each release, on programs kept as data (see tests/data/golden)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from binary import ACTIONS
from compare import MakeModel, Outcome, compare
from engine_model import EngineModel
from golden import Kept, read_corpus, read_failures
from obvious import ObviousAllocator
from oracles import RELEASES
from programs import OPERATIONS, legal
from snapshots import entry, segment, snapshot

from fragscope.allocator import ReplaySettings, replay, rules_for
from fragscope.trace.snapshot import snapshot_to_trace

MODELS = [pytest.param(ObviousAllocator, id="obvious"), pytest.param(EngineModel, id="engine")]
SINCE_2_10 = {"per_process_memory_fraction"}
SINCE_2_11 = SINCE_2_10 | {"large_segment_size_mb"}
SINCE_2_12 = SINCE_2_11 | {"throw_on_cudamalloc_oom"}
KEYS = {
    "max_split_size_mb", "max_non_split_rounding_mb", "roundup_power2_divisions", "garbage_collection_threshold",
    "expandable_segments",
}  # fmt: skip
NEWER_KEYS = {"2.9.1": set(), "2.10.0": SINCE_2_10, "2.11.0": SINCE_2_11}


def answered_by(release: str) -> list[Kept]:
    return [kept for kept in read_corpus() if kept.release == release]


@cache
def outcomes(release: str, model: MakeModel, rules_of: str | None = None) -> dict[str, Outcome]:
    """How each program of a release's corpus went, under its own rules or those of another release."""
    rules_of = rules_of or release
    return {
        kept.program.name: compare(kept.program, kept.answers, model, rules_of)
        for kept in answered_by(release)
        if kept.program.runs_on(rules_of)
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("release", RELEASES)
def test_every_address_decision_and_counter_equals_the_binary(release: str, model: MakeModel) -> None:
    found = outcomes(release, model)
    assert {name: o.difference for name, o in found.items() if o.difference is not None} == {}
    # Nothing was left open: no order of a hash table, which a model cannot know.
    left_open = {name for name, o in found.items() if o.unknown or o.held_reordered or o.pools_reordered or o.cut}
    assert left_open == set()
    whole = {kept.program.name: len(kept.program.ops) for kept in answered_by(release)}
    assert {name: outcome.operations for name, outcome in found.items()} == whole


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kept", read_failures(), ids=lambda kept: f"{kept.release}-{kept.program.name}")
def test_what_once_differed_is_equal_now(kept: Kept, model: MakeModel) -> None:
    difference = compare(kept.program, kept.answers, model, kept.release).difference
    assert difference is None


@pytest.mark.parametrize("release", RELEASES)
def test_the_corpus_holds_what_it_claims(release: str) -> None:
    kept = answered_by(release)
    programs = [k.program for k in kept]
    assert {op[0] for p in programs for op in p.ops} == set(OPERATIONS)
    assert {e.action for k in kept for entries in k.answers.entries for e in entries} == set(ACTIONS)
    assert {e.pool != 0 for k in kept for entries in k.answers.entries for e in entries} == {False, True}
    texts = [p.conf for p in programs] + [op[1] for p in programs for op in p.ops if op[0] == "conf"]
    wanted = KEYS | NEWER_KEYS.get(release, SINCE_2_12)
    assert {key for key in wanted if not any(key in text for text in texts)} == set()
    assert any(">" in text for text in texts)
    assert {p.seed == 0 for p in programs} == {False, True}  # ascending and scattered addresses
    assert {len({op[3] for op in p.ops if op[0] == "alloc"}) for p in programs} >= {1, 2, 4}  # streams


@pytest.mark.parametrize("release", RELEASES)
def test_the_corpus_has_what_only_pressure_brings(release: str) -> None:
    found = outcomes(release, ObviousAllocator)
    assert sum(o.ooms for o in found.values()) > 50
    assert sum(o.uses for o in found.values()) > 50
    assert sum(o.together for o in found.values()) > 5


def test_frees_that_complete_together_do_so_in_other_orders_than_that_of_the_frees() -> None:
    assert sum(o.reordered for release in RELEASES for o in outcomes(release, ObviousAllocator).values()) > 0


def test_every_program_of_the_corpus_makes_sense() -> None:
    assert [k.program.name for k in read_corpus() if legal(k.program.ops) != list(k.program.ops)] == []


@pytest.mark.parametrize(
    ("release", "wrong"),
    [("2.9.1", "2.10.0"), ("2.10.0", "2.9.1"), ("2.10.0", "2.11.0"), ("2.11.0", "2.10.0"), ("2.11.0", "2.12.0"),
     ("2.11.0", "2.13.0"), ("2.12.0", "2.11.0"), ("2.12.0", "2.13.0"), ("2.13.0", "2.11.0"), ("2.13.0", "2.12.0"),
     ("2.14.1", "2.12.0")],
)  # fmt: skip
def test_the_corpus_tells_releases_apart(release: str, wrong: str) -> None:
    assert any(outcome.difference or outcome.unknown for outcome in outcomes(release, ObviousAllocator, wrong).values())


def as_snapshot(kept: Kept) -> dict[str, Any]:
    """The binary's trace entries in the form in which torch writes them into a snapshot."""
    short = kept.release.rpartition(".")[0]
    states = {"allocated": "active_allocated", "pending": "active_pending_free", "free": "inactive"}
    return snapshot(
        [entry(e.action, e.addr, e.size, e.stream, release=short) for entries in kept.answers.entries for e in entries],
        [
            segment(view.addr, view.size, [(length, states[state]) for _, length, state in view.blocks], view.stream)
            for view in kept.answers.layouts[len(kept.program.ops) - 1]
        ],
        short,
    )


def is_like_a_recording(kept: Kept) -> bool:
    """Default conf, default pool; a snapshot does not show that the limit changed on the way."""
    kinds = {op[0] for op in kept.program.ops[1:]}
    return not kept.program.conf and kinds <= {"alloc", "free", "use", "done", "empty"}


@pytest.mark.parametrize("release", RELEASES)
def test_a_snapshot_of_the_binarys_trace_replays_to_itself(release: str) -> None:
    """The reader must infer from trace entries alone what the program did: deferred frees, empty_cache, retries."""
    recordings = [kept for kept in answered_by(release) if is_like_a_recording(kept)]
    for kept in recordings:
        program = kept.program
        trace = snapshot_to_trace(as_snapshot(kept), Path("golden.pickle"))
        settings = ReplaySettings(
            rules=rules_for(release),
            card="golden",
            total=program.total,
            capacity=program.capacity,
            memory_fraction=program.ops[0][1] if program.ops[0][0] == "fraction" else None,
        )
        outcome = replay(trace, settings, verify=True).verify
        assert outcome is not None
        assert outcome.first is None, program.name
    assert len(recordings) >= 3
