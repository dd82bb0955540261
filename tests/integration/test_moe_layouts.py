"""The scenarios that bring FP8, MXFP8 and BF16 experts into TensorRT-LLM's layouts, and make NVFP4 layers.

Expected values: bytes of the published shapes of whole layers, and of what each form keeps at its peak, counted from
the source of the release it replays; all of it written out here, and none taken from the scenarios.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fragscope.allocator import ReplaySettings, card_named, rules_for
from fragscope.results import Case, Results, load_results

pytest.importorskip("torch")
pytest.importorskip("flashinfer")

from fragscope.record.virtual import VirtualDevice
from fragscope.suite.discover import load_scenarios
from fragscope.suite.scenario import Case as ScenarioCase

ROOT = Path(__file__).parents[2]
NAMES = ("moe-fp8-per-tensor", "moe-mxfp8-shuffle", "moe-bf16-layout", "moe-nvfp4-create")
MIB = 1024**2
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "fragscope", "run", *NAMES, "--device", "virtual", "--torch", "2.13.0"]
    command += ["--card", "h100-80gb", "--out", str(out), "--no-report"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=540)
    return load_results(out)


@pytest.fixture(scope="module")
def cases(results: Results) -> dict[str, Case]:
    return {f"{c.scenario}/{c.preset}/{c.variant}": c for c in results.cases}


@dataclass(frozen=True)
class Shape:
    """One rank's part of a layer: experts, rows and columns of w13, rows and columns of w2."""

    experts: int
    rows: int
    hidden: int
    width: int

    @property
    def w13(self) -> int:
        return self.experts * self.rows * self.hidden

    @property
    def w2(self) -> int:
        return self.experts * self.hidden * self.width


def index(rows: int) -> int:
    """Bytes of one 64-bit row number a row."""
    return 8 * rows


SCOUT_TP1 = Shape(16, 2 * 8192, 5120, 8192)
SCOUT_TP4 = Shape(16, 2 * 2048, 5120, 2048)
SCOUT_TP8 = Shape(16, 2 * 1024, 5120, 1024)
SUPER = Shape(512, 2688, 1024, 2688)  # no gate
DEEPSEEK_TP1 = Shape(256, 2 * 2048, 7168, 2048)
DEEPSEEK_TP8 = Shape(256, 2 * 256, 7168, 256)
MINIMAX_TP2 = Shape(256, 2 * 768, 3072, 768)
QWEN30_TP1 = Shape(128, 2 * 768, 2048, 768)
QWEN235_TP4 = Shape(128, 2 * 384, 4096, 384)
AIR_TP1 = Shape(128, 2 * 1408, 4096, 1408)


def on_the_way(case: Case, base: int) -> int:
    """Bytes that were asked for beyond those that were there before, at most."""
    assert case.outcome == "ok"
    assert case.peak.requested >= base
    return case.peak.requested - base


PER_TENSOR = {"llama-4-scout-tp1": (SCOUT_TP1, 4), "llama-4-scout-tp8": (SCOUT_TP8, 8)}


@pytest.mark.parametrize("preset", PER_TENSOR)
def test_per_tensor_lists_need_four_w13_and_two_w2(cases: dict[str, Case], preset: str) -> None:
    """Swapped copy, woven stack, two lists, two stacks. The copy stays: w13 is a view, and a view keeps its base."""
    s, layers = PER_TENSOR[preset]
    case = cases[f"moe-fp8-per-tensor/{preset}/list-stack"]
    assert on_the_way(case, layers * (s.w13 + s.w2)) == 4 * s.w13 + 2 * s.w2


def test_per_tensor_lists_without_gate_swap_nothing(cases: dict[str, Case]) -> None:
    """Stack of what were views, two lists, w13's stack; after that w13's old storage is gone, and w2's stack comes."""
    case = cases["moe-fp8-per-tensor/nemotron-3-super-tp1/list-stack"]
    assert on_the_way(case, 2 * (SUPER.w13 + SUPER.w2)) == 3 * SUPER.w13 + SUPER.w2 == 2 * SUPER.w13 + 2 * SUPER.w2


MXFP8 = {
    "deepseek-v3-tp1": (DEEPSEEK_TP1, 1),
    "deepseek-v3-tp8": (DEEPSEEK_TP8, 2),
    "minimax-m2-tp2": (MINIMAX_TP2, 2),
    "qwen3-30b-a3b-tp1": (QWEN30_TP1, 3),
}


def with_scales(w: int) -> int:
    """Weights of one byte, and a byte for 32 of them."""
    return w + w // 32


@pytest.mark.parametrize("preset", MXFP8)
def test_mxfp8_lists_need_four_w13_and_two_w2(cases: dict[str, Case], preset: str) -> None:
    """Swapped copies, two woven lists, four shuffled lists, four stacks; scales as weights."""
    s, layers = MXFP8[preset]
    w13, w2 = with_scales(s.w13), with_scales(s.w2)
    case = cases[f"moe-mxfp8-shuffle/{preset}/list-stack"]
    assert on_the_way(case, layers * (w13 + w2)) == 4 * w13 + 2 * w2


@pytest.mark.parametrize("preset", MXFP8)
def test_mxfp8_in_one_gather_a_step(cases: dict[str, Case], preset: str) -> None:
    """Swapped copies, woven, shuffled; at the end w2's scales gathered and interleaved, with their row index."""
    s, layers = MXFP8[preset]
    w13, w2 = with_scales(s.w13), with_scales(s.w2)
    case = cases[f"moe-mxfp8-shuffle/{preset}/batched"]
    last = max(s.w13 // 32 + index(s.rows), 2 * (s.w2 // 32) + index(s.hidden))
    assert on_the_way(case, layers * (w13 + w2)) == 3 * w13 + s.w2 + last


def test_mxfp8_without_gate(cases: dict[str, Case]) -> None:
    """Nothing is swapped or woven: lists of four and their stacks; or results, and the last scales once more."""
    w13, w2 = with_scales(SUPER.w13), with_scales(SUPER.w2)
    lists = cases["moe-mxfp8-shuffle/nemotron-3-super-tp1/list-stack"]
    assert on_the_way(lists, w13 + w2) == 2 * (w13 + w2)
    batched = cases["moe-mxfp8-shuffle/nemotron-3-super-tp1/batched"]
    last = max(SUPER.w13 // 32 + index(SUPER.rows), 2 * (SUPER.w2 // 32) + index(SUPER.hidden))
    assert on_the_way(batched, w13 + w2) == w13 + SUPER.w2 + last


BF16 = {
    "qwen3-235b-a22b-tp4": (QWEN235_TP4, 2),
    "qwen3-30b-a3b-tp1": (QWEN30_TP1, 2),
    "glm-4.5-air-tp1": (AIR_TP1, 2),
    "llama-4-scout-tp4": (SCOUT_TP4, 4),
}


@pytest.mark.parametrize("preset", BF16)
@pytest.mark.parametrize("variant", ["list-stack", "preallocated", "in-place", "sliced"])
def test_bf16_forms(cases: dict[str, Case], preset: str, variant: str) -> None:
    """Two bytes a weight. vLLM keeps both row indices for a layer and adds the swap on the card: two more of w13's."""
    s, layers = BF16[preset]
    w13, w2, expert = 2 * s.w13, 2 * s.w2, 2 * s.w13 // s.experts
    indices = index(s.rows) + index(s.hidden)
    expected = {
        "list-stack": 3 * w13 + 2 * w2 + indices,
        "preallocated": w13 + w2 + indices + 2 * index(s.rows),
        "in-place": expert + 3 * index(s.rows),
        "sliced": expert // 4 + max(index(s.rows), index(s.hidden)),
    }
    case = cases[f"moe-bf16-layout/{preset}/{variant}"]
    assert on_the_way(case, layers * (w13 + w2)) == expected[variant]


@pytest.mark.parametrize("scenario", ["moe-fp8-per-tensor", "moe-mxfp8-shuffle"])
def test_rows_are_permuted_in_place_through_four_mib(cases: dict[str, Case], scenario: str) -> None:
    shapes = {**PER_TENSOR, "nemotron-3-super-tp1": (SUPER, 2)}
    if scenario == "moe-mxfp8-shuffle":
        shapes = {**MXFP8, "nemotron-3-super-tp1": (SUPER, 1)}
    for preset, (s, layers) in shapes.items():
        base = layers * (s.w13 + s.w2 if scenario == "moe-fp8-per-tensor" else with_scales(s.w13) + with_scales(s.w2))
        scratch = min(s.w13 // s.experts, 4 * MIB)
        most = scratch + max(index(s.rows), index(s.hidden))
        assert on_the_way(cases[f"{scenario}/{preset}/in-place"], base) == most, preset


@pytest.mark.parametrize("scenario", NAMES)
def test_what_is_proposed_needs_least(cases: dict[str, Case], scenario: str) -> None:
    groups: dict[str, list[Case]] = {}
    for case in cases.values():
        if case.scenario == scenario and case.outcome == "ok":
            groups.setdefault(case.preset, []).append(case)
    assert groups
    for preset, of_preset in groups.items():
        proposed = [c for c in of_preset if c.role == "proposed"] or [c for c in of_preset if c.role == "fixed"]
        others = [c for c in of_preset if c not in proposed]
        assert len(proposed) == 1
        assert others
        assert all(proposed[0].peak.allocated < c.peak.allocated for c in others), preset
        assert all(proposed[0].peak.reserved <= c.peak.reserved for c in others), preset


# Placeholders of all layers in MiB; a layer is E x (2I x H/16 + H x I/16) bytes.
PLACEHOLDERS = {
    "deepseek-v3-tp4": 58 * 168,  # 9.5 GiB
    "deepseek-v3-tp8": 58 * 84,  # 4.8 GiB
    "kimi-k2-tp8": 60 * 126,  # 7.4 GiB
    "qwen3-235b-a22b-tp4": 94 * 36,  # 3.3 GiB
}


@pytest.mark.parametrize("preset", [p for p in PLACEHOLDERS if p != "deepseek-v3-tp4"])
def test_placeholders_of_all_layers_are_there_at_the_peak(cases: dict[str, Case], preset: str) -> None:
    with_them, without = (cases[f"moe-nvfp4-create/{preset}/{v}"] for v in ("placeholders", "skipped"))
    assert (with_them.outcome, without.outcome) == ("ok", "ok")
    assert with_them.peak.requested - without.peak.requested == PLACEHOLDERS[preset] * MIB
    assert with_them.transient - without.transient == PLACEHOLDERS[preset] * MIB
    assert with_them.end_live == without.end_live  # nothing of them is left


def test_a_model_of_four_ranks_does_not_fit_one_card(cases: dict[str, Case]) -> None:
    """58 layers of 1,512 MiB are more than the card has, with placeholders or without."""
    for variant in ("placeholders", "skipped"):
        case = cases[f"moe-nvfp4-create/deepseek-v3-tp4/{variant}"]
        assert (case.outcome, case.expected_outcome) == ("oom", "oom")
        assert card_named("h100-80gb").free < 58 * 1512 * MIB


def test_placeholders_of_four_ranks_where_there_is_room() -> None:
    card = card_named("h100-80gb")
    room = 192 * 1024 * MIB
    (scenario,) = load_scenarios(ROOT / "scenarios" / "scenario_moe_nvfp4_create.py")
    preset = "deepseek-v3-tp4"
    peaks = {}
    for name, variant in scenario.variants.items():
        device = VirtualDevice(card, ReplaySettings(rules_for("2.13.0"), card.name, room, room))
        watch = device.memory.allocator.watch()
        with device:
            variant.body(ScenarioCase(scenario.name, preset, name, scenario.values_for(preset, {}), device.memory))
        peaks[name] = device.memory.allocator.peaks(watch).requested
    layer, indices = 1512 * MIB, index(2 * 512) + index(7168)
    assert peaks["placeholders"] - peaks["skipped"] == 9744 * MIB
    assert peaks["skipped"] == 59 * layer + indices  # one layer is there twice while it is shuffled


def test_numerics_agree_with_the_references(results: Results) -> None:
    for case in results.cases:
        assert case.numeric is not None
        assert (case.numeric["agree"], case.numeric["compared_with"]) == (True, "reference")


def test_every_figure_is_exact_under_the_newer_rules(results: Results) -> None:
    assert all(c.exact for c in results.cases if c.outcome == "ok")
