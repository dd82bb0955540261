"""What a change does to the limits themselves: budgets and lock of one tree against those of another.

A change of limits is for people to judge. It fails nothing, and stands before everything else: a pull request that
costs memory and raises the budget by as much would pass in silence otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from fragscope.errors import InputFileError, printable
from fragscope.gate.budgets import METRICS, Budget, Limit
from fragscope.gate.budgets_file import Budgets, parse_budgets
from fragscope.gate.lock import FILE_LIMIT, LockOptions
from fragscope.gate.verdict import PolicyChange
from fragscope.gate.waivers import Waiver
from fragscope.units import format_bytes

_Key = tuple[str, tuple[tuple[str, str], ...], str]
"""A budget's glob, what narrows it, and a metric."""


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A file of limits in one tree.

    Attributes:
        shown: what people call it.
        text: None where the tree has none.
    """

    shown: str
    text: str | None


def read_policy(file: Path | None, shown: str) -> PolicyFile:
    """The file as it is there; what cannot be read is as if it were not.

    Neither budgets nor a lock are larger than what is read: a lock may be as large, a budgets file less.
    """
    if file is None:
        return PolicyFile(shown, None)
    try:
        with file.open("rb") as f:
            return PolicyFile(shown, f.read(FILE_LIMIT).decode("utf-8", errors="replace"))
    except OSError:
        return PolicyFile(shown, None)


def budget_changes(before: PolicyFile, after: PolicyFile) -> list[PolicyChange]:
    """Every limit and waiver that is otherwise than it was, those that let more pass first.

    Raises:
        InputFileError: the current file cannot be used.
    """
    if before.text == after.text or after.text is None or before.text is None:
        return _of_file(before, after, "budgets")
    now = parse_budgets(after.text, after.shown)
    try:
        was = parse_budgets(before.text, before.shown)
    except InputFileError as e:
        detail = f"cannot be compared: before, {e.reason}"
        return [PolicyChange(file=after.shown, line=0, what=after.shown, kind="changed", detail=detail)]
    found = list(_limit_changes(was, now))
    found += [*_waiver_changes(was, now), *_lock_option_changes(was, now)]
    return sorted(found, key=_order)


def lock_changes(before: PolicyFile, after: PolicyFile) -> list[PolicyChange]:
    """Whether the lock changed, and by how many lines."""
    if before.text == after.text or after.text is None or before.text is None:
        return _of_file(before, after, "lock")
    # Counted, not aligned: a lock has no order to speak of, and aligning a large one may take minutes.
    was, now = Counter(before.text.splitlines()), Counter(after.text.splitlines())
    detail = f"{(now - was).total():,} lines written, {(was - now).total():,} taken out"
    return [PolicyChange(file=after.shown, line=0, what=after.shown, kind="changed", detail=detail)]


def setting_changes(key: str, before: str | None, after: str | None) -> list[PolicyChange]:
    """Whether a key of ``[tool.fragscope]`` that decides what the gate lets pass changed.

    Args:
        key: such as ``tolerance`` or ``lock``.
        before: as it was written; None where the table had no such key.
        after: as it is written.
    """
    if before == after:
        return []
    detail = f"{key} was {before or 'the default'}, now {after or 'the default'}"
    return [
        PolicyChange(file="pyproject.toml", line=0, what="[tool.fragscope]", kind="changed", detail=printable(detail))
    ]


def _of_file(before: PolicyFile, after: PolicyFile, what: str) -> list[PolicyChange]:
    if before.text == after.text or before.text is after.text:
        return []
    if after.text is None:
        # A file that is only no longer named may still be there.
        how = "removed" if before.shown == after.shown else "no longer in force"
        detail = f"the {what} file is {how}"
        return [PolicyChange(file=before.shown, line=0, what=before.shown, kind="removed", detail=detail)]
    detail = f"the {what} file is new"
    return [PolicyChange(file=after.shown, line=0, what=after.shown, kind="new", detail=detail)]


def _limit_changes(before: Budgets, after: Budgets) -> Iterator[PolicyChange]:
    was, now = _limits(before), _limits(after)
    for key in was.keys() | now.keys():
        old, new = was.get(key), now.get(key)
        if old is not None and new is not None and old.bytes == new.bytes:
            continue
        stated = new or old
        assert stated is not None
        pattern, narrowing, metric = key
        named = printable(pattern, 200) + "".join(f" ({k} {printable(v, 80) or 'default'})" for k, v in narrowing)
        yield PolicyChange(
            file=after.file if new is not None else before.file,
            line=stated.line,
            what=named,
            metric=metric,
            kind=_kind(old, new),
            before=None if old is None else old.bytes,
            after=None if new is None else new.bytes,
            detail=_detail(old, new),
        )


def _limits(budgets: Budgets) -> dict[_Key, Limit]:
    found: dict[_Key, Limit] = {}
    for budget in budgets.budgets:
        for metric, limit in budget.limits.items():
            key = (budget.pattern, tuple(sorted(_narrowing(budget).items())), metric)
            # Of equal ones that disagree the gate refuses to choose; the larger is the one that lets more pass.
            if key not in found or found[key].bytes < limit.bytes:
                found[key] = limit
    return found


def _narrowing(budget: Budget) -> dict[str, str]:
    return {k: "".join(v.split()) if k == "conf" else v for k, v in budget.narrowing.items()}


def _kind(old: Limit | None, new: Limit | None) -> Literal["raised", "lowered", "new", "removed"]:
    if old is None:
        return "new"
    if new is None:
        return "removed"
    return "raised" if new.bytes > old.bytes else "lowered"


def _detail(old: Limit | None, new: Limit | None) -> str:
    if old is None or new is None:
        limit = new or old
        assert limit is not None
        return f"{'now' if old is None else 'was'} {format_bytes(limit.bytes)}"
    by = format_bytes(abs(new.bytes - old.bytes))
    return f"{_kind(old, new)} by {by}, from {format_bytes(old.bytes)} to {format_bytes(new.bytes)}"


def _waiver_changes(before: Budgets, after: Budgets) -> Iterator[PolicyChange]:
    """Waivers that are new, gone or otherwise; one that only moved in its file is none of these."""
    was, now = list(before.waivers), list(after.waivers)
    pairs: list[tuple[Waiver | None, Waiver | None]] = []
    # Equal ones first, then those for the same values of the same cases, then those for the same cases.
    for known_by in (_whole, lambda w: (_cases(w), w.metrics), _cases):
        for new in tuple(now):
            at = next((i for i, old in enumerate(was) if known_by(old) == known_by(new)), None)
            if at is not None:
                now.remove(new)
                pairs.append((was.pop(at), new))
    pairs += [(None, new) for new in now] + [(old, None) for old in was]
    for before_it, it in pairs:
        stated = it or before_it
        assert stated is not None
        if before_it is None:
            detail = f"new: waives {_waived(stated)}: {printable(stated.reason, 200)}"
        elif it is None:
            detail = f"gone: waived {_waived(stated)}"
        elif _whole(before_it) == _whole(it):
            continue
        else:
            detail = f"changed, owner {printable(it.owner, 120)}: {'; '.join(_otherwise(before_it, it))}"
        narrowed = "".join(f" ({k} {printable(v, 80) or 'default'})" for k, v in _narrowing(stated.cases).items())
        yield PolicyChange(
            file=before.file if it is None else after.file,
            line=stated.line,
            what=f"waiver {printable(stated.cases.pattern, 200)}{narrowed}",
            kind="changed",
            detail=detail,
        )


def _cases(waiver: Waiver) -> tuple[object, ...]:
    return waiver.cases.pattern, _narrowing(waiver.cases)


def _whole(waiver: Waiver) -> tuple[object, ...]:
    return *_cases(waiver), waiver.metrics, waiver.owner, waiver.reason, waiver.expires, waiver.limit


def _waived(waiver: Waiver) -> str:
    most = "" if waiver.limit is None else f" up to {format_bytes(waiver.limit)}"
    return f"{', '.join(waiver.metrics)}{most}, until {waiver.expires}, owner {printable(waiver.owner, 120)}"


def _otherwise(old: Waiver, new: Waiver) -> Iterator[str]:
    """What of a waiver is not as it was."""
    sides = [
        {
            "metrics": ", ".join(waiver.metrics),
            "owner": printable(waiver.owner, 120),
            "expires": waiver.expires.isoformat(),
            "limit": "none" if waiver.limit is None else format_bytes(waiver.limit),
            "reason": printable(waiver.reason, 200),
        }
        for waiver in (old, new)
    ]
    for key, was in sides[0].items():
        now = sides[1][key]
        if was != now:
            yield f"{key} was {was}, now {now}"


def _lock_option_changes(before: Budgets, after: Budgets) -> Iterator[PolicyChange]:
    """What the lock lets pass that it did not, or no longer."""
    for option in fields(LockOptions):
        was, now = (getattr(side.lock, option.name) for side in (before, after))
        if was != now:
            words = ["allow" if allowed else "fail" for allowed in (was, now)]
            detail = f"{option.name} was {words[0]}, now {words[1]}"
            yield PolicyChange(file=after.file, line=0, what="[lock]", kind="changed", detail=detail)


def _order(change: PolicyChange) -> tuple[int, int, str, int]:
    looser = {"raised": 0, "removed": 1, "changed": 2, "new": 3, "lowered": 4}[change.kind]
    by = (change.after or 0) - (change.before or 0)
    metric = METRICS.index(change.metric) if change.metric in METRICS else len(METRICS)
    return looser, -by, change.what, metric
