"""Budgets, and whether results are within them. Needs no torch."""

from fragscope.gate.budgets import METRICS, Budget, Budgets, Limit, load_budgets, parse_budgets
from fragscope.gate.evaluate import evaluate
from fragscope.gate.verdict import (
    SCHEMA_VERSION,
    BudgetName,
    CaseName,
    Check,
    Decision,
    NotMeasured,
    Undeclared,
    Verdict,
)

__all__ = [
    "METRICS",
    "SCHEMA_VERSION",
    "Budget",
    "BudgetName",
    "Budgets",
    "CaseName",
    "Check",
    "Decision",
    "Limit",
    "NotMeasured",
    "Undeclared",
    "Verdict",
    "evaluate",
    "load_budgets",
    "parse_budgets",
]
