"""Tuning: the conf under which a set of traces needs least, found by replaying them under many.

The search is staged: every setting alone, the best of each kind together, then the neighbourhood of the best few, until
nothing better turns up. It does not prove that no better conf exists; it says how many were tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import add
from typing import Literal, Protocol

from fragscope.allocator import Assumption, DriverCalls, Rules, merged
from fragscope.errors import UsageError
from fragscope.search.candidates import material_of, neighbours, releases_of, singles, together
from fragscope.search.confs import Choice, choice_of, effective, kept, settings_in, spelled
from fragscope.search.subject import Subject

Goal = Literal["reserved", "stranded", "no-oom"]
MOST_TRIES = 300
_PARENTS = 3  # best confs of each kind that are tried together
_ROUNDS = 6
_FRONT = 4  # best confs whose neighbourhood is searched


@dataclass(frozen=True, slots=True)
class Figures:
    """What one trace does under one conf; bytes.

    Attributes:
        reserved: peak reserved.
        stranded: peak stranded.
        ooms: failed requests.
        retries: requests that released everything cached first.
        calls: driver calls; each costs time, and a synchronisation waits for all streams.
        exact: whether nothing assumed can change these figures.
        assumptions: what they take for granted.
    """

    reserved: int
    stranded: int
    ooms: int
    retries: int
    calls: DriverCalls
    exact: bool
    assumptions: tuple[Assumption, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """A conf and what the traces do under it, in their order.

    Attributes:
        conf: the string; None for each trace's recorded conf.
        settings: how many of the settings that are tuned it has.
        figures: one for each trace.
    """

    conf: str | None
    settings: int
    figures: tuple[Figures, ...]

    @property
    def ooms(self) -> int:
        """Failed requests in all traces."""
        return sum(f.ooms for f in self.figures)

    @property
    def retries(self) -> int:
        """Requests that released everything cached first, in all traces."""
        return sum(f.retries for f in self.figures)

    @property
    def calls(self) -> DriverCalls:
        """Driver calls of all traces."""
        calls = [f.calls for f in self.figures]
        return DriverCalls(sum(c.alloc for c in calls), sum(c.free for c in calls), sum(c.sync for c in calls))

    @property
    def reserved(self) -> int:
        """The largest peak of reserved bytes."""
        return max(f.reserved for f in self.figures)

    @property
    def stranded(self) -> int:
        """The largest peak of stranded bytes."""
        return max(f.stranded for f in self.figures)

    @property
    def exact(self) -> bool:
        """Whether the figures of all traces are exact."""
        return all(f.exact for f in self.figures)

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """What the figures take for granted, each kind once, with its worst effect and the events of all traces."""
        return merged([f.assumptions for f in self.figures], add)


@dataclass(frozen=True, slots=True)
class Tuning:
    """The answer.

    Attributes:
        goal: what was minimised.
        names: the traces.
        current: the recorded confs.
        ranked: all confs tried, best first.
        best: the one to use, None where none beats the recorded ones.
        calmer: the best that needs no more driver calls than the recorded ones, where ``best`` needs more.
        simpler: the best with a single setting, where ``best`` has more.
        surer: the best whose figures are exact, where those of ``best`` are not.
        variable: environment variable that the release reads it from.
    """

    goal: Goal
    names: tuple[str, ...]
    current: Trial
    ranked: tuple[Trial, ...]
    best: Trial | None
    calmer: Trial | None
    simpler: Trial | None
    surer: Trial | None
    variable: str

    def saved(self, trial: Trial) -> int:
        """Bytes of the goal's peak that a conf saves in the trace where it saves least; negative where one needs more.

        For ``no-oom`` they are reserved bytes.
        """
        pairs = zip(self.current.figures, trial.figures, strict=True)
        return min(_bytes(before, self.goal) - _bytes(after, self.goal) for before, after in pairs)


class Player(Protocol):
    """Whatever replays the traces under confs."""

    def __call__(self, confs: Sequence[str | None]) -> list[tuple[Figures, ...]]:
        """Figures of each conf, one for each trace; None is the trace's recorded conf."""
        ...


def tune(
    subjects: Sequence[Subject],
    play: Player,
    *,
    goal: Goal = "reserved",
    keep: Sequence[str] = (),
    most: int = MOST_TRIES,
    found: Callable[[int], None] = lambda tried: None,
) -> Tuning:
    """Find the conf under which the worst of the traces needs least.

    A conf is better the fewer requests fail; then by the goal's peak, relative to each trace's own peak of reserved
    bytes under its recorded conf, the worst trace first; then the fewer driver calls it makes beyond those as recorded;
    then the fewer settings it has. For ``no-oom``, retries and driver calls come before bytes. A conf under which more
    requests of a trace fail than when recorded is never the best.

    Args:
        subjects: the traces.
        play: replays them.
        goal: what to minimise.
        keep: settings that stay: ``KEY:VALUE``, or ``KEY`` as recorded.
        most: confs to try at most.
        found: told how many were tried after each stage.

    Raises:
        UsageError: ``keep`` makes no sense, or the traces were recorded under settings that contradict each other.
    """
    if not subjects:
        raise UsageError("tune: no trace was given")
    releases = releases_of(subjects)
    recorded = [settings_in(s.settings.conf, s.settings.rules.rules) for s in subjects]
    fixed = kept(keep, recorded, releases)
    material = material_of(subjects, fixed)
    search = _Search(play, releases, fixed, goal, most, found)
    search.attempt([(), *singles(material)])
    for _ in range(_ROUNDS):
        front, parents = search.front(), search.best_of_each_kind()
        nearby = [n for choice in front for n in neighbours(choice, material)]
        if not search.attempt([*together([*front, *parents]), *nearby]) or search.front() == front:
            break
    return search.answer(tuple(s.name for s in subjects), recorded)


class _Search:
    """The confs tried so far."""

    def __init__(
        self,
        play: Player,
        releases: tuple[Rules, ...],
        fixed: dict[str, str],
        goal: Goal,
        most: int,
        found: Callable[[int], None],
    ) -> None:
        self._play, self._releases, self._goal, self._most, self._found = play, releases, goal, most, found
        self._fixed = {key: value for key, value in fixed.items() if value}
        self._trials: dict[Choice, Trial] = {}
        self._seen: set[object] = set()
        self._order: list[Choice] = []  # tried, best first
        self._current = Trial(None, 0, play([None])[0])

    def attempt(self, choices: Iterable[Choice]) -> bool:
        """Try what has not been tried; says whether there was any."""
        new: list[tuple[Choice, str]] = []
        for choice in choices:
            text = spelled({**dict(choice), **self._fixed})
            try:
                meaning = effective(text, self._releases)
            except UsageError:
                continue  # a release refuses it, or the model does not cover it
            if meaning not in self._seen and len(self._trials) + len(new) < self._most:
                self._seen.add(meaning)
                new.append((choice, text))
        played = self._play([text for _, text in new]) if new else []
        for (choice, text), figures in zip(new, played, strict=True):
            self._trials[choice] = Trial(text, len(choice), figures)
        self._order = sorted(self._trials, key=lambda c: self._rank(self._trials[c]))
        self._found(len(self._trials))
        return bool(new)

    def front(self) -> list[Choice]:
        """The best confs with different figures."""
        out: list[Choice] = []
        different: set[object] = set()
        for choice in self._order:
            seen = tuple((f.reserved, f.stranded, f.ooms, f.calls) for f in self._trials[choice].figures)
            if seen not in different and len(out) < _FRONT:
                different.add(seen)
                out.append(choice)
        return out

    def best_of_each_kind(self) -> list[Choice]:
        """The best few confs of each single setting."""
        count: dict[str, int] = {}
        out: list[Choice] = []
        for choice in self._order:
            if len(choice) == 1:
                ((key, _),) = choice
                count[key] = count.get(key, 0) + 1
                if count[key] <= _PARENTS:
                    out.append(choice)
        return out

    def answer(self, names: tuple[str, ...], recorded: Sequence[dict[str, str]]) -> Tuning:
        ranked = [self._trials[choice] for choice in self._order]
        current = Trial(None, max(len(choice_of(values)) for values in recorded), self._current.figures)
        better = [t for t in ranked if self._beats(t)]
        best = better[0] if better else None
        calm = [t for t in better if _count(t.calls) <= _count(current.calls)]
        simple = [t for t in better if t.settings <= 1]
        return Tuning(
            goal=self._goal,
            names=names,
            current=current,
            ranked=tuple(ranked),
            best=best,
            calmer=calm[0] if calm and best not in calm else None,
            simpler=simple[0] if simple and best not in simple else None,
            surer=next((t for t in better if t.exact), None) if best is not None and not best.exact else None,
            variable=_variable(self._releases),
        )

    def _beats(self, trial: Trial) -> bool:
        mine, recorded = self._merit(trial), self._merit(self._current)
        return not self._fails_more(trial) and mine < recorded

    def _rank(self, trial: Trial) -> tuple[object, ...]:
        merit: tuple[object, ...] = (self._fails_more(trial), *self._merit(trial))
        calls = _count(trial.calls)
        more = max(0, calls - _count(self._current.calls))
        return (*merit, more, self._shares(trial), trial.settings, calls, trial.conf or "")

    def _merit(self, trial: Trial) -> tuple[int, tuple[Fraction, ...]]:
        """What makes a conf better than another whatever it costs in time; smaller is better."""
        if self._goal == "no-oom":
            return trial.ooms, (Fraction(trial.retries),)
        return trial.ooms, self._shares(trial)

    def _shares(self, trial: Trial) -> tuple[Fraction, ...]:
        """The goal's peak of each trace as a share of its own peak of reserved bytes as recorded, the worst first."""
        pairs = zip(self._current.figures, trial.figures, strict=True)
        shares = (Fraction(_bytes(after, self._goal), max(1, before.reserved)) for before, after in pairs)
        return tuple(sorted(shares, reverse=True))

    def _fails_more(self, trial: Trial) -> bool:
        return any(a.ooms > b.ooms for a, b in zip(trial.figures, self._current.figures, strict=True))


def _bytes(figures: Figures, goal: Goal) -> int:
    return figures.stranded if goal == "stranded" else figures.reserved


def _count(calls: DriverCalls) -> int:
    return calls.alloc + calls.free + calls.sync


def _variable(releases: Sequence[Rules]) -> str:
    """The newest name that all releases read."""
    common = set.intersection(*(set(rules.conf_variables) for rules in releases))
    return next(v for v in reversed(releases[-1].conf_variables) if v in common)
