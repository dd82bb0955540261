"""Twenty-five seeded regressions of a loader are found, each with case and line; twenty refactorings stay green.

Each change is made in a copy of the loader of its own, so that all of them cost one comparison.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from repositories import Gated, Team
from seeded_changes import REFACTORINGS, REGRESSIONS, Change, package, scenario

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

PROJECT = '[project]\nname = "engines"\nversion = "1"\n\n[tool.fragscope]\nscenarios = ["."]\n'


def gated(folder: Path, changes: tuple[Change, ...]) -> Gated:
    files = {"pyproject.toml": PROJECT, ".gitignore": ".fragscope/\n__pycache__/\n"}
    for change in changes:
        name = _package(change)
        files |= package(name) | {f"scenario_{name}.py": scenario(change.name, name)}
    team = Team.made(folder, files)
    for change in changes:
        team.write(package(_package(change), (change,)))
    return team.gate()


def _package(change: Change) -> str:
    return "engine_" + change.name.replace("-", "_")


@pytest.fixture(scope="module")
def regressions(tmp_path_factory: pytest.TempPathFactory) -> Gated:
    return gated(tmp_path_factory.mktemp("regressions") / "engines", REGRESSIONS)


def test_every_change_that_costs_memory_fails_the_gate(regressions: Gated) -> None:
    assert regressions.code == 3, regressions.err
    found = {c["case"]["scenario"] for c in regressions.regressions}
    assert {f"{change.name}-{change.case}" for change in REGRESSIONS} <= found
    assert {name.rpartition("-")[0] for name in found} == {change.name for change in REGRESSIONS}


@pytest.mark.parametrize("change", REGRESSIONS, ids=lambda change: change.name)
def test_it_is_told_by_the_line_that_holds_it(regressions: Gated, change: Change) -> None:
    case = f"{change.name}-{change.case}"
    (first, *_) = [c for c in regressions.regressions if c["case"]["scenario"] == case]
    responsible: dict[str, Any] = first["stacks"][0]
    assert responsible["code"].startswith(change.line), responsible
    assert responsible["file"].startswith(_package(change) + "/"), responsible
    assert responsible["kind"] in ("new", "grown")
    rose = [place for place in first["stacks"] if place["after"] > place["before"]]
    if change.look:
        assert not any(place["changed"] for place in rose), rose
        (looked, *_) = [place for place in first["touched"]["lines"][:3] if place["code"].startswith(change.look)]
        assert looked["file"].startswith(_package(change) + "/"), looked


def test_changes_that_cost_nothing_pass(tmp_path: Path) -> None:
    done = gated(tmp_path / "engines", REFACTORINGS)
    assert done.code == 0, done.out
    assert done.verdict["changes"] == []
    assert done.verdict["against"]["compared"] == 5 * len(REFACTORINGS)
