"""Writing the HTML page; what it needs beyond the core is imported only here."""

from __future__ import annotations

import importlib
from pathlib import Path

from fragscope.errors import UsageError
from fragscope.results import Results
from fragscope.trace.containers import write_atomically

_EXTRA = ("bokeh", "jinja2", "markupsafe")


def write_html(results: Results, folder: Path, out: Path) -> None:
    """Write one self-contained HTML page, whole or not at all.

    Args:
        results: what to show.
        folder: where the traces that the cases name lie; nothing outside it is read.
        out: the file to write.

    Raises:
        UsageError: the extra ``report`` is not installed.
    """
    try:
        page = importlib.import_module("fragscope.report.page")
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] not in _EXTRA:
            raise
        raise UsageError(f'an HTML report needs {e.name}: pip install "fragscope[report]"') from None
    html: str = page.render(results, folder)
    write_atomically(out, html.encode("utf-8", errors="replace"))
