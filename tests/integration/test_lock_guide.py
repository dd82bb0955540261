"""docs/lock.md shows what a lock and a gate really say of the loader in docs/own-loader.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_own_loader_guide import blocks, write

from fragscope.cli import run

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

GUIDE = (Path(__file__).parents[2] / "docs" / "lock.md").read_text(encoding="utf-8")


def test_the_lock_and_the_gate_as_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "acme"\n')
    parts = [(where, text) for _, where, text in blocks() if "file" in where]
    original, preset, _, fixed, *_ = parts
    write(tmp_path, *original)
    assert run(["init", "--loader", "acme_loader.weights:load_layers"]) == 0
    (tmp_path / "budgets.toml").unlink()
    for part in (preset, fixed):
        write(tmp_path, *part)
    arguments = ["run", "scenarios", "--device", "virtual", "--no-report", "--jobs", "1"]
    assert run(arguments) == 0
    assert run(["lock"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "fragscope: locked 1 case in fragscope.lock"
    (shown,) = re.findall(r"^```toml\n(version = .*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    written = (tmp_path / "fragscope.lock").read_text()
    # Which torch runs the test is not the guide's business; which rules apply by default is.
    assert re.sub(r'torch = ".*"\n', "", written[written.index("version") :]) == re.sub(r'torch = ".*"\n', "", shown)

    write(tmp_path, *original)
    assert run(arguments) == 0
    capsys.readouterr()
    assert run(["gate"]) == 3
    (session,) = re.findall(r"^```console\n\$ fragscope gate\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    assert capsys.readouterr().out == session
