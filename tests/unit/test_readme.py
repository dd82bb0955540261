"""The README's commands and figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MEASURED = json.loads((ROOT / "tests" / "data" / "scenarios" / "h100-torch-2.11.0.json").read_text())["cases"]
MIB = 1024**2


def test_the_first_shell_block_is_the_two_commands():
    block = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert block is not None
    lines = block[1].strip().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("nox -s suite")
    assert lines[1].endswith("nox -s tests")
    assert all(line.startswith("python3 -m venv .venv && .venv/bin/pip install") for line in lines)


def test_figures_are_those_measured_on_the_card():
    rows = re.findall(r"^\| .*? \| ([\d,.]+) MiB \| ([\d,.]+) MiB \| ([\d,.]+) MiB \|$", README, re.MULTILINE)
    for variant, row in zip(("list-stack", "preallocated", "batched", "in-place"), rows, strict=True):
        case = MEASURED[f"moe-fp8-shuffle/deepseek-v3-tp8/{variant}"]
        bytes_ = (case["peak"]["allocated"], case["peak"]["reserved"], case["transient"])
        assert tuple(float(cell.replace(",", "")) for cell in row) == tuple(round(b / MIB, 2) for b in bytes_)


def test_count_of_compared_decisions_is_that_of_the_reference_run():
    compared = sum(c["verify"]["compared"] for c in MEASURED.values())
    assert f"{compared:,} compared decisions" in README.replace("\n", " ")
    assert f"all {len(MEASURED)} shipped cases" in README.replace("\n", " ")
