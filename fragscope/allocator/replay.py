"""Replay: what an allocator would do with a Trace's requests, under settings of your choice.

With the recorded settings the model's decisions must equal the recorded ones, row by row; ``verify`` says where they do
not. With other settings the answer holds for an unchanged sequence of requests, and what else it assumes is listed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fragscope.allocator.assumptions import Assumption, assumptions_of
from fragscope.allocator.caching import CachingAllocator
from fragscope.allocator.compiling import worth_compiling
from fragscope.allocator.conf import Conf, parse_conf
from fragscope.allocator.difference import explained
from fragscope.allocator.engine.kinds import NOTHING
from fragscope.allocator.facts import Facts, has_other_conf
from fragscope.allocator.placement import DriverStart
from fragscope.allocator.ranges import ranges_of
from fragscope.allocator.settings import ReplaySettings
from fragscope.allocator.span import Span, SpanMeter
from fragscope.allocator.start import fitted_start
from fragscope.allocator.tape import Tape, tape_of
from fragscope.allocator.verify import Verification, compare
from fragscope.errors import UsageError
from fragscope.trace import ASKING, FRACTION_UNIT, DecisionKind, Decisions, RequestKind, SegmentState, Trace
from fragscope.trace.events import Column


@dataclass(frozen=True, slots=True)
class Oom:
    """A request that failed; bytes.

    Attributes:
        event: its row.
        requested: asked for.
        rounded: the block for it.
        stream: asked for on.
    """

    event: int
    requested: int
    rounded: int
    stream: int


@dataclass(frozen=True, slots=True)
class Replay:
    """The outcome of one replay.

    Attributes:
        settings: what it was decided under.
        trace: the Trace with the decisions of this replay; with none if they were not wanted.
        whole: the Trace from its first to its last event.
        measured: the measured phase, or None where the Trace marks none.
        ooms: every failed request, with those that were refused before the driver was asked.
        verify: comparison with the recorded decisions, if it was asked for.
        assumptions: what the answer takes for granted.
    """

    settings: ReplaySettings
    trace: Trace
    whole: Span
    measured: Span | None
    ooms: tuple[Oom, ...]
    verify: Verification | None
    assumptions: tuple[Assumption, ...]

    @property
    def exact(self) -> bool:
        """Whether nothing assumed can change the numbers, and no comparison has shown them wrong."""
        refuted = self.verify is not None and self.verify.mismatches > 0
        return not refuted and all(a.effect == "none" for a in self.assumptions)


def settle(tape: Tape, recorded: ReplaySettings) -> Tape:
    """Tell releases that a recording shows apart: the program's ``empty_cache()``, and the allocator's own.

    A snapshot shows that segments went back before a request took a new one, not why. Under the settings it was
    recorded with, the model tries both and keeps what returns the segments that the recording shows.
    """
    conf, compiled = parse_conf(recorded.conf, recorded.rules.rules), worth_compiling(len(tape.kind))
    tape = replace(tape, total=tape.total or recorded.total)
    if tape.trace.initial and tape.trace.decisions is not None:
        tape = _with_fitted_start(tape, recorded, conf, compiled=compiled)
    if tape.settled:
        return tape
    run = _Run(tape, recorded, conf, compiled=compiled, log=True)
    run.play()
    return replace(tape, kind=np.array(run.columns[0], dtype=np.int64), settled=True)


def _with_fitted_start(tape: Tape, recorded: ReplaySettings, conf: Conf, *, compiled: bool) -> Tape:
    """The Tape with what stood when recording began as the recorded decisions tell."""

    def play(start: tuple[SegmentState, ...], until: int | None) -> CachingAllocator:
        tried = replace(tape, trace=replace(tape.trace, initial=start))
        run = _Run(tried, recorded, conf, compiled=compiled, log=True)
        run.play(until)
        return run.allocator

    return replace(tape, trace=replace(tape.trace, initial=fitted_start(tape.trace, play)))


def replay(
    trace: Trace | Tape,
    settings: ReplaySettings,
    *,
    verify: bool = False,
    decisions: bool = True,
    compiled: bool | None = None,
    stop_at_oom: bool = False,
) -> Replay:
    """Decide a Trace's requests with the allocator model.

    Args:
        trace: requests, with or without decisions.
        settings: conf, rules and card.
        verify: compare with the recorded decisions.
        decisions: whether the new decisions are wanted; without them it is faster.
        compiled: whether the compiled loop serves; None takes it where numba is installed and it is worth while.
        stop_at_oom: end with the first request that fails.

    Raises:
        UnmodelledError: the Trace or the settings need something that the model does not cover.
        UsageError: ``verify`` without recorded decisions.
    """
    tape = trace if isinstance(trace, Tape) else tape_of(trace)
    trace = tape.trace
    if verify and trace.decisions is None:
        raise UsageError("--verify: this trace holds requests only; there are no recorded decisions to compare with")
    conf = parse_conf(settings.conf, settings.rules.rules)
    compiled = worth_compiling(len(tape.kind)) if compiled is None else compiled

    def played(start: DriverStart | None) -> _Run:
        run = _Run(tape, settings, conf, compiled=compiled, log=decisions or verify or not tape.settled, start=start)
        if stop_at_oom:
            run.allocator.stop_at_oom()
        run.play()
        return run

    run = played(None)
    if run.allocator.address_ties and run.allocator.departed and tape.segments and not verify:
        # Addresses that nobody recorded decide: they are worth finding out where the driver's begin.
        start = tape.driver_start()
        if start is not None:
            run = played(start)
    decided = run.decisions() if decisions or verify else None
    verification = None
    if verify:
        assert decided is not None
        verification = compare(trace, decided, run.allocator)
        if verification.mismatches and trace.initial:
            better = _with_fitted_start(tape, settings, conf, compiled=compiled)
            if better.trace.initial != trace.initial:
                return replay(better, settings, verify=True, compiled=compiled, stop_at_oom=stop_at_oom)
        if verification.first is not None:
            again = _Run(tape, settings, conf, compiled=compiled, log=not tape.settled)
            again.play(until=max(verification.first.event, 0))
            first = explained(verification.first, trace, decided, again.allocator)
            verification = replace(verification, first=first)
    recorded = trace.placement == "recorded" and bool(tape.segments or tape.maps) and not run.allocator.departed
    whole, failed = run.whole(), run.failed()
    facts = Facts(
        tape=tape,
        settings=settings,
        conf=conf,
        failed=failed,
        retries=whole.retries,
        reserved=whole.peak.reserved,
        held=whole.peak.hbm,
        ties=run.allocator.address_ties,
        addresses=None if recorded else run.modelled_addresses(),
        defects=run.allocator.defects,
        lost_frees=run.allocator.lost_frees,
        verified=verification is not None and not verification.mismatches,
    )
    return Replay(
        settings=settings,
        trace=replace(
            trace,
            decisions=decided,
            torch=settings.rules.torch,
            card=settings.card,
            device_total=settings.total,
            settings=replace(
                trace.settings,
                conf=settings.conf,
                memory_fraction=settings.memory_fraction,
                capacity=settings.capacity,
            ),
            placement="recorded" if recorded else "modelled",
            final=None,
        ),
        whole=whole,
        measured=run.measured,
        ooms=run.ooms(failed, decided),
        verify=verification,
        assumptions=assumptions_of(facts),
    )


class _Run:
    """One pass over the requests."""

    def __init__(
        self,
        tape: Tape,
        settings: ReplaySettings,
        conf: Conf,
        *,
        compiled: bool,
        log: bool,
        start: DriverStart | None = None,
    ) -> None:
        self.tape = tape
        self.settings = settings
        s = settings
        self.allocator = a = CachingAllocator(
            s.total, s.capacity, s.rules.rules, conf, s.memory_fraction, compiled=compiled, logging=log
        )
        if s.limit is not None:
            a.set_limit(s.limit)
        self.start = start
        if start is not None:
            a.begin_process(start.base, start.move_at)
        a.prepare(tape.allocations, len(tape.trace.pools))
        if tape.segments or tape.maps:
            a.give_addresses(tape.segments, tape.maps)
            if tape.trace.placement == "recorded":
                a.trust_addresses()
        kind = tape.kind if tape.settled else tape.kind.copy()  # releases are settled in place
        self.columns = (kind, *tape.columns[1:])
        if not compiled:
            self.columns = tuple(c.tolist() for c in self.columns)
        self._keeps_conf = not has_other_conf(tape.trace, s)
        self.measured: Span | None = None
        self._whole = SpanMeter(a, "")

    def play(self, until: int | None = None) -> None:
        """Serve all requests, or those before row ``until``."""
        phase: SpanMeter | None = None
        allocator, rows = self.allocator, len(self.tape.kind) if until is None else until
        row = 0
        while row < rows:
            row = allocator.decide(self.columns, row, rows)
            if row == rows:
                break
            kind, size = self.columns[0][row], self.columns[2][row]
            if kind == RequestKind.PHASE_BEGIN:
                if phase is not None:
                    phase.close()
                phase = SpanMeter(allocator, self._phase_name(row))
            elif kind == RequestKind.PHASE_END:
                if phase is not None:
                    self.measured = phase.finish()
                    phase = None
            elif kind == RequestKind.MEMORY_FRACTION:
                self._set_fraction(size / FRACTION_UNIT)
            elif kind == RequestKind.SETTINGS:
                self._set_conf(self.tape.trace.confs[size])
            elif kind == RequestKind.POOL_CREATE:
                self._create_pool(row)
            elif kind == RequestKind.RELEASE_SEEN:
                if row + 1 == until:
                    break
                row = self._settle_release(row)
            elif kind == RequestKind.START:
                row = self._restore()
            elif kind == RequestKind.CAPTURE_BEGIN:
                allocator.begin_capture()
            elif kind == RequestKind.CAPTURE_END:
                allocator.end_capture()
            elif kind in ASKING:  # it failed, and that was to be the end
                break
            row += 1
        if phase is not None:  # the recording ended inside it: a crash, an OOM
            self.measured = phase.finish()

    def _settle_release(self, row: int) -> int:
        """Find out who released, and serve the request that follows; returns the last row served."""
        allocator, kind = self.allocator, self.columns[0]
        if row + 1 >= len(kind) or kind[row + 1] != RequestKind.ALLOC:
            return row
        before = allocator.saved(int(self.columns[1][row + 1]))
        chosen, agreement = NOTHING, self._agreement(row, NOTHING)
        if agreement < (0, 0):
            own = allocator.exchange(before)
            if self._agreement(row, RequestKind.EMPTY_CACHE) > agreement:
                chosen = int(RequestKind.EMPTY_CACHE)
            else:
                allocator.exchange(own)
        kind[row] = chosen
        return row + 1

    def _agreement(self, row: int, choice: int) -> tuple[int, int]:
        """How well the decisions about the request after a release, and their order, are those recorded; 0 is best."""
        allocator = self.allocator
        start = allocator.decided
        allocator.row = row + 1  # recorded with the allocation, since a snapshot does not tell
        if choice != NOTHING:
            allocator.empty_cache()
        allocator.decide(self.columns, row + 1, row + 2)
        d = allocator.decisions(start)
        made = list(zip(d.kind.tolist(), d.addr.tolist(), strict=True))
        recorded = self._recorded.get(row + 1, [])
        # Frees that were completed together come in the order of a hash table.
        ours, theirs = ([x for x in rows if x[0] != DecisionKind.FREE_COMPLETED] for rows in (made, recorded))
        return -len(set(recorded) ^ set(made)), -sum(a != b for a, b in zip(ours, theirs, strict=False))

    @cached_property
    def _recorded(self) -> dict[int, list[tuple[int, int]]]:
        """Recorded decisions, kind and address, of the requests that follow a release."""
        trace = self.tape.trace
        if trace.decisions is None:
            return {}
        d = trace.decisions
        rows = np.flatnonzero(trace.requests.kind == RequestKind.RELEASE_SEEN) + 1
        wanted = np.flatnonzero(np.isin(d.request, rows))
        out: dict[int, list[tuple[int, int]]] = {}
        columns = (d.request[wanted].tolist(), d.kind[wanted].tolist(), d.addr[wanted].tolist())
        for request, kind, addr in zip(*columns, strict=True):
            out.setdefault(request, []).append((kind, addr))
        return out

    def _create_pool(self, row: int) -> None:
        size, pool = int(self.columns[2][row]), int(self.columns[4][row])
        self.allocator.create_pool(pool, use_on_oom=bool(size & 1), no_split=bool(size & 2))

    def _restore(self) -> int:
        """What stood when recording began; the addresses given for it are used up. Returns the last row that tells it.

        All of it stood at once: pools come before their memory, and what was laid out on the way is no peak.
        """
        requests, initial = self.tape.trace.requests, self.tape.trace.initial
        told = requests.start_rows
        for row in np.flatnonzero(requests.kind[:told] == RequestKind.POOL_CREATE).tolist():
            self._create_pool(row)
        rows = np.flatnonzero(requests.kind == RequestKind.HELD)
        ids = [self.columns[1][row] for row in rows.tolist()]
        held = list(zip(rows.tolist(), map(int, ids), requests.size[rows].tolist(), strict=True))
        ordinary = sum(not s.expandable for s in initial)
        maps = self.tape.maps[len(initial) - ordinary :]
        self.allocator.give_addresses(self.tape.segments[ordinary:], maps)
        ranges = ranges_of(self.tape.trace, self.tape.total or self.settings.total)
        self.allocator.restore(initial, held, ranges)
        self._whole.close()
        self._whole = SpanMeter(self.allocator, "")
        return told - 1

    def _set_fraction(self, fraction: float) -> None:
        """The program sets its memory fraction; one of the user's choice stays."""
        if self.settings.memory_fraction in (None, self.tape.trace.settings.memory_fraction):
            self.allocator.set_memory_fraction(fraction)

    def _set_conf(self, text: str) -> None:
        """The program changes its settings; under a conf of the user's choice that one stays."""
        if self._keeps_conf:
            self.allocator.set_conf(parse_conf(text, self.settings.rules.rules, self.allocator.conf))

    def decisions(self) -> Decisions:
        """The decisions made, with the Trace's ids."""
        decided, names = self.allocator.decisions(), self.tape.names
        if names is None:
            return decided
        return replace(decided, id=np.where(decided.id < 0, decided.id, names[decided.id]))

    def failed(self) -> Column:
        """Rows of requests that were not served, whatever the reason."""
        if self.allocator.first_oom is None:
            return np.zeros(0, dtype=np.int64)
        rows = np.flatnonzero(np.isin(self.tape.kind, ASKING))
        failed: Column = rows[self.allocator.are_failed(self.tape.id[rows])]
        return failed

    def ooms(self, failed: Column, decided: Decisions | None) -> tuple[Oom, ...]:
        """Requests that were not served."""
        requests = self.tape.trace.requests
        rounded: dict[int, int] = {}
        if decided is not None:
            logged = decided.kind == DecisionKind.OOM
            rounded = dict(zip(decided.request[logged].tolist(), decided.size[logged].tolist(), strict=True))
        columns = (failed, requests.size[failed], requests.stream[failed])
        return tuple(
            Oom(row, size, rounded[row] if row in rounded else self._rounded(row, size), stream)
            for row, size, stream in zip(*(c.tolist() for c in columns), strict=True)
        )

    def _rounded(self, row: int, size: int) -> int:
        return size if self.tape.kind[row] == RequestKind.RAW_ALLOC else self.allocator.rounded(size)

    def modelled_addresses(self) -> str:
        """What is said for addresses that no driver gave."""
        detail = "equal-size blocks were told apart by addresses that a model of the driver gave"
        if self.start is None:
            return detail
        return f"{detail}; it explains the order of {self.start.order:.1%} of the recorded pairs of segments"

    def whole(self) -> Span:
        return self._whole.finish()

    def _phase_name(self, row: int) -> str:
        return self.tape.trace.phases[int(self.tape.trace.requests.phase[row])]
