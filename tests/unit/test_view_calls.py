"""``view(shape, int)``, which #40310 had to give up: what the release at hand makes of it, and what others did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

MEASURED = json.loads((Path(__file__).parents[1] / "data" / "torch_calls" / "view_shape_and_int.json").read_text())


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def expected() -> dict[str, object]:
    """What the newest measured release up to the one at hand does."""
    known = [v for v in MEASURED["releases"] if release(v) <= release(torch.__version__)]
    outcome: dict[str, object] = MEASURED["releases"][max(known, key=release)]
    return outcome


@pytest.mark.parametrize("number", MEASURED["ints"])
def test_the_int_is_ignored_or_refused(number: int) -> None:
    x = torch.zeros(MEASURED["tensor"])
    shape = torch.Size(MEASURED["shape"])
    if "error" in expected():
        with pytest.raises(TypeError, match="invalid combination of arguments"):
            x.view(shape, number)
    else:
        assert list(x.view(shape, number).shape) == expected()["result"]


def test_the_unpacked_shape_has_one_dimension_more() -> None:
    x = torch.zeros(MEASURED["tensor"])
    assert list(x.view(*torch.Size(MEASURED["shape"]), -1).shape) == MEASURED["unpacked"]["result"]


def test_the_documentation_has_the_measured_releases() -> None:
    text = (Path(__file__).parents[2] / "docs" / "stream-order.md").read_text()
    for version, outcome in MEASURED["releases"].items():
        told = "`TypeError`" if "error" in outcome else "`[experts, rows]`, the int is ignored"
        assert f"| {version} | {told} |" in text
