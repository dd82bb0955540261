"""Git repositories of made-up teams, for tests of what a change of their code costs.

    team = Team.made(tmp_path)                       # a loader, its scenario, one commit called "base"
    team.edit("acme/loader.py", "old text", "new text")
    gated = team.gate()                              # fragscope gate --against base
    assert gated.code == 3
    assert gated.regressed("transient")["after"] > ...

``Gated.verdict`` is the JSON that the command printed. An edit is a replacement of text that must be there once;
``write`` replaces whole files; ``commit`` commits everything. A corpus of changes is a list of edits with what they
should give; several cases in one repository cost one run (test_gate_against.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

LOADER = '''\
"""Expert weights of one MoE layer, as inference engines load them."""

import torch


class ExpertWeights(torch.nn.Module):
    def __init__(self, experts: int, hidden: int, intermediate: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        w13 = torch.empty(experts, 2 * intermediate, hidden, dtype=dtype, device="cuda")
        w2 = torch.empty(experts, hidden, intermediate, dtype=dtype, device="cuda")
        self.w13 = torch.nn.Parameter(w13, requires_grad=False)
        self.w2 = torch.nn.Parameter(w2, requires_grad=False)

    def load_expert(self, expert: int, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        self.w13.data[expert].copy_(torch.cat([gate.cuda(), up.cuda()]))
        self.w2.data[expert].copy_(down.cuda())

    def process_weights_after_loading(self) -> None:
        """The kernel wants up before gate, and every expert transposed."""
        experts, rows, hidden = self.w13.shape
        for expert in range(experts):
            gate, up = self.w13.data[expert].chunk(2)
            swapped = torch.cat([up, gate])
            self.w13.data[expert].view(hidden, rows).copy_(swapped.t())
            down = self.w2.data[expert].clone()
            self.w2.data[expert].view(down.shape[1], hidden).copy_(down.t())
        self.w13.data = self.w13.data.view(experts, hidden, rows)
        self.w2.data = self.w2.data.view(experts, -1, hidden)
'''
"""The loader of docs/own-loader.md after its fix; 8 experts of 1024 by 704 bfloat16 keep runs short."""

SCENARIO = """\
import torch
from acme.loader import ExpertWeights

import fragscope

PRESETS = {"small": {"layers": 2, "experts": 8, "hidden": 1024, "intermediate": 704}}


@fragscope.scenario("acme-experts", presets=PRESETS, variant="loader")
def acme_experts(case):
    layers = [ExpertWeights(case.experts, case.hidden, case.intermediate) for _ in range(case.layers)]
    gate = up = torch.zeros(case.intermediate, case.hidden, dtype=torch.bfloat16)
    with case.measure():
        for layer in layers:
            for expert in range(case.experts):
                layer.load_expert(expert, gate, up, gate.t())
            layer.process_weights_after_loading()
"""
PROJECT = '[project]\nname = "acme"\nversion = "1"\n\n[tool.fragscope]\nscenarios = ["scenarios"]\n'
FILES = {
    "pyproject.toml": PROJECT,
    ".gitignore": ".fragscope/\n__pycache__/\n",
    "acme/__init__.py": "",
    "acme/loader.py": LOADER,
    "scenarios/scenario_acme.py": SCENARIO,
}
"""What a repository holds unless a test says otherwise."""

_IDENTITY = {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org"}
_IDENTITY |= {"GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@example.org"}
_ALONE = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def git(folder: Path, *arguments: str) -> str:
    """Run git as somebody without settings of his own, and return what it prints."""
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=os.environ | _IDENTITY | _ALONE,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Gated:
    """How ``fragscope gate --against`` ended."""

    code: int
    out: str
    err: str

    @property
    def verdict(self) -> dict[str, Any]:
        """What it printed with ``--format json``."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def regressions(self) -> list[dict[str, Any]]:
        """Its values that regressed, worst first."""
        return [c for c in self.verdict["changes"] if c["regressed"]]

    def regressed(self, metric: str) -> dict[str, Any]:
        """The one value of a metric that regressed."""
        (found,) = [c for c in self.regressions if c["metric"] == metric]
        return found


@dataclass(frozen=True)
class Team:
    """A repository with a loader and its scenario."""

    folder: Path

    @classmethod
    def made(cls, folder: Path, files: dict[str, str] | None = None, *, commit: bool = True) -> Team:
        """Make a repository with these files, and a first commit that a branch ``base`` stays at."""
        folder.mkdir(parents=True, exist_ok=True)
        git(folder, "init", "-q", "-b", "work")
        team = cls(folder)
        team.write(FILES if files is None else files)
        if commit:
            team.commit("base")
        return team

    def write(self, files: dict[str, str]) -> None:
        """Write whole files."""
        for name, text in files.items():
            file = self.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace a text that stands once in a file."""
        file = self.folder / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
        file.write_text(text.replace(old, new), encoding="utf-8")

    def commit(self, branch: str | None = None) -> str:
        """Commit everything; a branch of the given name then stays there. The commit, in full."""
        git(self.folder, "add", "-A")
        git(self.folder, "commit", "-q", "-m", "a change")
        if branch is not None:
            git(self.folder, "branch", branch)
        return git(self.folder, "rev-parse", "HEAD").strip()

    def line(self, name: str, text: str) -> int:
        """The number of the one line that holds a text."""
        (found,) = [n for n, x in enumerate((self.folder / name).read_text().splitlines(), 1) if text in x]
        return found

    def command(self, *arguments: str, against: str = "base", python: str = sys.executable) -> list[str]:
        """The command line of ``fragscope gate --against``."""
        return [python, "-m", "fragscope", "gate", "--against", against, *arguments]

    def gate(
        self,
        *arguments: str,
        against: str = "base",
        layout: str = "json",
        inside: str = ".",
        environment: dict[str, str] | None = None,
        python: str = sys.executable,
    ) -> Gated:
        """Run it from a folder of the repository."""
        done = subprocess.run(
            self.command("--format", layout, *arguments, against=against, python=python),
            cwd=self.folder / inside,
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Gated(done.returncode, done.stdout, done.stderr)

    def run(self, *arguments: str) -> dict[str, dict[str, Any]]:
        """``fragscope run`` in the working tree: its cases by id, as an independent measurement."""
        out = self.folder.parent / "run"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "fragscope",
                "run",
                "--device",
                "virtual",
                "--no-report",
                "--out",
                str(out),
                *arguments,
            ],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode in (0, 3), done.stderr
        return {case["id"]: case for case in json.loads((out / "results.json").read_bytes())["cases"]}


def scenario(body: str) -> str:
    """A scenario file with this body."""
    return "import torch\nimport fragscope\n" + dedent(body)
