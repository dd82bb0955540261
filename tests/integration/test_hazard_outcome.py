"""A program whose streams lack an order ends as ``hazard``: message, figures, exit code, and what comes before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenario_files import MIB, cases_in, run_in, write_scenarios

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

RACES = """
    def race(case, then):
        side = torch.cuda.Stream()
        with case.measure():
            x = on_card(3 * 2**20)
            x.zero_()
            case.kernel("encode", writes=[x], stream=side)
            then(x)

    @fragscope.scenario("races", presets={"one": {}}, variant="plain", expect=EXPECT)
    def _(case):
        race(case, lambda x: None)

    @fragscope.scenario("out-of-memory", presets={"one": {}}, expect="oom")
    def _(case):
        race(case, lambda x: on_card(200 * 2**30))

    @fragscope.scenario("elsewhere", presets={"one": {}}, expect="crash")
    def _(case):
        with case.measure():
            case.kernel("encode", reads=[torch.zeros(3)])
"""


def write(folder: Path, expect: str) -> None:
    write_scenarios(folder, "races", RACES.replace("EXPECT", expect))


def test_an_undeclared_hazard_is_told_with_both_lines_and_ends_with_3(tmp_path: Path) -> None:
    write(tmp_path, '"ok"')
    run_in(tmp_path, ".", code=3)
    found = cases_in(tmp_path)
    lines = (tmp_path / "scenario_races.py").read_text().splitlines()
    zero, encode = (next(n for n, line in enumerate(lines, 1) if text in line) for text in ("x.zero_()", '"encode", w'))
    assert (found["races/plain"]["outcome"], found["races/plain"]["message"]) == (
        "hazard",
        f"encode (scenario_races.py:{encode}, on stream 1) writes memory that aten::zero_ "
        f"(scenario_races.py:{zero}, on the default stream) writes, and nothing orders them; 1 such pair at 1 place",
    )


def test_a_declared_hazard_has_figures_like_any_case(tmp_path: Path) -> None:
    write(tmp_path, 'fragscope.Expect("hazard", device="virtual")')
    run_in(tmp_path, ".", "--conf", "", "--conf", "expandable_segments:True")
    case = cases_in(tmp_path)["races/plain"]
    assert (case["outcome"], case["expected_outcome"], case["exact"]) == ("hazard", "hazard", True)
    assert case["peak"]["requested"] == 3 * MIB


def test_how_a_case_ended_counts_before_a_hazard(tmp_path: Path) -> None:
    write(tmp_path, '"hazard"')
    run_in(tmp_path, ".")
    found = cases_in(tmp_path)
    assert found["out-of-memory/original"]["outcome"] == "oom"
    assert found["elsewhere/original"]["message"].startswith(
        "UsageError: kernel 'encode': one of its tensors is not on the card"
    )
