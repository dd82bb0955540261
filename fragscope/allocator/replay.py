"""Replay: what an allocator would do with a Trace's requests, under settings of your choice.

With the recorded settings the model's decisions must equal the recorded ones, row by row; ``verify`` says where they do
not. With other settings the answer holds for an unchanged sequence of requests, and what else it assumes is listed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fragscope.allocator.caching import CachingAllocator, DriverCalls, OutOfMemoryError
from fragscope.allocator.conf import Conf, parse_conf
from fragscope.allocator.counters import Counters
from fragscope.allocator.driver import Device, RecordedPlacement, TopDownPlacement
from fragscope.allocator.rules import ChosenRules
from fragscope.allocator.verify import Verification, compare
from fragscope.errors import UnmodelledError, UsageError
from fragscope.trace import DEFAULT_POOL, DecisionKind, DecisionLog, RequestKind, Requests, Trace

FRACTION_UNIT = 10**9  # how MEMORY_FRACTION requests store a fraction as an integer


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
    """

    rules: ChosenRules
    card: str
    total: int
    capacity: int
    conf: str = ""
    memory_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """The outcome of one replay.

    Attributes:
        settings: what it was decided under.
        trace: the Trace with the decisions of this replay.
        whole: the Trace from its first to its last event.
        measured: the measured phase, or None where the Trace marks none.
        ooms: every failed request.
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


def replay(trace: Trace, settings: ReplaySettings, *, verify: bool = False) -> Replay:
    """Decide a Trace's requests with the allocator model.

    Args:
        trace: requests, with or without decisions.
        settings: conf, rules and card.
        verify: compare with the recorded decisions.

    Raises:
        UnmodelledError: the Trace or the settings need something that the model does not cover.
        UsageError: ``verify`` without recorded decisions.
    """
    if verify and trace.decisions is None:
        raise UsageError("--verify: this trace holds requests only; there are no recorded decisions to compare with")
    _check_modelled(trace)
    conf = parse_conf(settings.conf, settings.rules.rules)
    placement: RecordedPlacement | TopDownPlacement = TopDownPlacement()
    if trace.decisions is not None:
        placement = RecordedPlacement(_recorded_segments(trace))
    run = _Run(trace, settings, conf, Device(settings.total, settings.capacity, placement))
    run.play()
    decided = run.log.finish()
    verification = None
    if verify:
        verification = compare(trace, decided, run.allocator)
    recorded = trace.placement == "recorded" and isinstance(placement, RecordedPlacement) and not placement.departed
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
        ooms=tuple(run.ooms),
        verify=verification,
        assumptions=tuple(_assumptions(trace, settings, run, recorded)),
    )


def _check_modelled(trace: Trace) -> None:
    if any(p != DEFAULT_POOL for p in trace.pools):
        private = [p for p in trace.pools if p != DEFAULT_POOL]
        raise UnmodelledError(
            "private pools", f"the trace uses {len(private)} (MemPool or CUDA graphs), which the model does not cover"
        )


def _recorded_segments(trace: Trace) -> list[tuple[int, int]]:
    assert trace.decisions is not None
    taken = trace.decisions.kind == DecisionKind.SEGMENT_ALLOC
    return list(zip(trace.decisions.addr[taken].tolist(), trace.decisions.size[taken].tolist(), strict=True))


class SpanMeter:
    """Takes the figures of a phase of a running allocator."""

    def __init__(self, allocator: CachingAllocator, name: str) -> None:
        self._allocator = allocator
        self._name = name
        self._base = allocator.meter.now()
        self._before = (allocator.ooms, allocator.retries)
        self._calls = replace(allocator.calls)
        allocator.meter.reset_peak()

    def finish(self, allocs: int) -> Span:
        """The figures from the start of the phase until now."""
        a = self._allocator
        calls = DriverCalls(
            a.calls.alloc - self._calls.alloc, a.calls.free - self._calls.free, a.calls.sync - self._calls.sync
        )
        return Span(
            name=self._name,
            base=self._base,
            end=a.meter.now(),
            peak=a.meter.peak(),
            segments_peak=a.meter.peak_segments,
            allocs=allocs,
            ooms=a.ooms - self._before[0],
            retries=a.retries - self._before[1],
            calls=calls,
            reserved_after_empty_cache=a.meter.reserved - a.releasable,
        )


class _Run:
    """One pass over the requests."""

    def __init__(self, trace: Trace, settings: ReplaySettings, conf: Conf, device: Device) -> None:
        self.trace = trace
        self.log = DecisionLog()
        self.allocator = CachingAllocator(device, settings.rules.rules, conf, settings.memory_fraction, self.log)
        self.ooms: list[Oom] = []
        self.measured: Span | None = None
        self.forced_uses = 0
        self.dropped_frees = 0
        self._whole_peak = Counters()
        self._whole_segments = 0
        self._allocs = 0

    def play(self) -> None:
        requests = self.trace.requests
        allocator, log = self.allocator, self.log
        live: dict[int, object] = {}
        failed: set[int] = set()
        phase: SpanMeter | None = None
        phase_from = 0
        columns = (requests.kind.tolist(), requests.id.tolist(), requests.size.tolist(), requests.stream.tolist())
        alloc, free = int(RequestKind.ALLOC), int(RequestKind.FREE)
        blocks: dict[int, object] = live
        for row, (kind, id_, size, stream) in enumerate(zip(*columns, strict=True)):
            log.request = row
            if kind == alloc:
                self._allocs += 1
                try:
                    blocks[id_] = allocator.malloc(size, stream, id_)
                except OutOfMemoryError as e:
                    failed.add(id_)
                    self.ooms.append(Oom(row, e.requested, e.rounded, e.stream))
            elif kind == free:
                block = blocks.pop(id_, None)
                if block is not None:
                    allocator.free(block)  # type: ignore[arg-type]
                elif id_ not in failed:
                    self.dropped_frees += 1
            elif kind == RequestKind.RECORD_STREAM:
                block = blocks.get(id_)
                if block is not None:
                    # A use by an unknown stream is still a use; no real stream handle is negative.
                    allocator.record_stream(block, stream)  # type: ignore[arg-type]
            elif kind == RequestKind.USES_DONE:
                allocator.uses_done(id_)
            elif kind == RequestKind.EMPTY_CACHE:
                allocator.empty_cache()
            elif kind == RequestKind.RELEASE_SEEN:
                if not self._retry_releases(requests, row):
                    log.request = row + 1  # recorded with the allocation, since a snapshot does not tell
                    allocator.empty_cache()
            elif kind == RequestKind.MEMORY_FRACTION:
                allocator.set_memory_fraction(size / FRACTION_UNIT)
            elif kind == RequestKind.PHASE_BEGIN:
                self._keep_peaks()
                phase, phase_from = SpanMeter(allocator, self._phase_name(requests, row)), self._allocs
            elif kind == RequestKind.PHASE_END and phase is not None:
                self.measured = phase.finish(self._allocs - phase_from)
                phase = None
        if phase is not None:  # the recording ended inside it: a crash, an OOM
            self.measured = phase.finish(self._allocs - phase_from)
        self._keep_peaks()

    def whole(self) -> Span:
        a = self.allocator
        return Span(
            name="",
            base=Counters(),
            end=a.meter.now(),
            peak=self._whole_peak,
            segments_peak=self._whole_segments,
            allocs=self._allocs,
            ooms=a.ooms,
            retries=a.retries,
            calls=a.calls,
            reserved_after_empty_cache=a.meter.reserved - a.releasable,
        )

    def _phase_name(self, requests: Requests, row: int) -> str:
        return self.trace.phases[int(requests.phase[row])]

    def _keep_peaks(self) -> None:
        """Fold the peaks since the last reset into those of the whole Trace."""
        meter, whole = self.allocator.meter, self._whole_peak
        peak = meter.peak()
        self._whole_peak = Counters(*(max(getattr(peak, n), getattr(whole, n)) for n in Counters.__dataclass_fields__))
        self._whole_segments = max(self._whole_segments, meter.peak_segments)

    def _retry_releases(self, requests: Requests, row: int) -> bool:
        """Whether the allocation after this row will itself release everything cached, for want of memory.

        If not, only an ``empty_cache()`` explains that segments were released.
        """
        return row + 1 < len(requests) and self.allocator.must_release(
            int(requests.size[row + 1]), int(requests.stream[row + 1])
        )


def _assumptions(trace: Trace, settings: ReplaySettings, run: _Run, recorded: bool) -> list[Assumption]:
    out = []
    deferred = trace.count(RequestKind.RECORD_STREAM)
    if deferred and trace.source == "virtual":
        detail = "deferred frees complete at the next synchronisation; on a GPU they may complete earlier"
        out.append(Assumption("deferred_frees", "bounded", deferred, detail))
    ties = run.allocator.address_ties
    if ties and not recorded:
        detail = "equal-size blocks were told apart by addresses that a model of the driver gave"
        out.append(Assumption("tie_by_modelled_address", "unknown", ties, detail))
    if run.dropped_frees:
        detail = "memory was freed that was never seen allocated; what it held is not in the figures"
        out.append(Assumption("late_start", "unknown", run.dropped_frees, detail))
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
    )
    if observed and changed:
        detail = "the program read memory state; under other settings it might have acted otherwise"
        out.append(Assumption("observations", "unknown", observed, detail))
    recorded_ooms = 0
    if trace.decisions is not None:
        recorded_ooms = int(np.count_nonzero(trace.decisions.kind == DecisionKind.OOM))
    if run.ooms and len(run.ooms) != recorded_ooms:
        detail = "a request failed that did not fail when recorded; the program would not have gone on unchanged"
        out.append(Assumption("after_oom", "unknown", len(trace.requests) - run.ooms[0].event, detail))
    return out
