"""Replay: what an allocator would do with a Trace's requests, under settings of your choice.

With the recorded settings the model's decisions must equal the recorded ones, row by row; ``verify`` says where they do
not. With other settings the answer holds for an unchanged sequence of requests, and what else it assumes is listed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from fragscope.allocator.caching import CachingAllocator, DriverCalls
from fragscope.allocator.conf import Conf, parse_conf
from fragscope.allocator.counters import Counters
from fragscope.allocator.difference import explained
from fragscope.allocator.engine import tables
from fragscope.allocator.engine.compiled import can_compile, is_compiled_before
from fragscope.allocator.engine.decide import NOTHING
from fragscope.allocator.placement import DriverStart, fitted_start
from fragscope.allocator.recorded import Recorded
from fragscope.allocator.rules import ChosenRules
from fragscope.allocator.verify import Verification, compare
from fragscope.errors import UsageError
from fragscope.trace import DEFAULT_POOL, DecisionKind, Decisions, RequestKind, Trace

FRACTION_UNIT = 10**9  # how MEMORY_FRACTION requests store a fraction as an integer
COMPILED_FROM = 50_000  # requests from which on the compiled loop is faster, loading it included
COMPILING_FROM = 4_000_000  # and compiling it included


@dataclass(frozen=True, slots=True)
class Assumption:
    """Something a replay takes for granted.

    Attributes:
        code: stable identifier.
        effect: ``none`` on the numbers, ``bounded``, or ``unknown``.
        events: how many events are concerned.
        detail: one sentence for people.
    """

    code: str
    effect: str
    events: int
    detail: str


@dataclass(frozen=True, slots=True)
class Oom:
    """A request that failed; bytes."""

    event: int
    requested: int
    rounded: int
    stream: int


@dataclass(frozen=True, slots=True)
class Span:
    """What happened between two marks.

    Attributes:
        name: the phase, ``""`` for the whole Trace.
        base: counters when it began.
        end: counters when it was over.
        peak: the largest value of each counter.
        segments_peak: most segments held at once.
        allocs: requests for memory.
        ooms: failed requests.
        retries: requests that released everything cached.
        calls: driver calls.
        reserved_after_empty_cache: reserved bytes that ``empty_cache()`` would leave at its end.
    """

    name: str
    base: Counters
    end: Counters
    peak: Counters
    segments_peak: int
    allocs: int
    ooms: int
    retries: int
    calls: DriverCalls
    reserved_after_empty_cache: int

    @property
    def transient(self) -> int:
        """Bytes needed only on the way: peak allocated beyond base and end."""
        return self.peak.allocated - max(self.base.allocated, self.end.allocated)

    @property
    def retained(self) -> int:
        """Allocated bytes the phase left behind (negative where it freed more)."""
        return self.end.allocated - self.base.allocated


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """What a Trace's requests are decided under.

    Attributes:
        rules: torch release.
        card: name for the output.
        total: bytes of device memory in all.
        capacity: bytes that segments may take together.
        conf: ``PYTORCH_ALLOC_CONF`` string.
        memory_fraction: per-process memory fraction, or None.
        limit: bytes that may be reserved, where that is known other than as a fraction.
    """

    rules: ChosenRules
    card: str
    total: int
    capacity: int
    conf: str = ""
    memory_fraction: float | None = None
    limit: int | None = None

    @classmethod
    def of(cls, recorded: Recorded) -> ReplaySettings:
        """The settings that a Trace was recorded under."""
        return cls(
            rules=recorded.rules,
            card=recorded.card.name,
            total=recorded.card.total,
            capacity=recorded.capacity,
            conf=recorded.conf.text,
            memory_fraction=recorded.memory_fraction,
            limit=recorded.limits.limit,
        )


@dataclass(frozen=True, slots=True)
class Replay:
    """The outcome of one replay.

    Attributes:
        settings: what it was decided under.
        trace: the Trace with the decisions of this replay; with none if they were not wanted.
        whole: the Trace from its first to its last event.
        measured: the measured phase, or None where the Trace marks none.
        ooms: every failed request; only the first if the decisions were not wanted.
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


@dataclass(frozen=True, slots=True)
class Tape:
    """A Trace's requests in the form that the allocator's loop reads, made once for many replays.

    Attributes:
        trace: where they come from.
        kind, id, size, stream, pool: columns; ids are 0, 1, 2, ...
        names: the Trace's id of each, None where they are the same.
        allocations: how many ids there are.
        segments: address and bytes of each recorded segment, in order.
        maps: address of each recorded mapping, in order.
        starts: what the recorded addresses tell of the driver (``placement``), once that was asked.
        settled: whether releases that the recording shows are told apart into ``empty_cache()`` and the allocator's
            own.
    """

    trace: Trace
    kind: Any
    id: Any
    size: Any
    stream: Any
    pool: Any
    names: Any
    allocations: int
    segments: tuple[tuple[int, int], ...]
    maps: tuple[int, ...]
    settled: bool
    starts: list[DriverStart | None] = field(default_factory=list)

    def driver_start(self) -> DriverStart | None:
        """Where the driver's address space begins, fitted to the recorded addresses."""
        if not self.starts:
            self.starts.append(fitted_start(self.trace))
        return self.starts[0]

    @property
    def columns(self) -> tuple[Any, Any, Any, Any, Any]:
        """What the loop reads."""
        return self.kind, self.id, self.size, self.stream, self.pool


def tape_of(trace: Trace) -> Tape:
    """A Trace's requests as a Tape; whether its releases are settled is seen when it is played."""
    requests = trace.requests
    names = None
    id_ = np.array(requests.id, dtype=np.int64)
    if len(id_) and (int(id_.min()) < -1 or int(id_.max()) >= 2 * len(id_)):
        names, id_ = np.unique(id_, return_inverse=True)
        id_ = id_.astype(np.int64)
    else:
        id_[id_ < 0] = len(id_) and int(id_.max()) + 1  # requests about no allocation name one that is never made
    segments: tuple[tuple[int, int], ...] = ()
    maps: tuple[int, ...] = ()
    if trace.decisions is not None:
        d = trace.decisions
        taken, mapped = d.kind == DecisionKind.SEGMENT_ALLOC, d.kind == DecisionKind.SEGMENT_MAP
        segments = tuple(zip(d.addr[taken].tolist(), d.size[taken].tolist(), strict=True))
        maps = tuple(d.addr[mapped].tolist())
    return Tape(
        trace=trace,
        kind=np.array(requests.kind, dtype=np.int64),
        id=id_,
        size=np.array(requests.size, dtype=np.int64),
        stream=np.array(requests.stream, dtype=np.int64),
        pool=np.array(requests.pool, dtype=np.int64),
        names=names,
        allocations=int(id_.max()) + 1 if len(id_) else 0,
        segments=segments,
        maps=maps,
        settled=not trace.count(RequestKind.RELEASE_SEEN),
    )


def settle(tape: Tape, recorded: ReplaySettings) -> Tape:
    """Tell releases that a recording shows apart: the program's ``empty_cache()``, and the allocator's own.

    A snapshot shows that segments went back before a request took a new one, not why. Under the settings it was
    recorded with, the model tries both and keeps what returns the segments that the recording shows.
    """
    if tape.settled:
        return tape
    run = _Run(tape, recorded, parse_conf(recorded.conf, recorded.rules.rules), compiled=_worth(tape), log=True)
    run.play()
    return replace(tape, kind=np.array(run.columns[0], dtype=np.int64), settled=True)


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
    compiled = _worth(tape) if compiled is None else compiled

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
        if verification.first is not None:
            again = _Run(tape, settings, conf, compiled=False, log=not tape.settled)
            again.play(until=max(verification.first.event, 0))
            first = explained(verification.first, trace, decided, again.allocator)
            verification = replace(verification, first=first)
    recorded = trace.placement == "recorded" and bool(tape.segments or tape.maps) and not run.allocator.departed
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
        whole=run.whole(),
        measured=run.measured,
        ooms=run.ooms(decided),
        verify=verification,
        assumptions=tuple(_assumptions(trace, settings, run, conf, verification, recorded=recorded)),
    )


def _worth(tape: Tape) -> bool:
    rows = len(tape.kind)
    return rows >= COMPILED_FROM and can_compile() and (rows >= COMPILING_FROM or is_compiled_before())


class SpanMeter:
    """Takes the figures of a phase of a running allocator."""

    def __init__(self, allocator: CachingAllocator, name: str) -> None:
        self._allocator = a = allocator
        self._name = name
        self._base = a.now
        self._before = (a.ooms + a.rejections, a.retries, a.allocs)
        self._calls = a.calls
        self._peaks = a.watch()

    def finish(self) -> Span:
        """The figures from the start of the phase until now."""
        a = self._allocator
        now = a.now
        span = Span(
            name=self._name,
            base=self._base,
            end=now,
            peak=a.peaks(self._peaks),
            segments_peak=a.peak_segments(self._peaks),
            allocs=a.allocs - self._before[2],
            ooms=a.ooms + a.rejections - self._before[0],
            retries=a.retries - self._before[1],
            calls=a.calls - self._calls,
            reserved_after_empty_cache=now.reserved - a.releasable,
        )
        self.close()
        return span

    def close(self) -> None:
        """No figures are wanted any more."""
        self._peaks.close()


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
            kind, size, pool = self.columns[0][row], self.columns[2][row], self.columns[4][row]
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
                allocator.create_pool(int(pool), use_on_oom=bool(size & 1), no_split=bool(size & 2))
            elif kind == RequestKind.RELEASE_SEEN:
                if row + 1 == until:
                    break
                row = self._settle_release(row)
            elif kind == RequestKind.START:
                self._restore()
            elif kind == RequestKind.CAPTURE_BEGIN:
                allocator.begin_capture()
            elif kind == RequestKind.CAPTURE_END:
                allocator.end_capture()
            elif kind == RequestKind.ALLOC:  # it failed, and that was to be the end
                break
            row += 1
        if phase is not None:  # the recording ended inside it: a crash, an OOM
            self.measured = phase.finish()

    def _settle_release(self, row: int) -> int:
        """Find out who released, and serve the request that follows; returns the last row served."""
        allocator, kind = self.allocator, self.columns[0]
        if row + 1 >= len(kind):
            return row
        before = allocator.saved()
        agreement = []
        for choice in (NOTHING, int(RequestKind.EMPTY_CACHE)):
            allocator.restored(tables.copied(before))
            start = allocator.decided
            allocator.row = row + 1  # recorded with the allocation, since a snapshot does not tell
            if choice != NOTHING:
                allocator.empty_cache()
            allocator.decide(self.columns, row + 1, row + 2)
            agreement.append((self._agreement(row + 1, start), choice, allocator.saved()))
        _, chosen, state = max(agreement, key=lambda a: a[0])
        kind[row] = chosen
        allocator.restored(state)
        return row + 1

    def _agreement(self, row: int, start: int) -> int:
        """How well the decisions from ``start`` on are those recorded for a row; 0 is perfectly."""
        recorded = self._recorded.get(row, frozenset())
        d = self.allocator.decisions(start)
        made = set(zip(d.kind.tolist(), d.addr.tolist(), strict=True))
        return -len(recorded ^ made)

    @cached_property
    def _recorded(self) -> dict[int, frozenset[tuple[int, int]]]:
        """Recorded decisions, kind and address, of the requests that follow a release."""
        trace = self.tape.trace
        if trace.decisions is None:
            return {}
        d = trace.decisions
        rows = np.flatnonzero(trace.requests.kind == RequestKind.RELEASE_SEEN) + 1
        wanted = np.flatnonzero(np.isin(d.request, rows))
        out: dict[int, set[tuple[int, int]]] = {}
        columns = (d.request[wanted].tolist(), d.kind[wanted].tolist(), d.addr[wanted].tolist())
        for request, kind, addr in zip(*columns, strict=True):
            out.setdefault(request, set()).add((kind, addr))
        return {row: frozenset(decisions) for row, decisions in out.items()}

    def _restore(self) -> None:
        """What stood when recording began; the addresses given for it are used up."""
        requests, initial = self.tape.trace.requests, self.tape.trace.initial
        rows = np.flatnonzero(requests.kind == RequestKind.HELD)
        ids = [self.columns[1][row] for row in rows.tolist()]
        held = list(zip(rows.tolist(), map(int, ids), requests.size[rows].tolist(), strict=True))
        ordinary = sum(not s.expandable for s in initial)
        maps = self.tape.maps[len(initial) - ordinary :]
        self.allocator.give_addresses(self.tape.segments[ordinary:], maps)
        self.allocator.restore(initial, held, maps)

    def _set_fraction(self, fraction: float) -> None:
        """The program sets its memory fraction; one of the user's choice stays."""
        if self.settings.memory_fraction in (None, self.tape.trace.settings.memory_fraction):
            self.allocator.set_memory_fraction(fraction)

    def _set_conf(self, text: str) -> None:
        """The program changes its settings; under a conf of the user's choice that one stays."""
        if self.settings.conf == self.tape.trace.settings.conf:
            self.allocator.set_conf(parse_conf(text, self.settings.rules.rules, self.allocator.conf))

    def decisions(self) -> Decisions:
        """The decisions made, with the Trace's ids."""
        decided = self.allocator.decisions()
        if self.tape.names is not None:
            named = decided.id >= 0
            decided.id[named] = self.tape.names[decided.id[named]]
        return decided

    def ooms(self, decided: Decisions | None) -> tuple[Oom, ...]:
        """Failed requests; only the first where no decisions were kept."""
        requests = self.tape.trace.requests
        if decided is None:
            first = self.allocator.first_oom
            if first is None:
                return ()
            return (Oom(first, int(requests.size[first]), -1, int(requests.stream[first])),)
        failed = np.flatnonzero(decided.kind == DecisionKind.OOM)
        rows = decided.request[failed]
        columns = (rows, requests.size[rows], decided.size[failed], requests.stream[rows])
        return tuple(Oom(*row) for row in zip(*(c.tolist() for c in columns), strict=True))

    def whole(self) -> Span:
        return replace(self._whole.finish(), base=Counters())

    def _phase_name(self, row: int) -> str:
        return self.tape.trace.phases[int(self.tape.trace.requests.phase[row])]


def _assumptions(
    trace: Trace, settings: ReplaySettings, run: _Run, conf: Conf, verification: Verification | None, *, recorded: bool
) -> list[Assumption]:
    out = []
    deferred = trace.count(RequestKind.RECORD_STREAM)
    if deferred and trace.source == "virtual":
        detail = "deferred frees complete at the next synchronisation; on a GPU they may complete earlier"
        out.append(Assumption("deferred_frees", "bounded", deferred, detail))
    ties = run.allocator.address_ties
    if ties and not recorded:
        detail = "equal-size blocks were told apart by addresses that a model of the driver gave"
        if run.start is not None:
            detail += f"; it explains the order of {run.start.order:.1%} of the recorded pairs of segments"
        out.append(Assumption("tie_by_modelled_address", "unknown", ties, detail))
    if run.allocator.defects:
        detail = "PyTorch itself fails here: parts of segments of max_split_size and more would go to the driver"
        out.append(Assumption("allocator_defect", "unknown", run.allocator.defects, detail))
    private = [p for p in trace.pools if p != DEFAULT_POOL]
    if private and conf.expandable_segments and trace.count(RequestKind.POOL_RELEASE):
        detail = "PyTorch miscounts expandable segments of released private pools and may give up one that is in use"
        out.append(Assumption("allocator_defect", "unknown", trace.count(RequestKind.POOL_RELEASE), detail))
    if run.allocator.lost_frees:
        detail = "memory was freed that was never seen allocated; what it held is not in the figures"
        out.append(Assumption("late_start", "unknown", run.allocator.lost_frees, detail))
    if trace.initial and (verification is None or verification.mismatches):
        detail = "what stood when recording began is kept as it was; its ages and order of creation are not recorded"
        out.append(Assumption("start_state", "unknown", trace.count(RequestKind.HELD), detail))
    if settings.limit is not None and (verification is None or verification.mismatches):
        detail = f"a limit of {settings.limit} reserved bytes is inferred from requests that failed; it may be higher"
        out.append(Assumption("limit_inferred", "bounded", 1, detail))
    if settings.rules.assumed:
        known = settings.rules.rules.release
        detail = f"torch {settings.rules.torch} is newer than the newest rules; those of {known} stand in"
        out.append(Assumption("rules_assumed", "unknown", len(trace.requests), detail))
    observed = int(np.count_nonzero(trace.requests.kind == RequestKind.OBSERVATION))
    changed = (
        trace.settings.conf != settings.conf
        or trace.torch not in (None, settings.rules.torch)
        or trace.card not in (None, settings.card)
        or (trace.device_total is not None and trace.device_total != settings.total)
        or (trace.settings.capacity is not None and trace.settings.capacity != settings.capacity)
        or trace.settings.memory_fraction != settings.memory_fraction
    )
    if observed and changed:
        detail = "the program read memory state; under other settings it might have acted otherwise"
        out.append(Assumption("observations", "unknown", observed, detail))
    recorded_ooms = 0
    if trace.decisions is not None:
        recorded_ooms = int(np.count_nonzero(trace.decisions.kind == DecisionKind.OOM))
    first_oom = run.allocator.first_oom
    if first_oom is not None and run.allocator.ooms + run.allocator.rejections != recorded_ooms:
        detail = "a request failed that did not fail when recorded; the program would not have gone on unchanged"
        out.append(Assumption("after_oom", "unknown", len(trace.requests) - first_oom, detail))
    return out
