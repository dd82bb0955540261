"""The scenario moe-chunking on the virtual device, against sums over FlashInfer's tensors and the published limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fragscope.results import Case, load_results
from fragscope.thresholds import FREED, Launch, launch_trace, shipped_models
from fragscope.trace import RequestKind, load_trace

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scenarios"))
pytestmark = pytest.mark.torch
GIB = 1024**3


def run(out: Path, *arguments: str, code: int = 0) -> dict[str, Case]:
    command = [
        sys.executable,
        "-m",
        "fragscope",
        "run",
        "--device",
        "virtual",
        "--card",
        "h100-80gb",
        "--torch",
        "2.11.0",
    ]
    done = subprocess.run(
        [*command, "--out", str(out), "--no-report", *arguments],
        check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return {f"{c.preset}/{c.variant}": c for c in load_results(out).cases}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, Case]:
    return run(folder, "moe-chunking")


def test_every_outcome_is_the_declared_one(cases: dict[str, Case]) -> None:
    outcomes = {name: case.outcome for name, case in cases.items()}
    assert all(case.as_expected for case in cases.values())
    assert outcomes["nemotron-3-super/unchunked"] == "overflow"
    assert outcomes["deepseek-v3/unchunked"] == "oom"
    assert outcomes["qwen3-next-80b/unchunked"] == "ok"
    for preset in ("nemotron-3-super", "deepseek-v3", "qwen3-next-80b"):
        assert outcomes[f"{preset}/chunked"] == outcomes[f"{preset}/memory-aware"] == "ok"
        assert outcomes[f"{preset}/chunked-unsliced"] == "wrong"


def test_an_overflow_says_how_far_the_grid_is_exceeded(cases: dict[str, Case]) -> None:
    """400,000 tokens of Nemotron 3 Super: 512 + (8,800,000 - 512) / 128 = 69,258 CTAs."""
    case = cases["nemotron-3-super/unchunked"]
    assert "400,000 tokens has 69,258 CTAs in y, 3,723 more than a grid can have" in case.message
    assert case.missing is None  # blocks of a grid are not bytes


@pytest.mark.parametrize("preset", ["nemotron-3-super", "deepseek-v3", "qwen3-next-80b"])
def test_requested_bytes_are_the_inputs_and_the_largest_launch(cases: dict[str, Case], preset: str) -> None:
    tokens = cases[f"{preset}/chunked"].params["tokens"]
    model = shipped_models()[preset]
    # hidden states at half a byte and a sixteenth for scales, bfloat16 results, routing of 4 + 4 bytes an expert
    inputs = tokens * (model.hidden // 2 + model.hidden // 16 + 2 * model.hidden + 8 * model.top_k)
    launch = sum(b.nbytes for b in Launch.of(model, 128).buffers(300_000))
    assert cases[f"{preset}/chunked"].peak.requested == inputs + launch
    # Unsliced routing is packed whole for every launch: 4 bytes for each expert of the other tokens.
    more = (tokens - 300_000) * model.top_k * 4
    assert cases[f"{preset}/chunked-unsliced"].peak.requested == inputs + launch + more


def test_a_launch_beyond_the_grid_holds_all_its_tensors_first(cases: dict[str, Case]) -> None:
    whole = sum(b.nbytes for b in Launch.of(shipped_models()["nemotron-3-super"], 128).buffers(400_000))
    case = cases["nemotron-3-super/unchunked"]
    assert case.transient >= whole
    assert whole > 29 * GIB


def test_memory_aware_has_the_smallest_peak_of_those_that_end_well(cases: dict[str, Case]) -> None:
    for preset in ("nemotron-3-super", "deepseek-v3", "qwen3-next-80b"):
        well = {c.variant: c.peak.reserved for n, c in cases.items() if n.startswith(preset) and c.outcome == "ok"}
        assert min(well, key=lambda variant: well[variant]) == "memory-aware"
        assert cases[f"{preset}/memory-aware"].transient * 4 < cases[f"{preset}/chunked"].transient


@pytest.mark.parametrize("variant", ["unchunked", "chunked"])
def test_a_case_asks_for_what_the_limits_are_computed_from(cases: dict[str, Case], folder: Path, variant: str) -> None:
    """Sizes of the first launch, in order, and the order in which its tensors end."""
    trace = cases[f"qwen3-next-80b/{variant}"].trace
    assert trace is not None
    rows = load_trace(folder / trace).requests
    measured = rows.phase > 0
    kinds, ids, sizes = (column[measured] for column in (rows.kind, rows.id, rows.size))
    tokens = {"unchunked": 400_000, "chunked": 300_000}[variant]
    wanted = launch_trace(Launch.of(shipped_models()["qwen3-next-80b"], 128), tokens).requests
    made, freed = (np.flatnonzero(kinds == kind)[: len(FREED)] for kind in (RequestKind.ALLOC, RequestKind.FREE))
    assert sizes[made].tolist() == wanted.size[: len(FREED)].tolist()
    assert (ids[freed] - ids[made][0]).tolist() == wanted.id[len(FREED) :].tolist()


def test_launches_leave_nothing_behind(cases: dict[str, Case]) -> None:
    for case in cases.values():
        if case.outcome in ("ok", "wrong", "overflow"):
            assert case.retained == 0
            assert case.end_live == case.base


def test_numbers_agree_but_where_routing_is_not_sliced(cases: dict[str, Case]) -> None:
    numeric = cases["qwen3-next-80b/chunked"].numeric
    assert numeric is not None
    assert numeric["differ"] == ["chunked-unsliced"]
    assert numeric["compared_with"] == "reference"
    assert numeric["tolerance"] == [1e-4, 1e-5]


def test_slices_change_no_bit_of_the_routing_and_unsliced_routing_shows_from_the_second_chunk_on() -> None:
    from scenario_moe_chunking import _CHUNKS, outputs

    whole, seen = outputs("unchunked", "cpu")
    for variant in ("chunked", "memory-aware"):
        assert torch.equal(outputs(variant, "cpu")[1], seen)
    wrong, theirs = outputs("chunked-unsliced", "cpu")
    first = _CHUNKS["chunked-unsliced"]
    assert torch.equal(theirs[:first], seen[:first])
    torch.testing.assert_close(wrong[:first], whole[:first], rtol=1e-4, atol=1e-5)
    same = (theirs[first:] == seen[first:]).all(dim=-1)
    assert same.float().mean() < 0.2  # routing varies along the tokens
    differ = ~torch.isclose(wrong[first:], whole[first:], rtol=1e-2, atol=1e-2).all(dim=-1)
    assert bool(differ[~same].all())


def test_tokens_can_be_set_and_the_grids_limit_is_where_it_was_published(tmp_path: Path) -> None:
    name = "moe-chunking/nemotron-3-super/unchunked"
    within = run(tmp_path / "a", name, "--set", "tokens=378344")["nemotron-3-super/unchunked"]
    beyond = run(tmp_path / "b", name, "--set", "tokens=378345")["nemotron-3-super/unchunked"]
    assert (within.outcome, within.expected_outcome) == ("ok", "ok")  # although 400,000 tokens are declared to overflow
    assert (beyond.outcome, beyond.expected_outcome) == ("overflow", "overflow")
    assert "65,536 CTAs in y, 1 more" in beyond.message


def test_the_shipped_budgets_hold(cases: dict[str, Case]) -> None:
    from fragscope.gate import load_budgets

    budgets = [b for b in load_budgets(ROOT / "budgets.toml").budgets if b.pattern.startswith("moe-chunking/")]
    assert budgets
    for budget in budgets:
        held = [c for c in cases.values() if budget.matches_name([c.scenario, c.preset, c.variant])]
        assert held
        for case in held:
            assert case.transient <= budget.limits["transient"].bytes
