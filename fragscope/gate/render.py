"""A verdict as text for a terminal or log, and as Markdown for a pull request. Names come from strangers' files."""

from __future__ import annotations

from collections.abc import Callable

from fragscope.errors import printable
from fragscope.gate import render_against as against
from fragscope.gate.verdict import BudgetName, Check, NotMeasured, Verdict
from fragscope.units import format_bytes

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
        *(_columns("not measured", *_missing(entry, _plain)) for entry in verdict.not_measured),
        *(_columns("within", name, metrics, caveats) for name, metrics, caveats in _uncertain(verdict)),
        *against.other_lines(verdict),
        summary(verdict),
    ]
    return "\n".join(lines) + "\n"


def as_markdown(verdict: Verdict) -> str:
    """A heading with the decision, the summary, and a table or list for each kind of trouble."""
    title = {"pass": "passed", "over": "failed", "not_measured": "not everything was measured"}[verdict.decision]
    lines = [f"### fragscope gate: {title}", "", summary(verdict), *against.policy_markdown(verdict)]
    if verdict.over:
        lines += ["", "| case | metric | budget | value | excess | stated in | |", "|---|---|--:|--:|--:|---|---|"]
    for check in verdict.over:
        limit, value, excess = _sizes(check.limit, check.value)
        caveats = "; ".join(check.caveats)
        cells = [_code(check.case.name), _code(check.metric), limit, value, excess, _code(check.budget.place)]
        cells.append(_code(caveats) if caveats else "")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    if verdict.undeclared:
        lines += ["", "Undeclared outcomes:", ""]
    for u in verdict.undeclared:
        message = f": {_code(u.message)}" if u.message else ""
        lines.append(f"- {_code(u.case.name)}: outcome {u.outcome}, declared {u.expected_outcome}{message}")
    lines += against.regression_markdown(verdict)
    if verdict.not_measured:
        lines += ["", "Not measured:", ""]
    lines += [f"- {': '.join(_missing(entry, _code))}" for entry in verdict.not_measured]
    uncertain = _uncertain(verdict)
    if uncertain:
        lines += ["", "Within budget, but not exact:", ""]
    lines += [f"- {_code(name)} {_code(metrics)}: {_code(caveats)}" for name, metrics, caveats in uncertain]
    lines += against.other_markdown(verdict)
    return "\n".join(lines) + "\n"


def summary(verdict: Verdict) -> str:
    """The last line: the decision, its reasons by number, and how much was compared at all."""
    troubles = [
        *against.troubles(verdict),
        _count(len(verdict.over), "value over budget", "values over budget"),
        _count(len(verdict.undeclared), "undeclared outcome", "undeclared outcomes"),
        _count(len(verdict.not_measured), "thing not measured", "things not measured"),
    ]
    decision = {"pass": "pass", "over": "fail", "not_measured": "not measured"}[verdict.decision]
    held = (
        f"{_count(len(verdict.checks), 'value', 'values') or '0 values'} of "
        f"{_count(verdict.cases_held, 'case', 'cases') or '0 cases'} held against "
        f"{_count(verdict.budgets, 'budget', 'budgets') or '0 budgets'}"
    )
    if verdict.cases_without_budget:
        held += f"; {_count(verdict.cases_without_budget, 'case has', 'cases have')} no budget"
    if verdict.against is not None:
        held = "; ".join([against.compared(verdict), *([held] if verdict.budgets else [])])
    return f"{decision}: {'; '.join([*(filter(None, [', '.join(filter(None, troubles))])), held])}"


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
    budget, shown, excess = _sizes(limit, value)
    over = [f"excess {excess}"] if value > limit else []
    columns = (word, *([name] if name else []), metric, f"budget {budget}", f"value {shown}", *over)
    return _columns(*columns, f"[{_plain(place)}]", *caveats)


def _sizes(limit_bytes: int, value_bytes: int) -> tuple[str, str, str]:
    """Budget, value and excess; in bytes where rounding would make budget and value look equal."""
    limit, value = format_bytes(limit_bytes), format_bytes(value_bytes)
    if limit == value and limit_bytes != value_bytes:
        limit, value = f"{limit_bytes:,} B", f"{value_bytes:,} B"
    excess = format_bytes(value_bytes - limit_bytes)
    if limit_bytes:
        percent = 100 * (value_bytes - limit_bytes) / limit_bytes
        excess += f" (+{percent:,.1f} %)" if percent >= 0.1 else " (+<0.1 %)"
    return limit, value, excess


def _uncertain(verdict: Verdict) -> list[tuple[str, str, str]]:
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


def _missing(entry: NotMeasured, shown: Callable[[str], str]) -> list[str]:
    columns: list[str] = []
    if entry.case is not None:
        columns.append(shown(entry.case.name))
    elif entry.budget is not None:
        columns.append(f"budget {shown(entry.budget.pattern)}")
    columns.append(shown(entry.reason))
    if entry.budget is not None:
        columns.append(_place(entry.budget) if shown is _plain else shown(entry.budget.place))
    return columns


def _place(budget: BudgetName) -> str:
    return f"[{_plain(budget.place)}]"


def _columns(*columns: str) -> str:
    return "  ".join(_plain(column) for column in columns)


def _plain(text: str) -> str:
    return printable(text, _NAME_LIMIT)


def _code(text: str) -> str:
    return against.code(text)


def _count(count: int, one: str, many: str) -> str:
    """``"1 case"``, ``"2 cases"``, and nothing for 0."""
    return f"{count:,} {one if count == 1 else many}" if count else ""
