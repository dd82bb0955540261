"""The scenarios of the one-sided all-to-all: what each way of sizing its workspace costs, and who hangs.

Expected bytes: sizes of the workspace by FlashInfer's formula, in whole pages of 2 MiB, as held in test_moe_alltoall.py
against the formula's own figures; DeepSeek-V3 on 8 ranks with 8,192 tokens: NVFP4 1,153.4 MiB, MXFP8 1,363.4, bf16
1,797.4.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fragscope.results import Case, load_results

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
MIB = 2**20
NVFP4, MXFP8, BF16 = 1154, 1364, 1798  # MiB in pages
pytestmark = pytest.mark.torch

Cases = dict[tuple[str, str], Case]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cases, str]:
    out = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "fragscope", "run", "a2a-workspace", "a2a-barrier", "--device", "virtual"]
    done = subprocess.run(
        [*command, "--out", str(out), "--no-report", "--card", "h100-80gb"],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    return {(c.preset, c.variant): c for c in load_results(out).cases}, done.stdout


def raw(cases: Cases, preset: str) -> dict[str, float]:
    return {variant: c.peak.raw / MIB for (p, variant), c in cases.items() if p == preset and c.outcome == "ok"}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("deepseek-v3-ep8-bf16", {"cached": NVFP4 + BF16, "worst": BF16, "freed": BF16}),
        ("deepseek-v3-ep8-mxfp8", {"cached": NVFP4 + MXFP8, "worst": BF16, "freed": MXFP8}),
        ("deepseek-v3-ep8-nvfp4", {"cached": NVFP4, "worst": BF16, "freed": NVFP4}),
        ("pr-test-bf16", {"cached": 22 + 34, "worst": 34, "freed": 34}),  # 20.70 and 32.20 MiB
        ("qwen3-235b-ep8-bf16", {"cached": 662 + 1030, "worst": 1030, "freed": 1030}),
        ("nemotron-3-super-ep8-bf16", {"cached": 178 + 270, "worst": 270, "freed": 270}),
        ("gpt-oss-120b-ep8-mxfp8", {"cached": 466 + 550, "worst": 724, "freed": 550}),
    ],
)
def test_workspaces_that_are_held_at_once(ran: tuple[Cases, str], preset: str, expected: dict[str, int]) -> None:
    found = raw(ran[0], preset)
    assert found.pop("one-shot", expected["freed"]) == expected["freed"]  # where all layers are alike
    assert found == {
        "grow-cached": expected["cached"], "grow-parts": expected["cached"], "worst-case": expected["worst"],
        "grow-freed": expected["freed"],
    }  # fmt: skip


def test_peak_hbm_is_what_both_hold_together(ran: tuple[Cases, str]) -> None:
    """PyTorch reserves the same 274 MiB whoever sizes the workspace; the peaks come together."""
    for variant in ("grow-cached", "worst-case", "grow-freed", "grow-parts"):
        case = ran[0]["deepseek-v3-ep8-bf16", variant]
        assert (case.peak.reserved, case.peak.hbm) == (274 * MIB, case.peak.raw + 274 * MIB)
        assert case.exact


def test_the_proposal_needs_least_of_all_that_run(ran: tuple[Cases, str]) -> None:
    for preset in {p for p, _ in ran[0]} - {"pp2-ep2"}:
        found = raw(ran[0], preset)
        assert found["grow-freed"] == min(found.values()), preset
    assert "grow-freed has the smallest peak HBM, 1,638.00 MiB; grow-cached has 1,154.00 MiB more." in " ".join(
        ran[1].split()
    )


def test_the_first_layers_workspace_overflows_by_what_the_head_needs_more(ran: tuple[Cases, str]) -> None:
    """Of 8 x 8,192 rows: bf16 activations of 2 x 7,168 bytes instead of 3,584 and 448 of scales."""
    case = ran[0]["deepseek-v3-ep8-bf16", "one-shot"]
    assert (case.outcome, case.missing) == ("overflow", 8 * 8192 * (14_336 - 4_032))
    assert case.message.startswith("combine: payload region insufficient, bf16 needs")
    overflows = {preset for (preset, variant), c in ran[0].items() if c.outcome == "overflow"}
    assert overflows == {p for p, _ in ran[0]} - {"deepseek-v3-ep8-nvfp4", "pp2-ep2"}


def test_stages_that_wait_for_the_world_hang_and_say_where(ran: tuple[Cases, str]) -> None:
    lines = (ROOT / "scenarios" / "scenario_a2a_barrier.py").read_text().splitlines()
    recv, barrier = (
        next(n for n, line in enumerate(lines, 1) if what in line) for what in ("dist.recv", "dist.barrier")
    )
    file = "scenarios/scenario_a2a_barrier.py"
    case = ran[0]["pp2-ep2", "world-barrier"]
    assert case.outcome == "timeout"
    assert case.message == (
        f"4 of 4 ranks hang: ranks 0, 1 at {file}:{recv} in first_token; ranks 2, 3 at {file}:{barrier} in initialize"
    )
    assert case.seconds < 60
    assert ran[0]["pp2-ep2", "group-barrier"].outcome == "ok"


def test_whose_code_is_replayed_is_said(ran: tuple[Cases, str]) -> None:
    replays = {variant: c.replays.split()[:2] for (_, variant), c in ran[0].items() if c.replays}
    assert replays == {
        "one-shot": ["vllm", "0.20.0"], "grow-cached": ["vllm", "0.22.0"], "grow-parts": ["vllm", "0.33.0"],
        "worst-case": ["sglang", "0.5.13"], "world-barrier": ["vllm", "0.20.0"], "group-barrier": ["vllm", "0.22.0"],
    }  # fmt: skip
