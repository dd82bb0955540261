"""Holding results against a lock: every difference is a finding, smaller values included.

A lock that lets savings pass silently would let them be lost silently, too: the next change could spend them and
still be within it. So a smaller value fails with its own words, and the remedy is to lock it. ``[lock]`` of the budgets
file may allow it, and new cases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from fragscope.errors import printable
from fragscope.gate.budgets import METRICS
from fragscope.gate.evaluate import caveats_of, names_of
from fragscope.gate.lock import Lock, LockedCase, LockOptions, locked_case, makers, why_not_locked
from fragscope.gate.verdict import CaseName, LockDifference, LockPlace, LockUse, NotMeasured, Verdict, decided
from fragscope.results import Case, Results

_RULES = re.compile(r"(?<=,torch-)[^,]+(?=,[^,]+,[^,]+$)")  # of an id: …@conf,torch-2.13,card,device
_ORDER = ("larger", "changed", "unlocked", "smaller")


def hold_to_lock(
    verdict: Verdict, results: Results, lock: Lock, options: LockOptions, *, whole: bool = True
) -> Verdict:
    """The verdict with everything that is not as it is locked.

    Args:
        verdict: of the same results.
        results: what was measured.
        lock: what it should be.
        options: what may differ.
        whole: the results should have every locked case; else those that were not run are none of their business.
    """
    found: list[LockDifference] = []
    missing: list[NotMeasured] = []
    held: set[str] = set()
    seen: set[str] = set()
    other_rules = {_RULES.sub("*", id_): id_ for id_ in lock.cases}
    for case, named in zip(results.cases, names_of(results), strict=True):
        seen.add(case.id)
        reason = why_not_locked(case)
        locked = lock.cases.get(case.id)
        if locked is None:
            twin = other_rules.get(_RULES.sub("*", case.id), "")
            if not reason and case.as_expected:  # another outcome is told as undeclared
                why = f"it is locked under the rules of torch {_rules(twin)}, not of {_rules(case.id)}" if twin else ""
                # A case that is locked under other rules is no new one: "new" must not switch the lock off.
                found.append(_unlocked(lock, named, why, allowed=options.new and not twin))
            seen.add(twin)  # said already
        elif reason:
            place = LockPlace(file=lock.file, line=locked.line)
            missing.append(NotMeasured(case=named, reason=f"is locked, and {reason}", lock=place))
        else:
            held.add(case.id)
            found.extend(_differences(lock.file, locked, case, named, options))
    for id_ in sorted(lock.cases.keys() - seen) if whole else ():
        place = LockPlace(file=lock.file, line=lock.cases[id_].line)
        missing.append(NotMeasured(reason=f"{printable(id_, 200)} is locked, and was not run", lock=place))
    found.sort(key=lambda d: (_ORDER.index(d.kind), -abs(_size(d)), d.case.name, d.case.id, d.metric))
    use = LockUse(file=lock.file, cases=len(lock.cases), held=len(held), note=made_otherwise(lock, results))
    return decided(
        msgspec.structs.replace(
            verdict, lock=use, lock_differences=found, not_measured=[*verdict.not_measured, *missing]
        )
    )


def made_otherwise(lock: Lock, results: Results) -> str:
    """What the lock was made with, where these results were made with something else; ``""`` where that is the same."""
    pairs = zip(("fragscope", "torch"), (lock.fragscope, lock.torch), makers(results), strict=True)
    changed = [f"{name} {then}, not {here}" for name, then, here in pairs if then and here and then != here]
    return f"the lock was made with {' and '.join(changed)}" if changed else ""


def _differences(
    file: str, locked: LockedCase, case: Case, named: CaseName, options: LockOptions
) -> Iterator[LockDifference]:
    now = locked_case(case)

    def place(key: str) -> LockPlace:
        return LockPlace(file=file, line=locked.lines.get(key, locked.line))

    if now.outcome != locked.outcome:
        yield LockDifference(
            case=named,
            kind="changed",
            metric="outcome",
            locked=locked.outcome,
            value=now.outcome,
            lock=place("outcome"),
        )
        return
    for metric in METRICS:
        then, value = locked.figures.get(metric), now.figures.get(metric)
        if then is None or value is None or then == value:
            continue
        if metric not in locked.stated and metric not in now.stated:
            continue  # said already, of what it equals
        smaller = value < then
        yield LockDifference(
            case=named,
            kind="smaller" if smaller else "larger",
            metric=metric,
            locked=then,
            value=value,
            lock=place(metric),
            allowed=smaller and options.improvements,
            caveats=caveats_of(case),
        )
    if bool(now.estimated) != bool(locked.estimated):
        words = ("exact", "estimated")
        yield LockDifference(
            case=named,
            kind="changed",
            metric="exactness",
            locked=words[bool(locked.estimated)],
            value=words[bool(now.estimated)],
            lock=place("estimated"),
            reason=now.estimated,
        )


def _unlocked(lock: Lock, named: CaseName, why: str, *, allowed: bool) -> LockDifference:
    return LockDifference(
        case=named,
        kind="unlocked",
        metric="",
        locked=None,
        value=None,
        lock=LockPlace(file=lock.file, line=1),
        allowed=allowed,
        reason=why,
    )


def _rules(id_: str) -> str:
    found = _RULES.search(id_)
    return printable(found[0], 40) if found else "?"


def _size(difference: LockDifference) -> int:
    if isinstance(difference.value, int) and isinstance(difference.locked, int):
        return difference.value - difference.locked
    return 0
