"""The HTML page, its figures and the traces behind them, decoded here as the page's script decodes them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from bokeh.document import Document
from builders import FP8, bare_case, case_of, fp8_results, replayed, replayed_phase, results_of
from driven_traces import Driven
from requests_of import trace_of

from fragscope.allocator import ReplaySettings, replay, rules_for
from fragscope.errors import UsageError
from fragscope.measure import lifetimes, timeline
from fragscope.report import page as report_page
from fragscope.report import write_html
from fragscope.report.drawing import unpack
from fragscope.report.figures import LINE_POINTS, map_figure, map_scale, raster
from fragscope.report.memory_map import Canvas, CellState, address_ranges, cell_shares
from fragscope.report.pools import MOST_SHARES, breakdown, places
from fragscope.report.traces import Recording, Unavailable, open_recording
from fragscope.results import Peak, PrecheckRecord, Results, VerifyRecord
from fragscope.trace import write_trace

MIB = 2**20
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"


class _Page(HTMLParser):
    """Elements and text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[str | None, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif self._open and self._open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def page(results: Results, folder: Path) -> _Page:
    out = folder / "page.html"
    write_html(results, folder, out)
    return _Page(out.read_text())


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    folder = tmp_path_factory.mktemp("fp8")
    return fp8_results(folder), folder


def test_a_page_has_the_figures_of_every_variant_and_loads_nothing(fp8: tuple[Results, Path]) -> None:
    seen = page(*fp8)
    for figure in ("~5,376.00", "~3,507.75", "~9,038.00", "gather has the smallest transient", "2.11", "h100-80gb"):
        assert figure in seen.words
    for tag, attributes in seen.tags:
        assert tag not in {"iframe", "object", "embed", "base", "form"}
        address = attributes.get("src") or attributes.get("href") or "#"
        assert address.startswith(("#", "data:")), (tag, address)
    policy = next(a["content"] for t, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert sum(kind is None for kind, _ in seen.scripts) == 2  # Bokeh once, and our own


def test_every_figure_has_words_for_those_who_do_not_see_it(fp8: tuple[Results, Path]) -> None:
    seen = page(*fp8)
    plots = [a for t, a in seen.tags if a.get("class") == "plot"]
    assert len(plots) == 4
    for plot in plots:
        assert plot["role"] == "img"
        assert re.search(r"peak.* ~?[\d,.]+ MiB", plot["aria-label"] or "")


def test_the_figures_are_bokeh_documents_whose_lines_keep_their_peaks(fp8: tuple[Results, Path]) -> None:
    payloads = [text for kind, text in page(*fp8).scripts if kind == "text/plain"]
    assert all(re.fullmatch(r"[A-Za-z0-9+/=]+", p) for p in payloads)
    document = Document.from_json(unpack(payloads[0])["doc"])
    (plot,) = document.roots
    lines = {
        (r.tags[0], r.glyph.y.field): r.data_source.data for r in plot.renderers if r.glyph.__class__.__name__ == "Line"
    }
    assert len(lines) == 6
    for letter, (_, name) in zip("ABC", FP8.values(), strict=True):
        measured = replayed_phase(name).measured
        assert measured is not None
        for counter in ("allocated", "reserved"):
            values = lines[letter, counter][counter]
            assert len(values) <= 4 * LINE_POINTS
            assert values.max() == np.float32(getattr(measured.peak, counter) / 1024**3)
            assert values[-1] == np.float32(getattr(measured.end, counter) / 1024**3)
        assert lines[letter, "allocated"]["allocated"][0] == np.float32(measured.base.allocated / 1024**3)


def test_the_memory_maps_carry_the_raster_as_computed(fp8: tuple[Results, Path]) -> None:
    results, folder = fp8
    recordings = [open_recording(case, folder) for case in results.cases]
    assert all(isinstance(r, Recording) for r in recordings)
    scale = map_scale(recordings)  # type: ignore[arg-type]
    payloads = [text for kind, text in page(results, folder).scripts if kind == "text/plain"]
    for recording, payload in zip(recordings, payloads[1:], strict=True):
        (plot,) = Document.from_json(unpack(payload)["doc"]).roots
        (image,) = plot.renderers
        (cells,) = image.data_source.data["image"]
        assert np.array_equal(cells, raster(recording, scale).cells)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["fp8-dsv3-tp8.fixed.default", "fp8-dsv3-tp8.newest.expandable", "streams-default", "oom-default"],
)
@pytest.mark.parametrize("shape", [(40, 70), (7, 333)])
def test_the_areas_of_a_memory_map_add_up_to_the_counters(name: str, shape: tuple[int, int]) -> None:
    trace = replayed(name).trace
    lives, line = lifetimes(trace), timeline(trace)
    rows = slice(len(trace.requests) // 5, len(trace.requests) - 3)
    begin = len(trace.requests) // 2
    ranges = address_ranges(lives, rows)
    canvas = Canvas(ranges, rows, begin, ranges.extent / shape[0], shape[1])
    shares = cell_shares(lives, canvas)
    cell = canvas.bytes_per_cell * canvas.events_per_cell
    assert canvas.shape[1] == min(shape[1], rows.stop - rows.start)
    assert shares.reserved.sum() * cell == pytest.approx(line.reserved[rows].sum(), rel=1e-9)
    assert (shares.base + shares.phase).sum() * cell == pytest.approx(line.active[rows].sum(), rel=1e-9)
    assert shares.stranded.sum() * cell == pytest.approx(line.stranded[rows].sum(), rel=1e-6)
    assert not shares.pool_idle.any()
    assert shares.phase.sum() > 0
    assert shares.base.sum() > 0


def test_holes_and_spikes_survive_a_coarse_memory_map() -> None:
    trace = replayed_phase("fp8-dsv3-tp8.orig.default").trace
    lives, line = lifetimes(trace), timeline(trace)
    assert line.measured is not None
    recording = Recording(trace, lives, line, line.measured)
    cells = raster(recording, map_scale([recording])).cells
    assert (cells == CellState.STRANDED).sum() > 500
    assert set(np.unique(cells)) >= {
        CellState.NOT_RESERVED, CellState.RELEASABLE, CellState.BASE, CellState.PHASE, CellState.STRANDED
    }  # fmt: skip


def pools_recording() -> Recording:
    """Expandable segments and a private pool, which loses its user before the end."""
    made = Driven("2.13", 1024 * MIB, 1024 * MIB, "expandable_segments:True")
    made.create_pool(1)
    made.alloc(0, 50 * MIB)
    made.begin_phase()
    for id_ in range(1, 5):
        made.alloc(id_, 30 * MIB, pool=1)
    for id_ in (1, 2, 4):
        made.free(id_)
    made.set_conf("expandable_segments:False")
    made.alloc(5, 12 * MIB)
    made.alloc(6, 64 * MIB)
    made.free(6)
    for id_ in range(7, 17):
        made.free(made_at(made, id_))
    made.release_pool(1)
    for id_ in range(20, 30):
        made.free(made_at(made, id_))
    trace = made.trace
    lives, line = lifetimes(trace), timeline(trace)
    assert line.measured is not None
    return Recording(trace, lives, line, line.measured)


def made_at(made: Driven, id_: int) -> int:
    """A small allocation, to let time pass."""
    made.alloc(id_, 512)
    return id_


def test_a_memory_map_shows_private_pools_and_what_expandable_segments_strand() -> None:
    recording = pools_recording()
    cells = raster(recording, map_scale([recording])).cells
    early, late = cells[:, : cells.shape[1] // 2], cells[:, -1]
    assert (early == CellState.POOL_IDLE).any()
    assert (late != CellState.POOL_IDLE).all()
    assert (late == CellState.RELEASABLE).any()
    assert np.isin(late, (CellState.STRANDED, CellState.PHASE_WITH_HOLES)).any()


def test_pointing_at_a_memory_map_says_what_kind_of_memory_it_is() -> None:
    recording = pools_recording()
    drawn = raster(recording, map_scale([recording]))
    kinds = places(recording.trace, recording.lives, drawn.canvas.rows, drawn.canvas.ranges)
    assert sorted(kinds.words) == ["expandable segment", "expandable segment, pool (0, 1)", "segment"]
    ranges, lives = drawn.canvas.ranges, recording.lives
    for piece in range(len(lives.pieces.addr)):
        segment = lives.pieces.segment[piece]
        offset = ranges.place(lives.pieces.addr[piece : piece + 1])
        word = kinds.words[kinds.word[np.searchsorted(kinds.offset, offset, side="right")[0] - 1]]
        assert ("expandable" in word) == bool(lives.segments.page[segment])
        assert ("pool (0, 1)" in word) == (lives.segments.pool[segment] == 1)
    payload = unpack(map_figure(recording, drawn, map_scale([recording])).payload)
    assert "expandable segment, pool (0, 1)" in str(payload)


def test_a_page_breaks_reserved_memory_down_by_pool(tmp_path: Path) -> None:
    recording = pools_recording()
    write_trace(recording.trace, tmp_path / "t.fscope")
    peak = Peak(1, 1, 1, 1, 1, 1, 55 * MIB)
    cases = [bare_case(trace="t.fscope", peak=peak, end=Peak(1, 1, 1, 1), allocs=30)]
    seen = page(results_of(cases), tmp_path)
    found = breakdown(recording)
    assert found is not None
    names = {share.words: share for share in found.shares}
    assert set(names) == {"default pool", "default pool, expandable", "pool (0, 1), expandable"}
    row = recording.timeline.at(found.event)
    assert row.reserved == recording.timeline.reserved.max()
    for counter in ("reserved", "active", "stranded", "pool_idle", "releasable"):
        assert sum(getattr(share, counter) for share in found.shares) == getattr(row, counter), counter
    for text in (*names, "idle in private pools at most", "55.00 MiB", "idle in a private pool that has users"):
        assert text in seen.words, text


def test_a_long_breakdown_ends_in_a_sum() -> None:
    made = Driven("2.11", 1024 * MIB, 1024 * MIB)
    for pool in range(20):
        made.alloc(pool, (pool + 2) * MIB, pool=pool)
    trace = made.trace
    recording = Recording(trace, lifetimes(trace), timeline(trace), slice(0, len(trace.requests)))
    found = breakdown(recording)
    assert found is not None
    assert [share.words for share in found.shares][-1] == f"{20 - MOST_SHARES} more"
    assert sum(share.reserved for share in found.shares) == recording.timeline.reserved[-1]


def test_plain_memory_needs_no_breakdown(fp8: tuple[Results, Path]) -> None:
    recording = open_recording(fp8[0].cases[0], fp8[1])
    assert isinstance(recording, Recording)
    assert breakdown(recording) is None
    assert "idle in a private pool that has users" not in page(*fp8).words


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    names = {"scenario": HOSTILE, "preset": HOSTILE, "params": {HOSTILE: HOSTILE}, "conf": HOSTILE, "message": HOSTILE}
    result = replayed_phase("fp8-dsv3-tp8.newest.default")
    write_trace(result.trace, tmp_path / "t.fscope")
    cases = [
        case_of(result, variant=HOSTILE, trace="t.fscope", card=HOSTILE, **names),
        bare_case(variant="b", role="fixed", outcome="oom", trace=HOSTILE, **names),
        bare_case(**(names | {"conf": "", "variant": HOSTILE})),
    ]
    results = results_of(cases, command=[HOSTILE], versions={HOSTILE: HOSTILE}, started=HOSTILE)
    seen = page(results, tmp_path)
    assert HOSTILE in seen.words
    assert not [t for t, _ in seen.tags if t == "img"]
    assert not [a for _, attributes in seen.tags for a in attributes if a.startswith("on")]
    assert all("alert" not in text for kind, text in seen.scripts if kind == "text/plain" or len(text) < 100_000)
    for _, text in [s for s in seen.scripts if s[0] == "text/plain"]:
        assert "alert" not in str(unpack(text))


def test_a_trace_that_cannot_be_used_is_said_at_its_case_and_costs_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = fp8_results(folder)
    outside = tmp_path / "outside.fscope"
    outside.write_bytes((folder / "traces" / "gather.fscope").read_bytes())
    whole = outside.read_bytes()
    (folder / "cut.fscope").write_bytes(whole[: len(whole) // 2])
    (folder / "text.fscope").write_text("not a trace")
    (folder / "empty.fscope").touch()
    (folder / "link.fscope").symlink_to(outside)
    (folder / "loop.fscope").symlink_to(folder / "loop.fscope")
    os.mkfifo(folder / "pipe.fscope")
    replace = msgspec.structs.replace
    reasons = {
        "../outside.fscope": "lies outside the folder",
        str(outside): "lies outside the folder",
        "link.fscope": "lies outside the folder",
        "cut.fscope": "cannot be used",
        "text.fscope": "cannot be used",
        "empty.fscope": "cannot be used: is empty",
        "loop.fscope": "The trace loop.fscope ",  # missing or unreadable: Python 3.13 resolves loops
        "pipe.fscope": "is missing",
        "traces": "is missing",
        "nope.fscope": "is missing",
        "a\0b": "cannot be read",
    }
    for name, reason in reasons.items():
        found = open_recording(replace(results.cases[0], trace=name), folder)
        assert isinstance(found, Unavailable), name
        assert reason in found.reason, name
        assert str(tmp_path) not in found.reason.replace(str(outside), ""), name
    cases = [results.cases[0], *(replace(results.cases[1], variant=n, trace=n) for n in reasons)]
    seen = page(results_of(cases), folder)
    assert len([a for _, a in seen.tags if a.get("class") == "plot"]) == 2
    assert len([a for _, a in seen.tags if a.get("class") == "missing"]) == len(reasons) + 1  # and the noscript text


def test_a_trace_that_contradicts_its_case_is_named(tmp_path: Path) -> None:
    result = replayed_phase("fp8-dsv3-tp8.newest.default")
    write_trace(result.trace, tmp_path / "t.fscope")
    case = case_of(result, trace="t.fscope", base=1, peak=msgspec.structs.replace(case_of(result).peak, allocated=7))
    seen = page(results_of([case]), tmp_path)
    assert "it shows a peak allocated of 7,616.05 MiB, the results say 7 B" in seen.words


def test_what_a_card_showed_of_the_model_is_a_note_of_its_case(tmp_path: Path) -> None:
    refuted = bare_case(
        device="cuda",
        exact=False,
        verify=VerifyRecord(2000, 3, "peak reserved: <b>"),
        precheck=PrecheckRecord(None, 5, False, "it was run without knowing what it needs"),
    )
    write_html(results_of([refuted]), tmp_path, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert (
        '<li class="bad"><b>model</b> the allocator model differs from the recording in 3 of 2,000 comparisons' in text
    )
    assert "peak reserved: &lt;b&gt;" in text
    assert "<b>before</b> it was run without knowing what it needs" in text
    assert "In 1 of 1 cases the allocator model differs" in text


def test_a_page_without_figures_needs_no_script(tmp_path: Path) -> None:
    seen = page(results_of([bare_case()]), tmp_path)
    assert "No trace was kept for this case." in seen.words
    assert not seen.scripts
    assert "Nothing was measured." in page(results_of([]), tmp_path).words


def test_a_page_of_36_cases_stays_small_and_holds_bokeh_once(fp8: tuple[Results, Path]) -> None:
    results, folder = fp8
    four = [*results.cases, msgspec.structs.replace(results.cases[0], variant="again", role="proposed")]
    many = [msgspec.structs.replace(c, preset=f"p{i}") for i in range(9) for c in four]
    out = folder / "many.html"
    write_html(results_of(many), folder, out)
    assert out.stat().st_size < 3_000_000
    assert len(_Page(out.read_text()).scripts) == 9 * 5 + 2


def test_without_the_extra_the_page_says_what_to_install_and_the_rest_works(tmp_path: Path) -> None:
    code = """
import sys
for name in ("bokeh", "jinja2", "torch"):
    sys.modules[name] = None
from pathlib import Path
from builders import bare_case, results_of
from fragscope.errors import UsageError
from fragscope.report import markdown, results_table, write_html
results = results_of([bare_case()])
assert "dsv3-tp8" in markdown(results)
results_table(results)
try:
    write_html(results, Path(), Path("x.html"))
except UsageError as e:
    print(e)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r'an HTML report needs (bokeh|jinja2)[\w.]*: pip install "fragscope\[report\]"\n', done.stdout)
    assert UsageError.exit_code == 2


def test_nothing_in_the_report_imports_torch(tmp_path: Path) -> None:
    code = "import sys, fragscope.report.page; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_html(results_of([bare_case()]), tmp_path, out)
    assert out.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_memory_past_the_allocator_has_a_line_of_its_own(tmp_path: Path) -> None:
    """20 MiB reserved; 30 and then 10 past the allocator: 50 together at most, 30 at the end."""
    requests = [("alloc", 0, 20 * MIB), ("raw", 1, 30 * MIB), ("raw free", 1, 30 * MIB), ("raw", 2, 10 * MIB)]
    replayed = replay(trace_of(*requests), ReplaySettings(rules_for("2.11"), "h100-80gb", 80 << 30, 70 << 30))
    write_trace(replayed.trace, tmp_path / "raw.fscope")
    peak = Peak(allocated=20 * MIB, reserved=20 * MIB, raw=30 * MIB, hbm=50 * MIB)
    more = bare_case(variant="more", role="fixed", peak=Peak(raw=60 * MIB, hbm=60 * MIB))
    seen = page(results_of([bare_case(trace="raw.fscope", peak=peak, allocs=1), more]), tmp_path)
    assert "list-stack has the smallest peak HBM, 50.00 MiB; more has 10.00 MiB more." in seen.words
    assert "past the allocator at most30.00 MiBpeak HBM50.00 MiB" in seen.words.replace("MiB peak", "MiBpeak")
    assert any("with memory past the allocator 50.00 MiB" in (a.get("aria-label") or "") for _, a in seen.tags)
    payload = next(text for kind, text in seen.scripts if kind == "text/plain")
    (plot,) = Document.from_json(unpack(payload)["doc"]).roots
    lines = [r for r in plot.renderers if r.glyph.__class__.__name__ == "Line"]
    (line,) = (r.data_source.data["hbm"] for r in lines if r.glyph.y.field == "hbm")
    assert line.max() == 50
    assert line[-1] == 30
    assert plot.y_range.end >= 50


def test_pages_without_such_memory_say_nothing_of_it(fp8: tuple[Results, Path]) -> None:
    assert "past the allocator" not in page(*fp8).words


def test_of_a_large_run_the_page_draws_the_first_settings_of_each_preset_and_what_went_wrong(
    fp8: tuple[Results, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, folder = fp8
    confs = ("", "max_split_size_mb:20", "expandable_segments:True")
    cases = [msgspec.structs.replace(case, conf=conf) for conf in confs for case in results.cases]
    wrong = len(results.cases)  # the first of the second conf
    cases[wrong] = msgspec.structs.replace(cases[wrong], outcome="oom")

    def drawn(name: str, **options: bool) -> tuple[int, str]:
        write_html(results_of(cases), folder, folder / name, **options)
        html = (folder / name).read_text()
        return html.count('<script type="text/plain">'), html

    maps = len(results.cases)
    assert drawn("whole.html")[0] == 3 * (maps + 1), "a map for each case, and each group on one axis"
    monkeypatch.setattr(report_page, "MOST_MAPS", len(cases) - 1)
    count, html = drawn("some.html")
    assert count == 2 * (maps + 1)
    assert html.count("fragscope report --all-figures draws all") == maps
    assert drawn("all.html", all_figures=True)[0] == 3 * (maps + 1)
