"""A verdict as GitHub Markdown: for a terminal, a job's summary, or a comment on a pull request.

Names come from strangers' files, and stand in code spans only: nothing in one is markup, HTML, a mention, an issue or a
link. In a table a code span must not hold ``|``, whatever stands before it: GitHub's parser splits cells before it
sees spans, and reads two backslashes before a bar as one escaped backslash.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fragscope.errors import printable
from fragscope.gate.findings import Finding, findings
from fragscope.gate.render import summary
from fragscope.gate.render_against import by_case, stack_texts, with_details
from fragscope.gate.verdict import Change, Verdict
from fragscope.units import MIB

MARKER = "<!-- fragscope-gate -->"
"""First line of a comment, by which a later run finds the one to replace."""

SUMMARY_LIMIT = MIB
"""Bytes of a step's summary; GitHub drops the whole summary beyond (docs, "Workflow commands", step summaries)."""

COMMENT_LIMIT = 65_536
"""Characters of a comment that GitHub's API takes."""

_NAME_LIMIT = 300
_TITLES = {"pass": "passed", "over": "failed", "not_measured": "not everything was measured"}
_TABLE = ("", "| | case | metric | limit | value | more | stated in | |", "|---|---|---|--:|--:|--:|---|---|")


@dataclass(frozen=True, slots=True)
class _Block:
    """Lines that are shown together or not at all.

    Attributes:
        lines: of Markdown.
        section: lines that open the section they are in; said once.
        finding: it counts where it is hidden.
    """

    lines: tuple[str, ...]
    section: tuple[str, ...]
    finding: bool = True


def as_markdown(verdict: Verdict, limit: int | None = None) -> str:
    """A heading with the decision, the summary, and what there is to say, worst first.

    Args:
        verdict: what to say.
        limit: the most bytes it may have, in UTF-8; what does not fit is left out from the end and counted. None for
            no limit.
    """
    head = [f"### fragscope gate: {_TITLES[verdict.decision]}{_only_a_warning(verdict)}", "", summary(verdict, code)]
    return _fitted(head, _blocks(findings(verdict), verdict.regressions), limit)


def as_comment(verdict: Verdict) -> str:
    """The body of a pull request's comment, which begins with ``MARKER`` and GitHub takes whole."""
    # A character has at least one byte, so what has few enough bytes has few enough characters.
    return f"{MARKER}\n{as_markdown(verdict, COMMENT_LIMIT - len(MARKER) - 1)}"


def code(text: str) -> str:
    """A code span in running text."""
    clean = printable(text, _NAME_LIMIT) or " "
    longest = max((len(run) for run in re.findall("`+", clean)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or clean.strip() != clean else ""
    return f"{fence}{pad}{clean}{pad}{fence}"


def _only_a_warning(verdict: Verdict) -> str:
    return " (only a warning)" if verdict.warn_only and verdict.decision != "pass" else ""


def _blocks(found: list[Finding], regressions: list[Change]) -> list[_Block]:
    policy = [f for f in found if f.word == "policy"]
    rest = [f for f in found if f.word != "policy"]
    errors = [f for f in rest if f.level == "error"]
    out = [_Block((_item(f),), ("", "Limits changed:", "")) for f in policy]
    out += [_Block((_item(f), *_nested(f)), ("", "Ends otherwise:", "")) for f in errors if f.first]
    out += [_Block((_row(f),), _TABLE) for f in errors if f.sizes]
    for group in by_case(regressions):
        heading = ("", f"What {code(group[0].case.name)} holds otherwise:", "")
        for change, details in with_details(group, code):
            if details:
                lines = [f"- {code(change.metric)}", *(f"  - {text}" for text in details)]
                out.append(_Block(tuple(lines), heading, finding=False))
    out += [_Block((_item(f),), ("", "Also fails:", "")) for f in errors if not f.first and not f.sizes]
    out += [_Block((_item(f),), ("", "Needs a look:", "")) for f in rest if f.level == "warning"]
    out += [_Block((_item(f),), ("", "Does not fail:", "")) for f in rest if f.level == "notice"]
    return out


def _fitted(head: list[str], blocks: list[_Block], limit: int | None) -> str:
    """As many blocks as fit, from the first; then how many findings do not."""

    def more(hidden: int) -> tuple[str, ...]:
        return ("", f"**{hidden:,} more finding{'s' * (hidden != 1)} did not fit here**; the job's log has them all.")

    lines = list(head)
    section: tuple[str, ...] = ()
    findings_left = sum(block.finding for block in blocks)
    room = None if limit is None else limit - _size(lines) - _size(more(findings_left))
    for block in blocks:
        added = (*(block.section if block.section != section else ()), *block.lines)
        if room is not None:
            room -= _size(added)
            if room < 0:
                lines += more(findings_left)
                break
        section = block.section
        lines += added
        findings_left -= block.finding
    return "\n".join(lines) + "\n"


def _size(lines: Sequence[str]) -> int:
    return sum(len(line.encode()) + 1 for line in lines)


def _row(finding: Finding) -> str:
    notes = "; ".join(finding.notes)
    cells = (
        finding.word,
        _cell(finding.case),
        _cell(finding.metric),
        *finding.sizes,
        _cell(finding.place) if finding.place else "",
        _cell(notes) if notes else "",
    )
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return code(text.replace("|", "\\x7c"))


def _item(finding: Finding) -> str:
    names = [code(name) for name in (finding.case, finding.metric) if name]
    said = [code(phrase) for phrase in finding.said]
    place = [f"({code(finding.place)})"] if finding.place else []
    return f"- {' '.join([finding.word, *names])}: {', '.join(said)} {' '.join(place)}".rstrip()


def _nested(finding: Finding) -> list[str]:
    return [f"  - {text}" for text in stack_texts(finding.stacks, finding.touched, code)]
