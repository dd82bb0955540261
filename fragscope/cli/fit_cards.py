"""What ``fragscope fit`` says of cards: on which of them traces and the cases of a run have room, worst first."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragscope.cli.card_answers import Answer, as_json, as_markdown, as_text
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
    from fragscope.search import Subject, UnderConf

_LONGEST = 2000  # characters of a line
_EXPANDABLE = "expandable_segments:True"
_HEAD = 64  # bytes of a file that tell what it is
_BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"


def is_results(path: str) -> bool:
    """Whether a path names the results of a run, and not a trace or a folder of recordings.

    Results may have any name: they are JSON, which no trace is.

    Raises:
        InputFileError: it cannot be read, or is a folder with none of these.
    """
    from fragscope.trace.containers import first_bytes
    from fragscope.trace.rank_set import members
    from fragscope.trace.recording import is_recording

    given = Path(path)
    try:
        if not given.is_dir():
            return first_bytes(given, _HEAD).lstrip(_BEFORE_JSON).startswith(b"{")
        if (given / "results.json").is_file():
            return True
        if is_recording(given) or members(given):
            return False
    except OSError as e:  # such as a name too long for any file
        raise InputFileError(path, (e.strerror or type(e).__name__).lower()) from None
    raise InputFileError(
        path, "is a folder with neither results.json ('fragscope run' writes it) nor recordings ('fragscope record')"
    )


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
