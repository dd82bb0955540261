"""What ``fragscope fit`` says of cards: on which of them traces and the cases of a run have room, worst first."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fragscope.cli.subjects import granted
from fragscope.cli.tables import aligned, markdown_list, markdown_table
from fragscope.cli.tune import progress
from fragscope.errors import (
    EXIT_NOT_MEASURED,
    EXIT_OVER_BUDGET,
    EXIT_PASS,
    InputFileError,
    NotMeasuredError,
    UsageError,
    printable,
)

if TYPE_CHECKING:
    from fragscope.allocator import Card
    from fragscope.results import Case
    from fragscope.search import OnCard, Subject, UnderConf

SCHEMA_VERSION = 1
_LONGEST = 2000  # characters of a line
_EXPLAINED = 20  # failures told at length, the others counted
_EXPANDABLE = "expandable_segments:True"


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said of one trace on one card.

    Attributes:
        name: of the trace or case.
        card: the profile.
        conf: that it is meant to run under.
        found: None where it cannot be said.
        reason: why it cannot.
        estimated: operators whose memory is unknown, so that it may need more.
        unsaid: confs that were asked for and of which nothing can be said, for ``reason``.
    """

    name: str
    card: Card
    conf: str
    found: OnCard | None
    reason: str = ""
    estimated: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()

    @property
    def runs(self) -> bool | None:
        """Whether it runs under any of the confs; None where that cannot be said."""
        if self.best is not None:
            return True
        return None if self.found is None or self.unsaid else False

    @property
    def best(self) -> UnderConf | None:
        """The answer under the first conf that it runs under."""
        return None if self.found is None else self.found.best

    @property
    def exact(self) -> bool:
        """Whether nothing assumed can change it as long as the program asks for the same."""
        shown = self.best or (None if self.found is None else self.found.first)
        return shown is not None and shown.exact and not self.estimated

    @property
    def badness(self) -> tuple[int, int]:
        """What fails first, then what nobody knows, what needs another conf, and the least room."""
        best = self.best
        if best is None:
            return (1, 0) if self.runs is None else (0, 0)
        assert self.found is not None and best.room is not None
        return (2 if best is not self.found.first else 3, best.room)


def is_results(path: str) -> bool:
    """Whether a path names the results of a run, and not a trace or a folder of recordings."""
    given = Path(path)
    try:
        return given.name.endswith("results.json") or (given / "results.json").is_file()
    except OSError:
        return False


def answer_on_cards(
    file: str,
    cards: tuple[str, ...],
    confs: tuple[str, ...],
    given: tuple[str | None, int | None, str | None],
    *,
    assume_unchanged: bool,
    form: str,
) -> int:
    """Say where the traces of a file run; ``given`` are sidecar, device index and release of ``fragscope fit``."""
    from fragscope.allocator import CARDS, card_named, rules_for
    from fragscope.cli.configured import configured

    configured()
    if given[2] is not None:
        rules_for(given[2])  # complains before anything is read
    profiles = [card_named(name) for name in dict.fromkeys(cards)] or sorted(CARDS.values(), key=lambda c: c.free)
    with progress() as say:
        say("reading")
        of_results = is_results(file)
        if of_results and (given[0] is not None or given[1] is not None):
            raise UsageError("--sidecar and --device-index are of snapshots; results say what they were made under")
        source = _of_results(file, profiles, given[2]) if of_results else _of_traces(file, profiles, given)
        answers = []
        notes: dict[str, None] = {}
        for question in source:
            say(printable(question.name, 60))
            answers += question.answers(confs, assume_unchanged=assume_unchanged)
            notes |= dict.fromkeys(question.notes)
    if not answers:
        raise NotMeasuredError(f"{file}: holds nothing that could run on a card")
    answers.sort(key=lambda a: a.badness)
    for note in notes:
        print(f"fragscope: {printable(note, 600)}", file=sys.stderr)
    if form == "json":
        print(json.dumps(as_json(file, profiles, answers), indent=2))
    elif form == "markdown":
        click.echo("\n".join(as_markdown(file, answers)))
    else:
        for line in as_text(file, answers):
            click.echo(printable(line, _LONGEST))
    if any(a.runs is False for a in answers):
        return EXIT_OVER_BUDGET
    return EXIT_NOT_MEASURED if any(a.runs is None for a in answers) else EXIT_PASS


# --- what is asked about ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Question:
    """One trace, or none and why, and the cards to ask about.

    Attributes:
        name: shown to people.
        subject: the trace; a sentence where it cannot be had.
        cards: to ask about.
        measured_there: it is of the virtual card asked about, with the memory and the release asked about, so that
            what it read of memory is what it would read.
        estimated: operators whose memory is unknown.
        conf: that it was recorded under, where there is no trace to ask.
    """

    name: str
    subject: Subject | str
    cards: Sequence[Card]
    measured_there: bool = False
    estimated: tuple[str, ...] = ()
    conf: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is assumed about the recording; that it names no card matters little where cards are named."""
        if isinstance(self.subject, str):
            return ()
        codes = {s.detail: s.code for s in self.subject.settings.stand_ins}
        return tuple(n for n in self.subject.notes if codes.get(n) != "card_assumed")

    def answers(self, confs: tuple[str, ...], *, assume_unchanged: bool) -> list[Answer]:
        """The answers on all cards."""
        from fragscope.allocator import worth_compiling
        from fragscope.cli.fit import different
        from fragscope.search import on_cards

        subject = self.subject
        if isinstance(subject, str):
            return [Answer(self.name, card, self.conf, None, subject) for card in self.cards]
        own = subject.settings.conf
        wanted = different(confs or (own, "", _EXPANDABLE), subject)
        compiled = worth_compiling(len(self.cards) * len(wanted) * len(subject.tape.kind))
        ask = partial(on_cards, subject, self.cards, compiled=compiled, only_until_it_runs=not confs)
        as_recorded = [c for c in wanted if self.measured_there and len(different((own, c), subject)) == 1]
        said, reason = wanted, ""
        try:
            found = ask(wanted, assume_unchanged=assume_unchanged)
        except UsageError as e:
            said, reason = as_recorded, str(e).removeprefix(f"{subject.name}: ")
            if not said:
                return [Answer(self.name, card, wanted[0], None, reason) for card in self.cards]
            found = ask(said, assume_unchanged=True)
        found = tuple(
            replace(on, confs=tuple(_as_recorded(c) if c.conf in as_recorded else c for c in on.confs)) for on in found
        )
        unsaid = tuple(c for c in confs if c in wanted and c not in said)  # others may help, and are not asked for
        return [
            Answer(self.name, card, said[0], on, reason if unsaid else "", self.estimated, unsaid)
            for card, on in zip(self.cards, found, strict=True)
        ]


def _as_recorded(under: UnderConf) -> UnderConf:
    """What the program read of memory was that of this very card."""
    return replace(under, assumptions=tuple(a for a in under.assumptions if a.code != "observations"))


def _of_traces(
    file: str, cards: Sequence[Card], given: tuple[str | None, int | None, str | None]
) -> Iterator[_Question]:
    from fragscope.search import Given, load_subject
    from fragscope.trace.rank_set import expand

    sidecar, device, release = given
    for path in expand(file):
        yield _Question(path, load_subject(path, Given(torch=release, device=device, sidecar=sidecar)), cards)


def _of_results(file: str, cards: Sequence[Card], release: str | None) -> Iterator[_Question]:
    """The cases of a run, those of one variant once: on each card the one that was recorded on it, if any was."""
    from fragscope.results import load_results

    results = load_results(Path(file))
    folder = Path(file) if Path(file).is_dir() else Path(file).parent
    several = release is None and len({case.torch for case in results.cases}) > 1
    groups: dict[str, list[Case]] = {}
    for case in results.cases:
        changed = "".join(f"[{k}={v}]" for k, v in sorted(case.changed.items()))
        name = f"{case.scenario}/{case.preset}/{case.variant}{changed}"
        groups.setdefault(f"{name}, torch {case.torch}" if several else name, []).append(case)
    for name, cases in groups.items():
        for case, asked in _by_case(cases, cards):
            yield _question(name, case, asked, folder, release)


def _by_case(cases: Sequence[Case], cards: Sequence[Card]) -> Iterator[tuple[Case, list[Card]]]:
    """Which case tells of which cards: one with a trace, of that card if there is one, in their order."""
    chosen: dict[int, list[Card]] = {}
    for card in cards:
        at = min(range(len(cases)), key=lambda i: (cases[i].trace is None, cases[i].card != card.name, i))
        chosen.setdefault(at, []).append(card)
    for at, asked in chosen.items():
        for own in (True, False):
            part = [card for card in asked if (card.name == cases[at].card) is own]
            if part:
                yield cases[at], part


def _question(name: str, case: Case, cards: Sequence[Card], folder: Path, release: str | None) -> _Question:
    from fragscope.results import trace_file
    from fragscope.search import Given, load_subject

    there = trace_file(case, folder)
    if isinstance(there, str):
        said = f"; {case.outcome}: {case.message}" if case.message else f"; {case.outcome}"
        return _Question(name, printable(f"{there.rstrip('.')}{said}", 600), cards, conf=case.conf)
    try:
        subject = load_subject(str(there), Given(torch=release))
    except (InputFileError, UsageError) as e:
        reason = e.reason if isinstance(e, InputFileError) else str(e)
        return _Question(name, printable(reason, 600), cards, conf=case.conf)
    there_already = case.device == "virtual" and _recorded_on(cards[0], subject)
    subject = replace(subject, name=name)
    if case.any_card:  # a trace that names no card is not held to be of another one
        trace = replace(subject.tape.trace, card=None)
        subject = replace(subject, tape=replace(subject.tape, trace=trace))
    estimated = tuple(op.op for op in case.estimated_ops)
    return _Question(name, subject, cards, there_already, estimated, case.conf)


def _recorded_on(card: Card, subject: Subject) -> bool:
    """Whether a trace is of that card with nothing else on it, under the rules that it is asked about."""
    from fragscope.allocator import recorded_under

    recorded = recorded_under(subject.tape.trace)
    where = recorded.card.name, recorded.card.total, recorded.capacity
    return where == (card.name, card.total, card.free) and recorded.rules.rules == subject.settings.rules.rules


# --- what is said -------------------------------------------------------------------------------------------------


def as_json(file: str, cards: Sequence[Card], answers: Sequence[Answer]) -> dict[str, Any]:
    """The answers as published: sizes are integer bytes, keys only ever get more."""
    from fragscope.cli.cards import card_json

    return {
        "schema_version": SCHEMA_VERSION,
        "path": file,
        "cards": [card_json(card) for card in cards],
        "answers": [_answer_json(a) for a in answers],
    }


def _answer_json(a: Answer) -> dict[str, Any]:
    best, found = a.best, a.found
    return {
        "name": a.name,
        "card": a.card.name,
        "conf": a.conf,
        "runs": a.runs,
        "runs_under": None if best is None else best.conf,
        "room": None if best is None else best.room,
        "held": None if best is None else best.held,
        "free": None if found is None else found.free,
        "other_memory": None if found is None else found.other,
        "exact": a.exact,
        "estimated_ops": list(a.estimated),
        "reason": a.reason,
        "unsaid": list(a.unsaid),
        "confs": [] if found is None else [asdict(c) for c in found.confs],
    }


def as_text(file: str, answers: Sequence[Answer]) -> list[str]:
    """For a terminal."""
    assumed = _granted(answers)
    return [
        _about(file, answers),
        *aligned(_table(answers)),
        *_legend(answers),
        *_explanations(answers),
        *(["taken for granted:", *(f"  {a}" for a in assumed)] if assumed else []),
    ]


def as_markdown(file: str, answers: Sequence[Answer]) -> list[str]:
    """For a pull request; names come from strangers' files and are escaped."""
    from fragscope.report.markdown import escaped

    lines = ["### fragscope fit", "", escaped(_about(file, answers)), "", *markdown_table(_table(answers))]
    for heading, said in (
        ("", [*_legend(answers), *_explanations(answers)]),
        ("Taken for granted:", _granted(answers)),
    ):
        if said:
            lines += ["", *([heading, ""] if heading else []), *markdown_list(said)]
    return lines


def _about(file: str, answers: Sequence[Answer]) -> str:
    cases, cards = len(dict.fromkeys(a.name for a in answers)), len(dict.fromkeys(a.card.name for a in answers))
    runs = sum(a.runs is True for a in answers)
    return (
        f"{file}: {cases:,} case{'s' * (cases != 1)} on {cards:,} card{'s' * (cards != 1)}, {runs:,} of "
        f"{len(answers):,} run; MiB left beside a CUDA context and nothing else"
    )


def _table(answers: Sequence[Answer]) -> list[tuple[str, ...]]:
    """A row for each case, the worst first, and a column for each card, the smallest first."""
    cards = sorted({a.card.name: a.card for a in answers}.values(), key=lambda card: (card.free, card.name))
    cells = {(a.name, a.card.name): _cell(a) for a in answers}
    confs = {a.name: a.conf for a in answers}  # in the order of the answers: the first of a case is its worst
    rows: list[tuple[str, ...]] = [(*(card.name for card in cards), "case (conf)")]
    for name, conf in confs.items():
        shown = printable(f"{name} ({conf or 'default'})", 300)
        rows.append((*(cells.get((name, card.name), "") for card in cards), shown))
    return rows


def _cell(a: Answer) -> str:
    """The room left; ``no`` where a request fails, ``?`` where nobody can say, ``c`` where another conf is needed."""
    from fragscope.units import mib

    best = a.best
    if best is None or a.found is None:
        return "?" if a.runs is None else "no"
    return f"{'' if a.exact else '~'}{mib(best.room or 0)}{'' if best is a.found.first else ' c'}"


def _legend(answers: Sequence[Answer]) -> list[str]:
    """What the marks mean, of those that are there."""
    marks = {
        "~": any(not a.exact for a in answers if a.best is not None),
        "c": any(a.best is not None and a.found is not None and a.best is not a.found.first for a in answers),
        "?": any(a.runs is None for a in answers),
    }
    said = {"~": "not exact", "c": "only under another conf", "?": "cannot be said"}
    words = [f"{mark} {said[mark]}" for mark, there in marks.items() if there]
    return ["; ".join(words)] if words else []


def _explanations(answers: Sequence[Answer]) -> list[str]:
    """What fails, why something cannot be said, and which other conf helps."""
    from fragscope.units import format_bytes

    told: dict[tuple[str, str], list[str]] = {}
    for a in answers:
        for line in _why(a):
            told.setdefault((a.name, line), []).append(a.card.name)
    lines = [f"{name} on {', '.join(cards)}{line}" for (name, line), cards in list(told.items())[:_EXPLAINED]]
    if len(told) > _EXPLAINED:
        lines.append(f"{len(told) - _EXPLAINED:,} more are not explained here; --format json has them all")
    unsure = dict.fromkeys(op for a in answers for op in a.estimated)
    if unsure:
        lines.append(f"what these operators take besides their outputs is not known there: {', '.join(unsure)}")
    others = {a.name: a.found.other for a in answers if a.found is not None and a.found.other}
    lines += [
        f"{name}: {format_bytes(size)} less are free there, which the process held beside context and allocator"
        for name, size in list(others.items())[:_EXPLAINED]
    ]
    return lines


def _why(a: Answer) -> Iterator[str]:
    """What fails on a card and what helps, or why nobody can say."""
    from fragscope.cli.fit import failure_lines

    if a.found is None:
        yield f": {a.reason}"
        return
    failure = a.found.first.failure
    if failure is not None:
        helps = "" if a.best is None else f"; runs with conf {a.best.conf or 'default'}"
        yield f", {a.conf or 'default'}: {'; '.join(failure_lines(failure))}{helps}"
    if a.unsaid:
        yield f", {', '.join(c or 'default' for c in a.unsaid)}: {a.reason}"


def _granted(answers: Sequence[Answer]) -> list[str]:
    """What the answers take for granted, each code once, with the cards it is said of."""
    from fragscope.allocator import merged

    shown = [(a.card.name, a.best or a.found.first) for a in answers if a.found is not None]
    on: dict[str, dict[str, None]] = {}
    for card, under in shown:
        for assumption in under.assumptions:
            if assumption.effect != "none":
                on.setdefault(assumption.code, {})[card] = None
    found = merged([under.assumptions for _, under in shown], max)
    cards = len({a.card.name for a in answers})
    return granted(
        [
            replace(a, detail=f"on {', '.join(on[a.code])}: {a.detail}") if a.code in on and cards > 1 else a
            for a in found
        ]
    )
