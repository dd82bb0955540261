"""PyTorch memory snapshots (``torch.cuda.memory._snapshot()``, 2.9 and newer) as Traces.

A snapshot lists what the allocator did; what the program asked for is read out of it:

* ``alloc`` and ``free_requested`` are requests. A free whose ``free_completed`` does not follow at once was deferred:
  some other stream used the block, so a ``RECORD_STREAM`` of an unknown stream is put before it and a ``USES_DONE``
  where the completion shows.
* Released segments that no allocation needed mean ``empty_cache()``, which snapshots do not record.
* An ``oom`` entry is an allocation that failed; only its rounded size is known.

What cannot be known is listed in ``Trace.lost``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fragscope.errors import InputFileError, UnmodelledError, UsageError
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
from fragscope.trace.trace import DEFAULT_POOL, Loss, PoolId, SegmentState, Settings, Trace

_STATES = {"inactive": "free", "active_allocated": "allocated", "active_pending_free": "pending"}
_KNOWN_KEYS = frozenset(
    {"segments", "device_traces", "allocator_settings", "external_annotations", "host_segments", "host_traces"}
)
_MAX_INT = 2**63 - 1
_SMALL_BLOCKS = 2048  # 1 MiB (kSmallSize): larger requests are served from other segments
_WITHIN_MALLOC = frozenset({"free_completed", "segment_free", "segment_alloc", "alloc", "oom"})
_MAX_SIZE = 2**62 - 1  # no device has that much, and sums of a few stay within 64 bits
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
    reader = _EntryReader(check)
    entries = traces[chosen] if chosen < len(traces) else []
    boundaries = list(marks)
    for number, entry in enumerate(entries):
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
    final = _final_segments(check, segments, chosen, reader.pools)
    settings = check.mapping(top.get("allocator_settings", {}), "allocator_settings")
    if _CONF_KEY not in settings:
        lost.append(Loss("allocator_settings", "the snapshot does not name its allocator conf; the default is assumed"))
    release = _release(top, settings, entries)
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
        settings=_settings(check, settings),
        torch=release,
        device=chosen,
        final=final,
        lost=tuple(lost),
        placement="recorded",
        source="snapshot",
        provenance={"file": path.name},
    )


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

    def __init__(self, check: _Checker) -> None:
        self.check = check
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
        self._released = self._took = False
        self._unknown_frees = 0
        self._inferred_uses = 0
        self._inferred_releases = 0
        self._ooms = 0
        self.lacks_pool_ids = False

    def take(self, number: int, entry: Mapping[str, Any]) -> None:
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
        self._begin_malloc(id_, size, stream, self._pool(entry, where), entry, where)
        self.decisions.append(DecisionKind.OOM, id_, free, size, stream, 0)
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
        if self._released:  # nothing completes after a release in one call: that was an empty_cache(), this is another
            self._explicit_release()
        addr, _size, stream, pool = self._place(entry, where)
        id_ = self._pending.pop(addr, None)
        if id_ is None:
            if not self._unknown_frees:
                raise InputFileError(self.check.path, f"{where}: completes the free of {addr:#x}, which nobody freed")
            return
        self._completed.append((id_, addr, stream, pool, len(self._segments)))

    def _segment_alloc(self, entry: Mapping[str, Any], where: str) -> None:
        addr, size, stream, pool = self._place(entry, where)
        self._segments.append((DecisionKind.SEGMENT_ALLOC, addr, size, stream, pool))
        self._took = True

    def _segment_free(self, entry: Mapping[str, Any], where: str) -> None:
        addr, size, stream, pool = self._place(entry, where)
        if self._took:
            raise InputFileError(
                self.check.path, f"{where}: a segment is released after one was taken for the same request"
            )
        self._segments.append((DecisionKind.SEGMENT_FREE, addr, size, stream, pool))
        self._released = True

    def _expandable(self, entry: Mapping[str, Any], where: str) -> None:
        raise UnmodelledError(
            "expandable_segments",
            f"{self.check.path} was recorded with expandable_segments:True ({entry['action']!r} at {where}), "
            "which the allocator model does not cover",
        )

    def _ignored(self, entry: Mapping[str, Any], where: str) -> None:
        del entry, where

    # Taken as they are in the table below, so that ``take`` has no chain of comparisons.
    _HANDLERS: dict[str, Any]

    def _place(self, entry: Mapping[str, Any], where: str) -> tuple[int, int, int, int]:
        integer = self.check.integer
        return (
            integer(entry, "addr", where),
            integer(entry, "size", where, _MAX_SIZE),
            integer(entry, "stream", where),
            self._pool(entry, where),
        )

    def _pool(self, entry: Mapping[str, Any], where: str) -> int:
        pool = self.check.pool(entry, "pool_id", where)
        if pool is None:
            self.lacks_pool_ids = True
            return 0
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
        if self._open_free is not None:
            self._close_completed_free(size, stream, waited=failed or (self._released and took))
        if self._released and not took and not failed:
            self._explicit_release()
        # Where everything cached was released or the request failed, all deferred frees were waited for. Which of them
        # had been noticed before the search cannot be told and does not matter: it failed even so. Announced before
        # the request they would come too early; announced after it they serve replays that have no need to wait.
        waited = self._released or failed
        announced = list(self._completed)
        if not waited:
            self._announce_uses(announced)
        elif took and not failed:
            self._inferred_releases += 1
            self.requests.append(RequestKind.RELEASE_SEEN)
        row = self.requests.append(
            RequestKind.ALLOC, id=id_, size=size, stream=stream, pool=pool, stack=self._stack(entry, where)
        )
        self.decisions.request = row
        self._write_gathered()
        if waited:
            self._announce_uses(announced)

    def _explicit_release(self) -> None:
        """Entries gathered so far belong to no allocation: the program called ``empty_cache()``."""
        if self._open_free is not None and self._completes_open:
            self._close_free(deferred=False)
        if not self._completed and not self._segments:
            return
        self._announce_uses(self._completed)
        self.decisions.request = self.requests.append(RequestKind.EMPTY_CACHE)
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
        self._released = self._took = False


_EntryReader._HANDLERS = {
    "alloc": _EntryReader._alloc,
    "free_requested": _EntryReader._free_requested,
    "free_completed": _EntryReader._free_completed,
    "segment_alloc": _EntryReader._segment_alloc,
    "segment_free": _EntryReader._segment_free,
    "segment_map": _EntryReader._expandable,
    "segment_unmap": _EntryReader._expandable,
    "oom": _EntryReader._oom,
    "snapshot": _EntryReader._ignored,
    "annotate": _EntryReader._ignored,
}


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
        out.append(SegmentState(addr, size, stream, index[pool], tuple(blocks)))  # type: ignore[arg-type]
    return tuple(sorted(out, key=lambda s: s.addr))


def _release(top: Mapping[str, Any], settings: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """The newest release that writes these keys: which keys a snapshot has grew from release to release.

    2.10 and 2.11 write the same keys; their allocators also behave alike under the settings that the model covers.
    """
    if "host_segments" in top:
        return "2.14"
    if "max_round_threshold" in settings:
        return "2.13"
    if any("pool_id" in e for e in entries):
        return "2.12"
    return "2.11" if any("user_metadata" in e for e in entries) else "2.9"


def _settings(check: _Checker, settings: Mapping[str, Any]) -> Settings:
    flat: dict[str, str] = {}
    for key, item in settings.items():
        if isinstance(item, dict):
            flat.update({f"{key}.{k}": _flat(v) for k, v in item.items()})
        else:
            flat[str(key)] = _flat(item)
    conf = check.text(settings, _CONF_KEY, "allocator_settings") if _CONF_KEY in settings else ""
    return Settings(conf=conf, recorded=flat)


def _flat(value: Any) -> str:
    """A setting as text. A container becomes its type's name: written out, one that holds itself twice has no end."""
    return str(value) if isinstance(value, str | int | float | None) else type(value).__name__
