"""Why a model and a recording part: the request where they do, the state it met, and the likely reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fragscope.allocator.caching import CachingAllocator
from fragscope.allocator.verify import Difference
from fragscope.trace import DecisionKind, Decisions, RequestKind, Trace

_SHOWN = 3  # cached blocks


def explained(difference: Difference, trace: Trace, modelled: Decisions, met: CachingAllocator) -> Difference:
    """The difference with the state around it and the likely reason.

    Args:
        difference: the first one.
        trace: as recorded.
        modelled: the model's decisions.
        met: the model as it stood before the request that they differ in.
    """
    if difference.event < 0:
        return replace(difference, likely=_at_the_end(trace))
    return replace(
        difference,
        around=tuple(_around(trace, difference.event, met)),
        likely=_reason(trace, modelled, difference.event, met),
    )


def _around(trace: Trace, row: int, met: CachingAllocator) -> list[str]:
    requests = trace.requests
    kind, size, stream = RequestKind(requests.kind[row]), int(requests.size[row]), int(requests.stream[row])
    pool = int(requests.pool[row])
    where = "" if pool == 0 else f" from pool {trace.pools[pool]}"
    lines = [f"request: {kind.name.lower()} {size} B on stream {stream:#x}{where}"]
    if kind == RequestKind.RAW_ALLOC:
        lines = [f"request: {kind.name.lower()} {size} B"]
    elif kind != RequestKind.ALLOC:
        lines = [f"request: {kind.name.lower()}{where}"]
    now = met.now
    limit = "no memory limit" if met.limit is None else f"at most {met.limit} B may be reserved"
    lines.append(
        f"before it: {now.reserved} B reserved, {now.allocated} B allocated, {now.active - now.allocated} B waiting "
        f"for other streams; the driver has {met.free_memory} B, {limit}"
    )
    if kind == RequestKind.ALLOC:
        cached = met.cached(size, stream, pool, _SHOWN)
        shown = ", ".join(f"{b.size} B at {b.addr:#x}" for b in cached)
        lines.append(f"cached blocks that are large enough, in search order: {shown or 'none'}")
    return lines


def _kinds(decisions: Decisions, row: int) -> list[DecisionKind]:
    here = decisions.kind[decisions.request == row]
    return [DecisionKind(k) for k in here.tolist()]


_LOSSES = {
    "late_start": "events are missing from the recording; what it says about the memory they concern does not hold",
    "settings_changes": "expandable segments were switched while the program ran, and when is not recorded",
    "pool_ids": "private pools are in use, and the events of this release do not name theirs",
}
_TAKES = (DecisionKind.SEGMENT_ALLOC, DecisionKind.SEGMENT_MAP)
_GIVES = (DecisionKind.SEGMENT_FREE, DecisionKind.SEGMENT_UNMAP)


def _reason(trace: Trace, modelled: Decisions, row: int, met: CachingAllocator) -> str:
    assert trace.decisions is not None
    theirs, ours = _kinds(trace.decisions, row), _kinds(modelled, row)
    lost = {loss.code for loss in trace.lost}
    for code, reason in _LOSSES.items():
        if code in lost:
            return reason
    if DecisionKind.OOM in theirs and DecisionKind.OOM not in ours:
        return (
            "the recorded request failed for want of memory that the model has: name the memory fraction "
            "(--memory-fraction) or what the card had free (--capacity)"
        )
    if DecisionKind.OOM in ours and DecisionKind.OOM not in theirs:
        return "the model ran out of memory that the recording had: name the card (--card) or its memory (--capacity)"
    if "start_state" in lost and met.conf.garbage_collection_threshold > 0.0 and _GIVES[0] in theirs + ours:
        return (
            "recording began late, and how long memory had been idle by then is not recorded; garbage collection "
            "goes by it"
        )
    gave, gives = any(k in _GIVES for k in theirs), any(k in _GIVES for k in ours)
    if gave and not gives:
        return (
            "cached memory was returned that the model keeps: a memory fraction or garbage collection was in force, "
            "or the program called empty_cache() where that cannot be told"
        )
    if gives and not gave:
        return "the model returned cached memory that the recording keeps: more memory was there, or another limit held"
    if DecisionKind.SEGMENT_MAP in theirs + ours and DecisionKind.SEGMENT_ALLOC in theirs + ours:
        return "expandable segments were switched on or off while the program ran; snapshots keep the last conf only"
    took, takes = [k for k in theirs if k in _TAKES], [k for k in ours if k in _TAKES]
    if took and takes:
        return (
            "another amount of memory was taken: settings that a snapshot does not hold, such as large_segment_size_mb"
        )
    if took != takes:
        return (
            "a cached block served here and not there: settings that changed while the program ran, deferred frees "
            "that completed at another time, or another release (--torch)"
        )
    if row < len(trace.requests) and trace.requests.kind[row] == RequestKind.ALLOC:
        cached = met.cached(
            int(trace.requests.size[row]), int(trace.requests.stream[row]), int(trace.requests.pool[row]), 2
        )
        if len(cached) == 2 and cached[0].size == cached[1].size:
            return "blocks of one size are told apart differently: another release's rules recorded this (--torch)"
    return "settings or a release other than those named, or the model is wrong"


def _at_the_end(trace: Trace) -> str:
    assert trace.decisions is not None
    pending = any(state == "pending" for s in trace.final or () for _, _, state in s.blocks)
    if pending:
        return "frees wait for other streams at the end, and when they complete is not recorded"
    if np.any(trace.decisions.kind == DecisionKind.ALLOC):
        return "every decision is the recorded one: something happened after the last event that is not recorded"
    return "the recording holds no allocation"
