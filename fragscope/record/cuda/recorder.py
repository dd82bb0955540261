"""The recorder: what a running program asks of PyTorch's CUDA allocator, as a Trace.

Events come from the allocator tracker (``native.py``): exact, in order, without stacks, at the cost of writing 64 bytes
each. Stacks come from PyTorch's own history, whose entries are the same events. Where the tracker cannot be built, the
history is the source of both.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from fragscope.errors import NotMeasuredError, UsageError
from fragscope.record.cuda import active
from fragscope.record.cuda.edge import CudaEdge, TorchEdge
from fragscope.record.cuda.hooks import quietly
from fragscope.record.cuda.options import RecorderOptions
from fragscope.record.cuda.running import Running
from fragscope.record.device_memory import DeviceMemory, How
from fragscope.trace import Loss, RequestKind, Trace

P = ParamSpec("P")
R = TypeVar("R")
_STATISTICS = ("allocated_bytes", "active_bytes", "reserved_bytes", "requested_bytes", "inactive_split_bytes")


@dataclass(frozen=True, slots=True)
class PhaseStatistics:
    """PyTorch's own peaks and ends of the measured phase, in bytes, by counter name without ``_bytes``."""

    peak: dict[str, int]
    end: dict[str, int]


class Recorder:
    """Records everything the current process allocates on its CUDA devices, from ``start`` to ``stop``.

    A context manager, and a decorator::

        with fragscope.Recorder() as recorder:
            load()
        print(recorder.trace)

    Attributes:
        trace: what was recorded, once it is over.
        statistics: PyTorch's own figures of the last phase that ``end_phase`` ended.
        total: bytes of device memory.
    """

    def __init__(self, options: RecorderOptions | None = None, *, edge: CudaEdge | None = None) -> None:
        self.options = options or RecorderOptions()
        if self.options.max_entries < 1:
            raise UsageError(f"max_entries is {self.options.max_entries}; a history needs at least one entry")
        self.trace: Trace | None = None
        self.statistics: PhaseStatistics | None = None
        self.total = 0
        self._edge = edge
        self._running: Running | None = None
        self._gave_way = False

    def start(self) -> None:
        """Begin to record.

        Raises:
            NotMeasuredError: recording cannot work here; the message says why in one line.
            UsageError: this recorder, or another one, is recording already.
        """
        if self._running is not None:
            raise UsageError("this recorder is recording already; stop it first")
        active.enter(self)
        try:
            with quietly():
                # Looked up now: a recorder that gave way has taken its hooks out of torch.
                self._running = Running(self._edge if self._edge is not None else _torch_edge(), self.options)
        except BaseException:
            active.leave(self)
            raise
        self.trace, self.statistics, self._gave_way = None, None, False
        self.total = self._running.total

    def stop(self, provenance: dict[str, str] | None = None) -> Trace:
        """End the recording and return its Trace.

        Args:
            provenance: what to keep beside it, such as the command; plain text.

        Raises:
            NotMeasuredError: the recorder was begun in another process.
            InputFileError: the events could not be written.
        """
        if self._gave_way and self.trace is not None:
            return self.trace
        running = self._require()
        self._running = None
        active.leave(self)
        with quietly():
            self.trace = running.finish(provenance or {})
        return self.trace

    def give_way(self) -> None:
        """End because another recorder begins; ``stop`` returns what was recorded until then."""
        if self._running is not None:
            self._running.lose(Loss("gave_way", "recording ended when the program began a recorder of its own"))
            self._gave_way = True
            with contextlib.suppress(Exception):  # CUDA may be beyond help
                running, self._running = self._running, None
                active.leave(self)
                with quietly():
                    self.trace = running.finish({})

    def discard(self) -> None:
        """End the recording and forget what was recorded; what ``keep`` names stays as it is."""
        running = self._require()
        self._running = None
        active.leave(self)
        with quietly():
            running.discard()

    def begin_phase(self, name: str) -> None:
        """The measured phase begins here: the device is waited for, and peaks of PyTorch's statistics start over."""
        running = self._require()
        with quietly():
            running.edge.synchronize()
            running.mark(RequestKind.PHASE_BEGIN, name)
            running.edge.reset_peaks(running.device)

    def end_phase(self) -> None:
        """The measured phase is over."""
        running = self._require()
        with quietly():
            running.edge.synchronize()
            stats = running.edge.statistics(running.device)
            self.statistics = PhaseStatistics(
                peak={s.removesuffix("_bytes"): stats[f"{s}.all.peak"] for s in _STATISTICS},
                end={s.removesuffix("_bytes"): stats[f"{s}.all.current"] for s in _STATISTICS},
            )
            running.mark(RequestKind.PHASE_END, None)

    def mark_phase(self, name: str | None) -> None:
        """A phase begins (or with None ends) here; nothing is waited for or reset (``fragscope.phase``)."""
        if self._running is not None:
            with quietly():
                self._running.mark(RequestKind.PHASE_END if name is None else RequestKind.PHASE_BEGIN, name)

    def take_device_memory(self, size: int, how: How) -> DeviceMemory:
        """Device memory past the allocator, ``size`` bytes, on the device that is recorded.

        Raises:
            torch.OutOfMemoryError: the driver has too little.
            NotMeasuredError: it cannot be asked.
        """
        return self._require().take_device_memory(size, how)

    def out_of_memory(self) -> None:
        """A request failed for good: what a crash would lose goes to disk now."""
        if self._running is not None:
            self._running.failed()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
            return
        with contextlib.suppress(Exception):  # the program's own error is the one to see
            self.stop()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """As a decorator: each call is recorded."""

        @functools.wraps(function)
        def recorded(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return recorded

    def _require(self) -> Running:
        if self._running is None:
            raise UsageError("the recorder is not recording; start it first")
        return self._running


def _torch_edge() -> CudaEdge:
    try:
        return TorchEdge()
    except ImportError:
        raise NotMeasuredError("torch is not installed; there is nothing to record") from None
