"""What both sides gave, as one verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fragscope.against.judge import Rules, judge
from fragscope.against.protocol import LeftOut
from fragscope.against.run import Side
from fragscope.config import Config
from fragscope.gate import Budgets, Verdict
from fragscope.gate.budgets_file import parse_budgets
from fragscope.gate.compare import Tolerance
from fragscope.gate.verdict import Against
from fragscope.results import Case, Peak, Results, Run

MIB = 2**20


def case(name: str, **settings: str) -> Case:
    scenario, preset, variant = name.split("/")
    sizes = Peak(requested=MIB, allocated=MIB, reserved=2 * MIB, hbm=2 * MIB)
    values = {"torch": "2.13.0", "card": "h100-80gb", "conf": "", **settings}
    return Case(
        id=f"{name}@{values['conf'] or 'default'}", digest="d", scenario=scenario, preset=preset, variant=variant,
        role="original", torch_installed="2.13.0", device="virtual", outcome="ok", exact=True, allocs=1,
        peak=sizes, end=sizes, transient=MIB, **values,
    )  # fmt: skip


def side(folder: Path, *cases: Case, **more: Any) -> Side:
    run = Run(started="", seconds=0.0, complete=True, planned=len(cases))
    scenarios = {c.scenario: f"scenarios/scenario_{c.scenario}.py" for c in cases}
    return Side(
        folder.name, folder, folder, Config(), folder, Results(run=run, cases=list(cases)), scenarios=scenarios, **more
    )


def judged(before: Side, after: Side, budgets: str = "") -> Verdict:
    limits = parse_budgets(budgets, "budgets.toml") if budgets else Budgets("budgets.toml", ())
    against = Against(ref="main", commit="0" * 40, current="1" * 40, dirty=False)
    return judge(before, after, Rules(limits, Tolerance()), against)


@pytest.mark.parametrize("borrowed", [False, True])
def test_cases_of_a_file_that_the_other_side_cannot_import_are_new_only_where_it_has_no_such_file(
    tmp_path: Path, borrowed: bool
):
    """Another case is compared, so that the verdict would pass otherwise."""
    left = LeftOut("scenarios/scenario_b.py", "No module named 'gone'", borrowed)
    before = side(tmp_path / "main", case("a/p/v"), left_out=(left,))
    verdict = judged(before, side(tmp_path / "now", case("a/p/v"), case("b/p/v")))
    why = "scenarios/scenario_b.py cannot be imported with main's code: No module named 'gone'"
    new = [(o.case.scenario, o.reason) for o in verdict.appeared]
    lost = [(n.case.scenario if n.case else "", n.reason) for n in verdict.not_measured]
    assert (new, lost) == ([("b", why)], []) if borrowed else ([], [("b", why)])
    assert verdict.exit_code == (0 if borrowed else 4)


NARROWED = """\
[[budget."a/*/*"]]
transient = "1 MiB"
[[budget."a/*/*"]]
conf = "expandable_segments:True"
transient = "1 MiB"
[[budget."a/*/*"]]
card = "l4"
transient = "1 MiB"
"""


def test_budgets_for_settings_that_were_not_run_are_said_and_fail_nothing(tmp_path: Path):
    verdict = judged(side(tmp_path / "main", case("a/p/v")), side(tmp_path / "now", case("a/p/v")), NARROWED)
    assert (verdict.exit_code, verdict.not_measured, verdict.budgets, len(verdict.checks)) == (0, [], 1, 1)
    assert verdict.against is not None
    assert verdict.against.notes == [
        "2 budgets for another conf, torch or card than was run: not held here (budgets.toml:3, 6); "
        "--conf, --torch and --card choose what is run"
    ]
    # One whose case is not there stays unmeasured, narrowed or not.
    misspelt = judged(
        side(tmp_path / "main", case("a/p/v")), side(tmp_path / "now", case("a/p/v")), NARROWED.replace("a/*", "aa/*")
    )
    assert misspelt.exit_code == 4
    assert len(misspelt.not_measured) == 3


def test_a_budget_for_settings_that_were_run_holds(tmp_path: Path):
    expandable = case("a/p/v", conf="expandable_segments:True")
    verdict = judged(
        side(tmp_path / "main", expandable), side(tmp_path / "now", expandable), NARROWED.replace('"1 MiB"', "5")
    )
    assert (verdict.exit_code, verdict.budgets, len(verdict.checks)) == (3, 2, 1)
