"""A CUDA edge that plays a recorded snapshot: recorders, and what uses them, run without a GPU.

::

    cuda = FakeCuda(snapshot)
    recorder = Recorder(edge=cuda)
    recorder.start()
    cuda.play(100)  # the first 100 events of the snapshot happen now
    trace = recorder.stop()
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import get_native_id
from typing import Any

import numpy as np

from fragscope.errors import NotMeasuredError
from fragscope.record.cuda.driver_memory import DriverOutOfMemoryError
from fragscope.record.cuda.edge import Notes, OomObserver, Tracker
from fragscope.record.device_memory import How
from fragscope.trace import RequestKind
from fragscope.trace.chunks import KINDS, RECORD, RELEASED, ChunkWriter, EventKind, note
from fragscope.trace.sizes import SMALL_SEGMENT, driver_pages
from fragscope.trace.snapshot import state_before
from fragscope.trace.start import StartState

_STATES = {"free": "inactive", "allocated": "active_allocated", "pending": "active_pending_free"}


class FakeCuda:
    """Plays the events of one device of a snapshot that was recorded from process start.

    Args:
        snapshot: as ``torch.cuda.memory._snapshot()`` returns it.
        device: CUDA device index; the others are silent.
        release: the torch that seems to be installed.
        gpu: the name of the card.
        total: bytes of its memory.
        no_tracker: why there is no tracker; None for one that works.
        unavailable: why nothing can be recorded; None where it can.
    """

    def __init__(
        self,
        snapshot: dict[str, Any],
        *,
        device: int = 0,
        release: str = "2.11.0",
        gpu: str = "NVIDIA H100 80GB HBM3",
        total: int = 80 << 30,
        no_tracker: str | None = None,
        unavailable: str | None = None,
    ) -> None:
        self.played = 0
        self.fraction: float | None = None
        self._snapshot = snapshot
        self._entries: list[dict[str, Any]] = list(snapshot["device_traces"][device])
        self._device = device
        self._release = release
        self._gpu = gpu
        self._total = total
        self._no_tracker = no_tracker
        self._unavailable = unavailable
        self._tracker = _FakeTracker(device)
        self._history: deque[dict[str, Any]] | None = None
        self._notes: Notes | None = None
        self._observers: list[OomObserver] = []
        self._peaks_from = 0
        self._raw = 0

    # What the program does.

    def play(self, events: int | None = None) -> None:
        """The next events happen, or (None) all that are left."""
        stop = len(self._entries) if events is None else min(len(self._entries), self.played + events)
        for entry in self._entries[self.played : stop]:
            self.played += 1
            self._happen(entry)
            if entry["action"] == "oom":
                for observer in self._observers:
                    observer(self._device, entry["size"], self._total, entry["device_free"])

    def empty_cache(self, events: int) -> None:
        """The program calls ``empty_cache()``, which causes the next events."""
        if self._notes is not None:
            self._notes.note(note(RequestKind.EMPTY_CACHE))
        self.play(events)
        if self._notes is not None:
            self._notes.note(RELEASED)

    def observe(self, what: str, where: str) -> None:
        """The program reads memory state."""
        if self._notes is not None:
            self._notes.note(note(RequestKind.OBSERVATION), text=f"{what}\n{where}")

    def _happen(self, entry: dict[str, Any]) -> None:
        if self._history is not None:
            self._history.append(entry)
        self._tracker.event(entry)

    # What the recorder asks.

    @property
    def release(self) -> str:
        return self._release

    def why_not(self) -> str | None:
        return self._unavailable

    def begin(self) -> int:
        return self._device

    def gpu(self, device: int) -> str:
        del device
        return self._gpu

    def memory(self, device: int) -> tuple[int, int]:
        del device
        return self._total - (1 << 30) - self._raw, self._total

    def synchronize(self) -> None:
        pass

    def statistics(self, device: int) -> dict[str, int]:
        """Of what the events say: requested bytes; a snapshot's events hold no block sizes."""
        del device
        live, peak, now = dict[int, int](), 0, 0
        for number, entry in enumerate(self._entries[: self.played]):
            if entry["action"] == "alloc":
                live[entry["addr"]] = entry["size"]
                now += entry["size"]
            elif entry["action"] == "free_completed":
                now -= live.pop(entry["addr"], 0)
            peak = max(peak, now) if number >= self._peaks_from else now
        names = ("allocated_bytes", "active_bytes", "reserved_bytes", "requested_bytes", "inactive_split_bytes")
        return {f"{name}.all.{what}": value for name in names for what, value in (("peak", peak), ("current", now))}

    def reset_peaks(self, device: int) -> None:
        del device
        self._peaks_from = self.played

    def memory_fraction(self, device: int) -> float | None:
        del device
        return self.fraction

    def events(self, device: int) -> int:
        if device != self._device:
            return 0
        return sum(e["action"] != "snapshot" for e in self._entries[: self.played])

    def snapshot(self) -> dict[str, Any]:
        stood = state_before(self._snapshot, self._device, self.played)
        traces: list[list[dict[str, Any]]] = [[] for _ in range(self._device + 1)]
        if self._history is not None:
            traces[self._device] = list(self._history)
            self._history.append({"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "time_us": 0})
        self._tracker.snapshot()
        return {
            "segments": _reported(stood, self._device),
            "device_traces": traces,
            "allocator_settings": self._snapshot.get("allocator_settings", {}),
        }

    def is_history_on(self) -> bool:
        return self._history is not None

    def start_history(self, stacks: str, max_entries: int) -> None:
        del stacks
        self._history = deque(maxlen=max_entries)

    def stop_history(self) -> None:
        self._history = None

    def tracker(self) -> Tracker:
        if self._no_tracker is not None:
            raise NotMeasuredError(self._no_tracker)
        return self._tracker

    def hooks(self, notes: Notes) -> AbstractContextManager[None]:
        return self._hooked(notes)

    @contextmanager
    def _hooked(self, notes: Notes) -> Iterator[None]:
        self._notes = notes
        try:
            yield
        finally:
            self._notes = None

    def take_device_memory(self, size: int, how: How, device: int) -> tuple[int, Callable[[], None]]:
        taken = driver_pages(size) if how == "cuMemCreate" else size
        if driver_pages(taken) > self.memory(device)[0]:
            raise DriverOutOfMemoryError(taken)
        self._raw += driver_pages(taken)

        def give() -> None:
            self._raw -= driver_pages(taken)

        return taken, give

    def out_of_memory(self, message: str) -> Exception:
        return MemoryError(message)

    def observe_oom(self, observer: OomObserver) -> None:
        self._observers.append(observer)


class _FakeTracker:
    """Writes chunks as the extension does."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._writer: ChunkWriter | None = None
        self._written = 0
        self._lost = 0
        self._error = 0
        self.room: int | None = None
        """Records that the disk takes; None for all."""

    def start(self, folder: Path, records: int, chunks: int) -> None:
        del chunks
        if not os.access(folder, os.W_OK):
            raise NotMeasuredError(f"{folder}: no events can be written there: {os.strerror(errno.EACCES).lower()}")
        self._writer = ChunkWriter(folder, records)

    def event(self, entry: dict[str, Any]) -> None:
        """An event happened."""
        kind = KINDS.get(entry["action"], 255)
        addr = entry["device_free"] if kind == EventKind.OOM else entry.get("addr", 0)
        pool = entry.get("pool_id", (0, 0))
        self._put(
            (
                kind,
                self._device,
                0,
                get_native_id(),
                addr,
                entry["size"],
                entry["stream"],
                *pool,
                entry.get("time_us", 0),
                -1,
            )
        )

    def snapshot(self) -> None:
        """A snapshot was taken."""
        self._put((EventKind.SNAPSHOT, self._device, 0, get_native_id(), 0, 0, 0, 0, 0, 0, -1))

    def note(self, kind: int, device: int, addr: int, size: int, stream: int, pool: tuple[int, int], text: int) -> None:
        self._put((kind, device, 0, get_native_id(), addr, size, stream, *pool, 0, text))

    def _put(self, record: tuple[int, ...]) -> None:
        if self._writer is None:
            return
        if self.room is not None and self._written >= self.room:
            self._error = errno.ENOSPC
            self._lost += 1
            return
        self._writer.write(np.array([record], dtype=RECORD))
        self._written += 1

    def stop(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def status(self) -> tuple[int, int, int]:
        return self._written, self._lost, self._error


def _reported(stood: StartState | None, device: int) -> list[dict[str, Any]]:
    """Segments as snapshots report them."""
    if stood is None:
        return []
    requested = {block.addr: block.requested for block in stood.live}
    return [
        {
            "device": device,
            "address": segment.addr,
            "total_size": segment.size,
            "stream": segment.stream,
            "segment_type": "small" if segment.page == SMALL_SEGMENT else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": segment.expandable,
            "blocks": [
                {"size": size, "requested_size": requested.get(addr, 0), "state": _STATES[state]}
                for addr, size, state in segment.blocks
            ],
        }
        for segment in stood.segments
    ]
