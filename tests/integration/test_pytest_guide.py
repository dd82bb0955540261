"""docs/pytest.md does what it says: every file and session in it, as written, in a folder of its own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "pytest.md"
_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_TIME = re.compile(r"^\d+ (passed|failed).* in .*$")
# As installed: found by its entry point, with no other plugin to print a line of its own.
_PLUGIN = ("-p", "no:fragscope", "-p", "fragscope.pytest_plugin", "-p", "no:cacheprovider")


def test_the_guide_as_written(tmp_path: Path):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "80"}
    for name in (
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "CI",
        "BUILD_NUMBER",
        "PYTEST_ADDOPTS",
    ):  # pytest prints more in CI
        environment.pop(name, None)
    release = ".".join(torch.__version__.split(".")[:2])
    played = 0
    for fence in _FENCE.finditer(GUIDE.read_text(encoding="utf-8")):
        _, *attributes = fence["info"].split()
        for name, value in (a.split("=", 1) for a in attributes):
            assert name == "file"
            (tmp_path / value).write_text(fence["text"])
        if attributes:
            continue
        command, *expected = fence["text"].splitlines()
        program, *arguments = shlex.split(command.removeprefix("$ "))
        assert program == "pytest"
        done = subprocess.run(
            [sys.executable, "-B", "-m", "pytest", *_PLUGIN, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        printed = [line for line in done.stdout.splitlines() if not _TIME.match(line)]
        assert printed == [re.sub(r"torch 2\.\d+$", f"torch {release}", line) for line in expected]
        played += 1
    assert played == 2
