"""The comparison as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from fragscope.report.summary import ESTIMATED_MEANS, Group, Row, Summary, summarize
from fragscope.results import Results
from fragscope.units import mib

_WIDE = 112  # from here on every column has its own place
_MARK = "│ "
UNKNOWN = "-"
HEADINGS = (
    "variant", "role", "outcome", "base", "transient", "against original", "peak allocated", "peak reserved",
    "stranded at end",
)  # fmt: skip
"""The columns of every comparison; those with figures begin after the outcome."""


def results_table(results: Results) -> RenderableType:
    """A renderable that lays itself out for the width it is given, down to 80 columns.

    Figures are MiB. Colour only repeats what the words say, so ``NO_COLOR`` and pipes lose nothing.
    """
    return _Report(summarize(results))


class _Report:
    def __init__(self, summary: Summary) -> None:
        self.summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= _WIDE
        for group in self.summary.groups:
            yield _heading(group)
            yield _table(group, wide)
            for row in group.rows:
                if row.message and not (row.case.as_expected and row.case.outcome == "ok"):
                    yield from _folded(f"{_name(row.variant)}: {row.message}", console, options)
                for note in row.notes:
                    yield from _folded(f"{_name(row.variant)}: {note}", console, options)
            yield Text()
        if self.summary.groups:
            notes = "MiB; against original: difference of transient"
            yield Text(f"{notes}; {ESTIMATED_MEANS}" if self.summary.estimated else notes, style="dim")
        for line in self.summary.headlines:
            yield from _folded(line, console, options)
        for line in self.summary.warnings:
            yield from _folded(f"! {line}", console, options, "yellow")


def _folded(text: str, console: Console, options: ConsoleOptions, style: str = "") -> Iterator[Text]:
    """A line as wide as there is room, in several where it is longer.

    Where the text is a stranger's, it may fold before any of its words, and a line that begins with ``::``, after
    blanks or not, is a command to GitHub's runner. Such a line gets a mark.
    """
    lines = Text(text, style).wrap(console, options.max_width)
    if any(map(_commands, lines)):
        lines = Text(text, style).wrap(console, max(options.max_width - len(_MARK), 1))
    for line in lines:
        yield Text.assemble(_MARK, line) if _commands(line) else line


def _commands(line: Text) -> bool:
    return line.plain.lstrip().startswith("::")


def _name(text: str) -> str:
    """A name at the beginning of a line, of results that may be a stranger's; those of scenarios have no colon."""
    return text.replace("::", r":\x3a")


def _heading(group: Group) -> RenderableType:
    title = Text(_name(group.scenario), style="bold")
    title.append(f"  {_name(group.preset)}", style="none")
    if group.settings:
        title.append(f"  {', '.join(group.settings)}", style="dim")
    return title


def figures(row: Row) -> tuple[str, ...]:
    """Base, transient, peak allocated, peak reserved, stranded at the end; MiB, marked where not exact."""
    case = row.case
    if not case.measured:
        return (UNKNOWN,) * 5
    values = (case.base, case.transient, case.peak.allocated, case.peak.reserved, case.end.stranded)
    return tuple(f"{row.mark}{mib(value)}" for value in values)


def _table(group: Group, wide: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2 if wide else 1, 0, 0))
    table.add_column("variant" if wide else "variant,\nrole, outcome", overflow="fold")
    if wide:
        table.add_column("role")
        table.add_column("outcome")
    for name in HEADINGS[3:]:
        table.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row in group.rows:
        base, transient, *rest = figures(row)
        numbers = (Text(base), Text(transient), _difference(row), *map(Text, rest))
        if wide:
            table.add_row(Text(_name(row.variant)), Text(row.case.role), _outcome(row), *numbers)
        else:
            # Numbers keep their width at 80 columns; words share a cell, which may fold.
            words = Text.assemble(f"{_name(row.variant)}\n", (row.case.role, "dim"), ", ", _outcome(row))
            table.add_row(words, *numbers)
    return table


def _outcome(row: Row) -> Text:
    if row.case.as_expected:
        return Text(row.outcome_text, style="" if row.case.outcome == "ok" else "yellow")
    return Text(f"! {row.outcome_text}", style="bold red")


def _difference(row: Row) -> Text:
    change = row.difference
    return Text(row.difference_text, style="" if not change else "green" if change < 0 else "red")
