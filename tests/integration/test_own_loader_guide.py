"""docs/own-loader.md does what it says: every file and command in it, as written, in a folder of its own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

GUIDE = Path(__file__).parents[2] / "docs" / "own-loader.md"
_COMMIT = re.compile(r"\b[0-9a-f]{7}\b(?= with changes| compared|\))")  # of the day it is made
_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> Iterator[tuple[str, dict[str, str], str]]:
    """Language, attributes and text of every fenced block."""
    for fence in _FENCE.finditer(GUIDE.read_text(encoding="utf-8")):
        language, *attributes = fence["info"].split()
        yield language, dict(a.split("=", 1) for a in attributes), fence["text"]


def write(folder: Path, attributes: dict[str, str], text: str) -> None:
    """A file as a block gives it, or with one method, its last, or one line replaced."""
    file = folder / attributes["file"]
    if "replace" in attributes:
        before = file.read_text()
        start = before.index(f"    def {attributes['replace']}(")
        assert "\n    def " not in before[start + 1 :], "the replaced method is the last one"
        text = before[:start] + text
    if "line" in attributes:
        lines = file.read_text().splitlines(keepends=True)
        (at,) = (number for number, line in enumerate(lines) if line.startswith(attributes["line"]))
        text = "".join([*lines[:at], text, *lines[at + 1 :]])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def play(folder: Path, console: str, environment: dict[str, str]) -> list[str]:
    """Run a console block's commands and return it with what they really print to stdout."""
    seen: list[str] = []
    status = 0
    for line in console.splitlines():
        if not line.startswith("$ "):
            continue
        seen.append(line)
        if line == "$ echo $?":
            seen.append(str(status))
            continue
        done = subprocess.run(
            shlex.split(line[2:]), cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        status = done.returncode
        assert status in (0, 3), done.stderr  # any other code says why there
        seen += done.stdout.splitlines()
    return seen


def test_the_guide_as_written(tmp_path: Path):
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "fragscope"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fragscope "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"}
    folder = tmp_path / "theirs"
    folder.mkdir()
    played = 0
    for language, attributes, text in blocks():
        if "file" in attributes:
            write(folder, attributes, text)
        elif language == "python":
            compile(text + "def _(case): ...\n", "guide", "exec")  # a part of a file, to be read
        else:
            assert language == "console", "every block is a file, a part of one, or a session"
            seen = [_COMMIT.sub("0000000", line.rstrip()) for line in play(folder, text, environment)]
            assert seen == _COMMIT.sub("0000000", text).splitlines()
            played += 1
    assert played == 14


def test_the_fix_computes_what_the_loader_computed(tmp_path: Path):
    """On the host, with small random weights."""

    def load(code: str) -> list[torch.Tensor]:
        space: dict[str, Callable[..., torch.nn.Module]] = {}
        exec(compile(code.replace('"cuda"', '"cpu"').replace(".cuda()", ""), "weights.py", "exec"), space)
        generator = torch.Generator().manual_seed(7)
        weights = space["ExpertWeights"](3, 8, 6, torch.float32)
        for expert in range(3):
            sizes = ((6, 8), (6, 8), (8, 6))
            weights.load_expert(expert, *(torch.randn(size, generator=generator) for size in sizes))
        weights.process_weights_after_loading()
        return list(weights.parameters())

    results = []
    for _, attributes, text in blocks():
        if attributes.get("file", "").endswith("weights.py"):
            write(tmp_path, attributes, text)
            results.append(load((tmp_path / attributes["file"]).read_text()))
    before, *after = results
    assert len(after) == 2
    for weights in after:
        assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_the_page_about_the_gate_shows_the_same_comparison():
    shown = [text for language, _, text in blocks() if language == "console" and "$ fragscope gate --against" in text]
    page = (GUIDE.parent / "gate.md").read_text(encoding="utf-8")
    assert f"```console\n{shown[0]}```" in page
