"""The edge to ``torch.cuda``: everything of it that the recorder touches, behind a small Protocol.

``TorchEdge`` is the real one. ``fake.FakeCuda`` plays a recorded snapshot and ships with the package, so that whatever
uses a recorder can be tested without a GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from fragscope.errors import NotMeasuredError
from fragscope.record.cuda import driver_memory
from fragscope.record.device_memory import How

OomObserver = Callable[[int, int, int, int], None]
"""Called when a request fails for good: device, rounded bytes, bytes of the device or the limit, free bytes."""


class Notes(Protocol):
    """Takes what happens between the allocator's events (``hooks``)."""

    def note(
        self,
        kind: int,
        *,
        device: int = -1,
        addr: int = 0,
        size: int = 0,
        stream: int = 0,
        pool: tuple[int, int] = (0, 0),
        text: str | None = None,
    ) -> None:
        """Note something at this point; ``kind`` as in ``trace.chunks``. Raises nothing."""

    def history_wanted(self) -> None:
        """The program is about to record PyTorch's history itself."""


class Tracker(Protocol):
    """Writes every event of the allocator into chunks."""

    def start(self, folder: Path, records: int, chunks: int) -> None:
        """Begin; ``records`` a chunk, at most ``chunks`` of them (0: no limit).

        Raises:
            NotMeasuredError: the folder cannot be written, or the allocator cannot be tracked.
        """

    def note(self, kind: int, device: int, addr: int, size: int, stream: int, pool: tuple[int, int], text: int) -> None:
        """Write a record between the events."""

    def stop(self) -> None:
        """End."""

    def status(self) -> tuple[int, int, int]:
        """Records written, records lost, and the ``errno`` that ended the writing (0: none)."""


class CudaEdge(Protocol):
    """What a recorder needs of CUDA and torch. Sizes are bytes."""

    @property
    def release(self) -> str:
        """The installed torch."""

    def why_not(self) -> str | None:
        """Why nothing can be recorded here, in one line; None where it can."""

    def begin(self) -> int:
        """Initialise CUDA; returns the current device."""

    def gpu(self, device: int) -> str:
        """The name CUDA reports."""

    def memory(self, device: int) -> tuple[int, int]:
        """Free and total memory of the device."""

    def synchronize(self) -> None:
        """Wait for everything on the current device."""

    def statistics(self, device: int) -> dict[str, int]:
        """``torch.cuda.memory_stats``."""

    def reset_peaks(self, device: int) -> None:
        """Peaks of the statistics start over."""

    def memory_fraction(self, device: int) -> float | None:
        """The per-process memory fraction in force, None where none was set or the release does not tell."""

    def events(self, device: int) -> int:
        """Events of the device so far that a history would hold, snapshots not counted."""

    def snapshot(self) -> dict[str, Any]:
        """``torch.cuda.memory._snapshot()``: segments of all devices, and the entries of the history if it is on."""

    def is_history_on(self) -> bool:
        """Whether PyTorch's own history is being recorded."""

    def start_history(self, stacks: str, max_entries: int) -> None:
        """Record PyTorch's own history from now on: ``stacks`` is ``none``, ``python`` or ``all``."""

    def stop_history(self) -> None:
        """No longer."""

    def tracker(self) -> Tracker:
        """The allocator tracker.

        Raises:
            NotMeasuredError: there is none for this torch; the message says why.
        """

    def hooks(self, notes: Notes) -> AbstractContextManager[None]:
        """While entered, what programs do through Python is noted: releases, settings, pools, observations, ..."""

    def take_device_memory(self, size: int, how: How, device: int) -> tuple[int, Callable[[], None]]:
        """Take device memory past PyTorch; see ``driver_memory.take``."""

    def out_of_memory(self, message: str) -> Exception:
        """What PyTorch raises where memory lacks."""

    def observe_oom(self, observer: OomObserver) -> None:
        """Call this whenever a request fails for good, from now on."""


class TorchEdge:
    """The installed torch."""

    def __init__(self) -> None:
        import torch  # noqa: PLC0415 - seconds to import, and optional

        self._torch = torch
        # Taken before the hooks stand in for them: what the recorder asks is no observation of the program's.
        self._ask_statistics = getattr(torch._C, "_cuda_memoryStats", None)
        self._ask_snapshot = getattr(torch._C, "_cuda_memorySnapshot", None)

    @property
    def release(self) -> str:
        return str(self._torch.__version__)

    def why_not(self) -> str | None:
        from fragscope.record.process import why_no_cuda  # noqa: PLC0415 - it imports torch

        return why_no_cuda()

    def begin(self) -> int:
        self._torch.cuda.init()
        return int(self._torch.cuda.current_device())

    def gpu(self, device: int) -> str:
        return str(self._torch.cuda.get_device_name(device))

    def memory(self, device: int) -> tuple[int, int]:
        free, total = self._torch.cuda.mem_get_info(device)
        return int(free), int(total)

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def statistics(self, device: int) -> dict[str, int]:
        return dict(self._torch.cuda.memory_stats(device))

    def reset_peaks(self, device: int) -> None:
        self._torch.cuda.reset_peak_memory_stats(device)

    def memory_fraction(self, device: int) -> float | None:
        ask = getattr(self._torch.cuda.memory, "get_per_process_memory_fraction", None)
        if ask is None:
            return None
        fraction = float(ask(device))
        return None if fraction == 1.0 else fraction

    def events(self, device: int) -> int:
        stats: Any = self._ask_statistics(device)  # type: ignore[misc]
        blocks = stats["allocation"]["all"]["allocated"] + stats["allocation"]["all"]["freed"]
        completed = stats["active"]["all"]["freed"]
        calls = stats["num_device_alloc"] + stats["num_device_free"]
        return int(blocks + completed + calls + stats["num_ooms"])

    def snapshot(self) -> dict[str, Any]:
        return dict(self._ask_snapshot(None))  # type: ignore[misc]

    def is_history_on(self) -> bool:
        return bool(self._torch._C._cuda_isHistoryEnabled())

    def start_history(self, stacks: str, max_entries: int) -> None:
        self._torch.cuda.memory._record_memory_history(
            enabled="all",
            context=None if stacks == "none" else "alloc",
            stacks="all" if stacks == "all" else "python",
            max_entries=max_entries,
            clear_history=True,
        )

    def stop_history(self) -> None:
        self._torch.cuda.memory._record_memory_history(enabled=None)

    def tracker(self) -> Tracker:
        from fragscope.record.cuda.native import load_tracker  # noqa: PLC0415 - only where there is a card

        return NativeTracker(load_tracker())

    def hooks(self, notes: Notes) -> AbstractContextManager[None]:
        from fragscope.record.cuda.hooks import installed  # noqa: PLC0415 - likewise

        return installed(self._torch, notes)

    def take_device_memory(self, size: int, how: How, device: int) -> tuple[int, Callable[[], None]]:
        return driver_memory.take(size, how, device)

    def out_of_memory(self, message: str) -> Exception:
        return self._torch.OutOfMemoryError(message)

    def observe_oom(self, observer: OomObserver) -> None:
        native: Any = self._torch._C
        native._cuda_attach_out_of_memory_observer(observer)


class NativeTracker:
    """The extension (``tracker.cpp``), as a Tracker."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def start(self, folder: Path, records: int, chunks: int) -> None:
        error = self._library.fragscope_start(os.fsencode(folder), records, chunks)
        if error:
            raise NotMeasuredError(f"{folder}: no events can be written there: {os.strerror(error).lower()}")

    def note(self, kind: int, device: int, addr: int, size: int, stream: int, pool: tuple[int, int], text: int) -> None:
        self._library.fragscope_note(kind, device, addr, size, stream, *pool, text)

    def stop(self) -> None:
        self._library.fragscope_stop()

    def status(self) -> tuple[int, int, int]:
        written, lost, error = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_int()
        self._library.fragscope_status(ctypes.byref(written), ctypes.byref(lost), ctypes.byref(error))
        return written.value, lost.value, error.value
