"""Device memory that a program took of the driver itself, read out of a Trace's requests."""

from __future__ import annotations

import numpy as np

from fragscope.trace.events import Column, DecisionKind, RequestKind
from fragscope.trace.sizes import DRIVER_PAGE
from fragscope.trace.trace import Trace


def raw_bytes(trace: Trace) -> Column:
    """Bytes held past the allocator after each request, in whole pages of the driver; int64, shape ``(requests,)``.

    A request that failed took nothing, as far as the Trace's decisions tell.
    """
    r, d = trace.requests, trace.decisions
    change = np.zeros(len(r), dtype=np.int64)
    concerned = np.flatnonzero((r.kind == RequestKind.RAW_ALLOC) | (r.kind == RequestKind.RAW_FREE))
    if not len(concerned):
        return change
    if d is not None:
        failed = r.id[d.request[d.kind == DecisionKind.OOM]]
        concerned = concerned[~np.isin(r.id[concerned], failed)]
    pages = -(-r.size[concerned] // DRIVER_PAGE) * DRIVER_PAGE
    change[concerned] = np.where(r.kind[concerned] == RequestKind.RAW_ALLOC, pages, -pages)
    return np.cumsum(change)
