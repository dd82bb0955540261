"""Everything a verdict has to say, as one list, worst first: what every format for people is made of.

Order: programs that end otherwise than declared or than before; then bytes, most first, whether over a budget, more
than before or more than locked; then what is otherwise than locked; then what was not measured. What does not fail
comes after all that does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from fragscope.gate.sizes import compared, count
from fragscope.gate.verdict import (
    Change,
    Check,
    CodePlace,
    LockDifference,
    NotMeasured,
    OutcomeChange,
    PolicyChange,
    StackChange,
    Touched,
    Verdict,
    WaiverName,
    WaiverUse,
)
from fragscope.units import format_bytes

Level = Literal["error", "warning", "notice"]
_LEVELS: tuple[Level, ...] = ("error", "warning", "notice")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to say.

    Attributes:
        level: error where it fails the gate, warning where someone should act, notice where it is only said.
        word: what it is, such as ``over``.
        case_id: of the case; "" where no case is meant.
        case: what people call it.
        metric: a key of budgets; "" where no value is meant.
        said: what there is to say of it, phrase by phrase.
        file, line: what it goes back to: the place in the code where that is known, else the line that states the
            limit. "" and 0 where there is none.
        in_code: ``file`` is relative to the repository's root; else to the working directory.
        place: the line that states the limit; "" where none does.
        bytes: by how much; what the order goes by.
        sizes: limit, value and difference as they are said; empty where there are none.
        notes: what else ``said`` has.
        stacks: the places in the code that make the difference.
        touched: what the change touched, where the first of these is none of it.
        first: goes before everything that is only bytes.
        waived: it would fail, and a waiver covers it.
    """

    level: Level
    word: str
    said: tuple[str, ...]
    case_id: str = ""
    case: str = ""
    metric: str = ""
    file: str = ""
    line: int = 0
    in_code: bool = False
    place: str = ""
    bytes: int = 0
    sizes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stacks: tuple[StackChange, ...] = ()
    touched: Touched = field(default_factory=Touched)
    first: bool = False
    waived: bool = False


def findings(verdict: Verdict) -> list[Finding]:
    """What a verdict says, worst first; the same list whatever order its parts came in."""
    places = _grown(verdict.changes)
    found = [_over(check, places) for check in verdict.checks if check.over]
    found += [_regressed(change) for change in verdict.changes if change.regressed]
    found += of_lock(verdict)
    found += [
        Finding(
            "error", "undeclared", (f"outcome {u.outcome}, declared {u.expected_outcome}", *_if(u.message)), u.case.id,
            u.case.name, first=True,
        )
        for u in verdict.undeclared
    ]  # fmt: skip
    found += [_outcome(entry) for entry in verdict.outcomes]
    found += [_missing(entry) for entry in verdict.not_measured]
    found += [_uncertain(check) for check in _first_uncertain(verdict)]
    found += [_policy(entry) for entry in verdict.policy]
    found += [_waiver(use) for use in verdict.waivers if use.state != "applied"]
    found += [_improved(change) for change in verdict.changes if change.improved]
    for word, sides in (("new", verdict.appeared), ("removed", verdict.removed)):
        found += [Finding("notice", word, (one.reason,), one.case.id, one.case.name) for one in sides]
    if verdict.against is not None:
        found += [Finding("notice", "note", (note,)) for note in verdict.against.notes]
    return sorted(found, key=_order)


def of_lock(verdict: Verdict) -> list[Finding]:
    """What is not as locked, and what the lock was made with."""
    places = _grown(verdict.changes)
    found = [_unlike_lock(entry, places) for entry in verdict.lock_differences]
    if verdict.lock is not None and verdict.lock.note:
        found.append(Finding("warning", "lock", (verdict.lock.note,), file=verdict.lock.file, line=1))
    return sorted(found, key=_order)


def of_waivers(verdict: Verdict) -> list[Finding]:
    """What is over a budget, or larger than before, and waived; and the waivers that do not apply."""
    places = _grown(verdict.changes)
    found = [_over(check, places) for check in verdict.checks if check.over and check.waiver]
    found += [_regressed(change) for change in verdict.changes if change.regressed and change.waiver]
    found += [_waiver(use) for use in verdict.waivers if use.state != "applied"]
    return sorted(found, key=_order)


def _order(finding: Finding) -> tuple[object, ...]:
    by_bytes = -finding.bytes if finding.level == "error" else 0
    return (
        _LEVELS.index(finding.level),
        not finding.first,
        by_bytes,
        finding.word,
        finding.case,
        finding.case_id,
        finding.metric,
        finding.line,
        finding.said,
    )


def _grown(changes: list[Change]) -> dict[tuple[str, str], tuple[StackChange, ...]]:
    """By case and metric, the places in the code that hold more than before."""
    return {
        (change.case.id, change.metric): tuple(s for s in change.stacks if s.after > s.before)
        for change in changes
        if change.regressed
    }


_Places = dict[tuple[str, str], tuple[StackChange, ...]]


def _over(check: Check, places: _Places) -> Finding:
    limit, value, excess = compared(check.limit, check.value)
    notes = (*check.caveats, *_waived(check.waiver))
    file, line, in_code = _place(places.get((check.case.id, check.metric), ()), check.budget.file, check.budget.line)
    return Finding(
        level="notice" if check.waiver else "error",
        word="waived" if check.waiver else "over",
        said=(f"budget {limit}", f"value {value}", f"excess {excess}", *notes),
        case_id=check.case.id,
        case=check.case.name,
        metric=check.metric,
        file=file,
        line=line,
        in_code=in_code,
        place=check.budget.place,
        bytes=check.excess,
        sizes=(limit, value, excess),
        notes=notes,
        waived=check.waiver is not None,
    )


def _regressed(change: Change) -> Finding:
    before, after, more = compared(change.before, change.after)
    allowed = f"allowed {format_bytes(change.allowed)}" if change.allowed else ""
    notes = (*_if(allowed), *change.caveats, *_waived(change.waiver))
    grown = tuple(s for s in change.stacks if s.after > s.before)
    file, line, in_code = _place(grown, "", 0)
    return Finding(
        level="notice" if change.waiver else "error",
        word="waived" if change.waiver else "regressed",
        said=(f"before {before}", f"now {after}", f"more {more}", *notes),
        case_id=change.case.id,
        case=change.case.name,
        metric=change.metric,
        file=file,
        line=line,
        in_code=in_code,
        bytes=change.after - change.before,
        sizes=(before, after, more),
        notes=notes,
        stacks=tuple(change.stacks),
        touched=change.touched,
        waived=change.waiver is not None,
    )


def _unlike_lock(entry: LockDifference, places: _Places) -> Finding:
    words = {
        "larger": "larger than locked",
        "smaller": "smaller than locked",
        "changed": "not as locked",
        "unlocked": "not locked",
    }
    size = 0
    sizes: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    if isinstance(entry.locked, int) and isinstance(entry.value, int):
        sizes = compared(entry.locked, entry.value)
        size = entry.value - entry.locked
        said = tuple(f"{word} {shown}" for word, shown in zip(("locked", "value", "difference"), sizes, strict=True))
    elif entry.kind == "changed":
        what = "figures are" if entry.metric == "exactness" else "outcome"
        said = (f"{what} {entry.value}, locked {entry.locked}",)
    notes = (*_if(entry.reason), *entry.caveats, *_waived(entry.waiver))
    if entry.kind in ("smaller", "unlocked"):
        notes += ("allowed by [lock]" if entry.allowed else "lock it with 'fragscope lock --update'",)
    waived = f"waived, {words[entry.kind]}" if entry.waiver else words[entry.kind]
    grown = places.get((entry.case.id, entry.metric), ()) if entry.kind == "larger" else ()
    file, line, in_code = _place(grown, entry.lock.file, entry.lock.line)
    return Finding(
        level="error" if entry.fails else "notice",
        word=waived,
        said=said + notes,
        case_id=entry.case.id,
        case=entry.case.name,
        metric=entry.metric if entry.kind in ("larger", "smaller") else "",
        file=file,
        line=line,
        in_code=in_code,
        place=entry.lock.place,
        bytes=max(size, 0),
        sizes=sizes,
        notes=notes,
        waived=entry.waiver is not None,
    )


def _missing(entry: NotMeasured) -> Finding:
    stated = entry.budget or entry.lock
    subject = f"budget {entry.budget.pattern}" if entry.budget is not None and entry.case is None else ""
    return Finding(
        level="error",
        word="not measured",
        said=(*_if(subject), entry.reason),
        case_id=entry.case.id if entry.case else "",
        case=entry.case.name if entry.case else "",
        file=stated.file if stated else "",
        line=stated.line if stated else 0,
        place=stated.place if stated else "",
        bytes=-1,  # after everything that has a size
    )


def _first_uncertain(verdict: Verdict) -> list[Check]:
    """One check of each case that is within its budgets and not certain, with all metrics that this goes for."""
    return list({c.case.id: c for c in reversed(verdict.checks) if c.caveats and not c.over}.values())


def _uncertain(check: Check) -> Finding:
    return Finding("notice", "within", tuple(check.caveats), check.case.id, check.case.name)


def _outcome(entry: OutcomeChange) -> Finding:
    where = [entry.place] if entry.place is not None else []
    file, line, in_code = _place((*where, *entry.stacks), "", 0)
    return Finding(
        level="error" if entry.regressed else "warning" if entry.declared else "notice",
        word=entry.word,
        said=(f"outcome {entry.after}, was {entry.before}", *_if(entry.message)),
        case_id=entry.case.id,
        case=entry.case.name,
        file=file,
        line=line,
        in_code=in_code,
        stacks=tuple(entry.stacks),
        touched=entry.touched,
        first=entry.regressed,
    )


def _improved(change: Change) -> Finding:
    before, after, less = compared(change.before, change.after)
    said = (f"before {before}", f"now {after}", f"difference {less}", *change.caveats)
    return Finding("notice", "improved", said, change.case.id, change.case.name, change.metric)


def _policy(entry: PolicyChange) -> Finding:
    what = "" if entry.what == entry.file else entry.what
    return Finding(
        level="warning" if entry.kind in ("raised", "removed", "changed") else "notice",
        word="policy",
        said=(*_if(what), *_if(entry.metric), entry.detail or entry.kind),
        file=entry.file,
        line=entry.line,
        place=f"{entry.file}:{entry.line}" if entry.line else entry.file,
    )


def _waiver(use: WaiverUse) -> Finding:
    waiver = use.waiver
    found = count(use.findings, "finding", "findings")
    state = {
        "expired": f"expired on {waiver.expires} and no longer applies" + (f" to {found}" if found else "; remove it"),
        "exceeded": f"does not apply: {found} above its limit of {format_bytes(waiver.limit or 0)}",
        "unused": "waives nothing; remove it",
        "applied": f"waives {found}",
    }[use.state]
    who = (f"owner {waiver.owner}", waiver.reason)
    return Finding(
        level="notice" if use.state == "unused" else "warning",
        word="waiver",
        said=(f"{waiver.pattern} {', '.join(waiver.metrics)}", state, *who),
        file=waiver.file,
        line=waiver.line,
        place=waiver.place,
    )


def _waived(waiver: WaiverName | None) -> tuple[str, ...]:
    if waiver is None:
        return ()
    limit = f" up to {format_bytes(waiver.limit)}" if waiver.limit is not None else ""
    return (f"waived{limit} until {waiver.expires} by {waiver.owner}: {waiver.reason} ({waiver.place})",)


def _place(places: Iterable[StackChange | CodePlace], file: str, line: int) -> tuple[str, int, bool]:
    for place in places:
        if place.file:
            return place.file, place.line, True
    return file, line, False


def _if(text: str) -> tuple[str, ...]:
    return (text,) if text else ()
