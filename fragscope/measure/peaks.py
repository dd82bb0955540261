"""What a recording shows of a program's memory without the allocator model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fragscope.trace import NO_ID, DecisionKind, RequestKind, Trace


@dataclass(frozen=True, slots=True)
class Peaks:
    """The largest values over a whole Trace, in bytes; they need not have occurred together.

    Recordings hold no block sizes, so allocated and stranded bytes take a replay.

    Attributes:
        requested: bytes asked for and not freed.
        reserved: bytes held from the driver; None where the Trace has no decisions.
    """

    requested: int
    reserved: int | None


def peaks(trace: Trace) -> Peaks:
    """The peaks, by adding up requests and decisions; a request that failed does not count."""
    return Peaks(_requested(trace), _reserved(trace))


def _requested(trace: Trace) -> int:
    r, d = trace.requests, trace.decisions
    takes = (r.kind == RequestKind.ALLOC) | (r.kind == RequestKind.HELD)
    if d is not None:
        failed = d.request[d.kind == DecisionKind.OOM]
        served = d.request[d.kind == DecisionKind.ALLOC]
        takes[np.setdiff1d(failed, served)] = False
    begun, frees = np.flatnonzero(takes), np.flatnonzero((r.kind == RequestKind.FREE) & (r.id != NO_ID))
    by_id = begun[np.argsort(r.id[begun], kind="stable")]
    at = np.searchsorted(r.id[by_id], r.id[frees])
    known = at < len(by_id)
    known[known] = r.id[by_id[at[known]]] == r.id[frees[known]]
    change = np.zeros(len(r), dtype=np.int64)
    change[begun] = r.size[begun]
    change[frees[known]] = -r.size[by_id[at[known]]]
    return int(np.cumsum(change).max(initial=0))


def _reserved(trace: Trace) -> int | None:
    d = trace.decisions
    if d is None:
        return None
    change = np.zeros(len(d), dtype=np.int64)
    for sign, kinds in (
        (1, (DecisionKind.SEGMENT_ALLOC, DecisionKind.SEGMENT_MAP)),
        (-1, (DecisionKind.SEGMENT_FREE, DecisionKind.SEGMENT_UNMAP)),
    ):
        rows = np.isin(d.kind, kinds)
        change[rows] = sign * d.size[rows]
    start = sum(segment.size for segment in trace.initial)
    return start + int(np.cumsum(change).max(initial=0))
