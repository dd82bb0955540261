"""What a verdict says of a comparison with another commit, as text. Names come from strangers' files.

Changes of limits stand first. Then each case that regressed: its values, and below them the lines that hold the
difference, once for all values that have the same ones. What is better, new or gone comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fragscope.errors import printable
from fragscope.gate.sizes import compared as in_words
from fragscope.gate.verdict import Change, CodePlace, OutcomeChange, PolicyChange, StackChange, Touched, Verdict
from fragscope.units import format_bytes

_NAME_LIMIT = 300
_SHOWN_STACKS = 6
_SHOWN_TOUCHED = 3
_Shown = Callable[[str], str]
_WHY = {
    "larger": "each is larger",
    "smaller": "each is smaller",
    "more": "it is asked for more often",
    "fewer": "it is asked for less often",
    "longer": "the same memory is kept longer",
    "shorter": "the same memory is freed earlier",
    "cut": "the same memory in blocks with other remainders",
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
            lines += _indented(stack_texts(outcome.stacks, outcome.touched, plain))
    for group in by_case(verdict.regressions):
        for change, details in with_details(group, plain):
            lines.append("  ".join(("regressed", *_change(change, plain))))
            lines += _indented(details)
    return lines


def other_lines(verdict: Verdict) -> list[str]:
    """What is better, what only one side has, and what was done."""
    ordered = sorted((o for o in verdict.outcomes if not o.regressed), key=lambda o: not o.declared)
    lines = ["  ".join((o.word, *_outcome(o, plain))) for o in ordered]
    lines += ["  ".join(("improved", *_change(change, plain))) for change in verdict.changes if change.improved]
    for word, found in (("new", verdict.appeared), ("removed", verdict.removed)):
        lines += ["  ".join((word, plain(one.case.name), plain(one.reason))) for one in found]
    if verdict.against is not None:
        lines += [f"note  {plain(note)}" for note in verdict.against.notes]
    return lines


def troubles(verdict: Verdict) -> list[str]:
    """What regressed, by number, for the summary."""
    values, ends = len(verdict.regressions), sum(o.regressed for o in verdict.outcomes)
    return [
        f"{values:,} value{'s' * (values != 1)} regressed" if values else "",
        f"{ends:,} case{'s' * (ends != 1)} {'end' if ends != 1 else 'ends'} otherwise than before" if ends else "",
    ]


def compared(verdict: Verdict, shown: _Shown) -> str:
    """Which trees were compared, and in how many cases, for the summary."""
    against = verdict.against
    if against is None:
        return ""
    tree = shown(against.current[:7]) if against.current else "the working tree"
    dirty = " with changes that are not committed" * against.dirty
    ref = shown(printable(against.ref, 100))
    return (
        f"{against.compared:,} case{'s' * (against.compared != 1)} of {tree}{dirty} compared with "
        f"{ref} ({shown(against.commit[:7])})"
    )


def sizes(before_bytes: int, after_bytes: int) -> tuple[str, str, str]:
    """Two sizes and by how much the second is larger, with its sign."""
    before, after, more = in_words(before_bytes, after_bytes)
    return before, after, f"{'+' if after_bytes > before_bytes else ''}{more}"


def signed(size: int) -> str:
    """A difference with its sign."""
    return f"{'+' if size > 0 else ''}{format_bytes(size)}"


def plain(text: str) -> str:
    """One harmless line."""
    return printable(text, _NAME_LIMIT)


def by_case(changes: list[Change]) -> list[list[Change]]:
    """Changes of one case together, in the order in which each is first met."""
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault(change.case.id, []).append(change)
    return list(groups.values())


def with_details(group: list[Change], shown: _Shown) -> Iterator[tuple[Change, list[str]]]:
    """Each change with its lines; of those that have the same places the last one, with the sizes of the first."""
    first = group[0]
    for number, change in enumerate(group):
        following = group[number + 1] if number + 1 < len(group) else None
        if following is not None and _places(following) == _places(first):
            yield change, []
        else:
            yield change, [*stack_texts(first.stacks, first.touched, shown), *_peak(first, shown)]
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
    said = [shown(outcome.case.name), f"outcome {shown(outcome.after)}, was {shown(outcome.before)}"]
    if outcome.message:
        said.append(shown(outcome.message))
    return [*said, *([f"at {_line(outcome.place, shown)}"] if outcome.place else [])]


def _change(change: Change, shown: _Shown) -> list[str]:
    before, after, more = sizes(change.before, change.after)
    allowed = [f"allowed {signed(change.allowed)}"] if change.regressed and change.allowed else []
    caveats = [shown(c) for c in change.caveats]
    return [shown(change.case.name), shown(change.metric), more, f"before {before}", f"now {after}", *allowed, *caveats]


def stack_texts(stacks: Sequence[StackChange], touched: Touched, shown: _Shown) -> list[str]:
    """The places in the code that make a difference, one a line, and where to look if the first was not changed.

    ``shown`` makes what strangers wrote harmless.
    """
    lines = [_stack(stack, shown) for stack in stacks[:_SHOWN_STACKS]]
    rest = stacks[_SHOWN_STACKS:]
    if rest:
        lines.append(
            f"{signed(sum(s.after - s.before for s in rest))} in {len(rest):,} other place{'s' * (len(rest) > 1)}"
        )
    return lines + _touched(touched, shown)


def _touched(touched: Touched, shown: _Shown) -> list[str]:
    lines = []
    for line in touched.lines[:_SHOWN_TOUCHED]:
        place = CodePlace(file=line.file, line=line.line, function=line.function, code=line.code)
        where = "changed on the way" if line.on_the_way else "changed elsewhere"
        lines.append("  ".join((where, _line(place, shown), *(["removed"] if line.removed else []))))
    more = len(touched.lines[_SHOWN_TOUCHED:]) + touched.more
    if more:
        lines.append(f"changed besides  {more:,} other line{'s' * (more > 1)}")
    return lines


def _stack(stack: StackChange, shown: _Shown) -> str:
    place = CodePlace(file=stack.file, line=stack.line, function=stack.function, code=stack.code)
    where = (
        _line(place, shown) if stack.file else shown(stack.frames[0] if stack.frames else "no call stack was recorded")
    )
    before, after, _ = in_words(stack.before, stack.after)
    held = f"held {before}, now {after}"
    if stack.kind in ("new", "gone"):
        held = {"new": "new", "gone": "gone"}[stack.kind]
    why = f": {_WHY[stack.why]}" if stack.why else ""
    changed = "; changed here" if stack.changed else ""
    return f"{signed(stack.after - stack.before)}  {where}  {held}{why}{changed}"


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
