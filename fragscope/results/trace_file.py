"""Where the Trace of a case lies: never outside the folder of its results."""

from __future__ import annotations

from pathlib import Path

from fragscope.errors import printable
from fragscope.results.model import Case


def trace_file(case: Case, folder: Path) -> Path | str:
    """The file of a case's Trace, or one printable sentence why there is none.

    Args:
        case: names the file, relative to ``folder``.
        folder: where the results file lies; nothing outside it is named, whatever the case or a link says.
    """
    if case.trace is None:
        return "No trace was kept for this case."
    shown = printable(case.trace, 160)
    try:
        root = folder.resolve(strict=True)
        file = (root / case.trace).resolve()
        if not file.is_relative_to(root):
            return f"The trace {shown} lies outside the folder of the results and was not read."
        if not file.is_file():
            return f"The trace {shown} is missing."
    except (OSError, ValueError, RuntimeError) as e:  # a name no file system takes, a link that leads to itself
        return f"The trace {shown} cannot be read ({printable(type(e).__name__)})."
    return file
