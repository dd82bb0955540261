"""``--resume`` keeps what is still true and runs what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenario_files import cases_in, results_in, run_in, write_scenarios

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

ONE = """
    from pathlib import Path
    {imports}

    @fragscope.scenario("{name}", presets={{"p": {{"n": 1}}}})
    def made(case):
        {lazy}
        with Path(__file__).with_name("runs.txt").open("a") as runs:
            runs.write("{name}\\n")
        with case.measure():
            kept = on_card(case.n * {size})

    @made.numeric
    def _(variant, device):
        {numeric}
        return [torch.arange(4)]
"""


def write_one(folder: Path, name: str, size: str = "512", **parts: str) -> None:
    values = {"imports": "", "lazy": "", "numeric": "", **parts}
    write_scenarios(folder, name, ONE.format(name=name, size=size, **values))


def ran(folder: Path) -> list[str]:
    """What ran since the last call."""
    file = folder / "runs.txt"
    names = sorted(file.read_text().split()) if file.exists() else []
    file.unlink(missing_ok=True)
    return names


def test_what_changed_runs_again(tmp_path: Path) -> None:
    for module in ("beside", "late", "checked"):
        (tmp_path / f"{module}.py").write_text("SIZE = 512\n")
    write_one(tmp_path, "unchanged")
    write_one(tmp_path, "edited")
    write_one(tmp_path, "imports", size="beside.SIZE", imports="import beside")
    write_one(tmp_path, "imports-late", size="late.SIZE", lazy="import late")
    write_one(tmp_path, "checks", numeric="import checked")
    write_one(tmp_path, "loses-its-trace")
    every = ["checks", "edited", "imports", "imports-late", "loses-its-trace", "unchanged"]
    run_in(tmp_path, ".")
    assert ran(tmp_path) == every
    first = cases_in(tmp_path)

    # Each edit keeps the length of its file.
    write_one(tmp_path, "edited", size="768")
    (tmp_path / "late.py").write_text("SIZE = 2048\n")
    (tmp_path / "checked.py").write_text("SIZE = 1024\n")
    (tmp_path / "out" / first["loses-its-trace/original"]["trace"]).unlink()
    with (tmp_path / "out" / "cases.jsonl").open("ab") as f:
        f.write(b'{"id": "cut off in the mid')
    done = run_in(tmp_path, ".", "--resume")
    assert ran(tmp_path) == ["checks", "edited", "imports-late", "loses-its-trace"]
    assert "2 of 6 cases are kept" in done.stderr
    second = cases_in(tmp_path)
    assert {name: c["end_live"] for name, c in second.items()} == {
        "checks/original": 512,
        "edited/original": 1024,
        "imports/original": 512,
        "imports-late/original": 2048,
        "loses-its-trace/original": 512,
        "unchanged/original": 512,
    }
    assert second["unchanged/original"] == first["unchanged/original"]
    assert second["unchanged/original"]["numeric"]["agree"] is True
    assert results_in(tmp_path)["run"]["complete"] is True

    (tmp_path / "beside.py").write_text("SIZE = 768\n")
    run_in(tmp_path, "scenario_imports.py", "--resume")
    assert ran(tmp_path) == ["imports"]
    assert cases_in(tmp_path)["imports/original"]["end_live"] == 1024
