"""What a gate says: a value that text, Markdown and JSON share."""

from __future__ import annotations

from typing import Literal

import msgspec

from fragscope.errors import EXIT_NOT_MEASURED, EXIT_OVER_BUDGET, EXIT_PASS

SCHEMA_VERSION = 1

Decision = Literal["pass", "over", "not_measured"]

_EXIT_CODES: dict[Decision, int] = {
    "pass": EXIT_PASS,
    "over": EXIT_OVER_BUDGET,
    "not_measured": EXIT_NOT_MEASURED,
}


class CaseName(msgspec.Struct, frozen=True, kw_only=True):
    """Which case is meant.

    Attributes:
        id: the case's id in the results file.
        name: what text output calls it: scenario/preset/variant where only one case has that, its id otherwise.
        scenario, preset, variant, conf, torch, card, device: as in the results file.
    """

    id: str
    name: str
    scenario: str
    preset: str
    variant: str
    conf: str
    torch: str
    card: str
    device: str


class BudgetName(msgspec.Struct, frozen=True, kw_only=True):
    """Which budget is meant.

    Attributes:
        pattern: the table's name: a glob over scenario/preset/variant.
        file: the budgets file as it is shown to people.
        line: where in that file, counted from 1: the limit's line where a limit is meant, else the table's.
    """

    pattern: str
    file: str
    line: int

    @property
    def place(self) -> str:
        """``budgets.toml:12``."""
        return f"{self.file}:{self.line}"


class LockPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where the lock states something.

    Attributes:
        file: the lock as it is shown to people.
        line: counted from 1.
    """

    file: str
    line: int

    @property
    def place(self) -> str:
        """``fragscope.lock:12``."""
        return f"{self.file}:{self.line}"


class WaiverName(msgspec.Struct, frozen=True, kw_only=True):
    """Which waiver is meant, and who answers for it.

    Attributes:
        pattern: the cases it is for: a glob over scenario/preset/variant.
        metrics: keys of budgets.
        owner, reason: as written.
        expires: the last day on which it applies, UTC, ISO 8601.
        limit: bytes up to which a value is waived; None where any is.
        file, line: of its table in the budgets file.
    """

    pattern: str
    metrics: list[str]
    owner: str
    reason: str
    expires: str
    file: str
    line: int
    limit: int | None = None

    @property
    def place(self) -> str:
        """``budgets.toml:12``."""
        return f"{self.file}:{self.line}"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One value held against one limit.

    Attributes:
        case: whose value it is.
        metric: the budget's key.
        limit, value: bytes.
        excess: value minus limit, bytes; negative while there is room.
        over: the value is above the limit. Equal is within.
        budget: the most specific budget that states this metric for this case.
        exact: what the results say: no size is unknown and nothing assumed can change the figures.
        estimated_ops: operators whose hidden temporaries are missing from the value.
        assumptions: codes of assumptions whose effect on the value is unknown.
        caveats: everything that keeps the value from being certain, for people; empty for an exact value.
        waiver: under which an excess does not fail the gate; None where none applies.
    """

    case: CaseName
    metric: str
    limit: int
    value: int
    excess: int
    over: bool
    budget: BudgetName
    exact: bool
    estimated_ops: list[str] = []
    assumptions: list[str] = []
    caveats: list[str] = []
    waiver: WaiverName | None = None


class Undeclared(msgspec.Struct, frozen=True, kw_only=True):
    """A case that ended otherwise than its scenario declares."""

    case: CaseName
    outcome: str
    expected_outcome: str
    message: str = ""


class NotMeasured(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a budget or the lock asked for and nobody measured.

    Attributes:
        case: the case without figures; None where no case matches, or where the whole run is meant.
        budget: the budget that asks; None where the lock does, or the whole run is meant.
        reason: why there is nothing to compare.
        lock: where the lock has the case.
    """

    case: CaseName | None = None
    budget: BudgetName | None = None
    reason: str
    lock: LockPlace | None = None


class LockDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it is locked.

    Attributes:
        case: whose it is.
        kind: larger or smaller than locked; changed, of what has no size; or unlocked: a case that the lock lacks.
        metric: a key of budgets, ``outcome``, or ``exactness``; ``""`` for an unlocked case.
        locked, value: bytes, or words for ``outcome`` and ``exactness``; None for an unlocked case.
        lock: the line that states it; the first one for an unlocked case.
        allowed: the repository lets this kind pass (``[lock]`` of the budgets file).
        reason: why, where it can be told.
        caveats: everything that keeps the value from being certain.
        waiver: under which it does not fail the gate; None where none applies.
    """

    case: CaseName
    kind: Literal["larger", "smaller", "changed", "unlocked"]
    metric: str
    locked: int | str | None
    value: int | str | None
    lock: LockPlace
    allowed: bool = False
    reason: str = ""
    caveats: list[str] = []
    waiver: WaiverName | None = None

    @property
    def fails(self) -> bool:
        """Neither allowed nor waived."""
        return not self.allowed and self.waiver is None


class LockUse(msgspec.Struct, frozen=True, kw_only=True):
    """The lock that results were held against.

    Attributes:
        file: as it is shown to people.
        cases: how many it has.
        held: how many of them were compared.
        note: what it was made with, where that is not what these results were made with.
    """

    file: str
    cases: int
    held: int
    note: str = ""


class WaiverUse(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one waiver.

    Attributes:
        state: applied; exceeded: what it is for is above its limit; expired; or unused: nothing needs it.
        findings: how many it waives; of one that does not apply, how many it is for.
    """

    waiver: WaiverName
    state: Literal["applied", "exceeded", "expired", "unused"]
    findings: int


class StackChange(msgspec.Struct, frozen=True, kw_only=True):
    """What one place in the code held at the peak (or end) that a metric speaks of, before and after; bytes.

    Attributes:
        kind: new (the code asked for nothing there before), grown, shrunk, or gone (it asks for nothing there now).
        before, after: bytes held.
        file: of the innermost frame in the repository that no unchanged allocation shares, relative to its root;
            ``""`` where no frame is in the repository.
        line: in ``file`` as it is now; as it was before where the place is gone.
        function: of that frame.
        code: the line's text.
        frames: ``file:line function`` outwards from the allocation, shortened to what tells stacks apart.
        blocks_before, blocks_after: in how many blocks.
        why: what makes the difference, as far as the requests tell: ``larger`` or ``smaller`` ones, ``more`` or
            ``fewer`` of them, or the same ones that live ``longer`` or ``shorter``; ``cut`` where the same is held in
            blocks with other remainders; ``""`` where several do.
        changed: the line is new or edited, or part of a statement that is; of a line that is there now.
    """

    kind: Literal["new", "grown", "shrunk", "gone"]
    before: int
    after: int
    file: str
    line: int
    function: str
    code: str = ""
    frames: list[str] = []
    blocks_before: int = 0
    blocks_after: int = 0
    why: Literal["", "larger", "smaller", "more", "fewer", "longer", "shorter", "cut"] = ""
    changed: bool = False


class CodePlace(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the repository.

    Attributes:
        file: relative to the repository's root.
        line: counted from 1, in the tree that is meant.
        function: that it is in.
        code: the line's text.
    """

    file: str
    line: int
    function: str
    code: str = ""


class TouchedLine(msgspec.Struct, frozen=True, kw_only=True):
    """A statement that a change of the code touched.

    Attributes:
        file: relative to the repository's root.
        line: in ``file`` as it is now; as it was before where the statement is removed.
        function: that it is in; ``""`` outside of functions.
        code: the line's text.
        removed: it is there no more.
        on_the_way: its function called for memory that rose, or for what was asked for at the peak.
    """

    file: str
    line: int
    function: str
    code: str = ""
    removed: bool = False
    on_the_way: bool = False


class Touched(msgspec.Struct, frozen=True, kw_only=True):
    """What a change of the code touched of what a case imports, where the line that rose most is none of it.

    It says where to look, not what the cause is.

    Attributes:
        lines: first those on the way to what rose; of files that asked for memory, or of others where none was touched.
        more: how many statements besides were touched in what the case imports.
    """

    lines: list[TouchedLine] = []
    more: int = 0


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One value of one case, before and after a change of the code; bytes.

    Attributes:
        case: whose value it is, as it is now.
        metric: a key of budgets.
        before, after: the values.
        allowed: by how much ``after`` may be larger.
        regressed: it is larger by more than that.
        stacks: which places hold the difference: of those that rose first the changed ones, then by size.
        touched: where to look, where the first of these lines was not changed.
        improved: it is smaller by more than that.
        peak_before, peak_after: the request at which the peak was reached; None for values of the end.
        peak_moved: these are different lines, and not one that moved.
        caveats: everything that keeps the values from being certain.
        waiver: under which a regression does not fail the gate; None where none applies.
    """

    case: CaseName
    metric: str
    before: int
    after: int
    allowed: int
    regressed: bool
    improved: bool = False
    stacks: list[StackChange] = []
    touched: Touched = Touched()
    peak_before: CodePlace | None = None
    peak_after: CodePlace | None = None
    peak_moved: bool = False
    caveats: list[str] = []
    waiver: WaiverName | None = None


class OutcomeChange(msgspec.Struct, frozen=True, kw_only=True):
    """A case that ends otherwise than before.

    Attributes:
        case: as it is now.
        before, after: outcomes.
        regressed: it ended as declared and does no more; else it is mended, or both are as declared.
        declared: it came to its end, and is declared not to now: its values are held against nothing.
        message: one line about how it ends now, or ended before where it is mended.
        place: the request that failed, where it runs out of memory now.
        stacks: which places held more or less then than at the same point before.
        touched: where to look, where the first of these lines was not changed.
    """

    case: CaseName
    before: str
    after: str
    regressed: bool
    declared: bool = False
    message: str = ""
    place: CodePlace | None = None
    stacks: list[StackChange] = []
    touched: Touched = Touched()

    @property
    def word(self) -> Literal["regressed", "declared otherwise", "improved"]:
        """What people call it."""
        if self.regressed:
            return "regressed"
        return "declared otherwise" if self.declared else "improved"


class OneSided(msgspec.Struct, frozen=True, kw_only=True):
    """A case that only one of two trees has, or that can be compared with nothing.

    Attributes:
        case: whose; of the tree that has it.
        reason: why it was not compared.
    """

    case: CaseName
    reason: str


class PolicyChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change of what the repository holds its cases to. It does not fail by itself, and is always said.

    Attributes:
        file: the budgets file or the lock, as it is shown to people.
        line: as it is now, or before where it is removed; 0 where the whole file is meant.
        what: the budget with what narrows it, or the file.
        metric: a key of budgets; ``""`` where none is meant.
        kind: what happened to the limit, or to the file.
        before, after: limits in bytes; None where there is none.
        detail: more, for people.
    """

    file: str
    line: int
    what: str
    metric: str = ""
    kind: Literal["raised", "lowered", "new", "removed", "changed"]
    before: int | None = None
    after: int | None = None
    detail: str = ""


class Against(msgspec.Struct, frozen=True, kw_only=True):
    """Which two trees were compared.

    Attributes:
        ref: as it was given.
        commit: that it is, in full.
        current: the commit that is checked out.
        dirty: the working tree differs from that commit; what was run is the working tree.
        compared: how many cases were compared.
        notes: what else was done, and what may explain differences.
    """

    ref: str
    commit: str
    current: str
    dirty: bool
    compared: int = 0
    notes: list[str] = []


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Results held against budgets, and against a lock where there is one.

    Where values are over budget *and* others were not measured, the verdict is ``over``: measuring again cannot
    make that better, so it is what the author of a change has to know first. Both lists are there in any case.

    Attributes:
        decision: pass, over (also an undeclared outcome, a regression, or a difference from the lock), or not_measured.
        exit_code: what the command ends with.
        budgets: how many budgets the file holds.
        cases: how many cases the results hold.
        cases_held: how many of them were measured and held against at least one limit.
        cases_without_budget: how many of them no budget matches.
        checks: every comparison; those over budget first, worst excess first.
        undeclared: outcomes that nobody declared.
        not_measured: what was asked for and is missing.
        lock: what results were held against; None where there is no lock.
        lock_differences: everything that is not as locked; larger values first, largest difference first.
        waivers: what became of each waiver, in the order of the file.
        warn_only: the repository only wants to be told: ``exit_code`` is 0 whatever the decision.
        against: which trees were compared; None where none were. What follows is empty then.
        policy: changes of budgets and lock.
        changes: every value that differs; regressions first, then improvements, then what is allowed.
        outcomes: cases that end otherwise than before.
        appeared, removed: cases that only the current tree has, and that only the other had.
    """

    schema_version: int = SCHEMA_VERSION
    decision: Decision
    exit_code: int
    budgets: int
    cases: int
    cases_held: int
    cases_without_budget: int
    checks: list[Check]
    undeclared: list[Undeclared]
    not_measured: list[NotMeasured]
    lock: LockUse | None = None
    lock_differences: list[LockDifference] = []
    waivers: list[WaiverUse] = []
    warn_only: bool = False
    against: Against | None = None
    policy: list[PolicyChange] = []
    changes: list[Change] = []
    outcomes: list[OutcomeChange] = []
    appeared: list[OneSided] = []
    removed: list[OneSided] = []

    @property
    def over(self) -> list[Check]:
        """The values over their budgets that no waiver covers, worst first."""
        return [check for check in self.checks if check.over and check.waiver is None]

    @property
    def regressions(self) -> list[Change]:
        """The values that a change of the code made larger and no waiver covers."""
        return [change for change in self.changes if change.regressed and change.waiver is None]


def decided(verdict: Verdict) -> Verdict:
    """The verdict with the decision and the exit code that its lists call for."""
    decision: Decision = "pass"
    fails = (
        bool(verdict.undeclared or verdict.over or verdict.regressions)
        or any(outcome.regressed for outcome in verdict.outcomes)
        or any(difference.fails for difference in verdict.lock_differences)
    )
    if fails:
        decision = "over"
    elif verdict.not_measured:
        decision = "not_measured"
    code = EXIT_PASS if verdict.warn_only else _EXIT_CODES[decision]
    return msgspec.structs.replace(verdict, decision=decision, exit_code=code)
