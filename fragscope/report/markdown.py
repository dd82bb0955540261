"""The comparison as GitHub Markdown, for a pull request's comment or a job's summary."""

from __future__ import annotations

import re

from fragscope.errors import printable
from fragscope.report.summary import ESTIMATED_MEANS, Group, Row, summarize
from fragscope.report.table import HEADINGS, figures
from fragscope.results import Results

_TEXT_COLUMNS = 3
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_BREAK = "&#8203;"  # zero width: GitHub links @names, #numbers and addresses after decoding entities, but not across it
_LINKED = re.compile(r"(@|#|://|www\.|\bGH-)(?=\S)", re.IGNORECASE)
_SPECIAL = re.compile(r"[\\`*_\[\]|~$]")


def markdown(results: Results) -> str:
    """The comparison of all groups as Markdown; figures are MiB."""
    summary = summarize(results)
    out = ["## GPU memory", ""]
    out += [f"- {escaped(line)}" for line in summary.headlines]
    out += [f"- :warning: {escaped(line)}" for line in summary.warnings]
    for group in summary.groups:
        out += ["", f"### {escaped(group.title)}", "", *_table(group)]
    if summary.groups:
        notes = "Figures in MiB. Against original: difference of transient."
        out += ["", f"{notes} {escaped(ESTIMATED_MEANS)}." if summary.estimated else notes]
    facts = "; ".join(f"{escaped(word)} {escaped(value)}" for word, value in summary.facts)
    out += ["", f"<sub>{facts}</sub>", ""]
    return "\n".join(out)


def escaped(text: str) -> str:
    """Text that GitHub shows as it stands: one line, no markup, no mention, no reference, no address made a link."""
    line = "".join(_ENTITIES.get(c, c) for c in _SPECIAL.sub(lambda m: f"\\{m[0]}", printable(text)))
    return _LINKED.sub(lambda m: f"{m[1]}{_BREAK}", line)


def _table(group: Group) -> list[str]:
    rule = ["---"] * _TEXT_COLUMNS + ["---:"] * (len(HEADINGS) - _TEXT_COLUMNS)
    lines = [_line(HEADINGS), _line(rule)]
    lines += [_line(_cells(row)) for row in group.rows]
    messages = [
        f"- {escaped(row.variant)}: {escaped(row.message)}"
        for row in group.rows
        if row.message and not (row.case.as_expected and row.case.outcome == "ok")
    ]
    messages += [f"- {escaped(row.variant)}: {escaped(note)}" for row in group.rows for note in row.notes]
    return [*lines, "", *messages] if messages else lines


def _cells(row: Row) -> list[str]:
    outcome = escaped(row.outcome_text)
    base, transient, *rest = figures(row)
    numbers = [base, transient, row.difference_text, *rest]
    return [
        escaped(row.variant),
        row.case.role,
        outcome if row.case.as_expected else f":x: **{outcome}**",
        *(escaped(n) for n in numbers),
    ]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
