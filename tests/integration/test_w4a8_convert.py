"""The scenario w4a8-convert: which variants lack an order and where, and what each takes.

Expected bytes are counted here from shapes alone: E experts, H hidden, I intermediate of one rank.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fragscope.gate import Budgets, evaluate, load_budgets
from fragscope.results import Case, Results, load_results

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
MIB = 2**20
SHAPES = {  # E, H, I, layers of one rank
    "kimi-k2-tp8": (384, 7168, 256, 2),
    "deepseek-v3-tp2": (256, 7168, 1024, 1),
    "qwen3-235b-a22b-tp2": (128, 4096, 768, 2),
}
UPSTREAM = ("unsynchronised", "synchronised", "all-at-once")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "fragscope", "run", "w4a8-convert", "--device", "virtual", "--torch", "2.13.0"]
    command += ["--card", "h100-80gb", "--out", str(out), "--no-report"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=540)
    return load_results(out)


def case(results: Results, preset: str, variant: str) -> Case:
    return next(c for c in results.cases if (c.preset, c.variant) == (preset, variant))


def line_of(text: str, nth: int = 1) -> int:
    """Where the scenario says something for the nth time."""
    lines = (ROOT / "scenarios" / "scenario_w4a8_convert.py").read_text().splitlines()
    return [number for number, line in enumerate(lines, start=1) if line.strip() == text][nth - 1]


@pytest.mark.parametrize("preset", SHAPES)
def test_upstreams_forms_lack_an_order_and_the_proposals_do_not(results: Results, preset: str) -> None:
    outcomes = {c.variant: c.outcome for c in results.cases if c.preset == preset}
    assert outcomes == {**dict.fromkeys(UPSTREAM, "hazard"), "ordered": "ok", "bounded": "ok"}
    assert all(c.outcome == c.expected_outcome for c in results.cases)


def test_before_the_fix_the_encode_reads_what_the_last_step_of_the_conversion_writes(results: Results) -> None:
    """Source: unified_encode_int4b_device<<<grid, block>>> in w4a8_utils.cu is launched without a stream."""
    launch = line_of('extension.kernel("unified_encode_int4b", reads=[t], writes=[out])')
    conversion = line_of("t |= ((nibble - 8) & 0xF) << shift")
    file = "scenarios/scenario_w4a8_convert.py"
    for preset in SHAPES:
        message = case(results, preset, "unsynchronised").message
        assert message.startswith(
            f"unified_encode_int4b ({file}:{launch}, on the default stream) reads memory that aten::bitwise_or_ "
            f"({file}:{conversion}, on stream 1) writes, and nothing orders them; "
        )


def test_the_fix_orders_the_encode_and_not_the_packing_of_the_scales(results: Results) -> None:
    """Source: cutlass::pack_scale_fp8 in mixed_dtype_utils.hpp (4.2.1 to 4.7.0) copies with cudaMemcpy, on stream 0."""
    for preset in SHAPES:
        for variant in ("synchronised", "all-at-once"):
            message = case(results, preset, variant).message
            assert message.startswith("cudaMemcpy of scales to the host ")
            assert "reads memory that aten::clone " in message
            assert "unified_encode" not in message


@pytest.mark.parametrize("preset", SHAPES)
def test_peaks_are_what_the_shapes_say(results: Results, preset: str) -> None:
    experts, hidden, intermediate, layers = SHAPES[preset]
    w13 = experts * 2 * intermediate * hidden // 2  # bytes of 4-bit values
    w2 = experts * hidden * intermediate // 2
    s13 = experts * 2 * intermediate * hidden // 128  # scales
    s2 = experts * hidden * intermediate // 128
    strides, layouts = (3 * 8 + 2 * 16) * experts, 2 * 3 * 4 * experts
    channel13, channel2 = 4 * experts * 2 * intermediate, 4 * experts * hidden
    base = layers * (w13 + w2 + 2 * s13 + 2 * s2)
    # A scale of two bytes becomes eight of one; all else that is made stays beside it.
    grows = (8 - 2) * (s13 + s2) + channel13 + channel2 + strides + layouts
    last = base + (layers - 1) * grows  # before the last layer

    def part(rows: int, groups: int) -> int:
        """Scales of 16 experts: fp8, float32, that divided, the last part's fp8, twice; their channel scales."""
        return 16 * rows * (groups * (1 + 4 + 4 + 2) + 4)

    after13 = last + strides + layouts + 8 * s13 + channel13
    peaks = {
        # Of the conversion, a value's copy and two more are alive at once; #40310 says nothing of them.
        "unsynchronised": last + strides + 3 * w13,
        # All results at once are less than that: w13 encoded and three copies of w2, half its size.
        "all-at-once": last + 3 * w13,
        "bounded": max(
            last + strides + w13 // experts,
            after13 + part(2 * intermediate, hidden // 128),
            after13 - 2 * s13 + 8 * s2 + channel2 + part(hidden, intermediate // 128),
        ),
    }
    peaks["synchronised"] = peaks["ordered"] = peaks["unsynchronised"]
    for variant, peak in peaks.items():
        assert case(results, preset, variant).peak.requested == peak, variant


@pytest.mark.parametrize("preset", SHAPES)
def test_upstreams_reorder_takes_an_experts_size_from_the_driver(results: Results, preset: str) -> None:
    """Source: cutlass::DeviceAllocation of count x bits / 8 bytes in device_memory.h (4.2.1, 4.4.2, 4.7.0)."""
    _, hidden, intermediate, _ = SHAPES[preset]
    expert = 2 * intermediate * hidden // 2
    for variant in (*UPSTREAM, "ordered"):
        assert case(results, preset, variant).peak.raw == -(-expert // (2 * MIB)) * 2 * MIB, variant
    assert case(results, preset, "bounded").peak.raw == 0


def test_sizes_of_kimi_k2_are_those_known_of_it(results: Results) -> None:
    """672 MiB of w13 on one rank of eight, and three times that on the way."""
    found = case(results, "kimi-k2-tp8", "unsynchronised")
    bounded = case(results, "kimi-k2-tp8", "bounded")
    assert 2016 * MIB < found.peak.requested - found.base < 2016 * MIB + 110 * MIB  # and a layer's growth
    assert bounded.transient < 16 * MIB


def test_the_smallest_peak_that_has_an_order_is_the_bounded_one(results: Results) -> None:
    for preset in SHAPES:
        ok = [c for c in results.cases if c.preset == preset and c.outcome == "ok"]
        assert min(ok, key=lambda c: c.peak.allocated).variant == "bounded"


def test_all_variants_compute_what_the_formats_say(results: Results) -> None:
    for c in results.cases:
        assert c.numeric is not None
        assert (c.numeric["agree"], c.numeric["compared_with"]) == (True, "reference")


def test_its_budgets_hold(results: Results) -> None:
    budgets = load_budgets(ROOT / "budgets.toml")
    own = tuple(b for b in budgets.budgets if b.pattern.startswith("w4a8-convert/"))
    verdict = evaluate(results, Budgets(budgets.file, own))
    assert (verdict.exit_code, verdict.not_measured) == (0, [])
    assert verdict.cases_held == 6
