"""Holding results against budgets.

A budget means that its cases must be measured. So a budget that matches nothing, a matched case without figures, one
whose figures its own recording refutes, and an incomplete run are all *not measured*, never a pass. An outcome that the
scenario does not declare fails by itself, budget or not, with two exceptions: a case under a budget that has no figures
is reported as not measured and only there, and a skipped case never ran, so that it has no outcome anyone could have
declared.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable

from fragscope.errors import EXIT_PASS, InputFileError, printable
from fragscope.gate.budgets import METRICS, Budget, Limit, case_name, metric_value
from fragscope.gate.budgets_file import Budgets
from fragscope.gate.verdict import BudgetName, CaseName, Check, NotMeasured, Undeclared, Verdict, decided
from fragscope.results import Case, Peak, Results, Run

_Resolved = dict[str, tuple[Limit, Budget]]
"""For one case, each limited metric with its limit and the budget that states it."""

_PARTS = ("scenario", "preset", "variant")
_SHOWN_OPS = 5
_HINTED_NAMES = 200  # comparing spellings is slow; a hint is not worth more


def evaluate(results: Results, budgets: Budgets, *, also_held: bool = False) -> Verdict:
    """Hold every case against the budgets that match it.

    The verdict depends on nothing but its arguments; the order of cases and budgets does not matter to what it says.

    Args:
        results: what was measured.
        budgets: the limits.
        also_held: something else, such as a lock, holds the results too, so that there may be no budget at all.

    Raises:
        InputFileError: two equally specific budgets state different limits for a case; names both.
    """
    by_name: dict[str, list[Case]] = {}
    for case in results.cases:
        by_name.setdefault(case_name(case), []).append(case)
    names = names_of(results)
    matching = _matcher(budgets)
    matched_budgets: set[int] = set()
    checks: list[Check] = []
    undeclared: list[Undeclared] = []
    not_measured = _incomplete(results.run, len(results.cases)) if budgets.budgets or also_held else []
    held = without_budget = 0

    for case, named in zip(results.cases, names, strict=True):
        indices = matching(case)
        matched_budgets.update(indices)
        limits = _resolve(case, [budgets.budgets[i] for i in indices], budgets.file)
        reason = _why_not_measured(case)
        if not limits:
            without_budget += 1
        elif reason is None:
            held += 1
            found = _checks(case, named, limits, budgets.file)
            vain = _why_within_means_nothing(case)
            checks.extend(c for c in found if c.over or not vain)
            short = [c for c in found if vain and not c.over]
            if short:
                why = vain.format(metrics=", ".join(c.metric for c in short))
                not_measured.append(NotMeasured(case=named, budget=short[0].budget, reason=why))
        else:
            first = min((budget for _, budget in limits.values()), key=lambda b: b.line)
            not_measured.append(NotMeasured(case=named, budget=_budget_named(first, budgets.file), reason=reason))
            continue
        if not case.as_expected and case.outcome != "skipped":
            undeclared.append(
                Undeclared(
                    case=named,
                    outcome=case.outcome,
                    expected_outcome=case.expected_outcome,
                    message=case.message,
                )
            )

    for index, budget in enumerate(budgets.budgets):
        if index not in matched_budgets:
            reason = _why_unmatched(budget, by_name)
            not_measured.append(NotMeasured(budget=_budget_named(budget, budgets.file), reason=reason))
    if not budgets.budgets and not also_held:
        reason = f"nothing was held against a budget: {budgets.file} states none"
        not_measured.append(NotMeasured(reason=reason))

    checks.sort(key=lambda c: (not c.over, -c.excess, c.case.name, c.case.id, METRICS.index(c.metric)))
    undeclared.sort(key=lambda u: (u.case.name, u.case.id))
    not_measured.sort(key=_not_measured_order)
    return decided(
        Verdict(
            decision="pass",
            exit_code=EXIT_PASS,
            budgets=len(budgets.budgets),
            cases=len(results.cases),
            cases_held=held,
            cases_without_budget=without_budget,
            checks=checks,
            undeclared=undeclared,
            not_measured=not_measured,
        )
    )


def _not_measured_order(entry: NotMeasured) -> tuple[bool, bool, str, str, int]:
    # What concerns the whole run first, then cases by name, then budgets by line.
    line = entry.budget.line if entry.budget else 0
    case = (entry.case.name, entry.case.id) if entry.case else ("", "")
    return entry.budget is not None, entry.case is None, *case, line


def _matcher(budgets: Budgets) -> Callable[[Case], list[int]]:
    # Globs are matched once per name: a run has few names and many settings and parameters.
    by_name: dict[str, list[int]] = {}

    def matching(case: Case) -> list[int]:
        name = case_name(case)
        if name not in by_name:
            parts = name.split("/")
            by_name[name] = [i for i, budget in enumerate(budgets.budgets) if budget.matches_name(parts)]
        return [i for i in by_name[name] if budgets.budgets[i].matches_settings(case)]

    return matching


def _resolve(case: Case, matching: list[Budget], file: str) -> _Resolved:
    resolved: _Resolved = {}
    for metric in METRICS:
        stating = [budget for budget in matching if metric in budget.limits]
        if not stating:
            continue
        top = max(budget.specificity for budget in stating)
        tied = [budget for budget in stating if budget.specificity == top]
        first = min(tied, key=lambda b: b.line)
        for other in tied:
            a, b = first.limits[metric], other.limits[metric]
            if a.bytes != b.bytes:
                raise InputFileError(
                    file,
                    f"line {b.line}: {metric} of budget {_shown(other.pattern)} ({b.bytes} B) disagrees with line "
                    f"{a.line}, budget {_shown(first.pattern)} ({a.bytes} B); both match {_shown(case_name(case))} "
                    "and neither is more specific",
                )
        resolved[metric] = (first.limits[metric], first)
    return resolved


def _shown(name: str) -> str:
    return printable(repr(name), 100)


def _checks(case: Case, named: CaseName, limits: _Resolved, file: str) -> list[Check]:
    operators = sorted({op.op for op in case.estimated_ops})
    unknown = sorted({a.code for a in case.assumptions if a.effect == "unknown"})
    uncertain = caveats_of(case)
    return [
        Check(
            case=named,
            metric=metric,
            limit=limit.bytes,
            value=(value := metric_value(case, metric)),
            excess=value - limit.bytes,
            over=value > limit.bytes,
            budget=BudgetName(pattern=budget.pattern, file=file, line=limit.line),
            exact=case.exact,
            estimated_ops=operators,
            assumptions=unknown,
            caveats=uncertain,
        )
        for metric, (limit, budget) in limits.items()
    ]


def caveats_of(case: Case) -> list[str]:
    """Everything that keeps a case's figures from being certain, for people."""
    return caveats(
        exact=case.exact,
        operators=[op.op for op in case.estimated_ops],
        assumptions=[(a.code, a.effect) for a in case.assumptions],
        lost=[loss.code for loss in case.lost],
        mismatches=case.verify.mismatches if case.verify is not None else 0,
        ended_in_oom=case.outcome == "oom",
    )


def caveats(
    *,
    exact: bool,
    operators: Iterable[str] = (),
    assumptions: Iterable[tuple[str, str]] = (),
    lost: Iterable[str] = (),
    mismatches: int = 0,
    ended_in_oom: bool = False,
) -> list[str]:
    """Everything that keeps figures from being certain, for people.

    Args:
        exact: what the measurement itself says.
        operators: whose hidden temporaries are unknown.
        assumptions: code and effect of each.
        lost: codes of what the recording lacks.
        mismatches: decisions in which the model differs from the recording.
        ended_in_oom: the phase ended early.
    """
    found: list[str] = []
    operators = sorted(set(operators))
    by_effect: dict[str, set[str]] = {}
    for code, effect in assumptions:
        by_effect.setdefault(effect, set()).add(code)
    unknown, bounded = (sorted(by_effect.get(effect, ())) for effect in ("unknown", "bounded"))
    if operators:
        more = f" and {len(operators) - _SHOWN_OPS} more" if len(operators) > _SHOWN_OPS else ""
        found.append(f"estimated: hidden temporaries of {', '.join(operators[:_SHOWN_OPS])}{more} are unknown")
    if unknown:
        found.append(f"{'' if operators else 'estimated: '}assumed with unknown effect: {', '.join(unknown)}")
    if not exact and not found and not ended_in_oom:
        because = f"assumed with bounded effect: {', '.join(bounded)}" if bounded else "the results do not say why"
        found.append(f"estimated: {because}")
    codes = sorted(set(lost))
    if codes:
        found.append(f"the recording lacks {', '.join(codes)}")
    if mismatches:
        found.append(f"the model differs from the recording in {mismatches} decisions")
    if ended_in_oom:
        found.append("the phase ended in an out-of-memory error: a lower bound")
    return found


def _why_not_measured(case: Case) -> str | None:
    """None for a case with figures."""
    if not case.measured:
        return f"{case.outcome}: {case.message}" if case.message else case.outcome
    if case.peak == Peak() and case.end == Peak() and case.allocs == 0:
        return f"has no figures (outcome {case.outcome}{f': {case.message}' if case.message else ''})"
    return None


def _why_within_means_nothing(case: Case) -> str:
    """Why values that are within their limits say nothing, with a place for ``{metrics}``; ``""`` where they do.

    Values over their limits stand: what an OOM cut short is over already.
    """
    if case.outcome == "oom":
        return "ended in an out-of-memory error: {metrics} would have been larger than what was reached"
    if case.verify is not None and case.refuted:
        differ = f"{case.verify.mismatches:,} of {case.verify.compared:,}"
        return f"the model differs from the recording in {differ} comparisons: {{metrics}} may not be what the card had"
    return ""


def _why_unmatched(budget: Budget, by_name: dict[str, list[Case]]) -> str:
    named = [case for name, group in by_name.items() if budget.matches_name(name.split("/")) for case in group]
    if not named:
        return f"no case matches{_nearest_name(budget, sorted(by_name))}"
    missing = [
        f"{key} {_values(named, key)}, not {value or 'default'}"
        for key, value in budget.narrowing.items()
        if not any(Budget(budget.pattern, {}, 0, **{key: value}).matches_settings(case) for case in named)
    ]
    return f"no case matches: those of that name have {'; '.join(missing) or 'these settings, but never together'}"


def _nearest_name(budget: Budget, names: list[str]) -> str:
    """A hint at the first part of the glob that nothing has, such as a misspelt scenario."""
    pattern = budget.pattern.split("/")
    split = [parts for name in names if len(parts := name.split("/")) == len(pattern) == len(_PARTS)]
    if not split:
        return ""
    reached = max(budget.leading_matches(parts) for parts in split)
    candidates = sorted({parts[reached] for parts in split if budget.leading_matches(parts) == reached})
    near = difflib.get_close_matches(pattern[reached], candidates[:_HINTED_NAMES], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f": none has the {_PARTS[reached]} {pattern[reached]}{hint}"


def _values(cases: list[Case], key: str) -> str:
    return " or ".join(sorted({str(getattr(case, key)) or "default" for case in cases}))


def _incomplete(run: Run, present: int) -> list[NotMeasured]:
    if run.complete and present >= run.planned:
        return []
    return [NotMeasured(reason=f"the run is incomplete: {present} of {run.planned} planned cases are there")]


def names_of(results: Results) -> list[CaseName]:
    """What outputs call each case, in the order of the results."""
    shared = Counter(case_name(case) for case in results.cases)
    return [case_named(case, unique=shared[case_name(case)] == 1) for case in results.cases]


def case_named(case: Case, *, unique: bool) -> CaseName:
    """What a verdict calls a case.

    Args:
        case: of the results.
        unique: no other case of them has its scenario, preset and variant.
    """
    return CaseName(
        id=case.id,
        name=case_name(case) if unique else case.id,
        scenario=case.scenario,
        preset=case.preset,
        variant=case.variant,
        conf=case.conf,
        torch=case.torch,
        card=case.card,
        device=case.device,
    )


def _budget_named(budget: Budget, file: str) -> BudgetName:
    return BudgetName(pattern=budget.pattern, file=file, line=budget.line)
