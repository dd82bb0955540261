"""What is said of traces and cases on cards: a table for a terminal and a pull request, and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fragscope.cli.subjects import granted
from fragscope.cli.tables import aligned, markdown_list, markdown_table
from fragscope.errors import printable

if TYPE_CHECKING:
    from fragscope.allocator import Card
    from fragscope.search import OnCard, UnderConf

SCHEMA_VERSION = 1
_EXPLAINED = 20  # failures told at length, the others counted


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
