"""The virtual device must ask for what a real card was asked for, operator by operator.

Expected events: tests/data/footprints, recorded by tests/gpu/record_footprints.py on the card that ``versions`` names.
"""

from __future__ import annotations

import gc
import json
import lzma
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fragscope.allocator import ReplaySettings, card_named, rules_for  # noqa: E402
from fragscope.errors import UnsupportedError  # noqa: E402
from fragscope.record.virtual import VirtualDevice, values  # noqa: E402
from fragscope.trace import RequestKind  # noqa: E402
from fragscope.units import GIB  # noqa: E402

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "gpu"))

import footprint_cases  # noqa: E402
import program_cases  # noqa: E402, F401 - adds its cases to footprint_cases.COMPOSITES
import sweep_cases  # noqa: E402, F401 - likewise

RECORDED: dict[str, Any] = {
    name: case
    for name, case in json.loads(
        lzma.decompress((TESTS / "data" / "footprints" / "h100-torch-2.11.0.json.xz").read_bytes())
    )["cases"].items()
    if "error" not in case  # no kernel on the card takes them
}
CASES = {n: c for n, c in {**footprint_cases.CASES, **footprint_cases.COMPOSITES}.items() if n in RECORDED}
# The virtual device lists these as estimated: some kinds and sizes of them, or all.
SOMETIMES = ("sweep_mode",)
ALWAYS = (
    "conv2d", "lstm", "gru", "conv2d_amp", "conv2d_backward", "stream_capture",
    "item", "adafactor_step", "sweep_isin_many", "sweep_conv1d",
    *(f"sweep_conv2d_{n}" for n in ("384_16", "64_7", "64_1", "64_3", "512_3")),
)  # fmt: skip
# What they take hangs on values, so those of all sizes are kept.
_BY_VALUES = (
    "nonzero", "masked_select", "unique",
    *(f"sweep_{n}" for n in ("nonzero", "masked_select", "unique", "bincount", "equal", "allclose", "where")),
)  # fmt: skip
# In which order a finished graph lets go of what it saved differs between releases of torch.
_ANY_END = ("layer_norm_train", "group_norm", "batch_norm_train", "encoder_layer")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")]


def stem_of(name: str) -> str:
    return name.partition("-")[0]


def by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """Cases of one operator at different shapes are one test."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(stem_of(name), []).append(name)
    return found


def card() -> VirtualDevice:
    profile = card_named("h100-80gb")
    return VirtualDevice(profile, ReplaySettings(rules_for("2.11.0"), profile.name, profile.total, profile.free))


def events_on_virtual_card(make: footprint_cases.Case) -> tuple[list[list[Any]], list[str], int]:
    """Events of a second run, as the recording lists them; estimated operators; allocations left over."""
    device = card()
    with device:
        for _ in range(2):
            device.estimated.clear()
            running = make()
            next(running)
            before = len(device.memory.requests)
            next(running)
            middle = len(device.memory.requests)
            running.close()
            del running
        rows = device.memory.requests.finish()
        left = device.memory.live - len(device.gemm_workspaces)
    out: list[list[Any]] = []
    live: dict[int, int] = {}
    for row in range(before, len(rows)):
        if row == middle:
            out.append(["|"])
        if rows.kind[row] == RequestKind.ALLOC:
            live[int(rows.id[row])] = sum(1 for e in out if e[0] == "alloc")
            out.append(["alloc", int(rows.size[row])])
        elif rows.kind[row] == RequestKind.FREE and int(rows.id[row]) in live:
            out.append(["free", live.pop(int(rows.id[row]))])
    if ["|"] not in out:
        out.append(["|"])
    return out, list(device.estimated), left


@pytest.fixture(autouse=True, scope="module")
def without_collection():
    """As inside ``case.measure()``: nothing may depend on a garbage collection."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture(autouse=True)
def collected_afterwards():
    """A virtual card is a cycle with all it has noted; those of thousands of cases are gigabytes."""
    yield
    gc.collect(0)


KNOWN = by_stem(n for n in CASES if stem_of(n) not in (*ALWAYS, *SOMETIMES))


@pytest.mark.parametrize("stem", KNOWN)
def test_events_equal_those_of_the_card(stem, monkeypatch):
    if stem in _BY_VALUES:
        for limit in ("LARGEST", "LARGEST_OF_FLOATS", "TOTAL"):
            monkeypatch.setattr(values, limit, GIB)
    for name in KNOWN[stem]:
        events, estimated, left = events_on_virtual_card(CASES[name])
        recorded = RECORDED[name]["second"]
        if stem in _ANY_END:
            split = recorded.index(["|"])
            events, recorded = ([*e[: split + 1], *sorted(e[split + 1 :])] for e in (events, recorded))
        assert events == recorded, name
        assert estimated == [], name
        assert left == 0, f"a result of {name} outlived its last reference"


@pytest.mark.parametrize("stem", SOMETIMES)
def test_what_is_not_estimated_is_equal(stem):
    """At least one case of each is exact, and one is not."""
    exact = 0
    names = by_stem(CASES)[stem]
    for name in names:
        events, estimated, left = events_on_virtual_card(CASES[name])
        assert estimated or events == RECORDED[name]["second"], name
        assert left == 0
        exact += not estimated
    assert exact < len(names)


@pytest.mark.parametrize("stem", ALWAYS)
def test_operators_with_unknown_scratch_are_listed(stem):
    for name in by_stem(CASES)[stem]:
        try:
            _, estimated, left = events_on_virtual_card(CASES[name])
        except UnsupportedError:  # its shape hangs on values
            continue
        assert estimated, f"{name} would be taken for exact"
        assert left == 0


def test_nearly_all_that_was_recorded_is_exact():
    """What the tests above would not notice: that more and more became estimated."""
    known = sum(map(len, KNOWN.values()))
    assert (known, len(CASES)) == (3622, 3663)


def test_first_matrix_product_takes_cublas_workspace_as_on_the_card():
    device = card()
    with device:
        running = footprint_cases.CASES["mm-small"]()
        next(running)
        before = len(device.memory.requests)
        next(running)
        rows = device.memory.requests.finish()
        running.close()
    taken = [int(s) for s, k in zip(rows.size[before:], rows.kind[before:], strict=True) if k == RequestKind.ALLOC]
    assert taken == [e[1] for e in RECORDED["mm-small"]["first"] if e[0] == "alloc"]


def test_flashinfer_interleave_asks_for_what_the_kernel_asked_for():
    pytest.importorskip("flashinfer")
    before = set(footprint_cases.CASES)
    footprint_cases.interleave_cases()
    names = set(footprint_cases.CASES) - before or {n for n in footprint_cases.CASES if n.startswith("nvfp4")}
    for name in sorted(names):
        make = footprint_cases.CASES[name]
        assert events_on_virtual_card(make)[0] == RECORDED[name]["second"], name
        del footprint_cases.CASES[name]
