"""Fitting: the smallest memory in which a trace's requests run without an OOM, and what fails just below it.

More memory is not always better: with collection of old segments, or with split limits, a request may fail at one
capacity and not at a smaller one. So the answer is the smallest capacity from which on all that were tried run, and it
says how many those were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fragscope.allocator import (
    CARDS,
    OF_PROGRAM,
    Assumption,
    DriverCalls,
    Replay,
    ReplaySettings,
    Tape,
    caught_of,
    merged,
    replay,
)
from fragscope.allocator.engine.kinds import NOTHING
from fragscope.allocator.engine.sizes import TOO_LARGE
from fragscope.errors import UsageError
from fragscope.search.failure import Failure, failure_of
from fragscope.search.subject import Subject
from fragscope.trace import RequestKind
from fragscope.units import MIB

PAGE = 2 * MIB  # what the driver gives memory in
UNLIMITED = 1 << 50  # bytes: more than any trace asks for
_NEAR = 16  # pages above an answer that are all tried
_STEP = 1.05  # factor between the capacities that are tried beyond those


@dataclass(frozen=True, slots=True)
class Fit:
    """The smallest memory for one conf; bytes.

    Attributes:
        conf: the string.
        capacity: the smallest capacity from which on all that were tried run; None where requests fail even with
            unlimited memory.
        lowest: the smallest capacity that was found to run; below ``capacity`` where a larger one fails.
        tested: capacities tried.
        failing: capacities above ``lowest`` that fail, ascending.
        failure: what fails with a page less than ``capacity``, or with unlimited memory; None if nothing is asked for.
        unlimited: most held from the driver with unlimited memory; from there on more memory changes nothing.
        retries: requests that released everything cached first, at ``capacity``.
        calls: driver calls at ``capacity``.
        calls_unlimited: driver calls with unlimited memory.
        cards: profiles whose usual free memory is enough, the smallest first.
        exact: whether nothing assumed can change these figures as long as the program asks for the same.
        assumptions: what they take for granted.
    """

    conf: str
    capacity: int | None
    lowest: int | None
    tested: int
    failing: tuple[int, ...]
    failure: Failure | None
    unlimited: int
    retries: int
    calls: DriverCalls
    calls_unlimited: DriverCalls
    cards: tuple[str, ...]
    exact: bool
    assumptions: tuple[Assumption, ...]


def fit(
    subject: Subject,
    conf: str,
    *,
    assume_unchanged: bool = False,
    compiled: bool | None = None,
    tested: Callable[[int], None] = lambda capacity: None,
) -> Fit:
    """The smallest capacity at which a trace's requests run under a conf.

    A limit on reserved bytes that the trace was recorded under is lifted: capacity takes its place.

    Args:
        subject: the trace.
        conf: the conf string.
        assume_unchanged: take for granted that the program asks for the same whatever it learns about memory; requests
            that it made in vain and got over are left out.
        compiled: as for ``replay``.
        tested: told each capacity that is tried.

    Raises:
        UsageError: the program learned something about memory when recorded and may act otherwise with less; or the
            conf is not one of the release.
    """
    tape, assumed = unchanged(subject, assume_unchanged=assume_unchanged)
    settings = (subject.settings if conf == subject.settings.conf else subject.settings.with_conf(conf)).with_limit(
        UNLIMITED
    )
    return _Fitting(tape, settings, assumed, compiled, tested).run()


def unchanged(subject: Subject, *, assume_unchanged: bool) -> tuple[Tape, tuple[Assumption, ...]]:
    """The requests that are asked for whatever the memory, and what that takes for granted.

    Raises:
        UsageError: the program learned about memory on the way, and ``assume_unchanged`` is not given.
    """
    trace = subject.tape.trace
    caught, _ = caught_of(trace, subject.tape.failed)
    observed = np.flatnonzero(trace.requests.kind == RequestKind.OBSERVATION)
    _refuse_if_learned(subject, caught.tolist(), observed, assume_unchanged)
    out = []
    if len(observed):
        detail = "the program read the state of memory; it is taken to ask for the same whatever it reads"
        out.append(Assumption("observations", "unknown", len(observed), detail))
    elif trace.source == "snapshot":
        detail = "a snapshot does not show where the program read the state of memory; it is taken to ask for the same"
        out.append(Assumption("observations_unseen", "unknown", len(trace.requests), detail))
    limits = np.flatnonzero(subject.tape.kind == RequestKind.MEMORY_FRACTION)
    kind = subject.tape.kind.copy()
    kind[[*caught.tolist(), *limits.tolist()]] = NOTHING
    kind[(kind == RequestKind.ALLOC) & (subject.tape.size >= TOO_LARGE)] = (
        NOTHING  # torch refuses these whatever there is
    )
    return replace(subject.tape, kind=kind), tuple(out)


def _refuse_if_learned(subject: Subject, caught: Sequence[int], observed: np.ndarray, assume_unchanged: bool) -> None:
    if assume_unchanged:
        return
    trace = subject.tape.trace
    first = [(int(row), "caught an OOM") for row in caught[:1]]
    for row in observed[:1].tolist():
        seen = trace.observations[int(trace.requests.size[row])]
        first.append((row, f"called {seen.what}{f' at {seen.where}' if seen.where else ''}"))
    if first:
        row, what = min(first)
        raise UsageError(
            f"{subject.name}: the program {what} at event {row:,} and may ask for something else with other memory; "
            "--assume-unchanged takes its requests as they are"
        )


class _Fitting:
    """One search."""

    def __init__(
        self,
        tape: Tape,
        settings: ReplaySettings,
        assumed: tuple[Assumption, ...],
        compiled: bool | None,
        tested: Callable[[int], None],
    ) -> None:
        self._tape, self._settings, self._assumed, self._compiled = tape, settings, assumed, compiled
        self._tested = tested
        self._runs: dict[int, bool] = {}  # by pages

    def run(self) -> Fit:
        roomy = self._play(UNLIMITED)
        most = _pages(roomy.whole.peak.hbm)  # less than the driver counts only if segments are not whole pages
        if roomy.whole.ooms:
            failure = failure_of(self._tape, self._at(UNLIMITED), self._compiled)
            return self._answer(roomy, None, None, failure, roomy)
        if not self._check(most):
            most += roomy.whole.segments_peak
            self._runs[most] = True
        lowest = self._first_that_runs(_pages(self._live()) - 1, most)
        answer = lowest
        self._try_above(answer, most)
        while failing := [pages for pages, runs in self._runs.items() if pages > answer and not runs]:
            below = max(failing)
            above = min(pages for pages, runs in self._runs.items() if pages > below and runs)
            answer = self._first_that_runs(below, above)
            self._try_above(answer, most)
        failure = None
        if answer:
            self._check(answer - 1)
            failure = failure_of(self._tape, self._at((answer - 1) * PAGE), self._compiled)
        return self._answer(roomy, answer * PAGE, lowest * PAGE, failure, self._play(answer * PAGE))

    def _first_that_runs(self, fails: int, runs: int) -> int:
        """Bisect between pages that fail (or are known to be too few) and pages that run."""
        while runs - fails > 1:
            middle = (fails + runs) // 2
            if self._check(middle):
                runs = middle
            else:
                fails = middle
        return runs

    def _try_above(self, answer: int, most: int) -> None:
        """Every page near the answer, then ever larger steps up to where nothing changes any more."""
        for pages in range(answer + 1, min(answer + _NEAR, most) + 1):
            self._check(pages)
        step = float(answer + _NEAR)
        while (pages := round(step)) < most:
            self._check(pages)
            step = max(step * _STEP, step + 1)

    def _check(self, pages: int) -> bool:
        """Whether the requests run with so many pages."""
        if pages not in self._runs:
            self._tested(pages * PAGE)
            self._runs[pages] = not self._play(pages * PAGE, stop=True).whole.ooms
        return self._runs[pages]

    def _live(self) -> int:
        """Most bytes that are live at once: no allocator needs less."""
        kinds, sizes, ids = self._tape.kind, self._tape.size, self._tape.id
        change = np.zeros(len(kinds) + 1, dtype=np.int64)
        begun = np.flatnonzero((kinds == RequestKind.ALLOC) | (kinds == RequestKind.HELD))
        change[begun] = sizes[begun]
        size_of = np.zeros(self._tape.allocations + 1, dtype=np.int64)
        size_of[ids[begun]] = sizes[begun]
        freed = np.flatnonzero(kinds == RequestKind.FREE)
        change[freed] = -size_of[ids[freed]]
        return int(np.cumsum(change).max(initial=0))

    def _at(self, capacity: int) -> ReplaySettings:
        return self._settings.with_capacity(capacity)

    def _play(self, capacity: int, *, stop: bool = False) -> Replay:
        return replay(
            self._tape, self._at(capacity), decisions=False, stop_at_oom=stop or capacity == UNLIMITED,
            compiled=self._compiled,
        )  # fmt: skip

    def _answer(
        self, roomy: Replay, capacity: int | None, lowest: int | None, failure: Failure | None, final: Replay
    ) -> Fit:
        failing = sorted(pages * PAGE for pages, runs in self._runs.items() if not runs)
        found = merged([roomy.assumptions, final.assumptions], max)
        return Fit(
            conf=self._settings.conf,
            capacity=capacity,
            lowest=lowest,
            tested=len(self._runs),
            failing=tuple(c for c in failing if lowest is not None and c > lowest),
            failure=failure,
            unlimited=roomy.whole.peak.hbm,
            retries=final.whole.retries,
            calls=final.whole.calls,
            calls_unlimited=roomy.whole.calls,
            cards=() if capacity is None else _cards_with(capacity),
            exact=all(a.effect == "none" for a in found if a.code not in OF_PROGRAM),
            assumptions=merged([self._assumed, found], max),
        )


def _pages(size: int) -> int:
    return -(-size // PAGE)


def _cards_with(capacity: int) -> tuple[str, ...]:
    enough = (card for card in CARDS.values() if card.free >= capacity)
    return tuple(card.name for card in sorted(enough, key=lambda card: card.free))
