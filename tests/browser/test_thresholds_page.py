"""The page of ``fragscope thresholds`` in a real Chromium, offline: it draws, it fits, and it answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report_page import Opened, browser, colors, fits_its_width  # noqa: F401 - a fixture

from fragscope.allocator import ReplaySettings, card_named, rules_for
from fragscope.report import write_thresholds_html
from fragscope.thresholds import MoeModel, shipped_models, thresholds

pytestmark = pytest.mark.browser

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = card_named("h100-80gb")
    settings = ReplaySettings(rules_for("2.11.0"), card.name, card.total, card.free)
    hostile = MoeModel("a-name-without-any-place-to-break-" * 2, 64, 4, 4096, 1024, source=HOSTILE)
    models = [shipped_models()["nemotron-3-super"], shipped_models()["llama-4-scout"], hostile]
    out = tmp_path_factory.mktemp("page") / "thresholds.html"
    write_thresholds_html([thresholds(model, 128, settings) for model in models], settings, out)
    return out


@pytest.fixture(params=[1280, 400], ids=["1280 px", "400 px"])
def opened(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Opened]:  # noqa: F811
    page = Opened(browser, file, request.param)
    yield page
    page.context.close()


def test_it_draws_everything_without_a_complaint_or_a_request(opened: Opened, file: Path) -> None:
    plots = opened.draw_all()
    assert len(plots) == 3
    assert all(colors(plot.screenshot()) > 20 for plot in plots)
    assert opened.problems == []
    assert opened.requests == [file.as_uri()]
    assert opened.page.evaluate("window.hacked") is None


def test_it_fits_its_width(opened: Opened) -> None:
    fits_its_width(opened)


def test_a_curve_answers_what_a_launch_needs(browser: Any, file: Path) -> None:  # noqa: F811
    opened = Opened(browser, file, 1280)
    opened.draw_all()
    plot = opened.page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = opened.page.locator(".bk-Tooltip")
    tip.wait_for()
    text = tip.evaluate("(tip) => tip.shadowRoot.textContent")
    assert "CTAs" in text
    assert "reserved" in text
    assert opened.problems == []
    opened.context.close()


def test_limits_stand_in_the_table(browser: Any, file: Path) -> None:  # noqa: F811
    opened = Opened(browser, file, 1280, java_script_enabled=False)
    text = opened.page.inner_text("#limits")
    for figure in ("nemotron-3-super", "378,344", "300,000", "29,557", "upstream cap"):
        assert figure in text
    opened.context.close()
