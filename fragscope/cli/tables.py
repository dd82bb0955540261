"""Tables of figures as text for a terminal or log, and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[tuple[str, ...]]
"""Cells, the headings first; one column holds words, usually the last, the others figures."""


def aligned(rows: Rows) -> list[str]:
    """Rows as lines, all columns but the last right-aligned; a terminal may be narrower, and no figure may be cut."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]])
        for row in rows
    ]


def markdown_table(rows: Rows, words: int = -1) -> list[str]:
    """The same as a Markdown table; cells come from strangers' files and are escaped.

    Args:
        rows: cells.
        words: which column is left-aligned.
    """
    from fragscope.report.markdown import escaped

    heading, *others = rows
    rule = ["--:"] * len(heading)
    rule[words] = "---"
    cells = [rule, *([escaped(cell) for cell in row] for row in others)]
    return [f"| {' | '.join(row)} |" for row in (heading, *cells)]


def markdown_list(lines: Sequence[str]) -> list[str]:
    """Lines as a Markdown list; an indented one belongs to the one before."""
    from fragscope.report.markdown import escaped

    return [f"{'  - ' if line.startswith(' ') else '- '}{escaped(line.strip())}" for line in lines]
