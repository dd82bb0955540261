"""Opening the Trace of a case: never outside the folder, and never an error that costs the rest of the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fragscope.errors import FragscopeError, printable
from fragscope.measure import Lifetimes, Timeline, lifetimes, timeline
from fragscope.results import Case, trace_file
from fragscope.trace import RequestKind, Trace, load_trace


@dataclass(frozen=True, slots=True)
class Recording:
    """A case's Trace, measured.

    Attributes:
        trace: as read.
        lives: when segments and blocks lived.
        timeline: counters after every request.
        rows: those of the measured phase, or of the whole Trace where none is marked. What stood when recording began
            is told before the first event, and is there after the first of these rows.
    """

    trace: Trace
    lives: Lifetimes
    timeline: Timeline
    rows: slice

    @property
    def events(self) -> int:
        """Requests of the phase, without its marks and without what stood when recording began."""
        kinds = self.trace.requests.kind[max(self.rows.start, self.trace.requests.start_rows) : self.rows.stop]
        return len(kinds) - int(((kinds == RequestKind.PHASE_BEGIN) | (kinds == RequestKind.PHASE_END)).sum())


def first_row(trace: Trace) -> int:
    """The row from which on a Trace's course is shown: the last that tells what stood when recording began, or 0."""
    return max(trace.requests.start_rows - 1, 0)


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why a case has no figures of its course.

    Attributes:
        reason: one printable sentence without the case's name.
    """

    reason: str


def open_recording(case: Case, folder: Path) -> Recording | Unavailable:
    """Read and measure the Trace of a case.

    Args:
        case: names the file, relative to ``folder``.
        folder: where the results file lies; nothing outside it is read, whatever the name or a link says.
    """
    file = trace_file(case, folder)
    if isinstance(file, str):
        return Unavailable(file)
    shown = printable(case.trace or "", 160)
    try:
        trace = load_trace(file)
        lives = lifetimes(trace)
        line = timeline(trace, lives)
    except FragscopeError as e:
        return Unavailable(f"The trace {shown} cannot be used: {_without_path(e)}.")
    except (OSError, ValueError, RuntimeError) as e:
        return Unavailable(f"The trace {shown} cannot be read ({printable(type(e).__name__)}).")
    if len(trace.requests) == 0:
        return Unavailable(f"The trace {shown} holds no events.")
    return Recording(trace, lives, line, line.measured or slice(first_row(trace), len(trace.requests)))


def _without_path(error: FragscopeError) -> str:
    """The reason alone: a page should not carry the paths of the machine it was made on."""
    return printable(str(getattr(error, "reason", error)), 200)
