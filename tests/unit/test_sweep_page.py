"""The page of a sweep: its numbers, its figure decoded, and nothing that a stranger's text could do."""

from __future__ import annotations

import base64
import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fragscope.results import Curve, Point, SweepResults

pytest.importorskip("bokeh")

from fragscope.report import write_sweep_html
from fragscope.report.drawing import unpack

MIB = 2**20
HOSTILE = "</script><script>alert(1)</script>"


def point(size: int, reserved: int, outcome: str = "ok") -> Point:
    return Point(
        size=size,
        outcome=outcome,
        peak_allocated=reserved,
        peak_reserved=reserved,
        transient=0,
        exact=True,  # type: ignore[arg-type]
    )


def curve(variant: str, largest: int | None, points: list[Point], **fields: object) -> Curve:
    values = {"conf": "", "torch": "2.13", "card": "h100-80gb", "capacity": 600 * MIB, "limited_by": "", "problem": ""}
    return Curve(name=f"grow/one/{variant}", largest=largest, points=points, **{**values, **fields})  # type: ignore[arg-type]


def page(tmp_path: Path, curves: list[Curve], **fields: object) -> str:
    values = {"parameter": "tokens", "low": 10, "high": 1000, "step": 1, "complete": True, **fields}
    write_sweep_html(SweepResults(curves=curves, **values), tmp_path / "sweep.html")  # type: ignore[arg-type]
    return (tmp_path / "sweep.html").read_text()


def decoded(column: dict[str, Any]) -> list[float]:
    raw = gzip.decompress(base64.b64decode(column["array"]["data"]))
    return np.frombuffer(raw, dtype=column["dtype"]).tolist()  # type: ignore[no-any-return]


def columns(html: str) -> list[dict[str, list[float]]]:
    """Data of every line drawn, in order."""
    (payload,) = re.findall(r'<script type="text/plain">([A-Za-z0-9+/=]+)</script>', html)
    found: list[dict[str, list[float]]] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if node.get("name") == "ColumnDataSource":
                entries = node["attributes"]["data"]["entries"]
                found.append({name: decoded(column) for name, column in entries})
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(unpack(payload))
    return found


def test_numbers_stand_in_the_table_and_curves_in_the_figure(tmp_path: Path) -> None:
    points = [point(10, 20 * MIB), point(500, 600 * MIB), point(501, 0, "oom")]
    html = page(
        tmp_path,
        [curve("twice", 500, points, limited_by="at 501: oom"), curve("once", None, [], problem="crash at 10: no")],
    )
    assert ">500</td>" in html
    assert ">600.00</td>" in html
    assert "at 501: oom" in html
    assert '<strong class="bad">crash at 10: no</strong>' in html
    assert 'aria-label="Peak reserved over tokens. Largest that fits: A twice: 500; B once: no answer."' in html
    assert columns(html) == [{"size": [10, 500], "reserved": [20.0, 600.0], "allocated": [20.0, 600.0]}]
    assert "10 to 1,000" in html


def test_without_anything_that_ran_there_is_no_figure(tmp_path: Path) -> None:
    html = page(tmp_path, [curve("twice", None, [point(10, 0, "oom")], limited_by="at 10: oom")])
    assert "there is nothing to draw" in html
    assert "<script" not in html


def test_an_unfinished_sweep_says_so(tmp_path: Path) -> None:
    assert "The sweep was not finished" in page(tmp_path, [], complete=False)
    html = page(tmp_path, [curve("twice", 10, [point(10, 20 * MIB)])], complete=False)
    assert "not finished</td>" in html
    assert "every size tried fits" not in html


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    points = [point(10, 20 * MIB)]
    html = page(
        tmp_path, [curve(HOSTILE, 10, points, limited_by=HOSTILE, conf=HOSTILE)], parameter=HOSTILE, command=[HOSTILE]
    )
    assert "alert(1)</script>" not in html
