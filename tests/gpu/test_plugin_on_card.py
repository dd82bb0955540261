"""On a GPU: a test's verdict is the same alone, after fifty others, in workers and in reversed order."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

OTHERS = """
import pytest
import torch

kept = []


@pytest.mark.parametrize("number", range(50))
def test_other(number):
    sizes = [1 + (7 * number + 5 * n) % 23 for n in range(6)]
    blocks = [torch.empty(size << 20, dtype=torch.uint8, device="cuda") for size in sizes]
    a = torch.randn(512 + 64 * (number % 5), 512, device="cuda")
    (a @ a.t()).sum().item()
    kept.extend(blocks[number % 2 :: 2])
    if number % 13 == 5:
        torch.cuda.empty_cache()
"""

SUBJECTS = """
import pytest
import torch
from test_1_others import kept


@pytest.mark.gpu_memory_budget(peak_reserved="1 MiB", stranded=0)
def test_training():
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, device="cuda") for _ in range(6)))
    optimizer = torch.optim.Adam(model.parameters())
    if kept:
        kept.pop()
    for _ in range(3):
        model(torch.randn(4096, 1024, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.gpu_memory_budget(transient="1 MiB")
def test_stack(fragscope_recorder):
    parts = [torch.empty(37 << 20, dtype=torch.uint8, device="cuda") for _ in range(4)]
    with fragscope_recorder.phase("load"):
        if kept:
            kept.pop(0)
        whole = torch.stack(parts)
        parts = None
        held = torch.empty(5 << 20, dtype=torch.uint8, device="cuda")
"""

REVERSED = """
import os


def pytest_collection_modifyitems(items):
    if os.environ.get("REVERSED"):
        items.reverse()
"""


def session(folder: Path, *arguments: str, **environment: str) -> dict[str, list[object]]:
    """Each subject's properties and failure message."""
    plugin = ("-p", "no:cacheprovider", "-p", "no:fragscope", "-p", "fragscope.pytest_plugin")
    command = [sys.executable, "-m", "pytest", *plugin, "--junitxml=junit.xml", *arguments]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths, **environment}, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    found: dict[str, list[object]] = {}
    for case in ET.parse(folder / "junit.xml").iter("testcase"):
        if "others" not in case.attrib["classname"]:
            values = [(p.attrib["name"], p.attrib["value"]) for p in case.iter("property")]
            found[case.attrib["name"]] = [values, [f.text for f in case.iter("failure")]]
    return found


def test_the_verdict_is_the_same_alone_after_others_in_workers_and_reversed(tmp_path):
    for name, text in {"test_1_others": OTHERS, "test_2_subjects": SUBJECTS, "conftest": REVERSED}.items():
        (tmp_path / f"{name}.py").write_text(text)
    alone = session(tmp_path, "test_2_subjects.py")
    assert alone.keys() == {"test_training", "test_stack"}
    assert all(failures and values for values, failures in alone.values())
    # By hand: four parts of 37 MiB, and as much again; a part has a segment of 38 MiB, whose rest is not split off.
    stack = dict(alone["test_stack"][0])
    assert int(stack["fragscope_peak_requested"]) == 8 * 37 << 20
    assert int(stack["fragscope_peak_allocated"]) == (4 * 38 + 148) << 20
    assert session(tmp_path) == alone
    assert session(tmp_path, REVERSED="1") == alone
    assert session(tmp_path, "-n", "2") == alone
