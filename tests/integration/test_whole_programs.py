"""Whole programs on the virtual device ask for what they asked an H100 for, and come near the peaks that it reached.

The requests are the same, one by one. Which of several cached blocks of one size is taken hangs on their addresses,
which the driver gives; so the peaks may differ a little.

Expected: tests/data/programs, made by tests/gpu/program_events.py from a run of tests/gpu/whole_programs.py on a card.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from fragscope.allocator import ReplaySettings, card_named, rules_for  # noqa: E402
from fragscope.record.virtual import VirtualDevice  # noqa: E402

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "gpu"))

import model_programs  # noqa: E402
import program_events  # noqa: E402

RECORDED = json.loads(lzma.decompress((TESTS / "data" / "programs" / "h100-torch-2.11.0.json.xz").read_bytes()))
CONFS = {"default": "", "expandable": "expandable_segments:True"}
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # the libraries' own


@pytest.mark.parametrize("conf", CONFS)
@pytest.mark.parametrize("name", RECORDED["programs"])
def test_a_program_is_the_same_as_on_the_card(name, conf):
    recorded = RECORDED["programs"][name]
    card = card_named("h100-80gb")
    rules = rules_for(RECORDED["versions"]["torch"].partition("+")[0])
    settings = ReplaySettings(rules, card.name, card.total, card.free, conf=CONFS[conf])
    with VirtualDevice(card, settings, TESTS.parent) as device:
        model_programs.PROGRAMS[name]()
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        trace = device.trace({})
    assert device.estimated == {}
    assert program_events.events_of(trace) == recorded["events"]
    assert peaks == {key: pytest.approx(recorded[conf][key], rel=0.01) for key in peaks}
