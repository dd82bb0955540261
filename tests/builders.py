"""Values that several test modules need: traces with a measured phase, cases, results."""

from __future__ import annotations

import json
import lzma
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fragscope.allocator import CARDS, DEFAULT_CARD, Replay, ReplaySettings, recorded_under, replay, rules_for
from fragscope.results import AfterEmptyCache, AssumptionRecord, Calls, Case, LossRecord, OomRecord, Peak, Results, Run
from fragscope.trace import RequestKind, RequestLog, Requests, Trace, load_trace, with_sidecar, write_trace
from fragscope.trace.snapshot import snapshot_to_trace

TRACES = Path(__file__).parent / "data" / "traces"
RULES = "2.11"  # the release that recorded the traces in tests/data

FP8 = {
    "list-stack": ("original", "fp8-dsv3-tp8.orig.default"),
    "preallocated": ("fixed", "fp8-dsv3-tp8.fixed.default"),
    "gather": ("newest", "fp8-dsv3-tp8.newest.default"),
}
"""Variant to role and recording; all three load the same four layers."""

CONFS = tuple(
    f"confs/{path.name.removesuffix('.pickle.xz')}" for path in sorted((TRACES / "confs").glob("*.pickle.xz"))
)
"""Recordings of random programs under other confs."""

FP8_BASE_ALLOCS = 8
"""Each FP8 recording first allocates the parameters: two a layer, four layers."""


def pickled(name: str) -> dict[str, Any]:
    """A recording in tests/data as torch wrote it."""
    value: dict[str, Any] = pickle.loads(lzma.decompress((TRACES / f"{name}.pickle.xz").read_bytes()))
    return value


def bare_recording(name: str) -> Trace:
    """A recording in tests/data without what its JSON says."""
    return load_trace(TRACES / f"{name}.pickle.xz")


def recording(name: str) -> Trace:
    """A recording in tests/data, with what its snapshot leaves out from the JSON beside it."""
    return with_sidecar(bare_recording(name), TRACES / f"{name}.json")


def begun_late(name: str, share: float) -> Trace:
    """A recording as if it had begun after that share of its entries."""
    return late_part(name, pickled(name), share)


def late_part(name: str, snapshot: dict[str, Any], share: float) -> Trace:
    """The same of a recording that was unpickled before."""
    (entries,) = (e for e in snapshot["device_traces"] if e)
    cut = {**snapshot, "device_traces": [entries[int(len(entries) * share) :]]}
    return with_sidecar(snapshot_to_trace(cut, TRACES / f"{name}.pickle.xz"), TRACES / f"{name}.json")


def own_settings(trace: Trace) -> ReplaySettings:
    """The settings that a Trace was recorded under, as far as it tells."""
    return ReplaySettings.of(recorded_under(trace))


def torch_statistics(name: str) -> dict[str, int]:
    """``torch.cuda.memory_stats()`` at the end of a recording in tests/data."""
    stats: dict[str, int] = json.loads((TRACES / f"{name}.json").read_text())["memory_stats"]
    return stats


def settings(name: str) -> ReplaySettings:
    """The settings a recording in tests/data was made under."""
    facts = json.loads((TRACES / f"{name}.json").read_text())
    card = CARDS[DEFAULT_CARD]
    return ReplaySettings(
        rules=rules_for(RULES),
        card=card.name,
        total=card.total,
        capacity=card.free,
        conf=facts["conf"],
        memory_fraction=facts.get("memory_fraction"),
    )


@cache
def replayed(name: str) -> Replay:
    """A recording in tests/data, decided by the model under its own settings."""
    return replay(load_trace(TRACES / f"{name}.pickle.xz"), settings(name))


@cache
def replayed_phase(name: str, after_allocs: int = FP8_BASE_ALLOCS) -> Replay:
    """The same with everything after the first allocations marked as the measured phase."""
    trace = load_trace(TRACES / f"{name}.pickle.xz")
    return replay(with_phase(trace, after_allocs), settings(name))


def with_phase(trace: Trace, after_allocs: int) -> Trace:
    """The trace's requests with a measured phase from after that many allocations to the end; no decisions."""
    kinds = trace.requests.kind
    begin = int(np.flatnonzero(kinds == RequestKind.ALLOC)[after_allocs - 1]) + 1
    log = RequestLog()
    for row in range(len(kinds)):
        if row == begin:
            log.append(RequestKind.PHASE_BEGIN, phase=1)
        _copy(log, trace.requests, row, phase=int(row >= begin))
    log.append(RequestKind.PHASE_END, phase=1)
    # A recording's decisions name rows of its own requests; without them the model places segments.
    return replace(trace, requests=log.finish(), decisions=None, phases=("", "load"), final=None, lost=())


def _copy(log: RequestLog, requests: Requests, row: int, phase: int) -> None:
    log.append(
        RequestKind(int(requests.kind[row])),
        id=int(requests.id[row]),
        size=int(requests.size[row]),
        stream=int(requests.stream[row]),
        pool=int(requests.pool[row]),
        phase=phase,
    )


def case_of(result: Replay, **fields: Any) -> Case:
    """The case a suite would make of a replay with a measured phase; ``fields`` replace or add to its values."""
    span = result.measured
    assert span is not None

    def peak(counters: Any) -> Peak:
        return Peak(*(getattr(counters, name) for name in Peak.__struct_fields__))

    values: dict[str, Any] = {
        "scenario": "load_experts",
        "preset": "dsv3-tp8",
        "variant": "list-stack",
        "role": "original",
        "torch": result.settings.rules.torch,
        "torch_installed": "2.13.0",
        "card": result.settings.card,
        "device": "virtual",
        "capacity": result.settings.capacity,
        "conf": result.settings.conf,
        "outcome": "oom" if span.ooms else "ok",
        "exact": result.exact,
        "base": span.base.allocated,
        "end_live": span.end.allocated,
        "transient": span.transient,
        "retained": span.retained,
        "peak": peak(span.peak),
        "end": peak(span.end),
        "after_empty_cache": AfterEmptyCache(span.reserved_after_empty_cache),
        "segments_peak": span.segments_peak,
        "allocs": span.allocs,
        "driver_calls": Calls(span.calls.alloc, span.calls.free, span.calls.sync),
        "ooms": [OomRecord(o.event, o.requested, o.rounded, o.stream) for o in result.ooms],
        "retries": span.retries,
        "lost": [LossRecord(x.code, x.detail, x.events) for x in result.trace.lost],
        "assumptions": [AssumptionRecord(a.code, a.effect, a.events, a.detail) for a in result.assumptions],  # type: ignore[arg-type]
        "seconds": 0.25,
        **fields,
    }
    values.setdefault("id", f"{values['scenario']}[{values['preset']}]/{values['variant']}")
    values.setdefault("digest", "0" * 16)
    return Case(**values)


def bare_case(**fields: Any) -> Case:
    """A case without a trace, for tables; everything may be replaced."""
    values: dict[str, Any] = {
        "digest": "0" * 16, "scenario": "load_experts", "preset": "dsv3-tp8", "variant": "list-stack",
        "role": "original", "torch": "2.11", "torch_installed": "2.13.0", "card": DEFAULT_CARD, "device": "virtual",
        "outcome": "ok", "exact": True,
    }  # fmt: skip
    values |= fields
    named = "/".join(str(values[key]) for key in ("scenario", "preset", "variant"))
    under = ",".join(str(values.get(key, "")) for key in ("conf", "torch", "card", "device"))
    return Case(**{"id": f"{named}@{under}", **values})


def results_of(cases: list[Case], **run: Any) -> Results:
    """Results around cases."""
    values: dict[str, Any] = {
        "started": "2026-05-04T10:11:12+00:00",
        "seconds": 12.5,
        "complete": True,
        "planned": len(cases),
        "versions": {"fragscope": "0.1.0", "python": "3.12.3", "torch": "2.13.0"},
        "command": ["fragscope", "run"],
    }
    return Results(run=Run(**(values | run)), cases=cases)


def fp8_results(folder: Path) -> Results:
    """Results with traces in ``folder`` of the three forms of the FP8 load, measured on the same layers."""
    cases = []
    for variant, (role, name) in FP8.items():
        result = replayed_phase(name)
        write_trace(result.trace, folder / "traces" / f"{variant}.fscope")
        cases.append(case_of(result, variant=variant, role=role, trace=f"traces/{variant}.fscope"))
    return results_of(cases)
