"""Commands as a user calls them, for the tests of each."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fragscope.cli import run


def json_of(command: str, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """What ``fragscope COMMAND … --format json`` answers, and that it ends with this exit code."""
    assert run([command, *arguments, "--format", "json"]) == code
    return json.loads(capsys.readouterr().out)


def error_of(command: str, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line that a refused call ends with, and that it prints nothing else."""
    assert run([command, *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def markdown_of(command: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], list[list[str]]]:
    """The lines of ``--format markdown``, and the cells of its table: in each row as many as there are headings."""
    assert run([command, *arguments, "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r"(?<!\\\\)\|", line)[1:-1] for line in lines if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert len({len(row) for row in cells}) == 1
    return lines, cells
