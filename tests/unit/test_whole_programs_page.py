"""What docs/whole-programs.md says of the run on a card: the tables as their command prints them, and every count."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from page_commands import assert_page_holds

ROOT = Path(__file__).parents[2]
FILE = "reports/h100-80gb-torch-2.11.0/programs.json"
PAGE = (ROOT / "docs" / "whole-programs.md").read_text()
PROSE = " ".join(PAGE.split())
PROGRAMS: dict[str, Any] = json.loads((ROOT / FILE).read_text())["programs"]
FIGURES = ("allocated", "reserved")
RUNS = {
    (program, conf): (jobs[f"virtual-{conf}"]["result"], jobs[f"card-{conf}"]["result"], jobs[f"compared-{conf}"])
    for program, jobs in PROGRAMS.items()
    for conf in ("default", "expandable")
}
DIFFERING = {key for key, (said, done, _) in RUNS.items() if any(said[f] != done[f] for f in FIGURES)}


@pytest.mark.torch
def test_tables_are_what_the_command_prints() -> None:
    command = f"python tests/gpu/whole_programs.py --table {FILE}"
    assert_page_holds(PAGE, command)


def test_counts_are_those_of_the_run() -> None:
    exact = {key for key, (said, _, _) in RUNS.items() if not said["estimated"] and not said["assumed"]}
    equal = sum(compared["requests"] == "equal" for _, _, compared in RUNS.values())
    verified = [done["verified"] for _, done, _ in RUNS.values()]
    assert f"{len(PROGRAMS)} programs of transformers" in PROSE
    assert f"which makes {len(RUNS)} runs" in PROSE
    assert f"- {len(RUNS) - len(DIFFERING)} of the {len(RUNS)} are equal to the byte" in PROSE
    assert f"they are equal: {len(exact)} of {len(exact)}." in PROSE
    assert not exact & DIFFERING
    assert f"- {equal} of the {len(RUNS)} ask for exactly" in PROSE
    assert all(len({*compared["peak_requested"]}) == 1 for _, _, compared in RUNS.values())
    assert sum(v["mismatches"] for v in verified) == 0
    assert f"0 of {sum(v['compared'] for v in verified):,} differ." in PROSE
    said = (
        f"Of {len(RUNS)} runs of whole programs of transformers, timm and torchvision, {len(RUNS) - len(DIFFERING)} had"
    )
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_every_difference_is_explained() -> None:
    section = PAGE[PAGE.index("## What differs") :]
    figures, requests = section.split("Requests differ in three more programs")
    named = [re.findall(r"^- (.*?):? ", part, re.MULTILINE) for part in (figures, requests)]
    assert named == [
        ["`llama-train`", "`vit-base-train`", "`encoder`"],
        ["`llama-sample`", "`resnet18-train`", "`vit-train-autocast`"],
    ]
    assert {
        ("llama-train", "default"),
        ("vit-train", "default"),
        ("vit-base-train", "default"),
        ("encoder", "default"),
    } == DIFFERING
    others = {program for (program, _), (_, _, compared) in RUNS.items() if compared["requests"] != "equal"}
    assert others == {"vit-base-train", "encoder", "llama-sample", "resnet18-train", "vit-train-autocast"}


@pytest.mark.parametrize(
    ("program", "figure", "percent"),
    [
        ("llama-train", "allocated", "+0.06 %"),
        ("vit-train", "allocated", "+0.07 %"),
        ("vit-base-train", "allocated", "0.19 %"),
        ("vit-base-train", "reserved", "0.78 %"),
        ("encoder", "reserved", "11.19 %"),
    ],
)
def test_percentages_are_those_of_the_run(program: str, figure: str, percent: str) -> None:
    said, done, _ = RUNS[program, "default"]
    off = abs(said[figure] - done[figure]) / done[figure]
    assert f"{100 * off:.2f} %" == percent.lstrip("+")
    assert percent in PAGE[PAGE.index("## What differs") :]


def test_nothing_of_the_machine_is_kept() -> None:
    assert not re.search(r"\"/|site-packages", (ROOT / FILE).read_text())
