"""Variants that run a package's own code: measured where the package is, left out where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scenario_files import MIB, cases_in, results_in, run_in, write_scenarios

from fragscope.suite.upstream import digest_of

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

WEIGHTS = """
import torch

def doubled(size):
    w = torch.ones(size, dtype=torch.uint8, device="cuda" if size > 8 else "cpu")
    return torch.cat([w, w])
"""
SCENARIO = """
    THEIRS = fragscope.Installed("theirs", "theirs.weights:doubled")

    @fragscope.scenario("double", presets={"one": {"size": 3 * 2**20}})
    def made(case):
        with case.measure():
            kept = on_card(2 * case.size)

    @made.installed("theirs", THEIRS)
    def _(case):
        with case.measure():
            kept = THEIRS.load()(case.size)

    @made.numeric
    def outputs(variant, device):
        return torch.ones(8, dtype=torch.uint8) if variant == "original" else THEIRS.load()(4)
"""


def install(folder: Path, source: str = WEIGHTS) -> None:
    (folder / "theirs").mkdir()
    (folder / "theirs" / "__init__.py").write_text("")
    (folder / "theirs" / "weights.py").write_text(source)
    facts = folder / "theirs-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")


def test_the_packages_own_code_is_measured_and_named(tmp_path: Path) -> None:
    install(tmp_path)
    write_scenarios(tmp_path, "double", SCENARIO)
    run_in(tmp_path, ".")
    case = cases_in(tmp_path)["double/theirs"]
    assert (case["outcome"], case["role"], case["exact"]) == ("ok", "installed", True)
    assert case["installed"] == {
        "package": "theirs", "version": "1.2", "function": "theirs.weights:doubled",
        "digest": digest_of(WEIGHTS, "doubled"),
    }  # fmt: skip
    assert case["peak"]["requested"] == 9 * MIB  # the part and the whole, which is all that stays
    assert case["retained"] == 6 * MIB
    assert case["numeric"]["agree"] is True
    assert case["numeric"]["variants"] == 2
    assert str(tmp_path / "theirs" / "weights.py") in case["sources"]
    assert cases_in(tmp_path)["double/original"].get("installed") is None


def test_where_the_package_is_missing_the_variant_does_not_apply(tmp_path: Path) -> None:
    write_scenarios(tmp_path, "double", SCENARIO)
    done = run_in(tmp_path, ".", "--format", "markdown")
    assert "fragscope: not applicable: double/theirs: theirs is not installed" in done.stderr
    assert "not applicable double/theirs: theirs is not installed" in done.stdout
    results = results_in(tmp_path)
    assert [c["variant"] for c in results["cases"]] == ["original"]
    assert results["run"]["planned"] == 1
    (left,) = results["run"]["not_applicable"]
    assert (left["variant"], left["reason"]) == ("double/theirs", "theirs is not installed")
    assert results["cases"][0]["numeric"]["agree"] is True
    assert results["cases"][0]["numeric"]["variants"] == 1


def test_asked_for_alone_nothing_is_measured(tmp_path: Path) -> None:
    write_scenarios(tmp_path, "double", SCENARIO)
    done = run_in(tmp_path, ".", "--variant", "theirs", code=4)
    assert "nothing that was asked for is applicable here" in done.stderr
    assert "double/theirs: theirs is not installed" in done.stderr


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_module_here\n", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("raise RuntimeError('no driver')\n", "RuntimeError: no driver"),
        ("def tripled(size): ...\n", "ImportError: theirs.weights has no doubled"),
    ],
)
def test_a_package_that_is_there_and_cannot_be_used_is_skipped_and_said(tmp_path: Path, source: str, why: str) -> None:
    """Nothing was measured although the package is there: exit code 4, and the other variants stand."""
    install(tmp_path, source)
    write_scenarios(tmp_path, "double", SCENARIO)
    run_in(tmp_path, ".", code=4)
    cases = cases_in(tmp_path)
    assert cases["double/theirs"]["outcome"] == "skipped"
    message = "theirs is installed, but theirs.weights:doubled cannot be imported"
    assert cases["double/theirs"]["message"] == f"{message}: {why}"
    assert cases["double/original"]["outcome"] == "ok"
    assert cases["double/original"]["numeric"]["variants"] == 1


def test_a_package_sees_the_machine_as_it_is_while_it_is_imported(tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    note = f"""
import json
with open({str(seen)!r}, "w") as f:
    json.dump([torch.cuda.is_available(), torch.version.cuda is not None], f)
"""
    install(tmp_path, WEIGHTS + note)
    write_scenarios(tmp_path, "double", SCENARIO)
    run_in(tmp_path, ".")
    import torch

    assert json.loads(seen.read_text()) == [torch.cuda.is_available(), torch.version.cuda is not None]
