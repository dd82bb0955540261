"""Trace entries as requests and decisions: what the program asked for, read out of what the allocator did.

* ``alloc`` and ``free_requested`` are requests. A free whose ``free_completed`` does not follow at once was deferred:
  some other stream used the block, so a ``RECORD_STREAM`` of an unknown stream is put before it and a ``USES_DONE``
  where the completion shows.
* Released segments that no allocation needed mean ``empty_cache()``, which snapshots do not record.
* An ``oom`` entry is an allocation that failed; only its rounded size is known.
* A private pool is made with its first allocation and was released before the first of its segments went back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fragscope.errors import InputFileError
from fragscope.trace.events import (
    NO_ID,
    NO_STACK,
    UNKNOWN_SIZE,
    UNKNOWN_STREAM,
    DecisionKind,
    DecisionLog,
    RequestKind,
    RequestLog,
)
from fragscope.trace.snapshot.losses import Inferred
from fragscope.trace.snapshot.pools import Pools
from fragscope.trace.snapshot.shape import ACTIONS, MAX_SIZE, Checker
from fragscope.trace.snapshot.skipped import Skipped
from fragscope.trace.snapshot.stacks import Stacks
from fragscope.trace.start import StartState

_WITHIN_MALLOC = frozenset(
    {"free_completed", "segment_free", "segment_alloc", "segment_map", "segment_unmap", "alloc", "oom"}
)
_OF_RELEASES = frozenset({"free_completed", "segment_free", "segment_unmap", "snapshot"})
_SMALL_BLOCKS = 2048  # 1 MiB (kSmallSize): larger requests are served from other segments


@dataclass(frozen=True, slots=True)
class _OpenFree:
    id: int
    addr: int
    size: int
    stream: int
    pool: int
    stack: int
    thread: int = 0


class EntryReader:
    """Walks trace entries and splits them into requests and decisions."""

    def __init__(
        self, check: Checker, pools: Pools, skipped: Skipped, *, scopes_defer: bool, releases_in_part: bool
    ) -> None:
        self.check = check
        self._pools = pools
        self._skipped = skipped
        self._within_malloc = within_malloc(skipped)
        self._handlers = self._AT_ONCE if skipped.frees_at_once else self._HANDLERS
        self._scopes_defer = scopes_defer
        self._releases_in_part = releases_in_part
        self._number = 0
        self._made_pools: set[int] = set()
        self.inferred = Inferred()
        self.requests = RequestLog()
        self.decisions = DecisionLog()
        self.stacks = Stacks(check)
        self.phases = [""]
        # What a recorder's notes say (``notes.NotedReader``); snapshots have none.
        self._uses: dict[int, set[int]] = {}  # id -> streams that it was seen used on
        self._noted_pools: set[int] = set()  # pools whose making and release is noted
        self._notes_settings = False
        self._in_release = False
        self._has_gap = False
        self._live: dict[int, int] = {}  # address -> id
        self._pending: dict[int, int] = {}  # address -> id whose free was requested but has not completed
        # The free read last, until what follows tells whether it was deferred, and whether its completion followed.
        self._open_free: _OpenFree | None = None
        self._completes_open = False
        self._next_id = 0
        # Entries of the malloc (or empty_cache) being read: they precede the entry that ends it.
        self._completed: list[tuple[int, int, int, int, int]] = []
        self._segments: list[tuple[DecisionKind, int, int, int, int]] = []
        self._released = self._took = self._took_segment = False
        self._maps: bool | None = None
        self.begins_mapped: bool | None = None

    def begin(self, start: StartState) -> None:
        """Recording began with these segments and blocks."""
        self.inferred.unsure = start.unsure
        self.decisions.request = self.requests.append(RequestKind.START)
        for segment in start.segments:
            kind = DecisionKind.SEGMENT_MAP if segment.expandable else DecisionKind.SEGMENT_ALLOC
            self.decisions.append(kind, NO_ID, segment.addr, segment.size, segment.stream, segment.pool)
            if segment.pool:
                self._made_pools.add(segment.pool)
        for pool in sorted(self._made_pools):
            self.requests.append(RequestKind.POOL_CREATE, pool=pool)
        pools = [(s.addr, s.pool) for s in start.segments]
        starts = [addr for addr, _ in pools]
        homes = [pools[bisect_right(starts, b.addr) - 1][1] for b in start.live]
        for block, pool in zip(start.live, homes, strict=True):
            id_ = self._live[block.addr] = self._new_id()
            self.decisions.request = self.requests.append(
                RequestKind.HELD, id=id_, size=block.requested, stream=block.stream, pool=pool
            )
            self.decisions.append(DecisionKind.ALLOC, id_, block.addr, UNKNOWN_SIZE, block.stream, pool)
            self.inferred.held += 1
        for block, pool in zip(start.live, homes, strict=True):
            if block.pending:
                self._open_free = _OpenFree(
                    self._live.pop(block.addr), block.addr, block.requested, block.stream, pool, NO_STACK
                )
                self._close_free(deferred=True)

    def take(self, number: int, entry: Mapping[str, Any]) -> None:
        """Read the next entry."""
        self._number = number
        where = f"event {number}"
        action = self.check.text(entry, "action", where)
        handler = self._handlers.get(action)
        if handler is None:
            return  # counted in ``skipped``
        free = self._open_free
        if free is not None:
            if self._completes_open:
                if action not in self._within_malloc:
                    self._close_free(deferred=False)
            elif action == "free_completed" and entry.get("addr") == free.addr and not self._is_used(free):
                self._completes_open = True
                return
            else:
                self._close_free(deferred=True)
        if self._in_release and action not in _OF_RELEASES:
            self._end_release()  # another thread goes on meanwhile
        handler(self, entry, where)

    def _end_release(self) -> None:
        """What has been gathered is all that the noted ``empty_cache()`` did."""
        if self._in_release:
            self._in_release = False
            self._write_release(inferred=False)

    def finish(self) -> None:
        """Write what waits for an entry that does not come."""
        if self._open_free is not None:
            self._close_free(deferred=not self._completes_open)
        self._end_release()  # a program that was killed inside empty_cache()
        self._explicit_release()

    # One handler per action.

    def _alloc(self, entry: Mapping[str, Any], where: str) -> None:
        addr, size, stream, pool = self._place(entry, where)
        if addr in self._live:
            if not self._has_gap:
                left_out = " (frees are not recorded: skip_actions?)" if self._skipped.all_frees else ""
                raise InputFileError(
                    self.check.path, f"{where}: allocates {addr:#x}, which is still allocated{left_out}"
                )
            self.requests.append(RequestKind.FREE, id=self._live.pop(addr), stream=stream, pool=pool)
        id_ = self._new_id()
        self._begin_malloc(id_, size, stream, pool, entry, where)
        self.decisions.append(DecisionKind.ALLOC, id_, addr, UNKNOWN_SIZE, stream, pool)
        self._live[addr] = id_

    def _oom(self, entry: Mapping[str, Any], where: str) -> None:
        size = self.check.integer(entry, "size", where, MAX_SIZE)
        stream = self.check.integer(entry, "stream", where)
        free = self.check.integer(entry, "device_free", where)
        id_ = self._new_id()
        pool = self._pools.of(self._number, entry, where, None)
        self._begin_malloc(id_, size, stream, pool, entry, where)
        self.decisions.append(DecisionKind.OOM, id_, free, size, stream, pool)
        self.inferred.ooms += 1

    def _free_requested(self, entry: Mapping[str, Any], where: str) -> None:
        self._explicit_release()
        addr, size, stream, pool = self._place(entry, where)
        live = self._live.pop(addr, None)
        if live is None:
            self.inferred.unknown_frees += 1
            return
        stack = self.stacks.of(entry, where)
        self._open_free = _OpenFree(live, addr, size, stream, pool, stack, self.requests.thread)

    def _free_at_once(self, entry: Mapping[str, Any], where: str) -> None:
        """A free of which only the request or only the completion is recorded."""
        self._free_requested(entry, where)
        self._completes_open = self._open_free is not None

    def _close_free(self, deferred: bool) -> None:
        """Write the free read last, now that what follows tells whether it was deferred."""
        free = self._open_free
        assert free is not None
        self._open_free, self._completes_open = None, False
        if deferred:
            if not self._is_used(free):
                self.requests.append(RequestKind.RECORD_STREAM, id=free.id, stream=UNKNOWN_STREAM, pool=free.pool)
                self.inferred.uses += 1
            self._pending[free.addr] = free.id
        self._uses.pop(free.id, None)
        self.decisions.request = self.requests.append(
            RequestKind.FREE, id=free.id, stream=free.stream, pool=free.pool, thread=free.thread, stack=free.stack
        )
        decide = self.decisions.append
        decide(DecisionKind.FREE_REQUESTED, free.id, free.addr, UNKNOWN_SIZE, free.stream, free.pool)
        if not deferred:
            decide(DecisionKind.FREE_COMPLETED, free.id, free.addr, UNKNOWN_SIZE, free.stream, free.pool)

    def _is_used(self, free: _OpenFree) -> bool:
        """Whether another stream is known to use it, so that its free must have been deferred."""
        return any(stream != free.stream for stream in self._uses.get(free.id, ()))

    def _close_completed_free(self, size: int, stream: int, *, waited: bool) -> None:
        """Write a free whose completion followed at once, before a request of ``size`` bytes.

        If the request waited for all streams although the freed block would have served it, the block was not there
        when it searched: its free was deferred, and the wait completed it.
        """
        free = self._open_free
        assert free is not None
        served = free.stream == stream and _blocks(free.size) >= _blocks(size)
        same_class = (_blocks(free.size) <= _SMALL_BLOCKS) == (_blocks(size) <= _SMALL_BLOCKS)
        deferred = waited and served and same_class
        self._close_free(deferred=deferred)
        if deferred:
            del self._pending[free.addr]
            self._completed.insert(0, (free.id, free.addr, free.stream, free.pool, 0))

    def _free_completed(self, entry: Mapping[str, Any], where: str) -> None:
        if self._released and not self._releases_in_part:
            # Nothing completes after a release in one call: that was an empty_cache(), this is another.
            self._explicit_release()
        addr, _size, stream, pool = self._place(entry, where)
        id_ = self._pending.pop(addr, None)
        if id_ is None:
            if not self.inferred.unknown_frees:
                raise InputFileError(self.check.path, f"{where}: completes the free of {addr:#x}, which nobody freed")
            return
        self._completed.append((id_, addr, stream, pool, len(self._segments)))

    def _segment_alloc(self, entry: Mapping[str, Any], where: str) -> None:
        self._segments.append((DecisionKind.SEGMENT_ALLOC, *self._place(entry, where)))
        self._took = self._took_segment = True

    def _segment_map(self, entry: Mapping[str, Any], where: str) -> None:
        self._segments.append((DecisionKind.SEGMENT_MAP, *self._place(entry, where)))
        self._took = True  # a part of what is needed, perhaps: then the rest follows, after a release

    def _segment_free(self, entry: Mapping[str, Any], where: str) -> None:
        self._release(DecisionKind.SEGMENT_FREE, entry, where)

    def _segment_unmap(self, entry: Mapping[str, Any], where: str) -> None:
        self._release(DecisionKind.SEGMENT_UNMAP, entry, where)

    def _release(self, kind: DecisionKind, entry: Mapping[str, Any], where: str) -> None:
        place = self._place(entry, where)
        if self._took_segment:
            raise InputFileError(
                self.check.path, f"{where}: a segment is released after one was taken for the same request"
            )
        self._segments.append((kind, *place))
        self._released = True

    def _ignored(self, entry: Mapping[str, Any], where: str) -> None:
        del entry, where

    # Taken as they are in the table below, so that ``take`` has no chain of comparisons.
    _HANDLERS: dict[str, Any]
    _AT_ONCE: dict[str, Any]

    def _place(self, entry: Mapping[str, Any], where: str) -> tuple[int, int, int, int]:
        integer = self.check.integer
        addr = integer(entry, "addr", where)
        return (
            addr,
            integer(entry, "size", where, MAX_SIZE),
            integer(entry, "stream", where),
            self._pools.of(self._number, entry, where, addr),
        )

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _begin_malloc(self, id_: int, size: int, stream: int, pool: int, entry: Mapping[str, Any], where: str) -> None:
        """Write the request whose entries have been gathered, and what led to it."""
        took, failed = self._took, entry.get("action") == "oom"
        inferring = pool > 0 and pool not in self._noted_pools and self._scopes_defer
        deferring = inferring and not self._releases_in_part
        if deferring and self._released and took:
            # Inside a scope nothing is released for a request: the program did it before.
            took_from = next(i for i, s in enumerate(self._segments) if not _is_release(s[0]))
            if all(not _is_release(s[0]) for s in self._segments[took_from:]):
                taken, self._segments = self._segments[took_from:], self._segments[:took_from]
                self._explicit_release()
                self._segments, self._took = taken, True
        if took and not failed:
            self._note_toggle(pool)
        if self._open_free is not None:
            waited_for = failed or (self._released and took and not self._releases_in_part)
            self._close_completed_free(size, stream, waited=waited_for)
        if self._released and not took and not failed:
            self._explicit_release()
        # Where everything cached was released or the request failed, all deferred frees were waited for. Which of them
        # had been noticed before the search cannot be told and does not matter: it failed even so. Announced before
        # the request they would come too early; announced after it they serve replays that have no need to wait.
        # Garbage collection and the release of oversize segments do not wait: with them the completions came first.
        waited = (self._released and not self._releases_in_part) or failed
        announced = list(self._completed)
        if not waited:
            self._announce_uses(announced)
        released = self._released and not failed
        in_scope = inferring and (released or failed) and not announced
        self._note_pools(pool)
        if in_scope:
            self.requests.append(RequestKind.SCOPE_OPEN, pool=pool)
        if released and took:
            self.inferred.releases += 1
            self.requests.append(RequestKind.RELEASE_SEEN)
        row = self.requests.append(
            RequestKind.ALLOC, id=id_, size=size, stream=stream, pool=pool, stack=self.stacks.of(entry, where)
        )
        self.decisions.request = row
        self._write_gathered()
        if in_scope:
            self.requests.append(RequestKind.SCOPE_CLOSE, pool=pool)
            self.requests.append(RequestKind.POOL_RELEASE, pool=pool)
        if waited:
            self._announce_uses(announced)

    def _note_toggle(self, pool: int) -> None:
        """Memory of another kind than before means that expandable segments were switched on or off."""
        is_mapped = any(kind == DecisionKind.SEGMENT_MAP for kind, *_ in self._segments)
        if pool or self._notes_settings:  # a pool with an allocator of its own never maps
            return
        if self._maps is not None and self._maps != is_mapped:
            self.requests.append(RequestKind.SETTINGS, size=int(is_mapped))
            self.inferred.toggles += 1
        self._maps = is_mapped
        if self.begins_mapped is None:
            self.begins_mapped = is_mapped

    def _note_pools(self, requested: int) -> None:
        """Private pools that a request needs or that must have been released by now."""
        released = {p for kind, _, _, _, p in self._segments if p and _is_release(kind)}
        for pool in sorted(released - self._noted_pools):
            if pool in self._made_pools and not (pool == requested and self._releases_in_part):
                self._made_pools.discard(pool)
                self.requests.append(RequestKind.POOL_RELEASE, pool=pool)
        if requested and requested not in self._made_pools:
            self._made_pools.add(requested)
            self.inferred.pools += 1
            self.requests.append(RequestKind.POOL_CREATE, pool=requested)

    def _explicit_release(self) -> None:
        """Entries gathered so far belong to no allocation: the program called ``empty_cache()``."""
        if self._open_free is not None and self._completes_open:
            self._close_free(deferred=False)
        if self._in_release or (not self._completed and not self._segments):
            return
        self._write_release(inferred=True)

    def _write_release(self, *, inferred: bool) -> None:
        """The entries gathered so far belong to a release of cached memory."""
        self._announce_uses(self._completed)
        self._note_pools(0)
        released = {pool for kind, _, _, _, pool in self._segments if _is_release(kind)}
        # The end of a MemPool returns that pool alone.
        only = released.pop() if len(released) == 1 else 0
        self.decisions.request = self.requests.append(RequestKind.EMPTY_CACHE, pool=only)
        self.inferred.releases += inferred
        self._write_gathered()

    def _announce_uses(self, completed: Sequence[tuple[int, int, int, int, int]]) -> None:
        for id_, _addr, stream, pool, _ in completed:
            self.requests.append(RequestKind.USES_DONE, id=id_, stream=stream, pool=pool)

    def _write_gathered(self) -> None:
        written = 0
        for id_, addr, stream, pool, at in self._completed:
            for kind, *segment in self._segments[written:at]:
                self.decisions.append(kind, NO_ID, *segment)
            written = at
            self.decisions.append(DecisionKind.FREE_COMPLETED, id_, addr, UNKNOWN_SIZE, stream, pool)
        for kind, *segment in self._segments[written:]:
            self.decisions.append(kind, NO_ID, *segment)
        self._completed.clear()
        self._segments.clear()
        self._released = self._took = self._took_segment = False


EntryReader._HANDLERS = {
    "alloc": EntryReader._alloc,
    "free_requested": EntryReader._free_requested,
    "free_completed": EntryReader._free_completed,
    "segment_alloc": EntryReader._segment_alloc,
    "segment_free": EntryReader._segment_free,
    "segment_map": EntryReader._segment_map,
    "segment_unmap": EntryReader._segment_unmap,
    "oom": EntryReader._oom,
    "snapshot": EntryReader._ignored,
    "annotate": EntryReader._ignored,
}
EntryReader._AT_ONCE = EntryReader._HANDLERS | dict.fromkeys(
    ("free_requested", "free_completed"), EntryReader._free_at_once
)
assert EntryReader._HANDLERS.keys() == ACTIONS


def within_malloc(skipped: Skipped) -> frozenset[str]:
    """Actions of entries that may belong to a request which a later entry ends."""
    return _WITHIN_MALLOC - {"free_completed"} if skipped.frees_at_once else _WITHIN_MALLOC


def _is_release(kind: DecisionKind) -> bool:
    return kind in (DecisionKind.SEGMENT_FREE, DecisionKind.SEGMENT_UNMAP)


def _blocks(size: int) -> int:
    """Units of 512 B that a request takes (kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp)."""
    return max(1, -(-size // 512))
