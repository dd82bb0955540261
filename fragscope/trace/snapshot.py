"""PyTorch memory snapshots (``torch.cuda.memory._snapshot()``, 2.9 and newer) as Traces.

A snapshot lists what the allocator did; what the program asked for is read out of it:

* ``alloc`` and ``free_requested`` are requests. A free whose ``free_completed`` does not follow at once was deferred:
  some other stream used the block, so a ``RECORD_STREAM`` of an unknown stream is put before it and a ``USES_DONE``
  where the completion shows.
* Released segments that no allocation needed mean ``empty_cache()``, which snapshots do not record.
* An ``oom`` entry is an allocation that failed; only its rounded size is known.
* A private pool is made with its first allocation and was released before the first of its segments went back. Where
  events do not name their pool (up to 2.11), it is that of the segment at their address, if that segment is still there
  at the end.

What cannot be known is listed in ``Trace.lost``.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fragscope.errors import InputFileError, UsageError
from fragscope.trace.containers import read_unpacked
from fragscope.trace.events import (
    NO_ID,
    NO_STACK,
    UNKNOWN_SIZE,
    UNKNOWN_STREAM,
    DecisionKind,
    DecisionLog,
    Frame,
    RequestKind,
    RequestLog,
    StackTable,
)
from fragscope.trace.pickles import load_plain_pickle
from fragscope.trace.start import ContradictionError, LiveBlock, StartState, start_state
from fragscope.trace.trace import DEFAULT_POOL, Loss, PoolId, SegmentState, Settings, Trace

_STATES = {"inactive": "free", "active_allocated": "allocated", "active_pending_free": "pending"}
_KNOWN_KEYS = frozenset(
    {"segments", "device_traces", "allocator_settings", "external_annotations", "host_segments", "host_traces"}
)
_MAX_INT = 2**63 - 1
_SMALL_BLOCKS = 2048  # 1 MiB (kSmallSize): larger requests are served from other segments
_WITHIN_MALLOC = frozenset(
    {"free_completed", "segment_free", "segment_alloc", "segment_map", "segment_unmap", "alloc", "oom"}
)
_MAX_SIZE = 2**62 - 1  # no device has that much, and sums of a few stay within 64 bits
_MOST_MEMORY = 2**44  # bytes: 16 TiB in one piece is more than any device has
_SCOPES_DEFER = (2, 12)  # up to here an open scope keeps an OOM from releasing what is cached
_CONF_KEY = "PYTORCH_CUDA_ALLOC_CONF"  # the name in every release, whichever variable was set


def read_snapshot(path: Path, device: int | None = None) -> Trace:
    """Read a pickled PyTorch memory snapshot, plain or inside ``.xz`` or ``.gz``.

    Args:
        path: the file.
        device: CUDA device to take where the snapshot holds several.

    Raises:
        InputFileError: the file is not a snapshot, is damaged, hostile or inconsistent.
        UsageError: the snapshot holds several devices and none was chosen, or not the one that was.
    """
    value = load_plain_pickle(read_unpacked(path), path)
    return snapshot_to_trace(value, path, device)


@dataclass(frozen=True, slots=True)
class PhaseMark:
    """A phase boundary that the recorder noted.

    Attributes:
        position: how many events came before it.
        kind: ``PHASE_BEGIN`` or ``PHASE_END``.
        name: the phase's name.
    """

    position: int
    kind: RequestKind
    name: str


def snapshot_to_trace(value: Any, path: Path, device: int | None = None, marks: Sequence[PhaseMark] = ()) -> Trace:
    """Turn a decoded snapshot into a Trace; arguments and errors as ``read_snapshot``.

    Args:
        value: the decoded snapshot.
        path: the file, for errors.
        device: CUDA device to take where the snapshot holds several.
        marks: phase boundaries, in order.
    """
    check = _Checker(path)
    top = check.mapping(value, "the file")
    for key in ("segments", "device_traces"):
        if key not in top:
            raise InputFileError(path, f"is not a PyTorch memory snapshot (no {key!r} in it)")
    traces = [check.sequence(t, "device_traces") for t in check.sequence(top["device_traces"], "device_traces")]
    segments = check.sequence(top["segments"], "segments")
    chosen = _choose_device(check, traces, segments, device)
    entries = traces[chosen] if chosen < len(traces) else []
    settings = check.mapping(top.get("allocator_settings", {}), "allocator_settings")
    release = _release(top, settings, entries)
    reader = _EntryReader(
        check,
        _PrivateRanges(check, entries, segments, chosen),
        scopes_defer=version_of(release) <= _SCOPES_DEFER,
        releases_in_part=_releases_in_part(settings),
    )
    final = _final_segments(check, segments, chosen, reader.pools)
    reader.index_pools()
    started = _start(check, reader, final, segments, entries, chosen, settings)
    boundaries = list(marks)
    first = _first_whole(entries) if started else 0
    for number, entry in enumerate(entries[first:], first):
        while boundaries and boundaries[0].position <= number:
            reader.mark(boundaries.pop(0))
        reader.take(number, check.mapping(entry, f"event {number}"))
    reader.finish()
    for boundary in boundaries:
        reader.mark(boundary)
    lost = reader.losses()
    unknown = sorted(str(k) for k in top if k not in _KNOWN_KEYS)
    if unknown:
        lost.append(Loss("unknown_keys", f"the snapshot has keys this version does not know: {', '.join(unknown)}"))
    if not entries:
        raise InputFileError(path, f"holds no recorded events for device {chosen}; was recording on when it was taken?")
    if _CONF_KEY not in settings:
        lost.append(Loss("allocator_settings", "the snapshot does not name its allocator conf; the default is assumed"))
    lost.append(Loss("torch_release", f"snapshots do not name their torch release; the keys are those of {release}"))
    private = sum(1 for s in final if s.pool)
    if reader.lacks_pool_ids and private:
        lost.append(Loss("pool_ids", "events of this release do not name their pool, and private pools exist", private))
    return Trace(
        requests=reader.requests.finish(),
        decisions=reader.decisions.finish(),
        stacks=reader.stacks,
        phases=tuple(reader.phases),
        pools=tuple(reader.pools),
        settings=_settings_at_start(check, settings, reader),
        confs=_confs(check, settings) if reader.toggles else (),
        torch=release,
        device=chosen,
        initial=started,
        final=final,
        lost=tuple(lost),
        placement="recorded",
        source="snapshot",
        provenance={"file": path.name},
    )


def version_of(release: str) -> tuple[int, ...]:
    """A release such as ``"2.11"`` as numbers to compare."""
    return tuple(int(part) for part in release.split("."))


def _releases_in_part(settings: Mapping[str, Any]) -> bool:
    """Whether requests may release some segments without waiting for other streams: garbage collection, oversize."""
    return bool(settings.get("max_split_size", -1) != -1 or settings.get("garbage_collection_threshold", 0) != 0)


def _blocks(size: int) -> int:
    """Units of 512 B that a request takes (kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp)."""
    return max(1, -(-size // 512))


class _Checker:
    """Type checks that say which file and which place is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise InputFileError(self.path, f"{where}: a dict is expected, not {type(value).__name__}")
        return value

    def sequence(self, value: Any, where: str) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            raise InputFileError(self.path, f"{where}: a list is expected, not {type(value).__name__}")
        return value

    def integer(self, entry: Mapping[str, Any], key: str, where: str, high: int = _MAX_INT) -> int:
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputFileError(self.path, f"{where}: {key!r} should be an integer, not {type(value).__name__}")
        if not 0 <= value <= high:
            raise InputFileError(self.path, f"{where}: {key!r} is {value:#x}, outside what an address or size can be")
        return value

    def text(self, entry: Mapping[str, Any], key: str, where: str) -> str:
        value = entry.get(key)
        if not isinstance(value, str):
            raise InputFileError(self.path, f"{where}: {key!r} should be text, not {type(value).__name__}")
        return value

    def pool(self, entry: Mapping[str, Any], key: str, where: str) -> PoolId | None:
        value = entry.get(key)
        if value is None:
            return None
        good = isinstance(value, list | tuple) and len(value) == 2
        if not good or not all(isinstance(v, int) and 0 <= v <= _MAX_INT for v in value):
            raise InputFileError(self.path, f"{where}: {key!r} should be a pair of integers")
        return (int(value[0]), int(value[1]))


def _choose_device(
    check: _Checker, traces: Sequence[Sequence[Any]], segments: Sequence[Any], device: int | None
) -> int:
    used = {i for i, t in enumerate(traces) if t}
    if device is not None:
        if device not in used:
            held = ", ".join(map(str, sorted(used))) or "none"
            raise UsageError(f"{check.path}: no events for device {device}; the snapshot has them for: {held}")
        return device
    if len(used) > 1:
        raise UsageError(
            f"{check.path}: holds events of devices {', '.join(map(str, sorted(used)))}; choose one with --device-index"
        )
    return used.pop() if used else 0


def _start(
    check: _Checker,
    reader: _EntryReader,
    final: tuple[SegmentState, ...],
    segments: Sequence[Any],
    entries: Sequence[Any],
    device: int,
    settings: Mapping[str, Any],
) -> tuple[SegmentState, ...]:
    """What stood when recording began, told to the reader."""
    if not all(_is_plain(entry) for entry in entries):
        return ()  # reading them in order says which one is not what it should be
    max_split = settings.get("max_split_size", -1)
    live = _live_at_end(check, segments, device)
    try:
        unsplit_from = max_split if max_split > 0 else _MAX_INT
        state = start_state(final, live, entries, reader.pool_of, unsplit_from)
        if state is not None and _first_whole(entries):
            state = start_state(final, live, entries[_first_whole(entries) :], reader.pool_of, unsplit_from)
    except ContradictionError as e:
        reader.contradiction = str(e)
        return ()
    except (InputFileError, KeyError, TypeError):
        return ()  # likewise
    if state is None:
        return ()
    reader.begin(state)
    return state.segments


def _first_whole(entries: Sequence[Any]) -> int:
    """The first entry that does not belong to a request whose beginning is lost."""
    for number, entry in enumerate(entries):
        action = entry.get("action") if isinstance(entry, dict) else None
        if action not in _WITHIN_MALLOC:
            return number
        if action in ("alloc", "oom"):
            return number + 1
    return len(entries)


def _is_plain(entry: Any) -> bool:
    """Whether an entry has what undoing it needs; an ``oom`` has no address."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("action"), str)
        and _is_within(entry.get("size"), _MOST_MEMORY)
        and _is_within(entry.get("stream"), _MAX_INT)
        and _is_within(entry.get("addr", 0), _MAX_INT - _MOST_MEMORY)
    )


def _is_within(value: Any, most: int) -> bool:
    return isinstance(value, int) and 0 <= value <= most


def _live_at_end(check: _Checker, segments: Sequence[Any], device: int) -> list[LiveBlock]:
    """Blocks that are not idle, from segments that were checked before."""
    out = []
    for number, segment in enumerate(segments):
        if segment["device"] != device:
            continue
        at = segment["address"]
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                where = f"segment {number}"
                requested = check.integer(block, "requested_size", where, _MAX_SIZE)
                pending = block["state"] == "active_pending_free"
                out.append(LiveBlock(at, requested, block["size"], pending, segment["stream"]))
            at += block["size"]
    return out


class _PrivateRanges:
    """Which pool an address belongs to, for events that do not say it.

    Known are the segments of private pools that stand at the end, each from the event on that last made it.
    """

    def __init__(self, check: _Checker, entries: Sequence[Any], segments: Sequence[Any], device: int) -> None:
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, PoolId]] = []  # end, first event, pool
        private = []
        for number, item in enumerate(segments):
            segment = check.mapping(item, f"segment {number}")
            pool = check.pool(segment, "segment_pool_id", f"segment {number}")
            if pool not in (None, DEFAULT_POOL) and segment.get("device") == device:
                addr = check.integer(segment, "address", f"segment {number}")
                private.append((addr, addr + check.integer(segment, "total_size", f"segment {number}"), pool))
        if not private:
            return
        private.sort()
        self._starts = [addr for addr, _, _ in private]
        since = [0] * len(private)
        for number, entry in enumerate(entries):
            if isinstance(entry, dict) and entry.get("action") in ("segment_alloc", "segment_free"):
                place: Any = entry.get("addr")
                at = bisect_right(self._starts, place) - 1 if isinstance(place, int) else -1
                if at >= 0 and place < private[at][1]:
                    since[at] = number + (entry["action"] == "segment_free")
        self._ranges = [(end, first, pool) for (_, end, pool), first in zip(private, since, strict=True)]

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def pool_at(self, number: int, addr: int) -> PoolId:
        """The pool of an address at an event."""
        at = bisect_right(self._starts, addr) - 1
        if at >= 0 and addr < self._ranges[at][0] and number >= self._ranges[at][1]:
            return self._ranges[at][2]
        return DEFAULT_POOL


@dataclass(frozen=True, slots=True)
class _OpenFree:
    id: int
    addr: int
    size: int
    stream: int
    pool: int
    stack: int


class _EntryReader:
    """Walks trace entries and splits them into requests and decisions."""

    def __init__(self, check: _Checker, private: _PrivateRanges, *, scopes_defer: bool, releases_in_part: bool) -> None:
        self.check = check
        self._private = private
        self._scopes_defer = scopes_defer
        self._releases_in_part = releases_in_part
        self._number = 0
        self._made_pools: set[int] = set()
        self._inferred_pools = 0
        self.requests = RequestLog()
        self.decisions = DecisionLog()
        self.stacks = StackTable()
        self.phases = [""]
        self.pools: list[PoolId] = [DEFAULT_POOL]
        self._pool_index = {DEFAULT_POOL: 0}
        self._frame_cache: dict[int, Frame] = {}
        self._stack_cache: dict[int, int] = {}
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
        self._unknown_frees = 0
        self.contradiction = ""
        self._held = 0
        self._maps: bool | None = None
        self.begins_mapped: bool | None = None
        self.toggles = 0
        self._inferred_uses = 0
        self._inferred_releases = 0
        self._ooms = 0
        self.lacks_pool_ids = False

    def index_pools(self) -> None:
        """Know the pools that the segments at the end have named."""
        self._pool_index = {pool: index for index, pool in enumerate(self.pools)}

    def pool_of(self, number: int, entry: Mapping[str, Any]) -> int:
        """The pool of an entry about a segment."""
        self._number = number
        return self._pool(entry, f"event {number}", entry["addr"])

    def begin(self, start: StartState) -> None:
        """Recording began with these segments and blocks."""
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
            self._held += 1
        for block, pool in zip(start.live, homes, strict=True):
            if block.pending:
                self._open_free = _OpenFree(
                    self._live.pop(block.addr), block.addr, block.requested, block.stream, pool, NO_STACK
                )
                self._close_free(deferred=True)

    def take(self, number: int, entry: Mapping[str, Any]) -> None:
        self._number = number
        where = f"event {number}"
        action = self.check.text(entry, "action", where)
        handler = self._HANDLERS.get(action)
        if handler is None:
            raise InputFileError(self.check.path, f"{where}: unknown action {action!r}")
        free = self._open_free
        if free is not None:
            if self._completes_open:
                if action not in _WITHIN_MALLOC:
                    self._close_free(deferred=False)
            elif action == "free_completed" and entry.get("addr") == free.addr:
                self._completes_open = True
                return
            else:
                self._close_free(deferred=True)
        handler(self, entry, where)

    def finish(self) -> None:
        if self._open_free is not None:
            self._close_free(deferred=not self._completes_open)
        self._explicit_release()

    def mark(self, boundary: PhaseMark) -> None:
        """A phase begins or ends between two entries."""
        self.finish()
        if boundary.kind == RequestKind.PHASE_BEGIN:
            self.phases.append(boundary.name)
        self.requests.append(boundary.kind, phase=len(self.phases) - 1)

    def losses(self) -> list[Loss]:
        lost = []
        if self._held:
            detail = "recording began late; what stood then is found by undoing it, sizes of some blocks are inferred"
            lost.append(Loss("start_state", detail, self._held))
        if self.contradiction:
            detail = f"what stood when recording began cannot be found: {self.contradiction}"
            lost.append(Loss("start_state", detail))
        if self._unknown_frees:
            lost.append(
                Loss(
                    "late_start",
                    "recording began late or its ring overflowed: memory was freed that was never seen allocated",
                    self._unknown_frees,
                )
            )
        if self._inferred_uses:
            lost.append(
                Loss("record_stream", "snapshots do not record record_stream; uses are inferred", self._inferred_uses)
            )
        if self._inferred_releases:
            lost.append(
                Loss(
                    "empty_cache",
                    "snapshots do not record empty_cache; calls are inferred from released segments",
                    self._inferred_releases,
                )
            )
        if self._inferred_pools:
            lost.append(
                Loss(
                    "pool_scopes",
                    "snapshots do not record when private pools are made and released; inferred from their blocks",
                    self._inferred_pools,
                )
            )
        if self.toggles:
            lost.append(
                Loss(
                    "settings_changes",
                    "expandable segments were switched on or off; when is inferred from the next memory that was taken",
                    self.toggles,
                )
            )
        if self._ooms:
            lost.append(Loss("oom_size", "an OOM's request is known only after rounding", self._ooms))
        return lost

    # One handler per action.

    def _alloc(self, entry: Mapping[str, Any], where: str) -> None:
        addr, size, stream, pool = self._place(entry, where)
        if addr in self._live:
            raise InputFileError(self.check.path, f"{where}: allocates {addr:#x}, which is still allocated")
        id_ = self._new_id()
        self._begin_malloc(id_, size, stream, pool, entry, where)
        self.decisions.append(DecisionKind.ALLOC, id_, addr, UNKNOWN_SIZE, stream, pool)
        self._live[addr] = id_

    def _oom(self, entry: Mapping[str, Any], where: str) -> None:
        size = self.check.integer(entry, "size", where, _MAX_SIZE)
        stream = self.check.integer(entry, "stream", where)
        free = self.check.integer(entry, "device_free", where)
        id_ = self._new_id()
        pool = self._pool(entry, where, None)
        self._begin_malloc(id_, size, stream, pool, entry, where)
        self.decisions.append(DecisionKind.OOM, id_, free, size, stream, pool)
        self._ooms += 1

    def _free_requested(self, entry: Mapping[str, Any], where: str) -> None:
        self._explicit_release()
        addr, size, stream, pool = self._place(entry, where)
        live = self._live.pop(addr, None)
        if live is None:
            self._unknown_frees += 1
            return
        self._open_free = _OpenFree(live, addr, size, stream, pool, self._stack(entry, where))

    def _close_free(self, deferred: bool) -> None:
        """Write the free read last, now that what follows tells whether it was deferred."""
        free = self._open_free
        assert free is not None
        self._open_free, self._completes_open = None, False
        if deferred:
            self.requests.append(RequestKind.RECORD_STREAM, id=free.id, stream=UNKNOWN_STREAM, pool=free.pool)
            self._pending[free.addr] = free.id
            self._inferred_uses += 1
        self.decisions.request = self.requests.append(
            RequestKind.FREE, id=free.id, stream=free.stream, pool=free.pool, stack=free.stack
        )
        decide = self.decisions.append
        decide(DecisionKind.FREE_REQUESTED, free.id, free.addr, UNKNOWN_SIZE, free.stream, free.pool)
        if not deferred:
            decide(DecisionKind.FREE_COMPLETED, free.id, free.addr, UNKNOWN_SIZE, free.stream, free.pool)

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
            if not self._unknown_frees:
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

    def _place(self, entry: Mapping[str, Any], where: str) -> tuple[int, int, int, int]:
        integer = self.check.integer
        addr = integer(entry, "addr", where)
        return (
            addr,
            integer(entry, "size", where, _MAX_SIZE),
            integer(entry, "stream", where),
            self._pool(entry, where, addr),
        )

    def _pool(self, entry: Mapping[str, Any], where: str, addr: int | None) -> int:
        pool = self.check.pool(entry, "pool_id", where)
        if pool is None:
            self.lacks_pool_ids = True
            if addr is None or not self._private:
                return 0
            pool = self._private.pool_at(self._number, addr)
        index = self._pool_index.get(pool)
        if index is None:
            index = self._pool_index[pool] = len(self.pools)
            self.pools.append(pool)
        return index

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _stack(self, entry: Mapping[str, Any], where: str) -> int:
        frames = entry.get("frames")
        if not frames:
            return NO_STACK
        # A hostile file may refer to one long list from every event. Identities hold while the file's value lives.
        known_stack = self._stack_cache.get(id(frames))
        if known_stack is not None:
            return known_stack
        out = []
        for frame in self.check.sequence(frames, where):
            # Snapshots share one dict per distinct frame, so its identity is a good cache key while it lives.
            known = self._frame_cache.get(id(frame))
            if known is None:
                f = self.check.mapping(frame, where)
                file, line, name = f.get("filename"), f.get("line"), f.get("name")
                known = self._frame_cache[id(frame)] = Frame(
                    file if isinstance(file, str) else "",
                    line if isinstance(line, int) and abs(line) <= _MAX_INT else 0,
                    name if isinstance(name, str) else "",
                )
            out.append(known)
        stack = self._stack_cache[id(frames)] = self.stacks.add(tuple(out))
        return stack

    def _begin_malloc(self, id_: int, size: int, stream: int, pool: int, entry: Mapping[str, Any], where: str) -> None:
        """Write the request whose entries have been gathered, and what led to it."""
        took, failed = self._took, entry.get("action") == "oom"
        deferring = pool > 0 and self._scopes_defer and not self._releases_in_part
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
        in_scope = pool > 0 and self._scopes_defer and (released or failed) and not announced
        self._note_pools(pool)
        if in_scope:
            self.requests.append(RequestKind.SCOPE_OPEN, pool=pool)
        if released and took:
            self._inferred_releases += 1
            self.requests.append(RequestKind.RELEASE_SEEN)
        row = self.requests.append(
            RequestKind.ALLOC, id=id_, size=size, stream=stream, pool=pool, stack=self._stack(entry, where)
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
        if pool:  # a pool with an allocator of its own never maps
            return
        if self._maps is not None and self._maps != is_mapped:
            self.requests.append(RequestKind.SETTINGS, size=int(is_mapped))
            self.toggles += 1
        self._maps = is_mapped
        if self.begins_mapped is None:
            self.begins_mapped = is_mapped

    def _note_pools(self, requested: int) -> None:
        """Private pools that a request needs or that must have been released by now."""
        for pool in sorted({p for kind, _, _, _, p in self._segments if p and _is_release(kind)}):
            if pool in self._made_pools and not (pool == requested and self._releases_in_part):
                self._made_pools.discard(pool)
                self.requests.append(RequestKind.POOL_RELEASE, pool=pool)
        if requested and requested not in self._made_pools:
            self._made_pools.add(requested)
            self._inferred_pools += 1
            self.requests.append(RequestKind.POOL_CREATE, pool=requested)

    def _explicit_release(self) -> None:
        """Entries gathered so far belong to no allocation: the program called ``empty_cache()``."""
        if self._open_free is not None and self._completes_open:
            self._close_free(deferred=False)
        if not self._completed and not self._segments:
            return
        self._announce_uses(self._completed)
        self._note_pools(0)
        released = {pool for kind, _, _, _, pool in self._segments if _is_release(kind)}
        # The end of a MemPool returns that pool alone.
        only = released.pop() if len(released) == 1 else 0
        self.decisions.request = self.requests.append(RequestKind.EMPTY_CACHE, pool=only)
        self._inferred_releases += 1
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


_EntryReader._HANDLERS = {
    "alloc": _EntryReader._alloc,
    "free_requested": _EntryReader._free_requested,
    "free_completed": _EntryReader._free_completed,
    "segment_alloc": _EntryReader._segment_alloc,
    "segment_free": _EntryReader._segment_free,
    "segment_map": _EntryReader._segment_map,
    "segment_unmap": _EntryReader._segment_unmap,
    "oom": _EntryReader._oom,
    "snapshot": _EntryReader._ignored,
    "annotate": _EntryReader._ignored,
}


def _is_release(kind: DecisionKind) -> bool:
    return kind in (DecisionKind.SEGMENT_FREE, DecisionKind.SEGMENT_UNMAP)


def _final_segments(
    check: _Checker, segments: Sequence[Any], device: int, pools: list[PoolId]
) -> tuple[SegmentState, ...]:
    out = []
    index = {pool: i for i, pool in enumerate(pools)}
    seen: set[int] = set()
    for number, item in enumerate(segments):
        where = f"segment {number}"
        segment = check.mapping(item, where)
        if check.integer(segment, "device", where) != device:
            continue
        addr = check.integer(segment, "address", where)
        size = check.integer(segment, "total_size", where)
        pool = check.pool(segment, "segment_pool_id", where) or DEFAULT_POOL
        if pool not in index:
            index[pool] = len(pools)
            pools.append(pool)
        items = check.sequence(segment.get("blocks"), f"{where}, 'blocks'")
        if items and id(items) in seen:  # one long list, referred to often, would unfold beyond all memory
            raise InputFileError(check.path, f"{where}: shares its list of blocks with another segment")
        seen.add(id(items))
        if addr + size > _MAX_INT:
            raise InputFileError(check.path, f"{where}: ends outside of what an address can be")
        blocks = []
        at = addr
        for item_block in items:
            block = check.mapping(item_block, where)
            state = _STATES.get(check.text(block, "state", where))
            if state is None:
                raise InputFileError(check.path, f"{where}: unknown block state {block['state']!r}")
            length = check.integer(block, "size", where)
            blocks.append((at, length, state))
            at += length
        if at != addr + size:
            raise InputFileError(check.path, f"{where}: its blocks cover {at - addr} of {size} bytes")
        stream = check.integer(segment, "stream", where)
        expandable = segment.get("is_expandable", False) is True
        out.append(SegmentState(addr, size, stream, index[pool], tuple(blocks), expandable))  # type: ignore[arg-type]
    return tuple(sorted(out, key=lambda s: s.addr))


def _release(top: Mapping[str, Any], settings: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """The newest release that writes these keys: which keys a snapshot has grew from release to release.

    2.10 and 2.11 write the same keys; their allocators also behave alike under the settings that the model covers.
    """
    if "host_segments" in top:
        return "2.14"
    if "max_round_threshold" in settings:
        return "2.13"
    if any("pool_id" in e for e in entries if isinstance(e, dict)):
        return "2.12"
    return "2.11" if any("user_metadata" in e for e in entries if isinstance(e, dict)) else "2.9"


def _settings(check: _Checker, settings: Mapping[str, Any]) -> Settings:
    flat: dict[str, str] = {}
    for key, item in settings.items():
        if isinstance(item, dict):
            flat.update({f"{key}.{k}": _flat(v) for k, v in item.items()})
        else:
            flat[str(key)] = _flat(item)
    conf = check.text(settings, _CONF_KEY, "allocator_settings") if _CONF_KEY in settings else ""
    return Settings(conf=conf, recorded=flat)


_SWITCH = re.compile(r"expandable_segments:(True|False)")


def _confs(check: _Checker, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The conf that the snapshot names, with expandable segments off and on."""
    conf = _settings(check, settings).conf
    if not _SWITCH.search(conf):
        conf = ",".join(part for part in (conf, "expandable_segments:False") if part)
    return _SWITCH.sub("expandable_segments:False", conf), _SWITCH.sub("expandable_segments:True", conf)


def _settings_at_start(check: _Checker, settings: Mapping[str, Any], reader: _EntryReader) -> Settings:
    """As the snapshot reports them, but for expandable segments if those were switched later."""
    reported = _settings(check, settings)
    if not reader.toggles:
        return reported
    is_mapped = bool(reader.begins_mapped)
    recorded = dict(reported.recorded)
    recorded["expandable_segments"] = str(is_mapped)
    return replace(reported, conf=_confs(check, settings)[is_mapped], recorded=recorded)


def _flat(value: Any) -> str:
    """A setting as text. A container becomes its type's name: written out, one that holds itself twice has no end."""
    return str(value) if isinstance(value, str | int | float | None) else type(value).__name__
