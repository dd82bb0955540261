"""How the engine's managers of the all-to-all workspace behave from layer to layer, and what they refuse."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[2] / "scenarios"))

import scenario_a2a_workspace as workspace
from moe_alltoall import MoeLayer, aux_bytes, needed_by, release_of

pytestmark = pytest.mark.torch
NOW = release_of("0.6.11.post2")
ROWS = 8 * 8192
BASE = MoeLayer("nvfp4", hidden=7168, top_k=8, experts=256, tokens=8192)
HEAD = BASE.sent_as("bf16")


class Block:
    def __init__(self, held: list[int], size: int) -> None:
        self.held, self.size = held, size
        held.append(size)

    def free(self) -> None:
        self.held.remove(self.size)


class Case:
    """What managers use of a case."""

    flashinfer = "0.6.11.post2"
    ranks = 8

    def __init__(self) -> None:
        self.held: list[int] = []
        self.most = 0

    def device_memory(self, size: int, how: str) -> Block:
        assert how == "cuMemCreate"
        block = Block(self.held, size)
        self.most = max(self.most, sum(self.held))
        return block


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace.torch.cuda, "empty_cache", lambda: None)


def built(kind: Any, *layers: MoeLayer) -> Case:
    case = Case()
    manager = kind(case)
    for layer in layers:
        manager.initialize(layer)
    return case


SMALL, LARGE = needed_by(NOW, 8, BASE), needed_by(NOW, 8, HEAD)


@pytest.mark.parametrize(
    ("kind", "held", "most"),
    [
        (workspace.OneShot, [SMALL], SMALL),
        (workspace.WorstCase, [LARGE], LARGE),
        (workspace.Grown, [SMALL, LARGE], SMALL + LARGE),
        (workspace.GrownByParts, [SMALL, LARGE], SMALL + LARGE),
        (workspace.GrownFreed, [LARGE], LARGE),
    ],
)
def test_what_is_held_after_layers_and_their_head(kind, held, most):
    case = built(kind, BASE, BASE, HEAD)
    assert (case.held, case.most) == (held, most)


@pytest.mark.parametrize("kind", [workspace.Grown, workspace.GrownByParts, workspace.GrownFreed])
def test_nothing_grows_where_the_largest_comes_first(kind):
    assert built(kind, HEAD, BASE, HEAD).held == [LARGE]


def test_what_is_made_for_more_tokens_takes_their_tables_too():
    """The same rows of another layout: half the tokens of twice the width, then the other way round."""
    narrow, wide = replace(BASE, tokens=8192, hidden=3584), replace(BASE, tokens=4096)
    case = built(workspace.Grown, wide, narrow)
    assert case.held == [needed_by(NOW, 8, wide), needed_by(NOW, 8, narrow)]


def test_by_parts_the_widest_rows_of_each_way_count_though_no_layer_has_both():
    """Dispatch of a bf16 layer 4,096 wide (8,192 + 64 bytes a row), combine of an NVFP4 one of 7,168 (14,336)."""
    other = replace(HEAD, hidden=4096)
    assert built(workspace.Grown, BASE, other).held == [SMALL], "as a whole it is the smaller one"
    assert built(workspace.GrownByParts, BASE, other).held[-1] == aux_bytes(NOW, 8, 8192) + ROWS * (8192 + 64 + 14_336)


@pytest.mark.parametrize("kind", [workspace.Grown, workspace.GrownByParts, workspace.GrownFreed])
def test_layers_that_route_differently_are_refused(kind):
    with pytest.raises(AssertionError, match="heterogeneous top_k: 6, was built with 8"):
        built(kind, BASE, replace(HEAD, top_k=6))
    with pytest.raises(AssertionError, match="heterogeneous num_experts: 128, was built with 256"):
        built(kind, BASE, replace(HEAD, experts=128))


def test_before_nobody_looked():
    assert built(workspace.OneShot, BASE, replace(HEAD, top_k=6, experts=128)).held == [SMALL]
