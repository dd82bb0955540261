"""Budgets, locks and waivers, and whether results are within them. Needs no torch."""

from fragscope.gate.budgets import METRICS, Budget, Limit
from fragscope.gate.budgets_file import Budgets, load_budgets, parse_budgets
from fragscope.gate.evaluate import evaluate
from fragscope.gate.lock import Lock, load_lock, lock_of, lock_text, parse_lock
from fragscope.gate.lock_check import hold_to_lock
from fragscope.gate.verdict import (
    SCHEMA_VERSION,
    BudgetName,
    CaseName,
    Check,
    Decision,
    NotMeasured,
    Undeclared,
    Verdict,
    decided,
)
from fragscope.gate.waivers import waive

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
    "Lock",
    "NotMeasured",
    "Undeclared",
    "Verdict",
    "decided",
    "evaluate",
    "hold_to_lock",
    "load_budgets",
    "load_lock",
    "lock_of",
    "lock_text",
    "parse_budgets",
    "parse_lock",
    "waive",
]
