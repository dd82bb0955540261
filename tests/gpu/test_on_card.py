"""On a machine with an NVIDIA GPU: the model, the virtual device and the shipped scenarios against the card at hand.

``nox -s gpu``. Needs a CUDA build of torch; no network.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from fragscope.results import Case, load_results  # noqa: E402

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
NAMES = ["moe-fp8-shuffle/qwen3-30b-a3b-tp1"]
if importlib.util.find_spec("flashinfer") is None:
    pytestmark.append(pytest.mark.skip(reason="the shipped scenarios need flashinfer"))


def run(out: Path, device: str) -> dict[str, Case]:
    command = [sys.executable, "-m", "fragscope", "run", *NAMES, "--device", device, "--out", str(out), "--no-report"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    return {f"{c.preset}/{c.variant}": c for c in load_results(out).cases}


@pytest.fixture(scope="module")
def on_card(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return run(tmp_path_factory.mktemp("cuda"), "cuda")


def test_every_decision_of_the_card_is_the_models(on_card):
    for name, case in on_card.items():
        assert case.verify is not None
        assert (case.verify.mismatches, case.verify.first) == (0, None), name
        assert case.verify.compared > 100


def test_numerics_on_the_card_agree_with_the_reference(on_card):
    assert all(c.numeric is not None and c.numeric["agree"] and c.numeric["device"] == "cuda" for c in on_card.values())


def test_the_virtual_device_asks_for_the_same(on_card, tmp_path):
    virtual = run(tmp_path, "virtual")
    assert set(virtual) == set(on_card)
    for name, case in on_card.items():
        other = virtual[name]
        assert (other.base, other.transient, other.retained) == (case.base, case.transient, case.retained), name
        assert other.allocs == case.allocs
        assert other.peak.allocated == case.peak.allocated
        if other.exact:
            assert other.peak == case.peak


def test_footprints_recorded_earlier_still_hold(tmp_path):
    """For the release and card at hand; another release may well differ, and then the table needs its recording."""
    stored = json.loads((ROOT / "tests" / "data" / "footprints" / "h100-torch-2.11.0.json").read_text())
    if stored["versions"]["torch"] != torch.__version__ or stored["versions"]["gpu"] != torch.cuda.get_device_name(0):
        pytest.skip(f"recorded with torch {stored['versions']['torch']} on {stored['versions']['gpu']}")
    out = tmp_path / "now.json"
    subprocess.run([sys.executable, ROOT / "tests" / "gpu" / "record_footprints.py", out], check=True, timeout=500)
    now = json.loads(out.read_text())["cases"]
    differing = [
        n for n, c in now.items() if n in stored["cases"] and c.get("second") != stored["cases"][n].get("second")
    ]
    assert differing == []
