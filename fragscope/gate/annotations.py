"""A verdict as workflow commands, which GitHub shows at the lines they name.

A command is a line that begins with ``::``, and ends at its line end, so that everything in it is one line. The runner
takes from each step 10 errors, 10 warnings and 10 notices (github.com/actions/toolkit, docs/problem-matchers.md; 50 a
job) and drops the rest without a word. So the worst come first, findings about one value are one annotation, and what
is left over is counted in the last notice. It is all in the log, in the text that follows the commands.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from fragscope.errors import printable
from fragscope.gate.findings import Finding, Level, findings
from fragscope.gate.render import as_text
from fragscope.gate.render_against import stack_texts
from fragscope.gate.sizes import count
from fragscope.gate.verdict import Verdict

PER_LEVEL = 10
"""Annotations of one level that GitHub takes from a step."""

_NAME_LIMIT = 300
_LEVELS: tuple[Level, ...] = ("error", "warning", "notice")


def as_github(verdict: Verdict, folder: str = "") -> str:
    """The commands, worst first, and then the verdict as text.

    Args:
        verdict: what to say.
        folder: of the working directory, relative to the repository's root; what budgets and locks are relative to.
    """
    found = [_only_warned(f) if verdict.warn_only else f for f in findings(verdict)]
    by_level: dict[Level, list[list[Finding]]] = {level: [] for level in _LEVELS}
    for group in _grouped(found):
        if group[0].level != "notice" or group[0].file:  # what is only said, of no line, is in the text
            by_level[group[0].level].append(group)
    room = {"error": PER_LEVEL, "warning": PER_LEVEL, "notice": PER_LEVEL}
    hidden = {level: len(by_level[level]) - room[level] for level in _LEVELS}
    if any(number > 0 for number in hidden.values()):
        room["notice"] -= 1  # the one that counts the hidden ones
        hidden["notice"] = len(by_level["notice"]) - room["notice"]
    lines = [_command(group, folder) for level in _LEVELS for group in by_level[level][: room[level]]]
    left = [count(max(hidden[level], 0), level, f"{level}s") for level in _LEVELS]
    if any(left):
        said = f"{', '.join(filter(None, left))} more than GitHub shows; the log of this step has them all"
        lines.append(f"::notice title=fragscope gate::{_data(said)}")
    return "\n".join([*lines, as_text(verdict)])


def error_command(message: str) -> str:
    """The command for an error that leaves no verdict; one line, without its end."""
    return f"::error title=fragscope gate::{_data(printable(message, 2000))}"


def _only_warned(finding: Finding) -> Finding:
    return replace(finding, level="warning") if finding.level == "error" else finding


def _grouped(found: list[Finding]) -> list[list[Finding]]:
    """Findings about one value of one case together, where the first of them stands; they have one level."""
    groups: dict[object, list[Finding]] = {}
    for index, finding in enumerate(found):
        key = (finding.level, finding.case_id, finding.metric) if finding.case_id and finding.metric else index
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def _command(group: list[Finding], folder: str) -> str:
    head = group[0]
    at = next((f for f in group if f.in_code), head)
    names = " ".join(filter(None, (head.case, head.metric)))
    title = f"{', '.join(dict.fromkeys(f.word for f in group))}: {names}" if names else f"fragscope gate: {head.word}"
    said = [
        f"{finding.word}: {', '.join(_plain(phrase) for phrase in finding.said)}"
        + (f" [{_plain(finding.place)}]" if finding.place else "")
        for finding in group
    ]
    said += [text for finding in group for text in stack_texts(finding.stacks, finding.touched, _plain)]
    properties = [*_location(at, folder), f"title={_property(title)}"]
    return f"::{head.level} {','.join(properties)}::{_data(chr(10).join(said))}"


def _location(finding: Finding, folder: str) -> list[str]:
    """The file and line, where that is a file of the repository."""
    if not finding.file:
        return []
    path = PurePosixPath(finding.file) if finding.in_code else PurePosixPath(folder, finding.file)
    if path.is_absolute() or ".." in path.parts:
        return []
    return [f"file={_property(str(path))}", *([f"line={finding.line}"] if finding.line > 0 else [])]


def _plain(text: str) -> str:
    return printable(text, _NAME_LIMIT)


def _data(text: str) -> str:
    """What follows the second ``::``; line ends are the message's own."""
    clean = "\n".join(printable(line, 4000) for line in text.split("\n"))
    return clean.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """A value before it, escaped as actions/toolkit does: the runner splits at commas, and looks for ``::``."""
    return _plain(text).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
