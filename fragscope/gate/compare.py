"""Results of one tree against those of another, case by case.

**What is compared how.** Requested bytes are a function of the program alone, and so are *transient* and *retained* as
far as requested bytes tell: any increase counts. Block sizes move by rounding and by remainders that the allocator does
not split off, reserved bytes by a segment when one temporary comes or goes; what only these add, to any value, is held
against the tolerance. What a program keeps no longer when it is over may be transient now: that needs no more memory.

**What counts as what.** A case that ends otherwise than before, and not as declared, has regressed, whatever its
values. One that is skipped is not measured. Nor is one that gained an operator of unknown footprint: its values may be
larger than they look. A case that only one side has is said and fails nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from fragscope.errors import UsageError, printable
from fragscope.gate.budgets import METRICS, case_name, metric_value
from fragscope.gate.evaluate import case_named, caveats_of
from fragscope.gate.verdict import CaseName, Change, NotMeasured, OneSided, OutcomeChange
from fragscope.results import CAME_TO_ITS_END, Case, Results
from fragscope.units import MIB, format_bytes, parse_bytes

LARGE_SEGMENT = 20 * MIB  # kLargeBuffer, c10/core/AllocatorConfig.h of torch 2.9 to 2.14
_EXACT = ("peak_requested", "transient", "retained")
_SHOWN_VALUES = 3


@dataclass(frozen=True, slots=True)
class Tolerance:
    """By how much a value may grow that moves by itself: the larger of both.

    Attributes:
        bytes: at least.
        share: of the value before.
    """

    bytes: int = LARGE_SEGMENT
    share: Fraction = Fraction(1, 100)

    def of(self, value: int) -> int:
        """Bytes by which a value may grow."""
        return max(self.bytes, int(value * self.share))

    def __str__(self) -> str:
        size = format_bytes(self.bytes) if self.bytes or not self.share else ""
        share = f"{float(100 * self.share):g} %" if self.share else ""
        return " or ".join(filter(None, (size, share)))


def parse_tolerance(text: str, where: str) -> Tolerance:
    """A tolerance as people write it: a size such as ``64 MiB``, or a share such as ``2 %``.

    Raises:
        UsageError: it is neither; names the place.
    """
    words = text.strip()
    if not words.endswith("%"):
        return Tolerance(parse_bytes(words, where), Fraction(0))
    try:
        share = Fraction(words[:-1].strip()) / 100
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if not 0 <= share <= 1:
        raise UsageError(f"{where}: {printable(text, 80)!r} is no share; write a size such as '64 MiB', or '2 %'")
    return Tolerance(0, share)


@dataclass(frozen=True, slots=True)
class Pair:
    """A case that both trees have."""

    before: Case
    after: Case


@dataclass(slots=True)
class Comparison:
    """What comparing found.

    Attributes:
        compared: how many cases.
        changes: every value that differs; see ``Verdict``.
        outcomes: cases that end otherwise.
        appeared, removed: cases of one side.
        not_measured: what cannot be compared since the current side lacks it.
        pairs: both cases, by the current one's id.
    """

    compared: int = 0
    changes: list[Change] = field(default_factory=list)
    outcomes: list[OutcomeChange] = field(default_factory=list)
    appeared: list[OneSided] = field(default_factory=list)
    removed: list[OneSided] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)
    pairs: dict[str, Pair] = field(default_factory=dict)


def compare(before: Results | None, after: Results, tolerance: Tolerance, which: str) -> Comparison:
    """Compare every case that both have, by id.

    Args:
        before: of the other tree; None where it has no case to run.
        after: of the current tree.
        tolerance: for what moves by itself.
        which: what people call the other tree.
    """
    found = Comparison()
    old = {case.id: case for case in before.cases} if before is not None else {}
    named = _names(after.cases)
    for case in after.cases:
        earlier = old.get(case.id)
        name = named[case.id]
        if case.outcome == "skipped":
            found.not_measured.append(
                NotMeasured(case=name, reason=f"skipped: {case.message or 'no reason was given'}")
            )
        elif earlier is None:
            found.appeared.append(OneSided(case=name, reason=f"{which} has no such case"))
        elif differing := _other_values(earlier, case):
            found.appeared.append(OneSided(case=name, reason=f"its values are others: {differing}"))
        else:
            found.pairs[case.id] = Pair(earlier, case)
            _compare(found, earlier, case, name, tolerance, which)
    current = {case.id for case in after.cases}
    for id_, name in _names(old.values()).items():
        if id_ not in current:
            found.removed.append(OneSided(case=name, reason=f"only {which} has it"))
    _sort(found)
    return found


def _names(cases: Iterable[Case]) -> dict[str, CaseName]:
    cases = list(cases)
    count = Counter(map(case_name, cases))
    return {case.id: case_named(case, unique=count[case_name(case)] == 1) for case in cases}


def _other_values(before: Case, after: Case) -> str:
    """Which preset values or parameters differ; a value that only one of them has does not count."""
    common = sorted(before.params.keys() & after.params.keys())
    other = [
        f"{printable(key, 60)} {printable(str(before.params[key]), 60)} → {printable(str(after.params[key]), 60)}"
        for key in common
        if before.params[key] != after.params[key]
    ]
    more = f" and {len(other) - _SHOWN_VALUES} more" if len(other) > _SHOWN_VALUES else ""
    return ", ".join(other[:_SHOWN_VALUES]) + more


def _compare(found: Comparison, before: Case, after: Case, name: CaseName, tolerance: Tolerance, which: str) -> None:
    if before.outcome != after.outcome:
        expected = after.as_expected
        # Whoever declares an early end in the same change makes room for anything; that is no improvement.
        declared = expected and _has_whole_figures(before) and not _has_whole_figures(after)
        message = before.message if expected and after.outcome == "ok" else after.message
        found.outcomes.append(
            OutcomeChange(
                case=name, before=before.outcome, after=after.outcome, regressed=not expected, declared=declared,
                message=message,
            )
        )  # fmt: skip
    ended = [_has_whole_figures(case) for case in (before, after)]
    if not all(ended):
        # What ended early has no figures that mean anything; it is compared by how it ended. One that did so only on
        # the other side is held against nothing.
        found.compared += not ended[1]
        return
    found.compared += 1
    found.changes += _changes(before, after, name, tolerance, which)
    gained = _gained_operators(before, after)
    if gained:
        reason = f"estimated: hidden temporaries of {gained} are unknown, and {which} has fewer of these calls"
        found.not_measured.append(NotMeasured(case=name, reason=reason))
    elif before.exact and not after.exact:
        why = "; ".join(caveats_of(after)) or "the results do not say why"
        found.not_measured.append(NotMeasured(case=name, reason=f"its figures were exact and are no more: {why}"))


def _has_whole_figures(case: Case) -> bool:
    return case.outcome in (*CAME_TO_ITS_END, "wrong")


def _gained_operators(before: Case, after: Case) -> str:
    had = {op.op: op.calls for op in before.estimated_ops}
    gained = sorted(op.op for op in after.estimated_ops if op.calls > had.get(op.op, 0))
    more = f" and {len(gained) - _SHOWN_VALUES} more" if len(gained) > _SHOWN_VALUES else ""
    return ", ".join(printable(op, 100) for op in gained[:_SHOWN_VALUES]) + more


def _changes(before: Case, after: Case, name: CaseName, tolerance: Tolerance, which: str) -> list[Change]:
    uncertain = [f"before: {c}" for c in caveats_of(before)] + caveats_of(after)
    found = []
    for metric in METRICS:
        was, now = metric_value(before, metric), metric_value(after, metric)
        if was == now or (metric == "peak_hbm" and not before.peak.raw and not after.peak.raw):
            continue  # without raw memory, peak HBM is peak reserved said twice
        allowed, why = _allowed(before, after, metric, tolerance)
        gain, _ = _allowed(after, before, metric, tolerance)
        found.append(
            Change(
                case=name,
                metric=metric,
                before=was,
                after=now,
                allowed=allowed,
                regressed=now - was > allowed,
                improved=was - now > gain,
                caveats=[*([why] if why else []), *uncertain],
            )
        )
    return found


def _allowed(before: Case, after: Case, metric: str, tolerance: Tolerance) -> tuple[int, str]:
    """By how much a value may be larger after, and what is to be said about that."""
    loose = tolerance.of(abs(metric_value(before, metric)))
    if metric not in _EXACT:
        return loose, ""
    if metric == "peak_requested":
        return 0, ""
    given_up = max(0, max(0, before.retained) - max(0, after.retained)) if metric == "transient" else 0
    if _requested(after, metric) <= _requested(before, metric) + _requested_given_up(before, after, metric):
        why = "requested bytes are no more; blocks are cut otherwise"
        if given_up:
            why = "what is no longer kept at the end is transient now; the peak needs no more"
        return loose + given_up, why
    return given_up, ""


def _requested(case: Case, metric: str) -> int:
    """Transient or retained in requested bytes."""
    if metric == "transient":
        return case.peak.requested - max(case.base_requested, case.end.requested)
    return case.end.requested - case.base_requested


def _requested_given_up(before: Case, after: Case, metric: str) -> int:
    if metric != "transient":
        return 0
    return max(0, max(0, _requested(before, "retained")) - max(0, _requested(after, "retained")))


def _sort(found: Comparison) -> None:
    def order(change: Change) -> tuple[int, int, str, str, int]:
        rank = 0 if change.regressed else 1 if change.improved else 2
        size = abs(change.after - change.before)
        return rank, -size, change.case.name, change.case.id, METRICS.index(change.metric)

    found.changes.sort(key=order)
    found.outcomes.sort(key=lambda o: (not o.regressed, o.case.name, o.case.id))
    for one_sided in (found.appeared, found.removed):
        one_sided.sort(key=lambda o: (o.case.name, o.case.id))
    found.not_measured.sort(key=lambda n: (n.case.name, n.case.id) if n.case else ("", ""))
