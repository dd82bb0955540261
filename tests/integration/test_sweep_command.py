"""``fragscope run --sweep``, as a user calls it."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from scenario_files import MIB, run_in, write_scenarios

SIZES = """
    @fragscope.scenario("grow", presets={"one": {"mib": 100}}, variant="twice")
    def grow(case):
        with case.measure():
            kept = [on_card(case.mib * 2**20), on_card(case.mib * 2**20)]

    @grow.variant("once", role="fixed")
    def _(case):
        with case.measure():
            kept = on_card(case.mib * 2**20)

    @fragscope.scenario("still", presets={"one": {}})
    def still(case):
        with case.measure():
            pass
"""
FREE = 80_552
"""MiB that the default card has free: a context takes the rest (fragscope/allocator/cards.py)."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scenarios(tmp_path, "sizes", SIZES)
    return tmp_path


def curves(folder: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((folder / "out" / "sweep" / "sweep.json").read_bytes())
    assert content["complete"]
    return {c["name"].rpartition("/")[2]: c for c in content["curves"]}


def test_the_largest_size_for_the_card_is_found_to_the_unit(folder: Path) -> None:
    done = run_in(folder, "scenario_sizes.py", "--sweep", "mib=1k:100k")
    found = curves(folder)
    # Blocks of this size have a segment each, of whole pages of 2 MiB.
    assert (found["twice"]["largest"], found["once"]["largest"]) == (FREE // 2, FREE)
    assert "mib = 40,276 is the largest that fits; at 40,277: oom: " in done.stdout
    assert "still has no mib to sweep, and is left out" in done.stderr
    at = {p["size"]: p for p in found["twice"]["points"]}
    assert at[40_276]["peak_reserved"] == FREE * MIB
    assert not (folder / "out" / "results.json").exists()


def test_a_budget_is_a_limit_too_and_named(folder: Path) -> None:
    (folder / "budgets.toml").write_text('[budget."grow/one/*"]\npeak_allocated = "3000 MiB"\n')
    done = run_in(folder, "scenario_sizes.py", "grow", "--sweep", "mib=1k:100k", "--budgets", "budgets.toml")
    found = curves(folder)
    assert (found["twice"]["largest"], found["once"]["largest"]) == (1500, 3000)
    # 1,501 MiB lie in a segment of 1,502, whose last MiB is too little to be split off.
    assert "at 1,501: peak_allocated 3,004.00 MiB, budget 3,000.00 MiB (budgets.toml:2)" in done.stdout


def test_a_second_run_takes_up_what_the_first_finished(folder: Path) -> None:
    first = run_in(folder, "scenario_sizes.py", "grow", "--sweep", "mib=1k:4k:100")
    before = curves(folder)
    run_in(folder, "scenario_sizes.py", "grow", "--sweep", "mib=1k:4k:100", "--resume")
    assert curves(folder) == before
    assert "every size tried fits, up to mib = 4,000" in first.stdout


def test_budgets_about_something_else_are_a_mistake(folder: Path) -> None:
    (folder / "budgets.toml").write_text('[budget."grown/*/*"]\npeak_allocated = "3000 MiB"\n')
    done = run_in(folder, "scenario_sizes.py", "grow", "--sweep", "mib=1k:2k", "--budgets", "budgets.toml", code=2)
    assert "no budget in it is about grow/one/twice or any other case of the sweep" in done.stderr


def test_a_refused_sweep_leaves_what_is_there(folder: Path) -> None:
    run_in(folder, "scenario_sizes.py", "grow", "--sweep", "mib=1k:2k:500")
    before = (folder / "out" / "sweep" / "sweep.json").read_bytes()
    with (folder / "out" / "sweep" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run_in(folder, "scenario_sizes.py", "grow", "--sweep", "mib=1k:2k:500", code=2)
    assert "another run" in done.stderr
    assert (folder / "out" / "sweep" / "sweep.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--sweep", "mib=1k"), "write NAME=LOW:HIGH"),
        (("--sweep", "mb=1:2"), "no selected scenario has an integer of that name; sizes there are: mib"),
        (("--sweep", "mib=1:2", "--set", "mib=3"), "--set sets it too"),
        (("--budgets", "b.toml"), "--budgets goes with --sweep"),
    ],
)
def test_what_cannot_be_swept_is_said_in_one_line(folder: Path, arguments: tuple[str, ...], problem: str) -> None:
    done = run_in(folder, "scenario_sizes.py", *arguments, code=2)
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
