"""One recording from its start to its end: where events come from, and the folder that they and all notes go to."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from fragscope.errors import NotMeasuredError
from fragscope.record.cuda import active
from fragscope.record.cuda.driver_memory import DriverOutOfMemoryError
from fragscope.record.cuda.edge import CudaEdge, TorchEdge, Tracker
from fragscope.record.cuda.history import HistoryTracker
from fragscope.record.cuda.hooks import quietly
from fragscope.record.cuda.non_torch import Chosen, Sampler, device_memory
from fragscope.record.cuda.notebook import Notebook, Texts
from fragscope.record.cuda.options import RecorderOptions, Stacks
from fragscope.record.cuda.stacks import stacks_of
from fragscope.record.device_memory import DeviceMemory, How
from fragscope.trace import Loss, RequestKind, Trace
from fragscope.trace.chunks import EventKind, note
from fragscope.trace.open_recording import open_recording
from fragscope.trace.recording import Beginning, End, RecordedLoss, write_beginning, write_end, write_stacks
from fragscope.units import format_bytes

RECORDS_PER_CHUNK = 1 << 16  # 4 MiB; what a crash can leave half written is one record, not one chunk
_TRIES = 8  # snapshots taken until one falls between two events of other threads


class Running:
    """A recording that is going on.

    Attributes:
        edge: CUDA.
        device: whose Trace is wanted.
        total: bytes of its memory.
        notes: takes what happens between events.

    Raises:
        NotMeasuredError: recording cannot work here; the message says why in one line.
    """

    def __init__(self, edge: CudaEdge, options: RecorderOptions) -> None:
        reason = edge.why_not()
        if reason is not None:
            raise NotMeasuredError(f"nothing can be recorded: {reason}")
        self.edge = edge
        current = edge.begin()
        self.device = current if options.device is None else options.device
        free, self.total = edge.memory(self.device)
        self._options = options
        self._lost: list[Loss] = []
        self._raw_numbers = itertools.count(1)  # 0 stands for what was asked for in vain
        self._tracker, self._history = self._source()
        self._folder = _folder(options.keep)
        self._pid = os.getpid()
        try:
            self._begin(free)
        except BaseException:
            self.discard()
            raise

    def _source(self) -> tuple[Tracker, HistoryTracker | None]:
        """Where events come from, and the same if it is PyTorch's history."""
        try:
            return self.edge.tracker(), None
        except NotMeasuredError as e:
            reason = str(e)
        if self.edge.is_history_on():
            raise NotMeasuredError(
                f"the program records PyTorch's allocator history itself, and without the tracker there is no other "
                f"source ({reason})"
            )
        self._lost.append(Loss("no_tracker", f"read from PyTorch's history, since {reason}"))
        history = HistoryTracker(self.edge, self.device, self._options.max_entries)
        return history, history

    def _begin(self, free: int) -> None:
        edge, options = self.edge, self._options
        wants_history = self._history is not None or options.stacks is not Stacks.NONE
        # A program's own history is left as it is, and read at the end.
        self._owns_history = wants_history and not edge.is_history_on()
        self._tracker.start(self._folder, RECORDS_PER_CHUNK, 0)
        if self._owns_history:
            edge.start_history(options.stacks, options.max_entries)
        self._texts = Texts(self._folder / "texts.jsonl")
        self.notes = Notebook(self._tracker, self._texts, self._give_history_up)
        memory = None if options.sample_non_torch is None else self._memory_to_sample()
        snapshot = self._anchored()
        write_beginning(
            self._folder,
            Beginning(
                torch=edge.release,
                device=self.device,
                gpu=edge.gpu(self.device),
                total=self.total,
                free=free,
                memory_fraction=edge.memory_fraction(self.device),
                settings=snapshot.get("allocator_settings", {}),
                segments=snapshot["segments"],
                pid=self._pid,
                tracked=self._history is None,
                stacks=str(options.stacks),
                device_wide=None if memory is None else memory.memory.scope == "device",
            ),
        )
        self._hooks = edge.hooks(self.notes)
        self._unhooked = False
        self._hooks.__enter__()
        self._sampler = None if memory is None else self._sampling(memory, options.sample_non_torch or 0.0)
        _observe_ooms(edge)

    def _anchored(self) -> dict[str, Any]:
        """A snapshot whose place among the events is recorded; the tracker sees that by itself."""
        if self._history is None:
            return self.edge.snapshot()
        for _ in range(_TRIES):
            before = self.edge.events(self.device)
            snapshot = self.edge.snapshot()
            if self.edge.events(self.device) == before:
                break
        self._tracker.note(EventKind.SNAPSHOT, self.device, 0, 0, 0, (0, 0), -1)
        return snapshot

    def _memory_to_sample(self) -> Chosen | None:
        try:
            return device_memory(self.device)
        except NotMeasuredError as e:
            self._lost.append(Loss("non_torch", str(e)))
            return None

    def _sampling(self, chosen: Chosen, interval: float) -> Sampler:
        kind = note(RequestKind.NON_TORCH)

        def sampled(_time_us: int, used: int) -> None:
            with quietly():
                self.notes.note(kind, device=self.device, size=used)

        sampler = Sampler(chosen.memory, interval, sampled)
        sampler.start()
        if chosen.memory.scope == "device":
            reasons = "; ".join(chosen.passed_over)
            detail = f"memory in use was sampled for the whole device, other processes' included: {reasons}"
            self._lost.append(Loss("non_torch_device_wide", detail))
        return sampler

    def take_device_memory(self, size: int, how: How) -> DeviceMemory:
        """Take device memory past the allocator, and note it; see ``Recorder``."""
        try:
            taken, give = self.edge.take_device_memory(size, how, self.device)
        except DriverOutOfMemoryError as e:
            with quietly():
                free, _ = self.edge.memory(self.device)
                self.notes.note(note(RequestKind.RAW_ALLOC), device=self.device, size=e.size, stream=free)
            raise self.edge.out_of_memory(
                f"{how}: {format_bytes(e.size)} asked for, {format_bytes(free)} free"
            ) from None
        number = next(self._raw_numbers)
        self.notes.note(note(RequestKind.RAW_ALLOC), device=self.device, addr=number, size=taken)

        def given_back() -> None:
            give()
            self.notes.note(note(RequestKind.RAW_FREE), device=self.device, addr=number)

        return DeviceMemory(taken, how, given_back)

    def mark(self, kind: RequestKind, name: str | None) -> None:
        """Note the beginning or end of a phase."""
        self.notes.note(note(kind), device=self.device, text=name)

    def lose(self, loss: Loss) -> None:
        """Something is missing from the recording, and it says so."""
        self._lost.append(loss)

    def failed(self) -> None:
        """A request failed for good: what a crash would lose goes to disk now."""
        if self._history is not None:
            self._history.drain()

    def finish(self, provenance: dict[str, str]) -> Trace:
        """End the recording and open it.

        Raises:
            NotMeasuredError: this is a forked child of the process that began it.
            InputFileError: the events could not be written.
        """
        if os.getpid() != self._pid:
            raise NotMeasuredError("the recorder was started in another process; a forked child records on its own")
        snapshot = None
        try:
            # The device is not waited for: a kernel that never ends must not keep the program from ending.
            self._end_sampling()  # the last sample is noted, too
            self._unhook()
            with contextlib.suppress(Exception):  # CUDA may be beyond help; what was written until then stays
                snapshot = self._anchored()
            self._tracker.stop()
            self._end_history()
            if self._options.stacks is not Stacks.NONE and snapshot is not None:
                self._write_stacks(snapshot["device_traces"])
            written, lost, error = self._tracker.status()
            if error:
                reason = os.strerror(error).lower()
                self._lost.append(Loss("not_written", f"recording stopped after {written} events: {reason}", lost))
            if self.notes.missed:
                self._lost.append(Loss("notes", "notes could not be written", self.notes.missed))
            self._close_texts()
            if snapshot is not None:
                write_end(self._folder, self._end(snapshot, provenance))
            return open_recording(self._folder, self.device)
        finally:
            self.discard()

    def _end_sampling(self) -> None:
        sampler = self._sampler
        if sampler is None:
            return
        self._sampler = None
        sampler.sample()
        sampler.stop()
        if sampler.missed:
            detail = (
                f"samples of device memory were left out or failed{': ' + sampler.trouble if sampler.trouble else ''}"
            )
            self._lost.append(Loss("non_torch_samples", detail, sampler.missed))

    def _end(self, snapshot: dict[str, Any], provenance: dict[str, str]) -> End:
        return End(
            segments=snapshot["segments"],
            lost=[RecordedLoss(x.code, x.detail, x.events) for x in self._lost],
            provenance=provenance,
        )

    def _write_stacks(self, device_traces: list[list[dict[str, Any]]]) -> None:
        if self._history is not None:
            write_stacks(self._folder, [self._history.stacks()])
        else:
            write_stacks(self._folder, stacks_of(device_traces, self._folder))

    def discard(self) -> None:
        """End without an outcome, as far as things had begun."""
        for end in (self._unhook, self._end_sampling, self._tracker.stop, self._close_texts, self._end_history):
            with contextlib.suppress(Exception):
                end()
        if self._options.keep is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _unhook(self) -> None:
        self.notes.close()
        if not self._unhooked:
            self._unhooked = True
            self._hooks.__exit__(None, None, None)

    def _close_texts(self) -> None:
        self._texts.close()

    def _end_history(self) -> None:
        if self._owns_history:
            self._owns_history = False
            self.edge.stop_history()

    def _give_history_up(self) -> None:
        """The program records PyTorch's history itself from now on.

        Ours is cleared first: torch writes past the end of a ring that came around and is then made shorter.
        """
        if self._history is not None:
            self._history.drain()
        self._end_history()


def _folder(keep: Path | None) -> Path:
    try:
        if keep is None:
            return Path(tempfile.mkdtemp(prefix="fragscope-recording-"))
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise NotMeasuredError(f"{keep}: holds something already; a recording needs an empty folder")
    except OSError as e:
        raise NotMeasuredError(f"{keep}: cannot be written: {(e.strerror or str(e)).lower()}") from None
    return keep


_observed: list[CudaEdge | type[TorchEdge]] = []
_observed_lock = threading.Lock()


def _observe_ooms(edge: CudaEdge) -> None:
    """An observer cannot be taken back, so there is one for all recordings; every TorchEdge is the same torch."""
    key: CudaEdge | type[TorchEdge] = TorchEdge if isinstance(edge, TorchEdge) else edge
    with _observed_lock:
        if any(seen is key for seen in _observed):
            return
        _observed.append(key)

    def observer(_device: int, _size: int, _total: int, _free: int) -> None:
        # Whatever is raised here would reach the program in place of its OutOfMemoryError.
        with contextlib.suppress(BaseException):
            recorder = active.recorder()
            if recorder is not None:
                with quietly():
                    recorder.out_of_memory()

    edge.observe_oom(observer)
