"""The virtual device must ask for what a real card was asked for, operator by operator.

Expected events: tests/data/footprints, recorded by tests/gpu/record_footprints.py on the card that ``versions`` names.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fragscope.allocator import ReplaySettings, card_named, rules_for  # noqa: E402
from fragscope.errors import UnsupportedError  # noqa: E402
from fragscope.record.virtual import VirtualDevice  # noqa: E402
from fragscope.trace import RequestKind  # noqa: E402

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "gpu"))

import footprint_cases  # noqa: E402
import program_cases  # noqa: E402, F401 - adds its cases to footprint_cases.COMPOSITES

RECORDED = json.loads((TESTS / "data" / "footprints" / "h100-torch-2.11.0.json").read_text())["cases"]
# Operators whose scratch depends on a kernel's launch shape; the virtual device lists them as estimated instead.
_REDUCTIONS = ("sum", "mean", "amax", "amin", "max", "min", "any", "all", "argmax", "prod", "var", "std", "norm")
UNKNOWN = (
    "randperm", "foreach_norm", "index_put_accumulate", "sort", "topk", "cumsum", "sdpa", "bincount_free_histc",
    *(f"{name}_{how}" for name in _REDUCTIONS for how in ("all", "rows", "columns")),
    "amax_quantize",
)  # fmt: skip
pytestmark = pytest.mark.torch


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


def is_unknown(name: str) -> bool:
    stem = name.rpartition("-")[0] or name
    return stem in UNKNOWN or any(stem.startswith(f"{n}_") for n in ("sort", "topk", "cumsum"))


@pytest.fixture(autouse=True, scope="module")
def without_collection():
    """As inside ``case.measure()``: nothing may depend on a garbage collection."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


KNOWN = [n for n in footprint_cases.CASES if not is_unknown(n)]


@pytest.mark.parametrize("name", KNOWN)
def test_events_equal_those_of_the_card(name):
    events, estimated, left = events_on_virtual_card(footprint_cases.CASES[name])
    assert events == RECORDED[name]["second"]
    assert estimated == []
    assert left == 0, "a result outlived its last reference"


@pytest.mark.parametrize("name", [n for n in footprint_cases.CASES if is_unknown(n)])
def test_operators_with_unknown_scratch_are_listed(name):
    _, estimated, left = events_on_virtual_card(footprint_cases.CASES[name])
    assert estimated, f"{name} would be taken for exact"
    assert left == 0


@pytest.mark.parametrize("name", [n for n in footprint_cases.COMPOSITES if n in RECORDED])
def test_what_is_made_of_many_operators_is_estimated_or_equal(name):
    events, estimated, left = events_on_virtual_card(footprint_cases.COMPOSITES[name])
    if not estimated:
        recorded = RECORDED[name]["second"]
        split = recorded.index(["|"])
        assert events[: split + 1] == recorded[: split + 1]
        # In which order a finished graph lets go of what it saved differs between releases of torch.
        assert sorted(events[split:]) == sorted(recorded[split:])
    assert left == 0


NEEDS_VALUES = (
    "nonzero", "masked_select", "unique", "item", "isin", "any_nan", "multinomial", "adafactor_step",
)  # fmt: skip
NOT_RECORDED = [n for n in footprint_cases.COMPOSITES if n not in RECORDED]


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_cases_that_wait_for_a_card_run_here(name):
    """What a card does is not known yet; nothing may be left over, and what needs values may say so."""
    try:
        _, _, left = events_on_virtual_card(footprint_cases.COMPOSITES[name])
    except UnsupportedError:
        assert name.partition("-")[0] in NEEDS_VALUES
        return
    assert left == 0


@pytest.mark.parametrize(
    "op",
    [
        lambda x: torch.where(x > 0, x, x.half()),
        lambda x: torch.complex(x, x).abs(),
        lambda x: torch.complex(x, x).angle(),
        lambda x: x.t().softmax(-1),
    ],
    ids=["where of two types", "abs of complex", "angle of complex", "softmax of strided"],
)
def test_kernels_that_convert_or_copy_first_are_listed(op):
    """Their sources make whole temporaries that no recording here has."""
    device = card()
    with device:
        op(torch.ones(40, 50, device="cuda"))
    assert device.estimated


def test_common_blocks_are_not_estimated():
    """What the cases above would not notice: that everything became estimated."""
    for name in (
        "linear_3d_bias",
        "layer_norm_train",
        "dropout_train",
        "adamw_step",
        "rope",
        "kv_cache_cat",
        "matmul_3d",
    ):
        assert events_on_virtual_card(footprint_cases.COMPOSITES[name])[1] == [], name


def test_the_recording_shows_that_the_unknown_are_rightly_so():
    """At least one size of most of them takes memory that the virtual device does not ask for."""
    differing = 0
    for name in footprint_cases.CASES:
        if is_unknown(name):
            events, _, _ = events_on_virtual_card(footprint_cases.CASES[name])
            differing += events != RECORDED[name]["second"]
    assert differing > 40


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
