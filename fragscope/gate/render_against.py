"""What a verdict says of a comparison with another commit, as text and as Markdown. Names come from strangers' files.

Changes of limits stand first. Then each case that regressed: its values, and below them the lines that hold the
difference, once for all values that have the same ones. What is better, new or gone comes last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fragscope.errors import printable
from fragscope.gate.verdict import Change, CodePlace, OutcomeChange, PolicyChange, StackChange, Verdict
from fragscope.units import format_bytes

_NAME_LIMIT = 300
_SHOWN_STACKS = 6
_PLAIN_REF = re.compile(r"[A-Za-z0-9./-]{1,100}")
_WHY = {
    "larger": "each is larger",
    "smaller": "each is smaller",
    "more": "it is asked for more often",
    "fewer": "it is asked for less often",
    "longer": "the same memory is kept longer",
    "shorter": "the same memory is freed earlier",
}


def policy_lines(verdict: Verdict) -> list[str]:
    """Changes of budgets and lock."""
    return ["  ".join(("policy", *_policy(change, plain))) for change in verdict.policy]


def regression_lines(verdict: Verdict) -> list[str]:
    """Cases that end otherwise than they should, and values that regressed."""
    lines = []
    for outcome in verdict.outcomes:
        if outcome.regressed:
            lines.append("  ".join(("regressed", *_outcome(outcome, plain))))
            lines += _indented(_stack_texts(outcome.stacks, plain))
    for group in _by_case(verdict.regressions):
        for change, details in _with_details(group, plain):
            lines.append("  ".join(("regressed", *_change(change, plain))))
            lines += _indented(details)
    return lines


def other_lines(verdict: Verdict) -> list[str]:
    """What is better, what only one side has, and what was done."""
    lines = ["  ".join(("improved", *_outcome(o, plain))) for o in verdict.outcomes if not o.regressed]
    lines += ["  ".join(("improved", *_change(change, plain))) for change in verdict.changes if change.improved]
    for word, found in (("new", verdict.appeared), ("removed", verdict.removed)):
        lines += ["  ".join((word, plain(one.case.name), plain(one.reason))) for one in found]
    if verdict.against is not None:
        lines += [f"note  {plain(note)}" for note in verdict.against.notes]
    return lines


def policy_markdown(verdict: Verdict) -> list[str]:
    """Changes of budgets and lock, before everything else."""
    if not verdict.policy:
        return []
    return ["", "**Limits changed:**", "", *(f"- {', '.join(_policy(change, code))}" for change in verdict.policy)]


def regression_markdown(verdict: Verdict) -> list[str]:
    """A table of what regressed, and the lines that hold it."""
    lines = []
    broken = [o for o in verdict.outcomes if o.regressed]
    if broken:
        lines += ["", "Ends otherwise than before:", ""]
    for outcome in broken:
        lines.append(f"- {', '.join(_outcome(outcome, code))}")
        lines += [f"  - {text}" for text in _stack_texts(outcome.stacks, code)]
    if verdict.regressions:
        lines += ["", "| case | metric | before | now | difference | |", "|---|---|--:|--:|--:|---|"]
    for change in verdict.regressions:
        before, after, more = sizes(change.before, change.after)
        cells = [code(change.case.name), code(change.metric), before, after, more]
        cells.append(code("; ".join(change.caveats)) if change.caveats else "")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    for group in _by_case(verdict.regressions):
        found = [(change, details) for change, details in _with_details(group, code) if details]
        if found:
            lines += ["", f"What {code(group[0].case.name)} holds otherwise:", ""]
        for change, details in found:
            lines.append(f"- {code(change.metric)}")
            lines += [f"  - {text}" for text in details]
    return lines


def other_markdown(verdict: Verdict) -> list[str]:
    """What is better, what only one side has, and what was done."""
    lines = [f"- improved: {', '.join(_outcome(o, code))}" for o in verdict.outcomes if not o.regressed]
    lines += [f"- improved: {', '.join(_change(change, code))}" for change in verdict.changes if change.improved]
    for word, found in (("new", verdict.appeared), ("removed", verdict.removed)):
        lines += [f"- {word}: {code(one.case.name)}: {code(one.reason)}" for one in found]
    if verdict.against is not None:
        lines += [f"- {code(note)}" for note in verdict.against.notes]
    return ["", *lines] if lines else []


def troubles(verdict: Verdict) -> list[str]:
    """What regressed, by number, for the summary."""
    values, ends = len(verdict.regressions), sum(o.regressed for o in verdict.outcomes)
    return [
        f"{values:,} value{'s' * (values != 1)} regressed" if values else "",
        f"{ends:,} case{'s' * (ends != 1)} {'end' if ends != 1 else 'ends'} otherwise than before" if ends else "",
    ]


def compared(verdict: Verdict) -> str:
    """Which trees were compared, and in how many cases, for the summary."""
    against = verdict.against
    if against is None:
        return ""
    tree = f"{against.current[:7] or 'the working tree'}{' with changes that are not committed' * against.dirty}"
    # Where this line is Markdown, a name must not be markup; one with other characters is left to the commit.
    ref = f"{against.ref} ({against.commit[:7]})" if _PLAIN_REF.fullmatch(against.ref) else against.commit[:7]
    return f"{against.compared:,} case{'s' * (against.compared != 1)} of {tree} compared with {ref}"


def sizes(before_bytes: int, after_bytes: int) -> tuple[str, str, str]:
    """Two sizes and by how much the second is larger; in bytes where rounding would make them look equal."""
    before, after = format_bytes(before_bytes), format_bytes(after_bytes)
    if before == after and before_bytes != after_bytes:
        before, after = f"{before_bytes:,} B", f"{after_bytes:,} B"
    more = signed(after_bytes - before_bytes)
    if before_bytes > 0:
        more += f" ({100 * (after_bytes - before_bytes) / before_bytes:+,.1f} %)"
    return before, after, more


def signed(size: int) -> str:
    """A difference with its sign."""
    return f"{'+' if size > 0 else ''}{format_bytes(size)}"


def plain(text: str) -> str:
    """One harmless line."""
    return printable(text, _NAME_LIMIT)


def code(text: str) -> str:
    """A code span: nothing inside is markup, a link or a mention."""
    clean = printable(text, _NAME_LIMIT)
    longest = max((len(run) for run in re.findall("`+", clean)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{clean}{pad}{fence}"


_Shown = Callable[[str], str]


def _by_case(changes: list[Change]) -> list[list[Change]]:
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault(change.case.id, []).append(change)
    return list(groups.values())


def _with_details(group: list[Change], shown: _Shown) -> Iterator[tuple[Change, list[str]]]:
    """Each change with its lines; of those that have the same places the last one, with the sizes of the first."""
    first = group[0]
    for number, change in enumerate(group):
        following = group[number + 1] if number + 1 < len(group) else None
        if following is not None and _places(following) == _places(first):
            yield change, []
        else:
            yield change, [*_stack_texts(first.stacks, shown), *_peak(first, shown)]
            first = following or first


def _places(change: Change) -> tuple[object, ...]:
    places = {(s.file, s.line, s.kind, s.why) for s in change.stacks}
    return frozenset(places), change.peak_before, change.peak_after


def _policy(change: PolicyChange, shown: _Shown) -> list[str]:
    place = f"{change.file}:{change.line}" if change.line else change.file
    what = "" if change.what == change.file else change.what
    names = [shown(x) for x in (what, change.metric) if x]
    return [shown(place), *names, shown(change.detail or change.kind)]


def _outcome(outcome: OutcomeChange, shown: _Shown) -> list[str]:
    said = [shown(outcome.case.name), f"outcome {outcome.after}, was {outcome.before}"]
    if outcome.message:
        said.append(shown(outcome.message))
    return [*said, *([f"at {_line(outcome.place, shown)}"] if outcome.place else [])]


def _change(change: Change, shown: _Shown) -> list[str]:
    before, after, more = sizes(change.before, change.after)
    allowed = [f"allowed {signed(change.allowed)}"] if change.regressed and change.allowed else []
    caveats = [shown(c) for c in change.caveats]
    return [shown(change.case.name), shown(change.metric), more, f"before {before}", f"now {after}", *allowed, *caveats]


def _stack_texts(stacks: list[StackChange], shown: _Shown) -> list[str]:
    lines = [_stack(stack, shown) for stack in stacks[:_SHOWN_STACKS]]
    rest = stacks[_SHOWN_STACKS:]
    if rest:
        lines.append(f"{signed(sum(s.after - s.before for s in rest))} in {len(rest):,} other places")
    return lines


def _stack(stack: StackChange, shown: _Shown) -> str:
    place = CodePlace(file=stack.file, line=stack.line, function=stack.function, code=stack.code)
    where = (
        _line(place, shown) if stack.file else shown(stack.frames[0] if stack.frames else "no call stack was recorded")
    )
    held = f"held {format_bytes(stack.before)}, now {format_bytes(stack.after)}"
    if stack.kind in ("new", "gone"):
        held = {"new": "new", "gone": "gone"}[stack.kind]
    why = f": {_WHY[stack.why]}" if stack.why else ""
    return f"{signed(stack.after - stack.before)}  {where}  {held}{why}"


def _peak(change: Change, shown: _Shown) -> list[str]:
    """Where the peak is reached, and where it was, if that is another line."""
    was, now = change.peak_before, change.peak_after
    if now is None or was is None:
        return []
    if not change.peak_moved:
        return [f"peak at {_line(now, shown)}, as before"]
    return [f"peak at {_line(now, shown)}; before at {_line(was, shown)}"]


def _line(place: CodePlace, shown: _Shown) -> str:
    return "  ".join(filter(None, (shown(f"{place.file}:{place.line}"), shown(place.code) if place.code else "")))


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
