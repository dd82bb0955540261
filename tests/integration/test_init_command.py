"""``fragscope init`` in repositories of several kinds; what it writes is run and gated as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fragscope.cli import run

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

LOADER = """
import torch


def process_weights(w13: torch.Tensor, w2: torch.Tensor, layers: int, device="cuda"):
    return [torch.stack([w.clone() for w in (w13, w2)]).to(device) for _ in range(layers)]
"""
PROJECT = '[project]\nname = "acme"\nversion = "0"\n'
KINDS: dict[str, tuple[dict[str, str], list[str], set[str], str]] = {
    "nothing at all": ({}, [], {"scenarios/scenario_loader.py", "budgets.toml"}, "scenarios"),
    "flat, in git": (
        {"acme/__init__.py": "", "acme/loader.py": LOADER, ".git/HEAD": "ref: x"},
        ["--loader", "acme.loader:process_weights"],
        {"scenarios/scenario_process_weights.py", "budgets.toml"},
        "scenarios",
    ),
    "src, pytest, GitHub": (
        {
            "src/acme/__init__.py": "",
            "src/acme/loader.py": LOADER,
            "pyproject.toml": PROJECT,
            "tests/test_x.py": "def test_x(): pass\n",
            ".git/config": "[remote]\nurl = https://github.com/acme/acme",
        },
        ["--loader", "acme.loader:process_weights", "--write-config"],
        {"tests/scenario_process_weights.py", "budgets.toml", ".github/workflows/fragscope.yml"},
        "",
    ),
    "one module, nox, GitHub": (
        {"acme.py": LOADER, "noxfile.py": "raise SystemExit\n", ".git/HEAD": "", ".github/dependabot.yml": ""},
        ["--loader", "acme:process_weights", "--no-github"],
        {"scenarios/scenario_process_weights.py", "budgets.toml"},
        "scenarios",
    ),
    "configured": (
        {
            "acme/__init__.py": LOADER,
            "pyproject.toml": PROJECT + '[tool.fragscope]\nscenarios = ["mem"]\n',
            ".git/HEAD": "",
        },
        ["--loader", "acme:process_weights", "--github"],
        {"mem/scenario_process_weights.py", "budgets.toml", ".github/workflows/fragscope.yml"},
        "",
    ),
}


def files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def fragscope(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, since the repositories' packages have one name."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "fragscope", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_written_runs_and_passes_as_it_is(kind: str, tmp_path: Path) -> None:
    there, arguments, written, what = KINDS[kind]
    for name, text in there.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = files(tmp_path)
    shown = fragscope(tmp_path, "init", *arguments, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert files(tmp_path) == before, "a dry run writes nothing"
    done = fragscope(tmp_path, "init", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert files(tmp_path) - before == written | (
        {"pyproject.toml"} - before if "--write-config" in arguments else set()
    )
    for name in written:
        assert f"--- {name}\n{(tmp_path / name).read_text()}" in shown.stdout, "it shows what it writes"
        assert f"wrote {name}" in done.stdout
    workflow = ".github/workflows/fragscope.yml"
    assert (f"replace OWNER in {workflow} " in done.stdout) == (workflow in written)
    said = f"next: fragscope run{f' {what}' if what else ''} --device virtual, then fragscope gate"
    assert done.stdout.splitlines()[-1] == said
    ran = fragscope(tmp_path, "run", *filter(None, [what]), "--device", "virtual", "--no-report")
    assert ran.returncode == 0, ran.stderr
    assert "The outcome is the declared one." in ran.stdout
    gated = fragscope(tmp_path, "gate")
    assert (gated.returncode, gated.stdout) == (0, "pass: 1 value of 1 case held against 1 budget\n")
    again = fragscope(tmp_path, "init", *(a for a in arguments if a != "--write-config"))
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert again.stderr.count("\n") == 1


def test_the_pull_request_that_brings_these_files_passes_the_workflow_as_it_is(tmp_path: Path) -> None:
    """Its base has none of them. The action gives ``against`` to the gate (action.yml)."""
    yaml = pytest.importorskip("yaml")

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=A", "-c", "user.email=a@acme.example"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "acme.py").write_text(LOADER)
    git("init", "-q", "-b", "main")
    git("remote", "add", "origin", "https://github.com/acme/acme")
    git("add", ".")
    git("commit", "-q", "-m", "The loader")
    git("checkout", "-q", "-b", "gate")
    done = fragscope(tmp_path, "init", "--loader", "acme:process_weights", "--write-config")
    assert (done.returncode, done.stderr) == (0, "")
    git("add", ".")
    git("commit", "-q", "-m", "Its gate")
    git("checkout", "-q", "main")
    git("merge", "-q", "--no-ff", "-m", "as actions/checkout has it", "gate")
    workflow = yaml.safe_load((tmp_path / ".github/workflows/fragscope.yml").read_text())
    given = workflow["jobs"]["fragscope"]["steps"][-1]["with"]
    assert given == {"against": "HEAD^1"}
    gated = fragscope(tmp_path, "gate", "--format", "github", f"--against={given['against']}")
    assert gated.returncode == 0, gated.stdout + gated.stderr
    assert "1 case of " in gated.stdout
    assert "1 value of 1 case held against 1 budget" in gated.stdout
    (tmp_path / "acme.py").write_text(LOADER.replace("w.clone()", "torch.cat([w, w])"))
    git("commit", "-q", "-a", "-m", "The next, which costs more")
    gated = fragscope(tmp_path, "gate", "--format", "github", f"--against={given['against']}")
    assert gated.returncode == 3, gated.stdout + gated.stderr
    assert "::error file=acme.py,line=6," in gated.stdout


BLOCKS = """
import torch


def to_blocks(w13: torch.Tensor, w2: torch.Tensor, block_k: int = 128):
    \"\"\"As FlashInfer's convert_to_block_layout, and scales of blocks packed by four.\"\"\"
    scales = [torch.empty(w.shape[1] // 128, device=w.device).view(-1, 4) for w in (w13, w2)]
    return [w.view(w.shape[0], -1, block_k).permute(1, 0, 2).contiguous() for w in (w13, w2)], scales
"""


def test_a_loader_with_blocks_runs_with_sizes_that_are_made_up(tmp_path: Path) -> None:
    (tmp_path / "acme.py").write_text(BLOCKS)
    assert fragscope(tmp_path, "init", "--loader", "acme:to_blocks").returncode == 0
    ran = fragscope(tmp_path, "run", "scenarios", "--device", "virtual", "--no-report")
    assert ran.returncode == 0, ran.stderr


def test_what_a_function_needs_and_nobody_can_make_is_said_where_it_fails(tmp_path: Path) -> None:
    (tmp_path / "acme.py").write_text("def load(config: dict):\n    return config['hidden']\n")
    assert fragscope(tmp_path, "init", "--loader", "acme:load").returncode == 0
    text = (tmp_path / "scenarios/scenario_load.py").read_text()
    assert "config = None  # to be made: dict" in text
    ran = fragscope(tmp_path, "run", "scenarios", "--device", "virtual", "--no-report")
    assert ran.returncode == 3, "it ended otherwise than declared"
    assert "crash" in ran.stdout
    assert "acme.py:2" in ran.stderr
    assert fragscope(tmp_path, "gate").returncode == 4, "nothing was measured"


def test_a_repository_elsewhere_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(["init", "theirs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("next in theirs: fragscope run scenarios ")
    assert files(tmp_path) == {"theirs/scenarios/scenario_loader.py", "theirs/budgets.toml"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere"], 2, "nowhere: there is no such folder"),
        (["--loader", "acme"], 2, "write MODULE:FUNCTION"),
        (["--action", "x y"], 2, "write OWNER/REPOSITORY@REF"),
        (["--action", "a/b@c\nd"], 2, "write OWNER/REPOSITORY@REF"),
        (["--force"], 2, "No such option"),
        (["told", "--github"], 2, "--github: there is no .git in "),
        (["broken"], 5, "pyproject.toml: line 1"),
        (["told", "--write-config"], 2, "has [tool.fragscope] already"),
    ],
)
def test_a_wrong_call_writes_nothing(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in (("broken", "x = "), ("told", "[tool.fragscope]\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    assert run(["init", *arguments]) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert files(tmp_path) == before
