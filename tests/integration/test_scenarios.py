"""Shipped scenarios on the virtual device against the same scenarios on a real card.

Expected values: tests/data/scenarios and reports, from ``fragscope run --device cuda`` on an H100 (torch 2.11.0+cu130,
flashinfer 0.6.18), where every decision of the model was compared with the card's allocator. Requests must be equal one
by one, and so must every figure but those of ``DECIDED_BY_ADDRESS``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from request_digest import counted_and_digested

from fragscope.allocator import ReplaySettings, card_named, replay, rules_for
from fragscope.gate import Budgets, evaluate, load_budgets
from fragscope.results import Case, Results, load_results
from fragscope.trace import RequestKind, Trace, load_trace

pytest.importorskip("torch")
pytest.importorskip("flashinfer")

from fragscope.record.virtual import VirtualDevice
from fragscope.suite.discover import load_scenarios
from fragscope.suite.scenario import Case as ScenarioCase

ROOT = Path(__file__).parents[2]
MEASURED = json.loads((ROOT / "tests" / "data" / "scenarios" / "h100-torch-2.11.0.json").read_text())["cases"]
ENDED = {
    f"{c.scenario}/{c.preset}/{c.variant}": c
    for c in load_results(ROOT / "reports" / "h100-80gb-torch-2.11.0" / "results.json").cases
    if c.outcome != "ok"
}
"""Cases that do not come to a good end, on a card as declared."""
NAMES = sorted({name.split("/")[0] for name in MEASURED})
MIB = 1024**2
DECIDED_BY_ADDRESS = {
    "moe-bf16-layout/qwen3-235b-a22b-tp4/list-stack": -20 * MIB,
    "moe-bf16-layout/qwen3-30b-a3b-tp1/list-stack": -20 * MIB,
    "moe-bf16-layout/glm-4.5-air-tp1/list-stack": -11 * MIB,
    "moe-bf16-layout/llama-4-scout-tp4/list-stack": -20 * MIB,
    "moe-nvfp4-shuffle/kimi-k2-tp8/list-stack": 2 * MIB,
}
"""What was stranded at most on the card, less what the virtual device says: equal blocks told apart by addresses."""
WITHOUT_OUT = [n for n in MEASURED if n.startswith("moe-mxfp8-shuffle/") and n.endswith("/in-place")]
"""Cases that ask the interleave kernel for new memory where its ``out`` is missing, as in the flashinfer of the run."""
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    out = tmp_path_factory.mktemp("run")
    command = [
        sys.executable,
        "-m",
        "fragscope",
        "run",
        *NAMES,
        "--device",
        "virtual",
        "--torch",
        "2.11.0",
        "--torch",
        "2.13.0",
    ]
    command += ["--card", "h100-80gb", "--out", str(out), "--no-report"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=540)
    return load_results(out), out


def cases(results: Results, torch: str) -> dict[str, Case]:
    """Those that were measured on the card."""
    named = {f"{c.scenario}/{c.preset}/{c.variant}": c for c in results.cases if c.torch == torch}
    return {name: case for name, case in named.items() if name in MEASURED}


@pytest.fixture(scope="module")
def without_out() -> dict[str, Trace]:
    """``WITHOUT_OUT`` on the virtual device."""
    (scenario,) = load_scenarios(ROOT / "scenarios" / "scenario_moe_mxfp8_shuffle.py")
    card = card_named("h100-80gb")
    in_place = scenario.variants["in-place"].body
    interleave = in_place.__globals__["block_scale_interleave"]

    def older(scales: Any) -> Any:
        return interleave(scales)

    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(in_place.__globals__, "block_scale_interleave", older)
        for name in WITHOUT_OUT:
            preset = name.split("/")[1]
            device = VirtualDevice(card, ReplaySettings.on(card, rules_for("2.11.0")), ROOT)
            with device:
                values = scenario.values_for(preset, {})
                in_place(ScenarioCase(scenario.name, preset, "in-place", values, device.memory))
                made[name] = device.trace()
    return made


def test_every_case_that_ran_on_the_card_runs_here(run: tuple[Results, Path]) -> None:
    assert set(cases(run[0], "2.11.0")) >= set(MEASURED)
    assert (len(MEASURED), len(WITHOUT_OUT), len(ENDED)) == (141, 5, 14)
    assert all(m["verify"]["mismatches"] == 0 for m in MEASURED.values())


@pytest.mark.parametrize("name", MEASURED)
def test_requests_equal_those_of_the_card_one_by_one(
    run: tuple[Results, Path], without_out: dict[str, Trace], name: str
) -> None:
    results, out = run
    trace = without_out.get(name)
    if trace is None:
        file = cases(results, "2.11.0")[name].trace
        assert file is not None
        trace = load_trace(out / file)
    assert counted_and_digested(trace.requests) == (MEASURED[name]["requests"], MEASURED[name]["requests_sha256"])


@pytest.mark.parametrize("name", [n for n in MEASURED if n not in WITHOUT_OUT])
def test_figures_equal_those_of_the_card_to_the_byte(run: tuple[Results, Path], name: str) -> None:
    case, measured = cases(run[0], "2.11.0")[name], MEASURED[name]
    assert case.as_expected
    for key in ("base", "end_live", "transient", "retained", "segments_peak", "allocs"):
        assert getattr(case, key) == measured[key], key
    for key in ("end", "after_empty_cache", "driver_calls"):
        assert msgspec.to_builtins(getattr(case, key)) == measured[key], key
    by_address = DECIDED_BY_ADDRESS.get(name, 0)
    assert case.exact <= (not by_address)
    said = msgspec.to_builtins(case.peak)
    said["stranded"] += by_address
    said["inactive_split"] += by_address
    assert said == measured["peak"]


@pytest.mark.parametrize("name", WITHOUT_OUT)
def test_figures_without_a_place_for_results_equal_those_of_the_card(without_out: dict[str, Trace], name: str) -> None:
    settings = ReplaySettings.on(card_named("h100-80gb"), rules_for("2.11.0"))
    span, measured = replay(without_out[name], settings).measured, MEASURED[name]
    assert span is not None
    assert (span.base.allocated, span.end.allocated) == (measured["base"], measured["end_live"])
    for key in ("transient", "retained", "segments_peak", "allocs"):
        assert getattr(span, key) == measured[key], key
    for key in ("peak", "end"):
        for figure, value in measured[key].items():
            assert getattr(getattr(span, key), figure) == value, (key, figure)


@pytest.mark.parametrize("name", ENDED)
def test_what_does_not_end_well_ends_as_on_the_card(run: tuple[Results, Path], name: str) -> None:
    (case,) = [c for c in run[0].cases if f"{c.scenario}/{c.preset}/{c.variant}" == name and c.torch == "2.11.0"]
    there = ENDED[name]
    assert (case.outcome, case.missing) == (there.outcome, there.missing)
    if there.outcome in ("overflow", "wrong"):  # where memory runs out hangs on what CUDA took of the card
        for key in ("base", "end_live", "transient", "retained", "peak", "end", "segments_peak", "allocs"):
            assert getattr(case, key) == getattr(there, key), key


def test_a_tie_that_the_driver_decides_is_said(run: tuple[Results, Path]) -> None:
    """Up to torch 2.11 some choices fall by address; from 2.13 on none does."""
    inexact = {n for n, c in cases(run[0], "2.11.0").items() if not c.exact}
    assert "moe-nvfp4-shuffle/kimi-k2-tp8/list-stack" in inexact  # its stranded peak did differ on the card, by 2 MiB
    for name in inexact:
        codes = {a.code for a in cases(run[0], "2.11.0")[name].assumptions}
        assert codes - {"raw_pages"} == {"tie_by_modelled_address"}, name
    assert all(c.exact for c in cases(run[0], "2.13.0").values())


def test_table_measured_for_the_published_recordings(run: tuple[Results, Path]) -> None:
    """Peak allocated and reserved in MiB, rounded, as measured with vLLM's own code on an H100."""
    table = {"list-stack": (39424, 39454), "preallocated": (28742, 28758), "batched": (28672, 28674)}
    for variant, (allocated, reserved) in table.items():
        case = cases(run[0], "2.11.0")[f"moe-fp8-shuffle/deepseek-v3-tp1/{variant}"]
        assert (round(case.peak.allocated / MIB), round(case.peak.reserved / MIB)) == (allocated, reserved)


@pytest.mark.parametrize(
    ("variant", "recording"), [("list-stack", "orig"), ("preallocated", "fixed"), ("batched", "newest")]
)
def test_figures_equal_those_recorded_with_vllms_own_code(
    run: tuple[Results, Path], variant: str, recording: str
) -> None:
    row = json.loads((ROOT / "tests" / "data" / "traces" / f"fp8-dsv3-tp8.{recording}.default.json").read_text())["row"]
    case = cases(run[0], "2.11.0")[f"moe-fp8-shuffle/deepseek-v3-tp8/{variant}"]
    assert case.base == row["base"]
    assert case.peak.allocated == row["peak_alloc"]
    assert case.peak.reserved == row["peak_res"]
    assert case.peak.requested == row["peak_requested"]
    assert case.end.inactive_split == row["inactive_split"]
    assert case.after_empty_cache.reserved == row["res_after_empty_cache"]


def test_in_place_needs_one_expert_of_scratch(run: tuple[Results, Path]) -> None:
    for name, case in cases(run[0], "2.13.0").items():
        if case.variant == "in-place":
            assert case.transient < 64 * MIB, name
            assert case.peak.allocated - case.end_live < 64 * MIB, name


def test_no_variant_that_comes_to_its_end_takes_less_than_what_is_proposed(run: tuple[Results, Path]) -> None:
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for case in run[0].cases:
        if case.outcome == "ok":
            groups.setdefault((case.scenario, case.preset, case.torch), []).append(case)
    held = 0
    for name, members in groups.items():
        proposed = [c for c in members if c.role == "proposed"]
        if proposed:
            held += 1
            assert min(c.peak.allocated for c in proposed) == min(c.peak.allocated for c in members), name
            assert min(c.peak.hbm for c in proposed) == min(c.peak.hbm for c in members), name
    assert held >= 60


def test_second_release_was_replayed_from_the_same_recording(run: tuple[Results, Path]) -> None:
    results, out = run
    replayed = 0
    for name, case in cases(results, "2.13.0").items():
        other = cases(results, "2.11.0")[name]
        assert case.trace and other.trace
        first, second = load_trace(out / other.trace), load_trace(out / case.trace)
        # What looked at its memory, or might have ended otherwise, is run anew.
        if case.outcome == "ok" and not first.count(RequestKind.OBSERVATION):
            assert second.provenance == first.provenance, name
            replayed += 1
    assert replayed > 100


def test_numerics_agree_with_the_references(run: tuple[Results, Path]) -> None:
    without = set()
    for case in cases(run[0], "2.11.0").values():
        if case.numeric is None:
            without.add(case.scenario)
            continue
        assert case.numeric["compared_with"] == "reference"
        assert case.numeric.get("differ", []) == (["chunked-unsliced"] if case.scenario == "moe-chunking" else [])
    assert without == {"a2a-barrier", "a2a-workspace"}  # these compute nothing


def test_the_shipped_budgets_hold_and_every_one_of_them_matches(run: tuple[Results, Path]) -> None:
    budgets = load_budgets(ROOT / "budgets.toml")
    of_these = tuple(b for b in budgets.budgets if b.pattern.split("/")[0] in ("*", *NAMES))
    verdict = evaluate(run[0], Budgets(budgets.file, of_these))
    assert (verdict.exit_code, verdict.not_measured) == (0, [])
    assert verdict.cases_held >= 19
