"""The page of ``fragscope thresholds``, decoded here as its script decodes it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from bokeh.document import Document
from bokeh.models.annotations import Label, Span

from fragscope.allocator import ReplaySettings, card_named, rules_for
from fragscope.report import write_thresholds_html
from fragscope.report.drawing import unpack
from fragscope.thresholds import MoeModel, Thresholds, shipped_models, thresholds

GIB = 1024**3
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"


def settings(free: int | None = None) -> ReplaySettings:
    card = card_named("h100-80gb")
    return ReplaySettings(rules_for("2.11.0"), card.name, card.total, card.free if free is None else free)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Thresholds]]:
    under = settings(16 * GIB)
    models = [shipped_models()["nemotron-3-super"], MoeModel("mine", 64, 4, 4096, 1024, source=HOSTILE)]
    found = [thresholds(model, 128, under) for model in models]
    out = tmp_path_factory.mktemp("page") / "thresholds.html"
    write_thresholds_html(found, under, out)
    return out.read_text(), found


def figures(page: str) -> list[Document]:
    payloads = re.findall(r'<script type="text/plain">([A-Za-z0-9+/=]+)</script>', page)
    return [Document.from_json(unpack(payload)["doc"]) for payload in payloads]


def test_a_page_loads_nothing_and_runs_only_its_own_scripts(made):
    page, _ = made
    assert "default-src 'none'; script-src 'sha256-" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', re.sub(r"(?s)<script.*?</script>", "", page))
    assert "alert(1)</script><img" not in page
    assert "{{7*7}}" in page  # shown, and not computed


def test_curves_are_what_was_found(made):
    page, found = made
    for document, f in zip(figures(page), found, strict=True):
        (plot,) = document.roots
        (line,) = plot.renderers
        assert np.array_equal(line.data_source.data["tokens"], [p.tokens for p in f.curve])
        assert np.allclose(line.data_source.data["reserved"] * GIB, [p.reserved for p in f.curve])


def test_every_limit_within_the_axis_is_marked_and_the_one_that_binds_is_solid(made):
    page, found = made
    (plot,) = figures(page)[0].roots
    spans = {s.location: s.line_dash for s in plot.center if isinstance(s, Span) and s.dimension == "height"}
    words = {label.text for label in plot.center if isinstance(label, Label)}
    f = found[0]
    assert f.binds == "memory"
    assert set(spans) == {f.chunk, f.memory, 300_000, f.grid[128]}
    assert [tokens for tokens, dash in spans.items() if dash == []] == [f.memory]
    assert words == {"recommended", "memory", "upstream cap", "launch grid", "free memory"}
    heights = [s.location for s in plot.center if isinstance(s, Span) and s.dimension == "width"]
    assert heights == [16.0]


def test_free_memory_beyond_every_peak_is_not_drawn(tmp_path: Path):
    under = settings()
    f = thresholds(shipped_models()["gpt-oss-20b"], 128, under)
    assert max(p.reserved for p in f.curve) * 1.3 < under.capacity
    write_thresholds_html([f], under, tmp_path / "page.html")
    (plot,) = figures((tmp_path / "page.html").read_text())[0].roots
    assert not [s for s in plot.center if isinstance(s, Span) and s.dimension == "width"]
