"""On a machine with an NVIDIA GPU: the model, the virtual device and the shipped scenarios against the card at hand.

``nox -s gpu``. Needs a CUDA build of torch; no network.
"""

from __future__ import annotations

import importlib.util
import json
import lzma
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
SHIPPED = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="the shipped scenarios need flashinfer"
)


def run(out: Path, device: str) -> dict[str, Case]:
    command = [sys.executable, "-m", "fragscope", "run", *NAMES, "--device", device, "--out", str(out), "--no-report"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    return {f"{c.preset}/{c.variant}": c for c in load_results(out).cases}


@pytest.fixture(scope="module")
def on_card(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return run(tmp_path_factory.mktemp("cuda"), "cuda")


@SHIPPED
def test_every_decision_of_the_card_is_the_models(on_card):
    for name, case in on_card.items():
        assert case.verify is not None
        assert (case.verify.mismatches, case.verify.first) == (0, None), name
        assert case.verify.compared > 100


@SHIPPED
def test_numerics_on_the_card_agree_with_the_reference(on_card):
    assert all(c.numeric is not None and c.numeric["agree"] and c.numeric["device"] == "cuda" for c in on_card.values())


@SHIPPED
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


TOO_LARGE = """
import fragscope
import torch

@fragscope.scenario("too-large", presets={"one": {}})
def _(case):
    base = torch.empty(10 * 2**40, dtype=torch.uint8, device="cuda")
    with case.measure():
        pass

@fragscope.scenario("fits", presets={"one": {}})
def _(case):
    with case.measure():
        kept = torch.empty(12 * 2**20, dtype=torch.uint8, device="cuda")
"""


def test_what_cannot_fit_this_card_is_skipped_and_the_rest_runs_under_each_conf(tmp_path):
    (tmp_path / "scenario_sizes.py").write_text(TOO_LARGE)
    confs = ["", "expandable_segments:True"]
    command = [
        sys.executable,
        "-m",
        "fragscope",
        "run",
        str(tmp_path),
        "--device",
        "cuda",
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--no-report", *(word for conf in confs for word in ("--conf", conf))]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=500, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    cases = load_results(tmp_path / "out").cases
    skipped = [c for c in cases if c.scenario == "too-large"]
    total = torch.cuda.get_device_properties(0).total_memory
    for case in skipped:
        assert (case.outcome, case.trace) == ("skipped", None)
        assert case.message.startswith("needs 10,485,760 MiB, card has "), case.message
        assert case.precheck is not None
        assert 0 < case.precheck.free < total
    fits = [c for c in cases if c.scenario == "fits"]
    assert [c.conf for c in fits] == [c.conf for c in skipped] == confs
    for case in fits:
        reserved = 20 if case.conf else 12  # MiB: an expandable segment of the large pool is mapped in pages of 20
        assert (case.outcome, case.peak.reserved) == ("ok", reserved * 2**20), case.message
        assert case.verify is not None
        assert (case.verify.mismatches, case.verify.first) == (0, None)


@SHIPPED
def test_footprints_recorded_earlier_still_hold(tmp_path):
    """For the release and card at hand; another release may well differ, and then the table needs its recording."""
    file = ROOT / "tests" / "data" / "footprints" / "h100-torch-2.11.0.json.xz"
    stored = json.loads(lzma.decompress(file.read_bytes()))
    if stored["versions"]["torch"] != torch.__version__ or stored["versions"]["gpu"] != torch.cuda.get_device_name(0):
        pytest.skip(f"recorded with torch {stored['versions']['torch']} on {stored['versions']['gpu']}")
    out = tmp_path / "now.json"
    subprocess.run([sys.executable, ROOT / "tests" / "gpu" / "record_footprints.py", out], check=True, timeout=500)
    now = json.loads(out.read_text())["cases"]
    differing = [
        n for n, c in now.items() if n in stored["cases"] and c.get("second") != stored["cases"][n].get("second")
    ]
    assert differing == []
