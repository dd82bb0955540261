"""A stretch of a Trace with nothing of what was there before: what one test asked for itself.

Kept are the requests between two rows about memory that was asked for between them. Lifetime ids, streams and pools are
numbered in the order of their first use, so that the same stretch gives the same Trace wherever in a process it stands:
raw handles and running numbers tell how much was made before.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fragscope.trace.events import ASKING, UNKNOWN_STREAM, Column, DecisionKind, RequestKind, Requests
from fragscope.trace.trace import DEFAULT_POOL, Loss, PoolId, Settings, Trace

_OF_MEMORY = (
    *ASKING,
    RequestKind.FREE,
    RequestKind.RAW_FREE,
    RequestKind.RECORD_STREAM,
    RequestKind.USES_DONE,
)
_OF_POOLS = (
    RequestKind.POOL_CREATE,
    RequestKind.SCOPE_OPEN,
    RequestKind.SCOPE_CLOSE,
    RequestKind.POOL_RELEASE,
    RequestKind.CAPTURE_BEGIN,
    RequestKind.CAPTURE_END,
)
_OF_THE_START = (RequestKind.START, RequestKind.HELD)

_LOST_ABOUT: dict[str, tuple[RequestKind, ...]] = {
    "late_start": (),
    "start_state": (),
    "empty_cache": (RequestKind.EMPTY_CACHE,),
    "record_stream": (RequestKind.RECORD_STREAM,),
    "settings_changes": (RequestKind.SETTINGS,),
}
"""Losses that concern a stretch only where it has such requests; the first two are about memory from before it."""

_LOST_ABOUT_POOLS = ("pool_ids", "pool_scopes")


@dataclass(frozen=True, slots=True)
class OwnRequests:
    """A stretch of a Trace by itself.

    Attributes:
        trace: its requests, without decisions, start state, card and limits on memory.
        foreign: requests left out since they concern memory or pools from before: a program may free what an earlier
            part of it allocated.
        failed: requests for memory left out since they failed when recorded.
    """

    trace: Trace
    foreign: int
    failed: int


def own_requests(trace: Trace, begin: int = 0, end: int | None = None) -> OwnRequests:
    """The requests between two rows, as if nothing had been before.

    Settings changed before remain in force. A private pool from before that the stretch takes memory from has the users
    and open scopes it had then, and no memory. Releases that a recording only shows (``RELEASE_SEEN``) are left out as
    the allocator's own; tell them apart from the program's first (``allocator.settle``).

    Args:
        trace: with decisions, if failed requests are to be known.
        begin: first row.
        end: row after the last; None for all.
    """
    r = trace.requests
    end = len(r) if end is None else end
    rows = np.arange(len(r))
    inside = (rows >= begin) & (rows < end)
    asked = inside & np.isin(r.kind, ASKING)
    failed = asked & np.isin(rows, _failed_rows(trace))
    asked &= ~failed
    keep = inside & ~failed & ~np.isin(r.kind, (*_OF_THE_START, RequestKind.RELEASE_SEEN))
    of_memory = keep & np.isin(r.kind, _OF_MEMORY)
    foreign = of_memory & ~_is_own(r, asked, of_memory)
    unused, carried = _pool_rows(r, asked, keep, begin, end)
    keep &= ~foreign & ~unused & _has_its_phase(r, keep)
    keep |= (rows < begin) & (r.kind == RequestKind.SETTINGS)
    chosen = np.flatnonzero(keep)
    # What is carried over stands before the stretch and after the settings from before.
    at = np.concatenate([chosen[chosen < begin], np.array(carried, dtype=np.int64), chosen[chosen >= begin]])
    columns = {name: getattr(r, name)[at.astype(np.int64)] for name in Requests.__slots__}
    columns["phase"] = np.where(at < begin, 0, columns["phase"]).astype(r.phase.dtype)
    own, pools = _renumbered(columns, trace.pools)
    return OwnRequests(
        trace=replace(
            trace,
            requests=own,
            decisions=None,
            pools=pools,
            settings=Settings(conf=trace.settings.conf, recorded=trace.settings.recorded),
            card=None,
            device_total=None,
            initial=(),
            final=None,
            lost=_lost(trace.lost, own, pools),
            placement="modelled",
        ),
        foreign=int(np.count_nonzero(foreign) + np.count_nonzero(unused)),
        failed=int(np.count_nonzero(failed)),
    )


def _failed_rows(trace: Trace) -> Column:
    d = trace.decisions
    return np.empty(0, dtype=np.int64) if d is None else d.request[d.kind == DecisionKind.OOM]


def _is_own(r: Requests, asked: npt.NDArray[np.bool_], of_memory: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Rows about memory that was asked for in the stretch, from the row that asks on."""
    ids, first = np.unique(r.id[asked], return_index=True)
    if not len(ids):
        return np.zeros(len(r), dtype=bool)
    since = np.flatnonzero(asked)[first]
    at = np.minimum(np.searchsorted(ids, r.id), len(ids) - 1)
    own: npt.NDArray[np.bool_] = of_memory & (ids[at] == r.id) & (np.arange(len(r)) >= since[at])
    return own


def _has_its_phase(r: Requests, inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """All rows but ends of phases that began before the stretch."""
    keep = np.ones(len(r), dtype=bool)
    is_open = False
    marks = inside & np.isin(r.kind, (RequestKind.PHASE_BEGIN, RequestKind.PHASE_END))
    for row in np.flatnonzero(marks).tolist():
        keep[row] = is_open or r.kind[row] == RequestKind.PHASE_BEGIN
        is_open = r.kind[row] == RequestKind.PHASE_BEGIN
    return keep


def _pool_rows(
    r: Requests, asked: npt.NDArray[np.bool_], keep: npt.NDArray[np.bool_], begin: int, end: int
) -> tuple[npt.NDArray[np.bool_], list[int]]:
    """Rows about pools that mean nothing in the stretch, and rows from before that it needs."""
    pools_asked = set(np.unique(r.pool[asked]).tolist()) - {0}
    joins: dict[int, list[int]] = {}  # rows that gave each pool a user, while it has users
    scopes: list[int] = []  # rows that opened the scopes that are open
    captures: list[int] = []
    drop = np.zeros(len(r), dtype=bool)
    here: Counter[int] = Counter()  # users that the stretch itself gave or is given
    carried: list[int] = []
    relevant = np.isin(r.kind, _OF_POOLS) | (asked & (r.pool > 0))
    has_begun = False
    for row in np.flatnonzero(relevant[:end]).tolist():
        kind, pool = int(r.kind[row]), int(r.pool[row])
        if row >= begin and not has_begun:
            has_begun = True
            carried = sorted({*(j for p in pools_asked for j in joins.get(p, ())), *captures})
            scopes = [s for s in scopes if s in carried]
            here.update(int(r.pool[j]) for j in carried if r.kind[j] != RequestKind.CAPTURE_BEGIN)
        if row >= begin and not keep[row]:
            continue
        if kind in (RequestKind.POOL_CREATE, RequestKind.SCOPE_OPEN):
            joins.setdefault(pool, []).append(row)
            here[pool] += row >= begin
            if kind == RequestKind.SCOPE_OPEN:
                scopes.append(row)
        elif kind == RequestKind.SCOPE_CLOSE:
            opened = next((s for s in reversed(scopes) if int(r.pool[s]) == pool), None)
            if opened is not None:
                scopes.remove(opened)
            else:
                drop[row] = row >= begin
        elif kind == RequestKind.POOL_RELEASE:
            if joins.get(pool):
                # A scope's user goes first, unless the scope is still open.
                closed = [j for j in joins[pool] if j not in scopes]
                joins[pool].remove((closed or joins[pool])[-1])
            if row >= begin:
                drop[row] = here[pool] == 0
                here[pool] -= here[pool] > 0
        elif kind == RequestKind.CAPTURE_BEGIN:
            captures.append(row)
        elif kind == RequestKind.CAPTURE_END:
            if captures:
                captures.pop()
            else:
                drop[row] = row >= begin
        elif here[pool] == 0:
            here[pool] = 1  # a pool that nobody made is made by the first request for memory of it
    return drop, carried if has_begun else sorted(captures)


def _renumbered(columns: dict[str, Any], pools: tuple[PoolId, ...]) -> tuple[Requests, tuple[PoolId, ...]]:
    """Ids, streams, pools and threads in the order of their first use."""
    ids, streams, used = columns["id"], columns["stream"], columns["pool"]
    named = ids >= 0
    columns["id"] = ids.copy()
    columns["id"][named] = order_of_first_use(ids[named])
    other = (streams != 0) & (streams != UNKNOWN_STREAM)
    columns["stream"] = streams.copy()
    columns["stream"][other] = order_of_first_use(streams[other]) + 1
    columns["thread"] = order_of_first_use(columns["thread"]).astype(columns["thread"].dtype)
    private = used > 0
    columns["pool"] = used.copy()
    columns["pool"][private] = order_of_first_use(used[private]) + 1
    _, first = np.unique(used[private], return_index=True)
    kept = [pools[p] for p in used[private][np.sort(first)].tolist()]
    # Which of a pool's two numbers counts tells a graph's pool from a MemPool; the number is a running one.
    named_pools = tuple((n, 0) if pool[0] else (0, n) for n, pool in enumerate(kept, 1))
    return Requests(**columns), (DEFAULT_POOL, *named_pools)


def order_of_first_use(values: Column) -> Column:
    """For each value, how many others came first before it did; int64, of the shape of ``values``."""
    _, first, at = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[at]


def _lost(lost: tuple[Loss, ...], own: Requests, pools: tuple[PoolId, ...]) -> tuple[Loss, ...]:
    def concerns(loss: Loss) -> bool:
        if loss.code in _LOST_ABOUT_POOLS:
            return len(pools) > 1
        kinds = _LOST_ABOUT.get(loss.code)
        return kinds is None or bool(np.isin(own.kind, kinds).any())

    return tuple(loss for loss in lost if concerns(loss))
