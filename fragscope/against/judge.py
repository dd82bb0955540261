"""What both sides gave, as one verdict: budgets, values, outcomes, limits, and the lines that hold the difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fragscope.against.attribute import Attribution
from fragscope.against.held import Recorded
from fragscope.against.places import Tree
from fragscope.against.run import Side
from fragscope.errors import printable
from fragscope.gate import Budgets, Lock, decided, evaluate, hold_to_lock
from fragscope.gate.budgets import Budget, case_name
from fragscope.gate.compare import Comparison, Pair, Tolerance, compare
from fragscope.gate.verdict import (
    Against,
    Change,
    NotMeasured,
    OneSided,
    OutcomeChange,
    PolicyChange,
    StackChange,
    Verdict,
)
from fragscope.results import CAME_TO_ITS_END, Results, Run
from fragscope.units import format_bytes

_SHOWN_LINES = 8
_NOTHING = Results(run=Run(started="", seconds=0.0, complete=True, planned=0), cases=[])


@dataclass(frozen=True, slots=True)
class Rules:
    """What the current side is held to.

    Attributes:
        budgets: of the working tree.
        tolerance: of the comparison.
        policy: what changed in the limits.
        selected: only some cases were asked for, so that budgets without a case are none of this run's business.
        lock: of the working tree; None where there is none.
    """

    budgets: Budgets
    tolerance: Tolerance
    policy: list[PolicyChange] = field(default_factory=list)
    selected: bool = False
    lock: Lock | None = None


def judge(before: Side, after: Side, rules: Rules, against: Against) -> Verdict:
    """Compare both sides, hold the current one against its budgets, and say which lines make the difference.

    The verdict depends on nothing but the two trees and their results: no time, no path of a temporary folder.

    Raises:
        InputFileError: two equally specific budgets disagree, or a recording cannot be used.
    """
    results = after.results or _NOTHING
    earlier, unable = _able(before, results)
    found = compare(earlier, results, rules.tolerance, before.which)
    appeared, lost = _without_what_cannot_be_compared(found.appeared, before, after)
    appeared = [msgspec.structs.replace(o, reason=unable.get(o.case.id, o.reason)) for o in appeared]
    notes = [*against.notes, *_notes(before, after)]
    budgets = _held_here(rules.budgets, results, notes)
    held_to = evaluate(results, budgets)
    explained = _Explained(before, after, found)
    changes = [explained.change(c) for c in found.changes]
    outcomes = [explained.outcome(o) for o in found.outcomes]
    broken = {o.case.id for o in outcomes if o.regressed}
    verdict = msgspec.structs.replace(
        held_to,
        undeclared=[u for u in held_to.undeclared if u.case.id not in broken],
        not_measured=[
            *_whole_runs(before, after, found),
            *(n for n in held_to.not_measured if n.case is not None or (n.budget is not None and not rules.selected)),
            *lost,
            *found.not_measured,
        ],
        against=msgspec.structs.replace(against, compared=found.compared, notes=notes),
        policy=rules.policy,
        changes=changes,
        outcomes=outcomes,
        appeared=appeared,
        removed=found.removed,
    )
    if rules.lock is None:
        return decided(verdict)
    # A lock may also have cases under other confs, releases and cards; those that are gone are told as removed.
    return hold_to_lock(verdict, results, rules.lock, rules.budgets.lock, whole=False)


def _able(before: Side, after: Results) -> tuple[Results | None, dict[str, str]]:
    """The other side's results without cases of borrowed scenarios that its code cannot run, and why it cannot.

    A scenario that comes with this change may call code that comes with it: that is no fault of the other side, and
    its mending no merit of this one.
    """
    if before.results is None:
        return None, {}
    ended = {case.id for case in after.cases if case.outcome in CAME_TO_ITS_END}
    unable = {
        case.id: f"{before.which} cannot run it: {case.outcome}: {case.message}"
        for case in before.results.cases
        if case.id in ended
        and case.outcome not in CAME_TO_ITS_END
        and (before.scenarios or {}).get(case.scenario) in before.borrowed
    }
    kept = [case for case in before.results.cases if case.id not in unable]
    return msgspec.structs.replace(before.results, cases=kept), unable


def _held_here(budgets: Budgets, results: Results, notes: list[str]) -> Budgets:
    """The budgets that can hold for a run on the virtual device under these settings; says how many cannot."""
    virtual = [b for b in budgets.budgets if b.device != "cuda"]
    cuda = len(budgets.budgets) - len(virtual)
    if cuda:
        notes.append(f"{cuda} budgets for device cuda are not held here: both sides run on the virtual device")
    elsewhere = [b for b in virtual if _is_for_other_settings(b, results)]
    if elsewhere:
        lines = ", ".join(f"{b.line}" for b in elsewhere[:_SHOWN_LINES]) + ", …" * (len(elsewhere) > _SHOWN_LINES)
        count = f"{len(elsewhere)} budget{'s' * (len(elsewhere) > 1)}"
        notes.append(
            f"{count} for another conf, torch or card than was run: not held here ({budgets.file}:{lines}); "
            "--conf, --torch and --card choose what is run"
        )
    return Budgets(budgets.file, tuple(b for b in virtual if b not in elsewhere))


def _is_for_other_settings(budget: Budget, results: Results) -> bool:
    """Whether a budget's cases were run, but none under one of the settings that it is narrowed to."""
    named = [case for case in results.cases if budget.matches_name(case_name(case).split("/"))]
    return bool(named) and any(
        not any(Budget(budget.pattern, {}, 0, **{key: value}).matches_settings(case) for case in named)
        for key, value in budget.narrowing.items()
    )


def _without_what_cannot_be_compared(
    appeared: list[OneSided], before: Side, after: Side
) -> tuple[list[OneSided], list[NotMeasured]]:
    """New cases, and those that the other side may have, too, in a file of its own that cannot be imported there."""
    left_out = {left.file: left for left in before.left_out}
    new, lost = [], []
    for one in appeared:
        left = left_out.get((after.scenarios or {}).get(one.case.scenario, ""))
        if left is None:
            new.append(one)
            continue
        reason = f"{printable(left.file)} cannot be imported with {before.which}'s code: {left.reason}"
        if left.borrowed:
            new.append(msgspec.structs.replace(one, reason=reason))
        else:
            lost.append(NotMeasured(case=one.case, reason=reason))
    return new, lost


def _whole_runs(before: Side, after: Side, found: Comparison) -> list[NotMeasured]:
    out = []
    for side in (before, after):
        run = side.results.run if side.results is not None else None
        if run is not None and not run.complete:
            present = len(side.results.cases) if side.results is not None else 0
            out.append(NotMeasured(reason=f"the run of {side.which} is incomplete: {present} of {run.planned} cases"))
    if not found.compared and not _introduced(before):
        why = "; ".join(f"{x.file}: {x.reason}" for x in before.left_out)
        out.append(NotMeasured(reason=f"nothing was compared with {before.which}{f': {why}' if why else ''}"))
    return out


def _introduced(before: Side) -> bool:
    """Whether the other side has no scenario of its own, so that there may be nothing to compare with."""
    ran = set((before.scenarios or {}).values())
    return ran <= set(before.borrowed) and all(x.borrowed for x in before.left_out)


def _notes(before: Side, after: Side) -> list[str]:
    ran = set((before.scenarios or {}).values())
    notes = [
        f"{printable(file)} is not in {before.which}: it was run there as it is here"
        for file in before.borrowed
        if file in ran
    ]
    for left in before.left_out:
        which = "is not there and " if left.borrowed else ""
        notes.append(f"{printable(left.file)} {which}cannot be imported with {before.which}'s code: {left.reason}")
    for file in sorted(set((after.scenarios or {}).values()) & (ran - set(before.borrowed))):
        if _content(before.top / file) != _content(after.top / file):
            notes.append(f"{printable(file)} is another one in {before.which}: differences may come from it")
    return notes


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


class _Explained:
    """Adds to changes which lines they come from; each recording is read once."""

    def __init__(self, before: Side, after: Side, found: Comparison) -> None:
        self._before, self._after = before, after
        self._trees = Tree(before.top, before.root), Tree(after.top, after.root)
        self._pairs = found.pairs
        self._read: dict[str, Attribution | None] = {}

    def change(self, change: Change) -> Change:
        """The change with its lines, unless it is one that is allowed."""
        both = self._recorded(change.case.id) if change.regressed or change.improved else None
        if both is None:
            return change
        found = both.of_value(change.metric, fell=change.improved)
        peak_before, peak_after, moved = both.peaks(change.metric)
        return msgspec.structs.replace(
            change,
            stacks=list(found.stacks),
            touched=found.touched,
            peak_before=peak_before,
            peak_after=peak_after,
            peak_moved=moved,
            caveats=[*_unexplained(change, self._pairs[change.case.id], found.stacks), *change.caveats],
        )

    def outcome(self, change: OutcomeChange) -> OutcomeChange:
        """The change with the request that failed, where that is what happened."""
        both = self._recorded(change.case.id) if change.after == "oom" else None
        if both is None:
            return change
        found = both.of_failure()
        return msgspec.structs.replace(change, place=both.failing(), stacks=list(found.stacks), touched=found.touched)

    def _recorded(self, case: str) -> Attribution | None:
        if case not in self._read:
            pair = self._pairs[case]
            self._read[case] = None
            if pair.before.trace is not None and pair.after.trace is not None:
                was = Recorded.of(self._before.folder / pair.before.trace)
                now = Recorded.of(self._after.folder / pair.after.trace)
                self._read[case] = Attribution(*self._trees, was, now, pair.after.sources)
        return self._read[case]


def _unexplained(change: Change, pair: Pair, stacks: tuple[StackChange, ...]) -> Iterator[str]:
    """What of a difference no line holds."""
    match change.metric:
        case "peak_reserved" | "peak_hbm":
            more = abs(change.after - change.before)
            held = abs(sum(s.after - s.before for s in stacks))
            if held < more:
                yield f"{format_bytes(more - held)} of the difference are idle memory, which no line holds"
        case "stranded":
            yield "stranded memory is idle; what changed is what is held beside it"
        case "transient" | "retained" if pair.before.base != pair.after.base:
            less = format_bytes(abs(pair.after.base - pair.before.base))
            yield f"{less} {'more' if pair.after.base > pair.before.base else 'less'} is held when the phase begins"
