"""results.json of a stranger: figures that no card can have are refused where the file is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from builders import bare_case, results_of

from fragscope.cli import run
from fragscope.errors import InputFileError
from fragscope.results import (
    AssumptionRecord,
    EstimatedOp,
    LossRecord,
    OomRecord,
    Peak,
    PrecheckRecord,
    Prediction,
    VerifyRecord,
    load_results,
)

HUGE = 10**400  # Python and JSON can say it, a float cannot
MOST = 2**63 - 1


def full() -> dict[str, Any]:
    """A results file that has every figure there is."""
    case = msgspec.structs.replace(
        bare_case(),
        missing=1,
        non_torch_peak=1,
        ooms=[OomRecord(1, 2, 3, 4)],
        verify=VerifyRecord(5, 0),
        precheck=PrecheckRecord(6, 7, exact=True),
        predicted=Prediction(base=1, transient=2, retained=3, peak=Peak(), end=Peak(), allocs=4, exact=True),
        estimated_ops=[EstimatedOp("op", 1)],
        lost=[LossRecord("code", "detail", 1)],
        assumptions=[AssumptionRecord("code", "none", 1)],
    )
    value: dict[str, Any] = json.loads(msgspec.json.encode(results_of([case])))
    return value


def figures(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where whole numbers are, except in what a scenario may fill as it likes."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("params", "changed", "numeric", "findings", "cards"):
                yield from figures(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from figures(item, (*path, i))
    elif type(value) is int:
        yield path


def written(folder: Path, where: tuple[str | int, ...], figure: int) -> Path:
    value = full()
    at = value
    for key in where[:-1]:
        at = at[key]  # type: ignore[index]
    at[where[-1]] = figure  # type: ignore[index]
    file = folder / "results.json"
    file.write_text(json.dumps(value))
    return file


def name_of(where: tuple[str | int, ...]) -> str:
    return "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in where)


@pytest.mark.parametrize("where", list(figures(full())), ids=name_of)
@pytest.mark.parametrize("figure", [HUGE, -MOST - 2], ids=["huge", "below"])
def test_a_figure_beyond_64_bits_is_refused_by_its_key(where: tuple[str | int, ...], figure: int, tmp_path: Path):
    with pytest.raises(InputFileError) as refusal:
        load_results(written(tmp_path, where, figure))
    assert f"at `{name_of(where)}`" in str(refusal.value)


SIGNED = {"retained", "non_torch_peak", "stream"}
"""A difference, a sample that what is reserved was taken from, and a driver's handle."""


@pytest.mark.parametrize("where", list(figures(full())), ids=name_of)
def test_only_differences_are_below_nothing(where: tuple[str | int, ...], tmp_path: Path):
    file = written(tmp_path, where, -1)
    if where[-1] in SIGNED:
        assert load_results(file)
        return
    with pytest.raises(InputFileError) as refusal:
        load_results(file)
    assert str(refusal.value).startswith(f"{file}: ")
    assert f"{name_of(where)}`" in str(refusal.value) or where == ("schema_version",)


@pytest.mark.parametrize("where", [("run", "seconds"), ("cases", 0, "seconds")], ids=name_of)
@pytest.mark.parametrize("figure", [-1, 10**10])
def test_a_time_is_one_that_passed(where: tuple[str | int, ...], figure: int, tmp_path: Path):
    with pytest.raises(InputFileError, match="seconds"):
        load_results(written(tmp_path, where, figure))


@pytest.mark.parametrize("command", [["gate", "--budgets", "b.toml"], ["lock"], ["report"]], ids=lambda c: c[0])
@pytest.mark.parametrize("fault", ["below nothing", "twice"])
def test_every_command_refuses_it_and_writes_nothing(
    command: list[str], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, ("cases", 0, "peak", "reserved"), -5)
    if fault == "twice":
        value = full()
        value["cases"].append(value["cases"][0] | {"transient": 7})
        file.write_text(json.dumps(value))
    Path("b.toml").write_text('[budget."*/*/*"]\npeak_reserved = "1 GiB"\n')
    assert run([*command, "results.json"]) == 5
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("fragscope: results.json: ")
    assert ("`$.cases[0].peak.reserved`" if fault == "below nothing" else "`$.cases[1].id` is that of") in err
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "b.toml"}


def test_the_largest_figures_are_read(tmp_path: Path):
    case = load_results(written(tmp_path, ("cases", 0, "transient"), MOST)).cases[0]
    assert case.transient == MOST


@pytest.mark.parametrize(
    "where", [("cases", 0, "transient"), ("cases", 0, "peak", "raw"), ("cases", 0, "predicted", "base")], ids=name_of
)
@pytest.mark.parametrize("style", [[], ["--format", "markdown"]])
def test_the_report_of_one_is_one_line(
    where: tuple[str | int, ...], style: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    file = written(tmp_path, where, HUGE)
    assert run(["report", str(file), *style]) == 5
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert name_of(where) in err
