"""Waivers: what may be over its budget, larger than locked or larger than before, for a while, and who answers for it.

    [[waiver]]
    case = "moe-fp8-shuffle/*/list-stack"   # a glob over scenario/preset/variant, as of a budget
    metrics = ["transient"]                 # keys of budgets
    owner = "@jane"
    reason = "fixed upstream in 0.21"
    expires = 2027-03-31                    # the last day on which it applies, UTC
    limit = "4 GiB"                         # optional: nothing above this is waived
    card = "h100-80gb"                      # optional: conf, torch, card and device narrow it as they do a budget

A waiver never hides anything: what it lets pass stands in every output, with its owner and reason. One that has
expired, that its own limit stops, or that nothing needs is named, too. It is for bytes only: an outcome that nobody
declared, and what was not measured, cannot be waived.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from fragscope.gate.budgets import Budget
from fragscope.gate.verdict import CaseName, Change, Check, LockDifference, Verdict, WaiverName, WaiverUse, decided


@dataclass(frozen=True, slots=True)
class Waiver:
    """One table of the file.

    Attributes:
        cases: which cases it is for; its limits are empty.
        metrics: keys of budgets; never empty.
        owner, reason: for people.
        expires: the last day on which it applies, UTC.
        limit: bytes; a value above is not waived. None where any value is.
        line: of the table.
    """

    cases: Budget
    metrics: tuple[str, ...]
    owner: str
    reason: str
    expires: datetime.date
    limit: int | None
    line: int

    def is_for(self, case: CaseName, metric: str) -> bool:
        """Whether a finding about this value is one that it speaks of."""
        parts = f"{case.scenario}/{case.preset}/{case.variant}".split("/")
        return metric in self.metrics and self.cases.matches_name(parts) and self.cases.matches_settings(case)

    def named(self, file: str) -> WaiverName:
        """What outputs say of it."""
        return WaiverName(
            pattern=self.cases.pattern,
            metrics=list(self.metrics),
            owner=self.owner,
            reason=self.reason,
            expires=self.expires.isoformat(),
            limit=self.limit,
            file=file,
            line=self.line,
        )


def waive(verdict: Verdict, waivers: Iterable[Waiver], file: str, today: datetime.date) -> Verdict:
    """The verdict with everything marked that a waiver covers, and with what became of each waiver.

    Where several cover a finding, the first in the file does.

    Args:
        verdict: with all that is held against anything.
        waivers: in the order of the file.
        file: that states them, as it is shown to people.
        today: the day, UTC.
    """
    books = [_Book(waiver, waiver.named(file), waiver.expires < today) for waiver in waivers]

    def covering(case: CaseName, metric: str, value: int) -> WaiverName | None:
        found = None
        for book in books:
            if book.takes(case, metric, value, free=found is None):
                found = book.name
        return found

    def check(entry: Check) -> Check:
        name = covering(entry.case, entry.metric, entry.value) if entry.over else None
        return msgspec.structs.replace(entry, waiver=name) if name else entry

    def change(entry: Change) -> Change:
        name = covering(entry.case, entry.metric, entry.after) if entry.regressed else None
        return msgspec.structs.replace(entry, waiver=name) if name else entry

    def difference(entry: LockDifference) -> LockDifference:
        if entry.allowed or not isinstance(entry.value, int):
            return entry
        name = covering(entry.case, entry.metric, entry.value)
        return msgspec.structs.replace(entry, waiver=name) if name else entry

    verdict = msgspec.structs.replace(
        verdict,
        checks=[check(entry) for entry in verdict.checks],
        changes=[change(entry) for entry in verdict.changes],
        lock_differences=[difference(entry) for entry in verdict.lock_differences],
    )
    return decided(msgspec.structs.replace(verdict, waivers=[book.use for book in books]))


class _Book:
    """What one waiver has been asked for so far."""

    def __init__(self, waiver: Waiver, name: WaiverName, expired: bool) -> None:
        self.name = name
        self._waiver = waiver
        self._expired = expired
        self._asked = self._within = self._applied = 0

    def takes(self, case: CaseName, metric: str, value: int, *, free: bool) -> bool:
        """Whether the waiver covers this finding, which no earlier one does where it is ``free``."""
        if not self._waiver.is_for(case, metric):
            return False
        self._asked += 1
        if self._waiver.limit is not None and value > self._waiver.limit:
            return False
        self._within += 1
        if self._expired or not free:
            return False
        self._applied += 1
        return True

    @property
    def use(self) -> WaiverUse:
        if self._expired:
            return WaiverUse(waiver=self.name, state="expired", findings=self._within)
        if self._applied:
            return WaiverUse(waiver=self.name, state="applied", findings=self._applied)
        if self._asked > self._within:
            return WaiverUse(waiver=self.name, state="exceeded", findings=self._asked - self._within)
        return WaiverUse(waiver=self.name, state="unused", findings=0)
