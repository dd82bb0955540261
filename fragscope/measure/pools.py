"""When private pools had users: while they have, nothing of them goes back to the driver.

Decisions do not show users; requests do. A pool that nobody made is made by the first allocation in it, with one user,
as recordings show them that do not say when a pool was made. Without users its idle memory goes back at the next
release, and a release that leaves nothing of the pool forgets it: the next allocation in it makes it anew.
Source: c10/cuda/CUDACachingAllocator.cpp (create_or_incref_pool, releasePool, release_cached_blocks).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fragscope.measure.segments import Ints
from fragscope.trace import DecisionKind, Decisions, RequestKind, Trace

_TOO_LARGE = 1 << 60  # kMaxAllocSize: refused before a pool is looked up
_JOINS = (RequestKind.POOL_CREATE, RequestKind.SCOPE_OPEN)


@dataclass(frozen=True, slots=True)
class Holds:
    """Spans of request rows in which a private pool had users; each column int64 of shape ``(n,)``.

    Attributes:
        pool: index into ``Trace.pools``, ascending.
        since: row of the request that gave it its first user; ascending within a pool.
        until: row of the request that took its last user; the number of rows where none did.
    """

    pool: Ints
    since: Ints
    until: Ints

    def __len__(self) -> int:
        return len(self.pool)

    def held_at(self, row: int) -> frozenset[int]:
        """Pools that had users after request ``row``."""
        return frozenset(self.pool[(self.since <= row) & (self.until > row)].tolist())


def pool_holds(trace: Trace, decisions: Decisions, stood: int) -> Holds:
    """Find when each private pool had users; those that stood when recording began had theirs from the first row on.

    Not seen is a release that returns nothing and that no request asks for. A pool whose memory went back in another
    way can be forgotten by such a release, which matters only where a program allocates from a pool without users.
    """
    requests = trace.requests
    allocates = (requests.kind == RequestKind.ALLOC) & (requests.size < _TOO_LARGE)
    joins = np.isin(requests.kind, _JOINS)
    rows = np.flatnonzero((requests.pool > 0) & (allocates | joins | (requests.kind == RequestKind.POOL_RELEASE)))
    memory = _Memory(trace, decisions, stood) if len(rows) else None
    out: list[tuple[int, int, int]] = []
    for pool, here in _by_pool(requests.pool[rows]):
        of_pool = rows[here]
        counted = ~allocates[of_pool]
        since = np.where(of_pool < trace.requests.start_rows, 0, of_pool)  # what the first rows tell was there at once
        signs = np.where(joins[of_pool[counted]], 1, -1)
        changes = list(zip(since[counted].tolist(), signs.tolist(), strict=True))
        assert memory is not None
        spans = _spans(changes, of_pool[~counted].tolist(), memory.of(pool), len(requests))
        out += [(pool, since, until) for since, until in spans]
    return Holds(*np.array(out, dtype=np.int64).reshape(-1, 3).T)


def _by_pool(pools: npt.NDArray[np.int32]) -> Iterator[tuple[int, Ints]]:
    """Each pool and where it stands, in order."""
    order = np.argsort(pools, kind="stable")
    names, starts, counts = np.unique(pools[order], return_index=True, return_counts=True)
    for pool, start, stop in zip(names.tolist(), starts, starts + counts, strict=True):
        yield pool, order[start:stop]


def _spans(
    changes: list[tuple[int, int]], allocations: list[int], memory: _PoolMemory, end: int
) -> list[tuple[int, int]]:
    """Rows from which on and up to which a pool has users.

    Args:
        changes: request rows that give it a user (1) or take one (-1).
        allocations: request rows that ask for memory of it.
        memory: what it held.
        end: number of request rows.
    """
    out: list[tuple[int, int]] = []
    users, since, known, now = 0, -1, False, -1
    for row, change in [*changes, (end, 0)]:
        while since < 0:  # between two changes a pool is forgotten and made by an allocation, perhaps more than once
            if known:
                now = memory.next_forgotten(now)
                if now >= row:
                    break
                known = False
            at = bisect_left(allocations, now + 1)
            if at == len(allocations) or allocations[at] >= row:
                break
            now = since = allocations[at]
            users, known = 1, True
            memory.begin(now)
        if change == 0:
            break
        now = row
        if change > 0 and not known:
            users, known = 0, True
            memory.begin(row)
        users += change
        if change > 0 and since < 0:
            since = row
        elif change < 0 and users == 0 and since >= 0:
            out.append((since, row))
            since = -1
    if since >= 0:
        out.append((since, end))
    return out


class _Memory:
    """What private pools held, read from the decisions once."""

    def __init__(self, trace: Trace, decisions: Decisions, stood: int) -> None:
        kind = decisions.kind
        comes = (kind == DecisionKind.SEGMENT_ALLOC) | (kind == DecisionKind.SEGMENT_MAP)
        goes = (kind == DecisionKind.SEGMENT_FREE) | (kind == DecisionKind.SEGMENT_UNMAP)
        at = np.flatnonzero((decisions.pool > 0) & (comes | goes | (kind == DecisionKind.ALLOC)))
        self._pool = decisions.pool[at]
        self._request = np.array(decisions.request[at], dtype=np.int64)
        self._stood = at < stood
        self._request[self._stood] = 0
        sign = comes[at].astype(np.int64) - goes[at]
        self._bytes = np.asarray(decisions.size[at], dtype=np.int64) * sign
        self._sign = sign
        self._places = dict(_by_pool(self._pool))
        clears = trace.requests.kind == RequestKind.EMPTY_CACHE
        self._clears = np.flatnonzero(clears)
        self._clears_pool = trace.requests.pool[self._clears]

    def of(self, pool: int) -> _PoolMemory:
        """What one pool held."""
        here = self._places.get(pool, np.empty(0, dtype=np.int64))
        request, sign = self._request[here], self._sign[here]
        stood = self._stood[here]
        # An allocation that took new memory counts one segment, whether it took one or mapped several times. Of what
        # stood when recording began, each segment and mapped range counts.
        first = np.searchsorted(request, request, side="left")
        came = np.concatenate([[0], np.cumsum(sign > 0)])
        took = np.where(stood, sign > 0, (sign == 0) & (came[np.arange(len(here))] > came[first]))
        segments = np.cumsum(took.astype(np.int64) - (sign < 0))
        clears = self._clears[(self._clears_pool == 0) | (self._clears_pool == pool)]
        return _PoolMemory(request, np.cumsum(self._bytes[here]), segments, sign < 0, clears)


class _PoolMemory:
    """When a pool was empty enough to be forgotten.

    The allocator counts segments: one up for an allocation that takes new memory, one down for each segment returned
    and each unmapping; it forgets a pool only where the count is down to zero (``cudaMalloc_count``).
    """

    def __init__(
        self, request: Ints, reserved: Ints, segments: Ints, returns: npt.NDArray[np.bool_], clears: Ints
    ) -> None:
        last = np.ones(len(request), dtype=bool)
        last[:-1] = request[1:] != request[:-1]
        self._request, self._segments = request[last], segments[last]
        looks = np.union1d(request[returns], clears)  # rows of releases
        at = np.searchsorted(self._request, looks, side="right")
        left = np.concatenate([[0], reserved[last]])[at]
        self._looks = looks[left == 0].tolist()
        self._counted = np.concatenate([[0], self._segments])[at][left == 0].tolist()
        self._before = 0

    def begin(self, row: int) -> None:
        """The pool is made at a request row: counting starts over."""
        at = int(np.searchsorted(self._request, row, side="left"))
        self._before = int(self._segments[at - 1]) if at > 0 else 0

    def next_forgotten(self, row: int) -> int:
        """The first row from here on at whose release nothing was left, 2**62 if there is none."""
        for at in range(bisect_left(self._looks, row), len(self._looks)):
            if self._counted[at] <= self._before:
                found: int = self._looks[at]
                return found
        return 2**62
