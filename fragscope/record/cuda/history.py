"""PyTorch's own allocator history, read while it runs: the source of events where there is no tracker.

The history is a ring: what is not read before it comes around is lost. The allocator's statistics count every event, so
that it is known how many there were, when to read, how many were lost, and between which two events something was
noted. The ring is never cleared: events of other threads between a snapshot and a clearing would be gone.
"""

from __future__ import annotations

import errno
import gc
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fragscope.errors import NotMeasuredError
from fragscope.record.cuda.edge import CudaEdge
from fragscope.record.cuda.stacks import StackCollector
from fragscope.trace.chunks import GAP, KINDS, NO_POOL, NOTE, RECORD, ChunkWriter, EventKind
from fragscope.trace.recording import DeviceStacks

_FULL = 0.75  # of the ring: then it is read
_POLL = 0.05  # seconds between looks at how full it is
_TRIES = 8  # snapshots taken until one falls between two events


class HistoryTracker:
    """A Tracker that reads PyTorch's history of one device from time to time.

    Args:
        edge: where the history is.
        device: CUDA device index.
        max_entries: length of the ring.
    """

    def __init__(self, edge: CudaEdge, device: int, max_entries: int) -> None:
        self._edge = edge
        self._device = device
        self._max_entries = max_entries
        self._writer: ChunkWriter | None = None
        self._lock = threading.RLock()
        self._notes: list[tuple[int, tuple[int, ...]]] = []  # events before it, record
        self._read = 0  # events written or lost so far
        self._base = 0  # what the statistics counted before the recording
        self._lost = 0
        self._error = 0
        self._stacks = StackCollector()
        self._stopping = threading.Event()
        self._reader: threading.Thread | None = None

    def start(self, folder: Path, records: int, chunks: int) -> None:
        del chunks
        self._writer = ChunkWriter(folder, records)
        try:
            self._writer.write(np.zeros(0, dtype=RECORD))
        except OSError as e:
            raise NotMeasuredError(f"{folder}: no events can be written there: {(e.strerror or str(e)).lower()}") from e
        self._base = self._edge.events(self._device)
        self._reader = threading.Thread(target=self._poll, name="fragscope-history", daemon=True)
        self._reader.start()

    def note(self, kind: int, device: int, addr: int, size: int, stream: int, pool: tuple[int, int], text: int) -> None:
        with self._lock:
            position = self._edge.events(self._device) - self._base
            self._notes.append((position, (kind, device, 0, 0, addr, size, stream, *pool, 0, text)))

    def drain(self) -> None:
        """Read what the history has gained, and write it with the notes made meanwhile."""
        with self._lock, _without_collection():
            if self._writer is None:
                return
            entries, count, is_sure = self._entries()
            new = count - self._read
            if new < 0 or not is_sure:
                # The program reset the statistics, or threads never paused: nobody knows what lies between.
                self._notes = [(max(position, self._read), record) for position, record in self._notes]
                self._notes.insert(0, (self._read, (GAP, self._device, 0, 0, 0, -1, 0, 0, 0, 0, -1)))
            if new < 0:
                self._base += new
                count, new = self._read, 0
            # What was lost is the oldest of it; the ring ends with the newest.
            got = min(new, len(entries))
            entries = entries[len(entries) - got :]
            rows = list(self._merged(entries, new - got))
            self._stacks.add(entries)
            self._read = count
            self._write(rows)

    def stop(self) -> None:
        self._stopping.set()
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join()
        self.drain()
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def stacks(self) -> DeviceStacks:
        """The stacks of the events that were written."""
        return self._stacks.finish(self._device)

    def status(self) -> tuple[int, int, int]:
        return self._read - self._lost, self._lost, self._error

    def _poll(self) -> None:
        while not self._stopping.wait(_POLL):
            if self._edge.events(self._device) - self._base - self._read > _FULL * self._max_entries:
                self.drain()

    def _entries(self) -> tuple[list[dict[str, Any]], int, bool]:
        """The history's entries, without snapshots, how many events there were when it was read, and whether surely."""
        entries: list[dict[str, Any]] = []
        before, after = -1, 0
        for _ in range(_TRIES):
            before = self._edge.events(self._device)
            traces = self._edge.snapshot()["device_traces"]
            after = self._edge.events(self._device)
            listed = traces[self._device] if self._device < len(traces) else []
            entries = [e for e in listed if e["action"] in KINDS and e["action"] != "snapshot"]
            if before == after:
                break
        return entries, after - self._base, before == after

    def _merged(self, entries: list[dict[str, Any]], lost: int) -> Iterator[tuple[int, ...]]:
        """Records of the entries, with the notes where they belong."""
        notes, self._notes = deque(sorted(self._notes, key=lambda n: n[0])), []
        at = self._read
        if lost > 0:
            while notes and notes[0][0] <= at:
                yield notes.popleft()[1]
            at += lost
            yield (GAP, self._device, 0, 0, 0, lost, 0, 0, 0, 0, -1)
        for entry in entries:
            while notes and notes[0][0] <= at:
                yield notes.popleft()[1]
            yield _record(entry, self._device)
            at += 1
        for _, record in notes:
            yield record

    def _write(self, rows: list[tuple[int, ...]]) -> None:
        records = np.array(rows, dtype=RECORD)
        try:
            if self._writer is None or self._error:
                raise OSError(self._error or errno.EBADF, "closed")
            self._writer.write(records)
        except OSError as e:
            self._error = e.errno or errno.EIO
            self._lost += int(np.count_nonzero(records["kind"] < NOTE))


def _record(entry: dict[str, Any], device: int) -> tuple[int, ...]:
    kind = KINDS[entry["action"]]
    addr = entry["device_free"] if kind == EventKind.OOM else entry["addr"]
    pool = entry.get("pool_id", (NO_POOL, 0))
    return (kind, device, 0, 0, addr, entry["size"], entry["stream"], *pool, entry.get("time_us", 0), -1)


@contextmanager
def _without_collection() -> Iterator[None]:
    """A snapshot makes millions of objects; looking for garbage among them triples its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
