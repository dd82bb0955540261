"""Scenario files that tests write, and the command that runs them in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

MIB = 2**20
HEAD = """\
import torch
import fragscope

def on_card(size):
    return torch.empty(size, dtype=torch.uint8, device="cuda")

"""
SMALL = HEAD + dedent(
    """\
    @fragscope.scenario("small", presets={"one": {"n": 1}, "two": {"n": 2}}, params={"mode": ("fast", "slow")})
    def _(case):
        with case.measure():
            kept = on_card(case.n)

    @small.variant("other", role="fixed")
    def _(case):
        with case.measure():
            kept = on_card(case.n)
    """
).replace("def _(case):", "def small(case):", 1)
"""One scenario with two presets and two variants."""


def write_scenarios(folder: Path, name: str, text: str) -> Path:
    """Write a scenario file below common imports and ``on_card(bytes)``."""
    file = folder / f"scenario_{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(HEAD + dedent(text), encoding="utf-8")
    return file


def command(*arguments: str) -> list[str]:
    """The command line of ``fragscope run`` with results in ``out``."""
    return [sys.executable, "-m", "fragscope", "run", "--out", "out", "--no-report", "--device", "virtual", *arguments]


def run_in(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run scenarios from a folder and hold the exit code."""
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def results_in(folder: Path) -> dict[str, Any]:
    """The run's results.json."""
    content: dict[str, Any] = json.loads((folder / "out" / "results.json").read_bytes())
    return content


def cases_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Cases of the run by scenario and variant."""
    return {f"{c['scenario']}/{c['variant']}": c for c in results_in(folder)["cases"]}
