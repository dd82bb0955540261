"""Where a trace's requests run: on which cards, under which confs, and with how much room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fragscope.allocator import OF_PROGRAM, Assumption, Card, Tape, merged, replay
from fragscope.measure import non_torch
from fragscope.search.failure import Failure, failure_of
from fragscope.search.fit import unchanged
from fragscope.search.subject import Subject
from fragscope.trace import Trace
from fragscope.trace.raw import raw_bytes


@dataclass(frozen=True, slots=True)
class UnderConf:
    """What becomes of the requests on one card under one conf; bytes.

    Attributes:
        conf: the string.
        runs: whether every request is served.
        held: most that is held from the driver, by the allocator and past it; None where a request fails.
        room: what is left of the card then.
        retries: requests that released everything cached first.
        failure: the first request that fails.
        exact: whether nothing assumed can change this as long as the program asks for the same.
        assumptions: what it takes for granted.
    """

    conf: str
    runs: bool
    held: int | None
    room: int | None
    retries: int
    failure: Failure | None
    exact: bool
    assumptions: tuple[Assumption, ...]


@dataclass(frozen=True, slots=True)
class OnCard:
    """What becomes of the requests on one card; bytes.

    Attributes:
        card: the profile.
        free: what the allocator may take there: what a context leaves, less ``other``.
        other: what the recorded process held beside context, allocator and memory it took itself: communication
            libraries, kernels loaded later. A lower bound, since it is sampled; 0 where it was not.
        confs: the answers, in the order of the confs that were asked for; never empty.
    """

    card: Card
    free: int
    other: int
    confs: tuple[UnderConf, ...]

    @property
    def first(self) -> UnderConf:
        """The answer under the conf that was named first."""
        return self.confs[0]

    @property
    def best(self) -> UnderConf | None:
        """The first conf under which it runs."""
        return next((c for c in self.confs if c.runs), None)


def on_cards(
    subject: Subject,
    cards: Sequence[Card],
    confs: Sequence[str],
    *,
    assume_unchanged: bool = False,
    compiled: bool | None = None,
    only_until_it_runs: bool = False,
) -> tuple[OnCard, ...]:
    """Decide a trace's requests on each card under each conf.

    A limit on reserved bytes that the trace was recorded under is lifted: the card takes its place.

    Args:
        subject: the trace.
        cards: where it is to run, with nothing else on them.
        confs: conf strings; the first is the one that is wanted, others are what may help.
        assume_unchanged: as for ``fit``.
        compiled: as for ``replay``.
        only_until_it_runs: leave out the confs after the first that serves all requests.

    Raises:
        UsageError: as for ``fit``.
    """
    tape, assumed = unchanged(subject, assume_unchanged=assume_unchanged)
    other = _other_memory(subject.tape.trace)
    out = []
    for card in cards:
        answers: list[UnderConf] = []
        for conf in confs:
            answers.append(_under_conf(subject, tape, assumed, card, other, conf, compiled))
            if answers[-1].runs and only_until_it_runs:
                break
        out.append(OnCard(card, max(0, card.free - other), other, tuple(answers)))
    return tuple(out)


def _under_conf(
    subject: Subject,
    tape: Tape,
    assumed: tuple[Assumption, ...],
    card: Card,
    other: int,
    conf: str,
    compiled: bool | None,
) -> UnderConf:
    own = subject.settings if conf == subject.settings.conf else subject.settings.with_conf(conf)
    settings = own.alone_on(card, other)
    replayed = replay(tape, settings, decisions=False, compiled=compiled, stop_at_oom=True)
    whole, runs = replayed.whole, not replayed.ooms
    held = whole.peak.hbm if runs else None
    return UnderConf(
        conf=conf,
        runs=runs,
        held=held,
        room=None if held is None else settings.capacity - held,
        retries=whole.retries,
        failure=None if runs else failure_of(tape, settings, compiled),
        exact=all(a.effect == "none" for a in replayed.assumptions if a.code not in OF_PROGRAM),
        assumptions=merged([assumed, replayed.assumptions], max),
    )


def _other_memory(trace: Trace) -> int:
    """Most that the process held beyond its first sample, which is the context, and beside what it took itself."""
    sampled = non_torch(trace)
    if sampled is None or sampled.device_wide:
        return 0
    outside = sampled.non_torch - raw_bytes(trace)[sampled.rows]
    return max(0, int(np.max(outside)) - int(outside[0]))
