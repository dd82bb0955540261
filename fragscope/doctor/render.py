"""A diagnosis as text for a terminal or a log."""

from __future__ import annotations

import textwrap

from rich.text import Text

from fragscope.doctor.check import Diagnosis, Status
from fragscope.errors import printable

_STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red", "absent": "dim"}
_LONGEST = 2000  # characters of a detail


def as_text(diagnosis: Diagnosis, width: int | None = None) -> Text:
    """One line a check, its advice below it, a summary at the end.

    Args:
        diagnosis: what to show.
        width: columns to break lines at; None leaves them whole, as tools that search in them want.
    """
    text = Text()
    column = max(len(check.name) for check in diagnosis.checks)
    indent = " " * (9 + column)
    for check in diagnosis.checks:
        text.append(f"{check.status:<6}", style=_STYLES[check.status])
        text.append(f" {check.name:<{column}}  ")
        text.append(_broken(printable(check.detail, _LONGEST), width, indent) + "\n")
        if check.advice:
            advice = _broken(f"-> {printable(check.advice, _LONGEST)}", width, indent)
            text.append(f"{indent}{advice}\n", style="cyan")
    counts = {status: sum(check.status == status for check in diagnosis.checks) for status in _STYLES}
    text.append("\n" + ", ".join(f"{count} {status}" for status, count in counts.items() if count) + "\n")
    return text


def _broken(line: str, width: int | None, indent: str) -> str:
    if width is None:
        return line
    lines = textwrap.wrap(line, max(width - len(indent), 30), break_long_words=False, break_on_hyphens=False)
    return f"\n{indent}".join(lines)
