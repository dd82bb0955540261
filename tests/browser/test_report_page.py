"""The report page in a real Chromium, offline: it draws, it fits, it answers, and it asks nobody for anything."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from builders import bare_case, fp8_results, results_of

from fragscope.report import write_html

pytestmark = pytest.mark.browser

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-default-apps", "--disable-sync", "--no-first-run",
]  # fmt: skip
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing; install the distribution's chromium to run the browser tests")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with three drawn variants, and a second group in which nearly everything went wrong."""
    folder = tmp_path_factory.mktemp("page")
    drawn = fp8_results(folder).cases
    hostile = {"scenario": HOSTILE, "preset": HOSTILE, "message": HOSTILE}
    cases = [
        *drawn,
        msgspec.structs.replace(drawn[2], variant=HOSTILE, role="original", **hostile),
        bare_case(
            variant="a-name-without-any-place-to-break-" * 4, role="fixed", outcome="oom", trace="../x", **hostile
        ),
    ]
    out = folder / "report.html"
    write_html(results_of(cases, planned=9, complete=False), folder, out)
    return out


class Opened:
    """A page and everything it complained about or asked for."""

    def __init__(self, browser: Any, file: Path, width: int, **options: Any) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        self.page = self.context.new_page()
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda e: self.problems.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(file.as_uri())

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def draw_all(self) -> list[Any]:
        """Scroll to each figure, as a reader would, and wait for it."""
        plots = self.page.locator(".plot").all()
        for number, plot in enumerate(plots):
            plot.scroll_into_view_if_needed()
            self.page.locator(".plot").nth(number).and_(self.page.locator("[data-drawn]")).wait_for()
        return plots


def fits_its_width(opened: Opened) -> None:
    """Nothing of the page and its figures lies beyond the window."""
    opened.draw_all()
    width = opened.page.viewport_size["width"]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    for plot in opened.page.locator(".plot > *").all():
        box = plot.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


@pytest.fixture(params=[1280, 400], ids=["1280 px", "400 px"])
def opened(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Opened]:
    page = Opened(browser, file, request.param)
    yield page
    page.context.close()


def colors(png: bytes) -> int:
    """How many different colours an RGB or RGBA picture has."""
    stream = io.BytesIO(png[8:])
    width = height = channels = 0
    data = b""
    while header := stream.read(8):
        length, kind = struct.unpack(">I4s", header)
        body = stream.read(length)
        stream.read(4)
        if kind == b"IHDR":
            width, height = struct.unpack(">II", body[:8])
            channels = {2: 3, 6: 4}[body[9]]
        elif kind == b"IDAT":
            data += body
    raw = zlib.decompress(data)
    stride = width * channels + 1
    # Filtered rows differ from pixels, but a blank picture has the same few bytes in every row.
    return len({raw[y * stride : (y + 1) * stride] for y in range(height)})


def test_it_draws_everything_without_a_complaint_or_a_request(opened: Opened, file: Path) -> None:
    plots = opened.draw_all()
    assert len(plots) == 6
    assert opened.problems == []
    assert opened.requests == [file.as_uri()]
    assert opened.page.evaluate("window.hacked") is None


def test_it_fits_its_width(opened: Opened) -> None:
    fits_its_width(opened)


def test_the_figures_are_not_blank(opened: Opened) -> None:
    for plot in opened.draw_all():
        assert plot.locator("canvas").count() > 0
        assert colors(plot.screenshot()) > 20


def test_a_variant_can_be_hidden_and_shown(browser: Any, file: Path) -> None:
    opened = Opened(browser, file, 1280)
    figure = opened.page.locator(".progress").first
    opened.draw_all()
    plot, button = figure.locator(".plot"), figure.get_by_role("button", name="list-stack")
    button.scroll_into_view_if_needed()

    def picture() -> bytes:
        # Two frames: one for Bokeh to draw in, one for the picture to show it.
        opened.page.evaluate("() => new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))")
        shot: bytes = plot.screenshot()
        return shot

    button.focus()
    before = picture()
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    hidden = picture()
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert hidden != before
    assert picture() == before
    assert opened.problems == []
    opened.context.close()


def test_the_memory_map_answers_what_lies_where(browser: Any, file: Path) -> None:
    opened = Opened(browser, file, 1280)
    opened.draw_all()
    plot = opened.page.locator(".plot").nth(1)
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = opened.page.locator(".bk-Tooltip")
    tip.wait_for()
    text = tip.evaluate("(tip) => tip.shadowRoot.textContent")
    assert "live from inside the phase" in text or "live since before the phase" in text
    assert "0x" in text
    assert opened.problems == []
    opened.context.close()


def test_a_dark_scheme_changes_page_and_figures(browser: Any, file: Path) -> None:
    opened = Opened(browser, file, 1280, color_scheme="dark")
    opened.draw_all()
    ground = "getComputedStyle(document.body).backgroundColor"
    fill = "Bokeh.documents.at(-1).roots()[0].background_fill_color"
    assert opened.page.evaluate(ground) == "rgb(21, 24, 28)"
    assert "#15181c" in str(opened.page.evaluate(f"JSON.stringify({fill})"))
    opened.page.emulate_media(color_scheme="light")
    opened.draw_all()
    assert opened.page.evaluate(ground) == "rgb(255, 255, 255)"
    opened.page.wait_for_function(f"JSON.stringify({fill}).includes('#ffffff')")
    assert opened.problems == []
    opened.context.close()


def test_without_scripts_the_numbers_are_still_there(browser: Any, file: Path) -> None:
    opened = Opened(browser, file, 1280, java_script_enabled=False)
    text = opened.page.inner_text("body")
    assert "The figures need JavaScript" in text
    assert "3,507.75" in text
    opened.context.close()
