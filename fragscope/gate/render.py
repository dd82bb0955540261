"""A verdict as text for a terminal or log. Names come from strangers' files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from fragscope.errors import printable
from fragscope.gate import render_against as against
from fragscope.gate.findings import Finding, of_lock, of_waivers
from fragscope.gate.sizes import compared, count
from fragscope.gate.verdict import Check, NotMeasured, Verdict

_NAME_LIMIT = 300


def as_text(verdict: Verdict) -> str:
    """One line for each thing that is wrong, worst first; then what is uncertain; then the summary."""
    lines = [
        *against.policy_lines(verdict),
        *(_over_line(check) for check in verdict.over),
        *(
            _columns(
                "undeclared",
                u.case.name,
                f"outcome {u.outcome}, declared {u.expected_outcome}",
                *([u.message] if u.message else []),
            )
            for u in verdict.undeclared
        ),
        *against.regression_lines(verdict),
        *(_finding_line(finding) for finding in of_lock(verdict)),
        *(_columns("not measured", *_missing(entry)) for entry in verdict.not_measured),
        *(_columns("within", name, metrics, caveats) for name, metrics, caveats in uncertain(verdict)),
        *(_finding_line(finding) for finding in of_waivers(verdict)),
        *against.other_lines(verdict),
        summary(verdict),
    ]
    return "\n".join(lines) + "\n"


def summary(verdict: Verdict, shown: Callable[[str], str] = against.plain) -> str:
    """The last line: the decision, its reasons by number, and how much was compared at all.

    Args:
        verdict: what it is of.
        shown: makes what strangers wrote harmless where the line is to stand.
    """
    troubles = [
        *against.troubles(verdict),
        count(len(verdict.over), "value over budget", "values over budget"),
        count(len(verdict.undeclared), "undeclared outcome", "undeclared outcomes"),
        *_lock_troubles(verdict),
        count(len(verdict.not_measured), "thing not measured", "things not measured"),
    ]
    decision = {"pass": "pass", "over": "fail", "not_measured": "not measured"}[verdict.decision]
    if verdict.warn_only and verdict.decision != "pass":
        decision = f"{decision}, and only a warning"
    held = [against.compared(verdict, shown)] if verdict.against is not None else []
    if verdict.budgets or not (held or verdict.lock):
        held.append(
            f"{count(len(verdict.checks), 'value', 'values') or '0 values'} of "
            f"{count(verdict.cases_held, 'case', 'cases') or '0 cases'} held against "
            f"{count(verdict.budgets, 'budget', 'budgets') or '0 budgets'}"
        )
        if verdict.cases_without_budget:
            held.append(f"{count(verdict.cases_without_budget, 'case has', 'cases have')} no budget")
    if verdict.lock is not None:
        of_all = f" of {verdict.lock.cases:,}" if verdict.lock.held < verdict.lock.cases else ""
        held.append(f"{verdict.lock.held:,}{of_all} locked case{'s' * (verdict.lock.cases != 1)} compared")
    waived = sum(use.findings for use in verdict.waivers if use.state == "applied")
    if waived:
        held.append(f"{waived:,} waived")
    return f"{decision}: {'; '.join([*(filter(None, [', '.join(filter(None, troubles))])), *held])}"


def _lock_troubles(verdict: Verdict) -> list[str]:
    kinds = Counter(difference.kind for difference in verdict.lock_differences if difference.fails)
    return [
        count(kinds["larger"], "value larger than locked", "values larger than locked"),
        count(kinds["smaller"], "value smaller than locked", "values smaller than locked"),
        count(kinds["changed"], "case not as locked", "cases not as locked"),
        count(kinds["unlocked"], "case not locked", "cases not locked"),
    ]


def _finding_line(finding: Finding) -> str:
    place = (f"[{_plain(finding.place)}]",) if finding.place else ()
    names = filter(None, (finding.case, finding.metric))
    return _columns(finding.word, *names, *finding.said, *place)


def _over_line(check: Check) -> str:
    where = (check.budget.place, *check.caveats)
    return comparison_line("over", check.case.name, check.metric, check.limit, check.value, *where)


def comparison_line(word: str, name: str, metric: str, limit: int, value: int, place: str, *caveats: str) -> str:
    """One value held against one limit.

    Args:
        word: how it came out: ``over`` or ``within``.
        name: of what was measured; "" where that is clear.
        metric: one of ``METRICS``.
        limit: bytes.
        value: bytes.
        place: where the limit is stated.
        caveats: what keeps the value from being certain.
    """
    budget, shown, excess = compared(limit, value)
    over = [f"excess {excess}"] if value > limit else []
    columns = (word, *([name] if name else []), metric, f"budget {budget}", f"value {shown}", *over)
    return _columns(*columns, f"[{_plain(place)}]", *caveats)


def uncertain(verdict: Verdict) -> list[tuple[str, str, str]]:
    """Cases within budget whose values are not certain: name, metrics, why."""
    groups: dict[str, list[Check]] = {}
    for check in verdict.checks:
        if check.caveats and not check.over:
            groups.setdefault(check.case.id, []).append(check)
    found = [
        (checks[0].case.name, ", ".join(sorted(c.metric for c in checks)), "; ".join(checks[0].caveats))
        for checks in groups.values()
    ]
    return sorted(found)


def _missing(entry: NotMeasured) -> list[str]:
    columns: list[str] = []
    if entry.case is not None:
        columns.append(entry.case.name)
    elif entry.budget is not None:
        columns.append(f"budget {entry.budget.pattern}")
    columns.append(entry.reason)
    stated = entry.budget or entry.lock
    if stated is not None:
        columns.append(f"[{_plain(stated.place)}]")
    return columns


def _columns(*columns: str) -> str:
    return "  ".join(_plain(column) for column in columns)


def _plain(text: str) -> str:
    return printable(text, _NAME_LIMIT)
