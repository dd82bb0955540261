"""The pytest plugin: hooks and fixtures. What they do is in ``fragscope.testing``, imported when a test is measured.

A test is measured if it has the marker ``gpu_memory_budget`` or takes ``fragscope_recorder`` or ``fragscope_device``.
The recording covers the test's own body where it takes neither fixture, else everything from the fixture on.

There is no assertion here that pytest should rewrite (PYTEST_DONT_REWRITE).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from fragscope.errors import FragscopeError, NotMeasuredError, printable
from fragscope.testing import DEVICE, MARKER, RECORDER

if TYPE_CHECKING:
    from fragscope.testing.marker import Budget
    from fragscope.testing.options import Options
    from fragscope.testing.recording import Recording


@dataclass(slots=True)
class _Measured:
    """A test that is to be measured.

    Attributes:
        budget: what it is held to.
        recording: under way, or over.
        skipped: why it cannot be measured here.
        sections: for its report.
    """

    budget: Budget
    recording: Recording | None = None
    skipped: str | None = None
    sections: list[tuple[str, str]] = field(default_factory=list)


_MEASURED = pytest.StashKey[_Measured | None]()
_OPTIONS = pytest.StashKey["Options"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the command line and of pytest's ini file."""
    group = parser.getgroup("fragscope", "GPU memory budgets")
    group.addoption("--fragscope-card", metavar="NAME", help="Card of tests that take fragscope_device.")
    group.addoption(
        "--fragscope-require",
        action="store_true",
        default=None,
        help="A test with a GPU memory budget that is skipped fails.",
    )
    parser.addini("fragscope_card", "Card of tests that take fragscope_device.", default="")
    parser.addini(
        "fragscope_require", "A test with a GPU memory budget that is skipped fails.", type="bool", default=None
    )
    parser.addini(
        "fragscope_budget", "Limits of every measured test, such as peak_reserved = 8 GiB.", type="linelist", default=[]
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(peak_requested=, peak_allocated=, peak_reserved=, transient=, retained=, stranded=, card=): "
        "GPU memory that the test's own requests may need, such as '2 GiB'; None lifts a default.",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Read the budget of a test that is to be measured, and skip it where that cannot be."""
    fixtures = {RECORDER, DEVICE}.intersection(getattr(item, "fixturenames", ()))
    if not fixtures and item.get_closest_marker(MARKER) is None:
        return
    item.stash[_MEASURED] = None  # of an earlier run of this item
    with _one_line():
        _measure_in_future(item, fixtures)


def _measure_in_future(item: pytest.Item, fixtures: set[str]) -> None:
    from fragscope.testing import devices
    from fragscope.testing.marker import read_budget
    from fragscope.testing.properties import without_earlier

    options = _options(item.config)
    marks = [(mark.args, mark.kwargs) for mark in item.iter_markers(MARKER)]
    measured = _Measured(read_budget(marks, _place(item), options.defaults))
    item.stash[_MEASURED] = measured
    item.user_properties[:] = without_earlier(item.user_properties)
    if len(fixtures) > 1:
        pytest.fail(f"{_place(item)}: takes both {RECORDER} and {DEVICE}; a test is recorded once", pytrace=False)
    why_not = devices.why_no_virtual_card() if DEVICE in fixtures else devices.gpu().why_not()
    if why_not is not None:
        measured.skipped = f"its GPU memory cannot be measured: {why_not}"
        pytest.skip(measured.skipped)


@pytest.fixture
def fragscope_recorder(request: pytest.FixtureRequest) -> Iterator[Recording]:
    """Records the test on the GPU.

    ``with fragscope_recorder.phase("load"):`` marks what budgets are held against; ``stop()`` ends the recording and
    returns the Trace, which is ``fragscope_recorder.trace`` from then on.
    """
    from fragscope.testing import devices

    with _one_line():
        measured = _of_fixture(request, RECORDER)
    with _one_line(measured):
        measured.recording = recording = devices.record_on_gpu()
    yield recording
    recording.stop()


@pytest.fixture
def fragscope_device(request: pytest.FixtureRequest) -> Iterator[Recording]:
    """Runs the test on a virtual card, with or without a GPU.

    Code that says ``cuda`` runs at full size and has no data. ``phase(name)``, ``stop()`` and ``trace`` are those of
    ``fragscope_recorder``.
    """
    from fragscope.testing import devices

    with contextlib.ExitStack() as stack:
        with _one_line():
            measured = _of_fixture(request, DEVICE)
            options = _options(request.config)
            card = measured.budget.card or options.card
            virtual = devices.on_virtual_card(card, options.torch, request.config.rootpath)
            measured.recording = stack.enter_context(virtual)
        yield measured.recording


def _of_fixture(request: pytest.FixtureRequest, name: str) -> _Measured:
    measured: _Measured | None = request.node.stash.get(_MEASURED, None)
    if measured is None or measured.recording is not None:
        where = _place(request.node)
        pytest.fail(f"{where}: {name} came too late to record the test; take it as an argument", pytrace=False)
    return measured


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Record the test where no fixture does, and hold it to its budget when it is over."""
    measured = item.stash.get(_MEASURED, None)
    if measured is None:
        return (yield)
    recording = measured.recording
    if recording is None:
        from fragscope.testing import devices

        with _one_line(measured):
            recording = measured.recording = devices.record_on_gpu()
    try:
        result = yield
    except (pytest.skip.Exception, KeyboardInterrupt):
        recording.stop()
        raise
    except BaseException:
        with contextlib.suppress(pytest.fail.Exception):  # the test's own failure is what counts
            _judge(item, measured, recording, failed=True)
        raise
    _judge(item, measured, recording, failed=False)
    return result


def _judge(item: pytest.Item, measured: _Measured, recording: Recording, *, failed: bool) -> None:
    """Measure what was recorded, note the figures, and fail a test that is over its budget."""
    from fragscope.testing import sections
    from fragscope.testing.measuring import measure
    from fragscope.testing.properties import add_columns, properties

    bounds = measured.budget.bounds
    with _one_line():
        measurement = measure(recording.finished())
        comparisons = measurement.held_against(bounds)
        over = any(c.over for c in comparisons)
        if over or failed:
            text = sections.section(measurement, comparisons, item.config.rootpath)
            measured.sections.append((sections.TITLE, text))
    item.user_properties += properties(measurement, bounds)
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if hasattr(benchmark, "extra_info"):
        add_columns(benchmark, measurement)
    if over:
        pytest.fail(sections.headline(comparisons), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the section to a failure; say where a skip belongs; make it a failure where measuring is required."""
    report = yield
    measured = item.stash.get(_MEASURED, None)
    if measured is not None and call.when == "call":
        report.sections += measured.sections
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker(MARKER) is not None:
        shown = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = shown.removeprefix("Skipped: ")
        if measured is not None and measured.skipped is not None:
            path, line, _ = item.location
            report.longrepr = (str(item.config.rootpath / path), (line or 0) + 1, measured.skipped)
        with contextlib.suppress(FragscopeError):  # the settings are wrong, which every measured test says
            if _options(item.config).require:
                report.outcome = "failed"
                report.longrepr = f"{_place(item)}: GPU memory budget not measured: {printable(reason)}"
    return report


@contextlib.contextmanager
def _one_line(measured: _Measured | None = None) -> Iterator[None]:
    """An error raised on purpose ends the test with its message alone; what cannot be measured here skips it."""
    try:
        yield
    except FragscopeError as e:
        reason = printable(str(e), 1000)
        if measured is None or not isinstance(e, NotMeasuredError):
            raise pytest.fail.Exception(reason, pytrace=False) from None
        measured.skipped = f"its GPU memory cannot be measured: {reason}"
        raise pytest.skip.Exception(measured.skipped) from None


def _options(config: pytest.Config) -> Options:
    found = config.stash.get(_OPTIONS, None)
    if found is None:
        from fragscope.testing.options import read_options

        require: bool | None = config.getoption("fragscope_require")
        found = config.stash[_OPTIONS] = read_options(
            config.rootpath,
            card=config.getoption("fragscope_card") or config.getini("fragscope_card") or None,
            require=config.getini("fragscope_require") if require is None else require,
            ini_file=config.inipath.name if config.inipath is not None else "pytest's options",
            ini_budget=config.getini("fragscope_budget"),
        )
    return found


def _place(item: Any) -> str:
    """``file:line`` of a test."""
    path, line, _ = item.location
    return f"{printable(str(path))}:{(line or 0) + 1}"
