"""From a recording's folder to a Trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fragscope.errors import InputFileError, UsageError
from fragscope.trace.chunks import ANY_DEVICE, NO_POOL, NOTE, EventKind, Records, note, read_chunks
from fragscope.trace.events import RequestKind
from fragscope.trace.recording import (
    Beginning,
    DeviceStacks,
    End,
    read_beginning,
    read_end,
    read_stacks,
    read_texts,
)
from fragscope.trace.snapshot.notes import NotedReader
from fragscope.trace.snapshot.pools import Pools, PrivateRanges
from fragscope.trace.snapshot.segments import final_segments, live_at_end
from fragscope.trace.snapshot.settings import conf_of, releases_in_part, scopes_defer, settings_at_start
from fragscope.trace.snapshot.shape import Checker
from fragscope.trace.start import StartState, large_page
from fragscope.trace.trace import DEFAULT_POOL, Loss, PoolId, Settings, Trace

_ACTIONS: dict[int, str] = {
    EventKind.ALLOC: "alloc",
    EventKind.FREE_REQUESTED: "free_requested",
    EventKind.FREE_COMPLETED: "free_completed",
    EventKind.SEGMENT_ALLOC: "segment_alloc",
    EventKind.SEGMENT_FREE: "segment_free",
    EventKind.SEGMENT_MAP: "segment_map",
    EventKind.SEGMENT_UNMAP: "segment_unmap",
    EventKind.OOM: "oom",
    EventKind.SNAPSHOT: "snapshot",
}
_AT_ONCE = 1 << 16  # records made into Python objects together


def open_recording(folder: Path, device: int | None = None) -> Trace:
    """Open a recording: one that was ended, or what a program that was killed had written.

    Args:
        folder: of the recording.
        device: CUDA device; None is the one the recorder was asked for.

    Raises:
        InputFileError: a file of it is damaged, foreign or hostile, or there are no events.
        UsageError: the device has no events, but others have.

    A program that allocated nothing on the device that the recorder was asked for gives a Trace without allocations.
    """
    check = Checker(folder)
    beginning = read_beginning(folder)
    end = read_end(folder)
    chosen = beginning.device if device is None else device
    records = _records(folder)
    events = records["kind"] < NOTE
    snapshots = records["kind"] == EventKind.SNAPSHOT
    used = np.unique(records["device"][events & ~snapshots]).tolist()
    stood = chosen == beginning.device and chosen in records["device"][snapshots]
    if chosen not in used and not stood:
        if used and device is not None:
            raise UsageError(f"{folder}: no events for device {chosen}; it has them for: {', '.join(map(str, used))}")
        raise InputFileError(folder, f"holds no events of device {chosen}: nothing was allocated there")
    mine = (records["device"] == chosen) | (~events & (records["device"] == ANY_DEVICE))
    return _trace(folder, check, beginning, end, records[mine], chosen)


def devices_of(folder: Path) -> tuple[int, ...]:
    """The CUDA devices that a recording has events of."""
    records = _records(folder)
    seen = (records["kind"] < NOTE) & (records["kind"] != EventKind.SNAPSHOT)
    return tuple(np.unique(records["device"][seen]).tolist())


def _records(folder: Path) -> Records:
    chunks = list(read_chunks(folder))
    if not chunks:
        raise InputFileError(folder, "holds no events: the program ended before the first was written")
    return np.concatenate(chunks)


def _trace(folder: Path, check: Checker, beginning: Beginning, end: End | None, records: Records, device: int) -> Trace:
    lost = [] if end is None else [Loss(x.code, x.detail, x.events) for x in end.lost]
    anchors = np.flatnonzero(records["kind"] == EventKind.SNAPSHOT)
    if not len(anchors):
        raise InputFileError(folder, "is torn: the program ended before it was known what stood at the start")
    # What stood at the start, and at the end, is what a snapshot showed; events before the one are in it already.
    stop = int(anchors[-1]) if end is not None and len(anchors) > 1 else len(records)
    records = records[int(anchors[0]) : stop]
    settings = beginning.settings
    pools = Pools(check, PrivateRanges(check, (), () if end is None else end.segments, device))
    release = ".".join(beginning.torch.split("+")[0].split(".")[:2])
    reader = NotedReader(
        check,
        pools,
        read_texts(folder),
        scopes_defer=scopes_defer(release),
        releases_in_part=releases_in_part(settings),
    )
    page = large_page(conf_of(settings))
    stood = final_segments(check, beginning.segments, device, pools, page)
    if stood:
        live = tuple(sorted(live_at_end(check, beginning.segments, device), key=lambda b: b.addr))
        reader.begin(StartState(stood, live))
    stacks = read_stacks(folder, device)
    _read(reader, records, stacks)
    reader.finish()
    lost += _losses(reader, end, pools)
    if stacks is not None and stacks.parted:
        lost.append(Loss("stacks", "call stacks that the history did not hold in the order of events", stacks.parted))
    final = None if end is None else final_segments(check, end.segments, device, pools, page)
    is_asked_for = device == beginning.device
    return Trace(
        requests=reader.requests.finish(),
        decisions=reader.decisions.finish(),
        stacks=reader.stacks.table,
        phases=tuple(reader.phases),
        pools=tuple(pools.ids),
        observations=tuple(reader.observations),
        confs=tuple(reader.confs),
        settings=_settings(check, beginning, reader, sum(s.size for s in stood) if is_asked_for else None),
        torch=beginning.torch,
        card=beginning.gpu if is_asked_for else None,
        device=device,
        device_total=beginning.total if is_asked_for else None,
        initial=stood,
        final=final,
        lost=tuple(lost),
        placement="recorded",
        source="cuda",
        provenance={} if end is None else end.provenance,
    )


def _settings(check: Checker, beginning: Beginning, reader: NotedReader, reserved: int | None) -> Settings:
    """The settings in force; how much memory there was is known of the device that the recorder was asked for."""
    reported = settings_at_start(check, beginning.settings, toggled=False, begins_mapped=bool(reader.begins_mapped))
    if reserved is None:
        return reported
    return replace(reported, memory_fraction=beginning.memory_fraction, capacity=beginning.free + reserved)


def _read(reader: NotedReader, records: Records, stacks: DeviceStacks | None) -> None:
    """Give the reader all records, with the stacks of those that have one."""
    frames = _frames(stacks)
    counted = (records["kind"] < NOTE) & (records["kind"] != EventKind.SNAPSHOT)
    first = int(np.count_nonzero(counted)) - (0 if stacks is None else len(stacks.of))
    scopes = _scopes_of_captures(records)
    threads: dict[int, int] = {}  # as the system numbers them -> in order of appearance
    event = 0  # events, as stacks count them
    number = 0
    for part in range(0, len(records), _AT_ONCE):
        for record in _rows(records[part : part + _AT_ONCE]):
            kind, addr, size, stream, pool_first, pool_second, text, thread = record
            reader.requests.thread = threads.setdefault(thread, len(threads))
            if kind >= NOTE:
                pool = (pool_first, pool_second)
                if kind == note(RequestKind.SCOPE_OPEN) and addr:
                    pool = scopes.get(addr, DEFAULT_POOL)
                reader.note(kind, addr=addr, size=size, stream=stream, pool=pool, text=text)
                continue
            action = _ACTIONS.get(kind)
            if action is None:
                reader.unknown_notes += 1
                continue
            if kind == EventKind.SNAPSHOT:
                continue
            entry: dict[str, Any] = {"action": action, "addr": addr, "size": size, "stream": stream}
            if kind == EventKind.OOM:
                entry["device_free"] = addr
            if pool_first != NO_POOL:
                entry["pool_id"] = (pool_first, pool_second)
            if stacks is not None and event >= first and stacks.of[event - first] >= 0:
                entry["frames"] = frames[stacks.of[event - first]]
            reader.take(number, entry)
            event += 1
            number += 1


def _scopes_of_captures(records: Records) -> dict[int, PoolId]:
    """The pool of each capture by its number, which is known only when it is over."""
    closed = records[(records["kind"] == note(RequestKind.SCOPE_CLOSE)) & (records["addr"] > 0)]
    pools = zip(closed["pool_first"].tolist(), closed["pool_second"].tolist(), strict=True)
    return dict(zip(closed["addr"].tolist(), pools, strict=True))


def _rows(records: Records) -> Iterator[tuple[int, ...]]:
    names = ("kind", "addr", "size", "stream", "pool_first", "pool_second", "text", "thread")
    return zip(*(records[name].tolist() for name in names), strict=True)


def _frames(stacks: DeviceStacks | None) -> list[list[dict[str, Any]]]:
    """Stacks in the form that snapshots have; equal frames are one object."""
    if stacks is None:
        return []
    frames = [{"filename": file, "line": line, "name": name} for file, line, name in stacks.frames]
    return [[frames[i] for i in stack] for stack in stacks.stacks]


def _losses(reader: NotedReader, end: End | None, pools: Pools) -> list[Loss]:
    inferred = reader.inferred
    inferred.held = 0  # what stood at the start was recorded, and is not lost
    lost = inferred.losses()
    if reader.gaps:
        lost.append(Loss("gap", "events were lost while recording", reader.lost_events))
    if reader.unknown_notes:
        lost.append(Loss("unknown_notes", "records of kinds that this version does not know", reader.unknown_notes))
    if end is None:
        lost.append(Loss("torn", "the program ended before the recorder did; what it wrote until then is here"))
    if pools.lacks_ids:
        lost.append(Loss("pool_ids", "events of this release do not name their pool when read from its history"))
    return lost
