"""Writing HTML pages; what they need beyond the core is imported only here."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fragscope.allocator import ReplaySettings
from fragscope.errors import UsageError
from fragscope.results import Results, SweepResults
from fragscope.thresholds import Thresholds
from fragscope.trace.containers import write_atomically

_EXTRA = ("bokeh", "jinja2", "markupsafe")


def write_html(results: Results, folder: Path, out: Path, *, all_figures: bool = False) -> None:
    """Write one self-contained HTML page, whole or not at all.

    Args:
        results: what to show.
        folder: where the traces that the cases name lie; nothing outside it is read.
        out: the file to write.
        all_figures: draw every case of a large run, too.

    Raises:
        UsageError: the extra ``report`` is not installed.
    """
    html: str = _module("fragscope.report.page").render(results, folder, all_figures=all_figures)
    write_atomically(out, html.encode("utf-8", errors="replace"))


def write_thresholds_html(found: Sequence[Thresholds], settings: ReplaySettings, out: Path) -> None:
    """Write the page of ``fragscope thresholds``, self-contained, whole or not at all.

    Args:
        found: what to show, at least one.
        settings: what it was found under.
        out: the file to write.

    Raises:
        UsageError: the extra ``report`` is not installed.
    """
    html: str = _module("fragscope.report.thresholds_page").render(found, settings)
    write_atomically(out, html.encode("utf-8", errors="replace"))


def write_sweep_html(found: SweepResults, out: Path) -> None:
    """Write the page of ``fragscope run --sweep``, self-contained, whole or not at all.

    Raises:
        UsageError: the extra ``report`` is not installed.
    """
    html: str = _module("fragscope.report.sweep_page").render(found)
    write_atomically(out, html.encode("utf-8", errors="replace"))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] not in _EXTRA:
            raise
        raise UsageError(f'an HTML report needs {e.name}: pip install "fragscope[report]"') from None
