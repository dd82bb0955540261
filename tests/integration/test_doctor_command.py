"""``fragscope doctor`` on the machine that runs the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def doctor(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    command = [sys.executable, "-m", "fragscope", "doctor", *options]
    return subprocess.run(
        command, cwd=ROOT, env={**clean, **environ}, capture_output=True, text=True, check=False, timeout=300
    )


def test_json_has_every_check_once():
    done = doctor("--format", "json")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1
    assert found["exit_code"] == done.returncode
    names = [check["name"] for check in found["checks"]]
    assert len(names) == len(set(names)) == 11
    assert all(set(check) == {"name", "status", "detail", "advice"} for check in found["checks"])


@pytest.mark.torch
def test_a_conf_that_torch_rejects_is_the_exit_code():
    done = doctor(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:yes")
    assert (done.returncode, done.stderr) == (1, "")
    assert any(line.startswith("fail   conf ") and "rejects it" in line for line in done.stdout.splitlines())


@pytest.mark.torch
def test_torch_is_asked_in_another_process_and_found():
    import torch

    checks = {c["name"]: c for c in json.loads(doctor("--format", "json").stdout)["checks"]}
    assert str(torch.__version__) in checks["torch"]["detail"]
