"""How peak memory grows with a size, and the largest size that fits.

A sweep doubles its size until a case does not fit, and then halves the interval between that size and the largest one
that did, until nothing lies between. Nothing above a size that does not fit is tried, and the answer says so; that the
sizes in between fit is not proven.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fragscope.errors import UsageError
from fragscope.results import CAME_TO_ITS_END, Case, Curve, Outcome, Point, SweepResults
from fragscope.suite.discover import Selection
from fragscope.suite.plan import PlannedCase

_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_RANGE = re.compile(r"([A-Za-z_]\w*)=(\d{1,20})([A-Za-z]*):(\d{1,20})([A-Za-z]*)(?::(\d{1,20})([A-Za-z]*))?", re.ASCII)
_TOO_LARGE: tuple[Outcome, ...] = ("oom", "overflow")
_MOST = 2**62


@dataclass(frozen=True, slots=True)
class Range:
    """``NAME=LOW:HIGH[:STEP]``: sizes from ``low`` to ``high``, each ``low`` plus a multiple of ``step``."""

    name: str
    low: int
    high: int
    step: int = 1

    @property
    def grid(self) -> list[int]:
        """Both ends, and the doublings of the lower one between them: tried in this order until one does not fit."""
        out = [self.low]
        last = self.at(self.steps(self.high))
        while (following := max(self.at(self.steps(out[-1] * 2)), out[-1] + self.step)) < last:
            out.append(following)
        return sorted({*out, last})

    def steps(self, size: int) -> int:
        """Whole steps from the lower end to a size, rounded down."""
        return (size - self.low) // self.step

    def at(self, steps: int) -> int:
        """The size that many steps above the lower end."""
        return self.low + steps * self.step


def parse_range(text: str) -> Range:
    """Read ``--sweep``; k, M, G are powers of 1000, Ki, Mi, Gi of 1024.

    Raises:
        UsageError: it is not of that form, or empty.
    """
    match = _RANGE.fullmatch(text)
    if match is None or any(unit not in _FACTORS for unit in match.group(3, 5, 7) if unit is not None):
        raise UsageError(
            f"--sweep {text}: write NAME=LOW:HIGH or NAME=LOW:HIGH:STEP, such as tokens=1k:1M; "
            "k, M and G are powers of 1000, Ki, Mi and Gi of 1024"
        )
    low, high = int(match[2]) * _FACTORS[match[3]], int(match[4]) * _FACTORS[match[5]]
    step = 1 if match[6] is None else int(match[6]) * _FACTORS[match[7]]
    if not 0 < low <= high < _MOST or step < 1:
        raise UsageError(f"--sweep {text}: sizes go up from at least 1, in steps of at least 1")
    return Range(match[1], low, high, step)


Over = Callable[[Case], str]
"""Why a case is over a budget, ``""`` where it is within all."""


@dataclass(slots=True)
class _Cell:
    """One case of the sweep, at all sizes so far."""

    first: PlannedCase
    points: dict[int, Point] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    undeclared: bool = False
    refuted: str = ""

    @property
    def problem(self) -> str:
        """What keeps the sweep from an answer: an outcome that has nothing to do with size."""
        for size, point in sorted(self.points.items()):
            if not point.reached and not point.too_large:
                return f"{point.outcome} at {size:,}: {self.reasons[size] or 'no message'}"
        return ""

    @property
    def bracket(self) -> tuple[int | None, int | None]:
        """The largest size that fits, and the smallest above it that does not."""
        largest = max((s for s, p in self.points.items() if p.fits), default=None)
        above = min((s for s in self.points if largest is None or s > largest), default=None)
        return largest, above


class Sweep:
    """Which sizes to run next, given what came out so far.

    Args:
        sizes: what is swept.
        at: the cases at one size, the same ones for every size.
        over: holds a case against budgets.
    """

    def __init__(self, sizes: Range, at: Callable[[int], Sequence[PlannedCase]], over: Over) -> None:
        self._sizes = sizes
        self._at = at
        self._over = over
        self._cells: dict[tuple[object, ...], _Cell] = {}
        self._where: dict[str, tuple[_Cell, int]] = {}

    def first(self) -> list[PlannedCase]:
        """The cases at the size to begin with."""
        size = self._sizes.low
        return [self._ask(self._cells.setdefault(_key(p), _Cell(p)), size, p) for p in self._at(size)]

    def after(self, case: Case) -> Iterable[PlannedCase]:
        """What to run now that a case is finished."""
        cell, size = self._where[case.digest]
        too_large = case.outcome in _TOO_LARGE or _does_not_fit(case)
        cell.reasons[size] = case.message
        cell.undeclared |= not too_large and case.outcome not in CAME_TO_ITS_END and not case.as_expected
        if case.refuted and not cell.refuted:
            cell.refuted = f"at {size:,} the allocator model differs from what was recorded"
        cell.points[size] = Point(
            size=size,
            outcome=case.outcome,
            peak_allocated=case.peak.allocated,
            peak_reserved=case.peak.reserved,
            transient=case.transient,
            exact=case.exact,
            too_large=too_large,
            over=self._over(case) if case.outcome in CAME_TO_ITS_END else "",
        )
        largest, above = cell.bracket
        if cell.problem or largest is None:
            return ()
        # What does not fit may also take as long as it is large: nothing above the first such size is tried.
        if above is None:
            size = next((s for s in self._sizes.grid if s > largest), largest)
        else:
            size = self._sizes.at((self._sizes.steps(largest) + self._sizes.steps(above)) // 2)
        if size <= largest:
            return ()
        planned = next(p for p in self._at(size) if _key(p) == _key(cell.first))
        return (self._ask(cell, size, planned),)

    def _ask(self, cell: _Cell, size: int, planned: PlannedCase) -> PlannedCase:
        self._where[planned.digest] = (cell, size)
        return planned

    def results(self, command: Sequence[str], *, complete: bool) -> SweepResults:
        """What came out, in the order of the plan."""
        return SweepResults(
            parameter=self._sizes.name,
            low=self._sizes.low,
            high=self._sizes.high,
            step=self._sizes.step,
            command=list(command),
            complete=complete,
            curves=[_curve(cell, self._sizes) for cell in self._cells.values()],
        )


def _curve(cell: _Cell, sizes: Range) -> Curve:
    settings = cell.first.settings
    largest, above = cell.bracket
    limited_by, last = "", max(cell.points, default=sizes.low)
    if above is not None:
        point = cell.points[above]
        # What torch says of an out-of-memory error goes on to advice.
        why = cell.reasons[above].partition(". GPU ")[0]
        limited_by = f"at {above:,}: {point.over or f'{point.outcome}: {why}'}"
    return Curve(
        name=cell.first.selection.name,
        conf=settings.conf,
        torch=settings.rules.torch,
        card=settings.card,
        capacity=settings.capacity,
        largest=None if cell.problem else largest,
        limited_by="" if cell.problem else limited_by,
        problem=cell.problem,
        declared=bool(cell.problem) and not cell.undeclared,
        refuted=cell.refuted,
        untried_above=last if above is not None and last < sizes.grid[-1] else None,
        points=[point for _, point in sorted(cell.points.items())],
    )


def _does_not_fit(case: Case) -> bool:
    """Whether it was not run because the card has less than it needs."""
    known = case.precheck
    return case.outcome == "skipped" and known is not None and known.needs is not None and known.needs > known.free


def sweepable(selections: Sequence[Selection], name: str) -> tuple[list[Selection], list[str]]:
    """The selections that have a size of that name, and the scenarios that have none.

    Raises:
        UsageError: none has.
    """
    chosen = []
    for selection in selections:
        value = selection.scenario.values_for(selection.preset, {}).get(name)
        if isinstance(value, int) and not isinstance(value, bool) and not _has_choices(selection, name):
            chosen.append(selection)
    if not chosen:
        sizes = {
            key
            for s in selections
            for key, value in s.scenario.values_for(s.preset, {}).items()
            if isinstance(value, int) and not isinstance(value, bool) and not _has_choices(s, key)
        }
        known = f"sizes there are: {', '.join(sorted(sizes))}" if sizes else "they have no integer parameters"
        raise UsageError(f"--sweep {name}: no selected scenario has an integer of that name; {known}")
    having = {s.scenario.name for s in chosen}
    return chosen, sorted({s.scenario.name for s in selections} - having)


def _has_choices(selection: Selection, name: str) -> bool:
    return isinstance(selection.scenario.params.get(name), tuple)


def _key(planned: PlannedCase) -> tuple[object, ...]:
    return planned.selection.name, planned.settings
