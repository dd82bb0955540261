"""What a recorded test needs: its own requests, served by an allocator that has nothing yet and is as large as any.

Reserved and stranded bytes depend on what an allocator holds already, and failures on how large its card is. Neither is
the test's doing, so that neither counts: a test has the same figures alone and after fifty others, beside any neighbour
and on any card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fragscope.allocator import Card, Replay, ReplaySettings, Span, recorded_under, replay, settle, tape_of
from fragscope.allocator.assumptions import LOSSES
from fragscope.gate.budgets import METRICS, metric_value
from fragscope.gate.evaluate import caveats
from fragscope.testing.marker import Bound
from fragscope.testing.recording import Finished
from fragscope.trace import Observation, OwnRequests, RequestKind, Requests, Trace, own_requests
from fragscope.units import GIB

_ENDLESS = 2**20 * GIB  # no card has it, and sums of it stay far from overflow
_NO_CARD = Card("any", "", _ENDLESS, _ENDLESS, (0, 0), 0, 0, "larger than any card")
_ELSEWHERE = ("torch_release", "no_tracker", "non_torch")
"""Beginnings of losses that say nothing about a test's own requests: snapshots do not name their release, but recorders
do; how events were read; and memory outside PyTorch's allocator, which no metric counts."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase of a test needs, or all of a test that marks none.

    Attributes:
        name: "" for all.
        span: the figures.
        subject: the test's own requests with this phase alone marked.
    """

    name: str
    span: Span
    subject: Trace


@dataclass(frozen=True, slots=True)
class Comparison:
    """A value held against its limit; bytes.

    Attributes:
        metric: one of ``METRICS``.
        value: the largest of all phases.
        bound: the limit.
        phase: which phase has that value.
    """

    metric: str
    value: int
    bound: Bound
    phase: Phase

    @property
    def over(self) -> bool:
        """The value is above the limit. Equal is within."""
        return self.value > self.bound.bytes


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a test needs.

    Attributes:
        phases: never empty.
        settings: what its requests were served under.
        where: what it was recorded on, for people.
        caveats: everything that keeps the figures from being certain.
    """

    phases: tuple[Phase, ...]
    settings: ReplaySettings
    where: str
    caveats: tuple[str, ...]

    def value(self, metric: str) -> int:
        """The largest value of a metric over all phases, bytes."""
        return metric_value(self._worst(metric).span, metric)

    def values(self) -> dict[str, int]:
        """Every metric's largest value, bytes."""
        return {metric: self.value(metric) for metric in METRICS}

    def held_against(self, bounds: Mapping[str, Bound]) -> tuple[Comparison, ...]:
        """Every limit with its value; those over it first, the worst excess first of all."""
        found = [Comparison(m, self.value(m), bound, self._worst(m)) for m, bound in bounds.items()]
        return tuple(sorted(found, key=lambda c: (not c.over, c.bound.bytes - c.value if c.over else 0)))

    def _worst(self, metric: str) -> Phase:
        return max(self.phases, key=lambda phase: metric_value(phase.span, metric))


def measure(finished: Finished) -> Measurement:
    """What a recorded test needs, under the conf and the rules it was recorded with.

    Raises:
        UnmodelledError: the allocator model does not cover its settings.
        UsageError: its conf is not such as its release has.
    """
    trace = finished.trace
    recorded = recorded_under(trace, card=_NO_CARD)
    if trace.count(RequestKind.RELEASE_SEEN):
        trace = _with_releases_settled(trace)
    own = own_requests(trace)
    settings = ReplaySettings(recorded.rules, _NO_CARD.name, _ENDLESS, _ENDLESS, recorded.conf.text)
    subject = replace(own.trace, settings=replace(own.trace.settings, conf=recorded.conf.text))
    phases = []
    for name, marked in _by_phase(subject):
        decided = replay(marked, settings, decisions=False)
        phases.append(Phase(name, decided.measured if decided.measured is not None else decided.whole, marked))
    return Measurement(tuple(phases), settings, finished.where, tuple(_caveats(own, decided, finished)))


def decided(phase: Phase, settings: ReplaySettings) -> Replay:
    """The phase's requests with the decisions made about them: who held what, where."""
    return replay(phase.subject, settings)


def _with_releases_settled(trace: Trace) -> Trace:
    """The program's own ``empty_cache()`` told apart from releases that the recording's allocator made by itself."""
    tape = settle(tape_of(trace), ReplaySettings.of(recorded_under(trace)))
    kind = np.where(tape.kind == RequestKind.EMPTY_CACHE, RequestKind.EMPTY_CACHE, trace.requests.kind)
    return replace(trace, requests=replace(trace.requests, kind=kind.astype(trace.requests.kind.dtype)))


def _by_phase(trace: Trace) -> Iterator[tuple[str, Trace]]:
    """The Trace once for each phase with its marks alone, or as it is where nothing is marked."""
    kind = trace.requests.kind
    begins, ends = (np.flatnonzero(kind == k) for k in (RequestKind.PHASE_BEGIN, RequestKind.PHASE_END))
    if not len(begins):
        yield "", trace
    for begin in begins.tolist():
        after = ends[ends > begin]
        kept = np.ones(len(kind), dtype=bool)
        kept[begins] = kept[ends] = False
        kept[begin] = True
        kept[after[:1]] = True
        columns = {name: getattr(trace.requests, name)[kept] for name in Requests.__slots__}
        yield trace.phases[int(trace.requests.phase[begin])], replace(trace, requests=Requests(**columns))


def _caveats(own: OwnRequests, decided: Replay, finished: Finished) -> Iterator[str]:
    yield from caveats(
        exact=decided.exact and not finished.estimated,
        operators=finished.estimated,
        assumptions=[(a.code, a.effect) for a in decided.assumptions],
        lost=[code for code in (x.code for x in own.trace.lost) if not _is_said(code)],
    )
    if own.failed:
        many = own.failed > 1
        yield f"{own.failed:,} request{'s' * many} ran out of memory and do{'es' * (not many)} not count"
    seen = sorted({o.what for o in _observations(own.trace) if o.what != "OutOfMemoryError"})
    if seen:
        yield f"the test read memory state ({', '.join(seen)}), which depends on more than itself"


def _is_said(code: str) -> bool:
    """Whether a loss is no caveat of its own: the assumption that it makes is one, or it concerns other figures."""
    return LOSSES.get(code) is not None or code.startswith(_ELSEWHERE)


def _observations(trace: Trace) -> list[Observation]:
    rows = trace.requests.kind == RequestKind.OBSERVATION
    return [trace.observations[i] for i in trace.requests.size[rows].tolist()]
