"""A comparison with another commit, a lock and a waiver in one verdict, as GitHub shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from repositories import Team

pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def fragscope(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fragscope", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


WAIVER = """\
[[waiver]]
case = "acme-experts/*/*"
metrics = ["transient", "peak_requested", "peak_allocated", "peak_reserved", "stranded"]
owner = "@jane"
reason = "until the next release"
expires = 9999-12-31
"""


def test_a_regression_is_annotated_once_a_value_at_the_line_that_holds_it(tmp_path):
    team = Team.made(tmp_path)
    assert fragscope(team.folder, "run", "--device", "virtual", "--no-report").returncode == 0
    assert fragscope(team.folder, "lock").returncode == 0
    team.commit("locked")
    # Every expert's copy is kept to the end of the method: 8 of 2.75 MiB instead of one.
    loop, copy = "        for expert in range(experts):\n", "            swapped = torch.cat([up, gate])\n"
    team.edit("acme/loader.py", loop, f"        kept = []\n{loop}")
    team.edit("acme/loader.py", copy, f"{copy}            kept.append(swapped)\n")
    line = team.line("acme/loader.py", "swapped = torch.cat([up, gate])")
    done = fragscope(team.folder, "gate", "--against", "HEAD", "--format", "github", "--comment", "comment.md")
    assert done.returncode == 3, done.stderr
    annotations = [text for text in done.stdout.splitlines() if text.startswith("::error")]
    (transient,) = [text for text in annotations if text.partition("::")[2].partition("::")[0].endswith(" transient")]
    assert transient.startswith(f"::error file=acme/loader.py,line={line},title=")
    assert "regressed: before " in transient
    assert "larger than locked: locked " in transient
    assert "[fragscope.lock:" in transient
    comment = (team.folder / "comment.md").read_text()
    assert f"`acme/loader.py:{line}`" in comment
    assert "locked case compared" in comment

    (team.folder / "budgets.toml").write_text(WAIVER)
    done = fragscope(team.folder, "gate", "--against", "HEAD")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("policy  budgets.toml  the budgets file is new\n")
    assert "waived  acme-experts/small/loader  transient  before " in done.stdout
    assert "waived, larger than locked  acme-experts/small/loader  transient  locked " in done.stdout
    assert "by @jane: until the next release" in done.stdout
