"""The state of a virtual card while code runs on it: its memory, its storages, and what had to be left open."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fragscope.allocator import Card, OutOfMemoryError, ReplaySettings
from fragscope.errors import UnsupportedError
from fragscope.record.device_memory import DeviceMemory, How
from fragscope.record.virtual.autocast import Autocast
from fragscope.record.virtual.backward import BackwardPass, GraphStreams
from fragscope.record.virtual.callsite import CallSites
from fragscope.record.virtual.card_memory import CardMemory, Recorded
from fragscope.record.virtual.cublas import Cublas
from fragscope.record.virtual.extent import Extent, extent_of
from fragscope.record.virtual.pinned import Pinned
from fragscope.record.virtual.scopes import Scopes
from fragscope.record.virtual.scratch.plan import Plan
from fragscope.record.virtual.storages import Entry, Origin, Place, Storages
from fragscope.record.virtual.values import Values
from fragscope.trace import Trace
from fragscope.trace.sizes import driver_pages
from fragscope.units import GIB, KIB, MIB, format_bytes


class VirtualCard:
    """What the modes and stand-ins of one virtual device share.

    Args:
        card: what the card reports of itself.
        settings: memory, rules and conf its allocator works under.
        root: folder that file names in stacks are relative to.

    Attributes:
        memory: the allocator model and the log of requests.
        values: real values of small tensors.
        autocast: what operators cast while ``torch.autocast`` is on.
        pinned: host tensors that the program pinned.
        scopes: which requests go to private pools.
        refused: what was asked for and cannot be known: times and first place, by description.
        asked_card: whether what was asked may depend on which card this is: the program or a library read its
            properties, and might go another way on another one.
        estimated: operators whose hidden temporaries are unknown: calls and first place, by name.
    """

    def __init__(self, card: Card, settings: ReplaySettings, root: Path | None = None) -> None:
        self._card = card
        self.asked_card = False
        self.memory = CardMemory(settings)
        self.sites = CallSites(root)
        self.storages = Storages(self.memory.free)
        self.values = Values(self.storages, self.sites.where)
        self.pinned = Pinned()
        self.autocast = Autocast(self.storages)
        self.estimated: dict[str, tuple[int, str]] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.scopes = Scopes(newest_first=settings.rules.rules.newest_scope_first)
        self._thread = ThreadState()
        self._cublas = Cublas(lambda: self.card.capability, self.allocate, self.estimate)
        self._graphs = GraphStreams(self.estimate, StreamEvents(self.memory), self.record_stream)
        self._graph_task = -1
        self._hooks_only: dict[int, bool] = {}  # whether a stream was used by hooks of backward passes only

    @property
    def card(self) -> Card:
        """What the card reports of itself, to whoever goes by it."""
        self.asked_card = True
        return self._card

    @property
    def stream(self) -> int:
        """Handle of the running thread's current stream."""
        running = self._thread.running
        return self._thread.stream if running is None else running.stream

    @stream.setter
    def stream(self, handle: int) -> None:
        self._backward_stream()
        if self._thread.running is None:
            self._thread.stream = handle
        else:
            self._thread.running.stream = handle
        self._graphs.changed(handle)

    @property
    def explicit_meta(self) -> bool:
        """Whether the running thread makes a meta tensor that the program itself asked for."""
        return self._thread.explicit_meta

    @explicit_meta.setter
    def explicit_meta(self, value: bool) -> None:
        self._thread.explicit_meta = value

    @property
    def function_mode(self) -> TorchFunctionMode | None:
        """The running thread's function mode."""
        return self._thread.function_mode

    @staticmethod
    def check_index(device: object) -> None:
        """Refuse cards other than the first.

        Raises:
            RuntimeError: as CUDA does.
        """
        if isinstance(device, str):
            device = torch.device(device)
        index = device if isinstance(device, int) else getattr(device, "index", None)
        if index not in (None, 0, -1):
            shown = f"cuda:{index}"
            raise RuntimeError(f"CUDA error: invalid device ordinal ({shown}; the virtual device has one card, cuda:0)")

    def trace(self, provenance: dict[str, str] | None = None) -> Trace:
        """What was asked so far, with the decisions made about it."""
        return self.memory.trace(provenance)

    # --- memory ---------------------------------------------------------------------------------------------------

    def allocate(self, size: int, stream: int | None = None) -> int | None:
        """Allocate on a stream by its handle, or on the current one; None for no bytes.

        Raises:
            torch.OutOfMemoryError: as on the card.
        """
        if size == 0:
            return None
        stack, stream = self.sites.stack(), self.stream if stream is None else stream
        try:
            return self.memory.alloc(size, stream, stack, self.scopes.pool_of(stream))
        except OutOfMemoryError as e:
            raise torch.OutOfMemoryError(self._oom_message(e)) from None

    def take_device_memory(self, size: int, how: How) -> DeviceMemory:
        """Device memory past the allocator, ``size`` bytes.

        Raises:
            torch.OutOfMemoryError: the driver has too little.
        """
        taken = driver_pages(size) if how == "cuMemCreate" else size
        try:
            id_ = self.memory.take_raw(taken, self.sites.stack())
        except OutOfMemoryError as e:
            raise torch.OutOfMemoryError(f"{how}: {_size(taken)} asked for, {_size(e.free)} free") from None

        def give() -> None:
            self.memory.give_raw(id_, taken)
            if how == "cudaMalloc" and self.memory.ordered:
                self.memory.finished_work()  # cudaFree waits for the card

        return DeviceMemory(taken, how, give)

    def register(self, tensor: torch.Tensor) -> None:
        """Give a new tensor's storage its memory on the card, unless it is followed already.

        Raises:
            UnsupportedError: it is sparse.
        """
        if tensor.layout is not torch.strided:
            raise self.unsupported("sparse tensors are not supported on the virtual device")
        if self.storages.find(tensor) is None:
            id_ = self.allocate(0 if tensor._is_zerotensor() else tensor.untyped_storage().nbytes())
            self.storages.follow(tensor, Place.CARD, id_)

    def resized(self, tensor: torch.Tensor, entry: Entry) -> None:
        """A tensor's storage on the card may have grown."""
        self.storage_resized(tensor.untyped_storage().nbytes(), entry)

    def storage_resized(self, size: int, entry: Entry) -> None:
        """A storage on the card grew or shrank: the new memory is taken before the old is given back."""
        if size == entry.size:
            return
        self.storages.forget(entry)
        entry.origin = None
        old = entry.id
        entry.id = self.allocate(size)
        entry.size = size
        entry.address = None
        if old is not None:
            self.memory.free(old)

    @contextlib.contextmanager
    def temporaries(self, sizes: list[int]) -> Iterator[None]:
        """Memory an operator takes besides its outputs and gives back, in order, when it returns."""
        ids: list[int] = []
        try:
            for size in sizes:
                id_ = self.allocate(size)
                if id_ is not None:
                    ids.append(id_)
            yield
        finally:
            for id_ in ids:
                self.memory.free(id_)

    def follow_plan(self, op: str, plan: Plan, results: Sequence[torch.Tensor]) -> None:
        """Take the memory of an operator's results and scratch, and give the scratch back, in the order of its plan.

        A result that the plan does not name takes none.
        """
        if plan.why:
            self.estimate(f"{op} {plan.why}")
        scratch: list[int | None] = []
        try:
            for step, n in plan.steps:
                if step == "out":
                    self.register(results[n])
                elif step == "take":
                    scratch.append(self.allocate(n))
                else:
                    id_, scratch[n] = scratch[n], None
                    self.release(id_)
        finally:
            for id_ in reversed(scratch):
                self.release(id_)

    def release(self, id_: int | None) -> None:
        """Give back what ``allocate`` gave, which is None for no bytes."""
        if id_ is not None:
            self.memory.free(id_)

    def take_gemm_workspace(self, *, lt: bool = False) -> None:
        """Take what a matrix product takes besides its result and keeps: workspaces of cuBLAS."""
        self._cublas.take(self.stream, lt=lt)

    @property
    def gemm_workspaces(self) -> Collection[object]:
        """The workspaces that cuBLAS holds."""
        return self._cublas.workspaces

    # --- order of work --------------------------------------------------------------------------------------------

    def launched(
        self, what: str, reads: Iterable[torch.Tensor], writes: Iterable[torch.Tensor], stream: int | None = None
    ) -> None:
        """Work reads and writes tensors, on a stream by its handle or on the current one.

        What of them is not on the card is left out.
        """
        if not self.memory.ordered:
            return
        handle = self.stream if stream is None else stream
        task = torch._C._current_graph_task_id()
        if task != self._graph_task:
            # A backward pass orders its own work. Its borders count as waiting for everything but what hooks put on
            # their own streams.
            self._graph_task = task
            self.memory.finished_work({h for h, only in self._hooks_only.items() if only})
        in_hook = task != -1 and handle != self._backward_stream() and not torch.is_grad_enabled()
        self._hooks_only[handle] = in_hook and self._hooks_only.get(handle, True)
        read, written = self._touched(reads), self._touched(writes)
        if read or written:
            self.memory.launch(handle, what, self.sites.line, read, written)

    @contextlib.contextmanager
    def backward(self, roots: Sequence[Any], gradients: Sequence[Any]) -> Iterator[None]:
        """While autograd runs a backward pass in the running thread, from tensors or edges of the graph."""
        outer = self._thread.running
        self._cublas.backward()
        with self._graphs.running(roots, gradients, self.stream, nested=outer is not None) as running:
            self._thread.running = running
            try:
                yield
            finally:
                self._thread.running = outer

    def summing_gradients(self) -> contextlib.AbstractContextManager[None]:
        """While gradients are added up."""
        running = self._thread.running
        return contextlib.nullcontext() if running is None else running.summing()

    def record_stream(self, tensor: torch.Tensor, stream: int) -> None:
        """A stream uses a tensor, which may be on the card."""
        if torch._C._functorch.is_legacy_batchedtensor(tensor):  # several gradients at once, which hide their memory
            self.estimate("batched gradients of several streams")
            return
        entry = self.storages.find(tensor)
        if entry is not None and entry.id is not None:
            self.memory.record_stream(entry.id, stream)

    def _backward_stream(self) -> int:
        """Stream that the running thread's backward pass is on; asked before the stream changes."""
        if self._thread.running is not None:
            return self._thread.running.node_stream
        task = torch._C._current_graph_task_id()
        if self._thread.backward[0] != task:
            self._thread.backward = (task, self.stream)
        return self._thread.backward[1]

    def _touched(self, tensors: Iterable[torch.Tensor]) -> list[tuple[int, Extent]]:
        """Lifetime ids of tensors on the card, and the bytes they cover, by address."""
        out = []
        for tensor in tensors:
            entry = self.storages.find(tensor)
            if entry is None or entry.place is not Place.CARD or entry.id is None:
                continue
            if entry.address is None:
                entry.address = self.memory.address(entry.id)
            size = tensor.itemsize
            start = entry.address + int(tensor.storage_offset()) * size
            if tensor.is_contiguous():
                length = int(tensor.numel()) * size
                extent = Extent(start, start + length, length) if length else None
            else:
                extent = extent_of(start, tensor.shape, tensor.stride(), size)
            if extent is not None:
                out.append((entry.id, extent))
        return out

    # --- what cannot be known -------------------------------------------------------------------------------------

    def unsupported(self, what: str, tensors: Iterable[torch.Tensor] = ()) -> UnsupportedError:
        """The error for something that cannot be known without data, at the user's line.

        Args:
            what: in words.
            tensors: whose values are needed; the first that is unknown is explained.
        """
        what += self.values.explain(tensors, self._found)
        where = self.sites.where()
        calls, first = self.refused.get(what, (0, where or ""))
        self.refused[what] = (calls + 1, first)
        return UnsupportedError(what, where)

    def _found(self, origin: Origin) -> str:
        """What made values unknown, in words."""
        where = origin.where or ("" if origin.id is None else self.memory.made_at(origin.id))
        reason = f": {origin.reason}" if origin.reason else ""
        size = format_bytes(origin.size)
        return f"those of {origin.op}{f' at {where}' if where else ''} ({size}), which are not there{reason}"

    def estimate(self, op: str) -> None:
        """Note an operator whose hidden temporaries are unknown."""
        calls, where = self.estimated.get(op, (0, ""))
        self.estimated[op] = (calls + 1, where or self.sites.where() or "")

    def wait_for_stream(self) -> None:
        """The host waits for the current stream, as in every blocking copy.

        Raises:
            torch.AcceleratorError: the stream is only captured.
        """
        self.not_captured()
        self.memory.finished(self.stream)

    def not_captured(self, call: str = "") -> None:
        """Refuse what waits for work that is only captured, and so is never done.

        Raises:
            torch.AcceleratorError: as CUDA does.
        """
        if self.scopes.is_captured(self.stream):
            self.scopes.broken(self.stream)
            raise torch.AcceleratorError(
                f"CUDA error: operation not permitted when stream is capturing{f' ({call})' if call else ''}"
            )

    def observe(self, what: str) -> None:
        """The program reads memory state."""
        self.memory.observe(what, self.sites.stack())

    def _oom_message(self, e: OutOfMemoryError) -> str:
        """As c10/cuda/CUDACachingAllocator.cpp words it, less what NVML would say about other processes."""
        allocator, s = self.memory.allocator, self.memory.settings
        now = allocator.now
        allowed = "" if allocator.limit is None else f"{_size(allocator.limit)} allowed; "
        return (
            f"CUDA out of memory. Tried to allocate {_size(e.segment)}. GPU 0 has a total capacity of {_size(s.total)} "
            f"of which {_size(e.free)} is free. {allowed}"
            f"Of the allocated memory {_size(now.allocated)} is allocated by PyTorch, and "
            f"{_size(now.reserved - now.allocated)} is reserved by PyTorch but unallocated. If reserved but "
            "unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid "
            f"fragmentation. (virtual {self._card.name})"
        )


class StreamEvents:
    """Events that torch records and waits for itself."""

    def __init__(self, memory: CardMemory) -> None:
        self._memory = memory

    def record(self, stream: int) -> Recorded:
        """An event behind the work so far of a stream."""
        return self._memory.record_event(stream, counts=False)

    def wait(self, stream: int, event: Recorded) -> None:
        """A stream waits for an event."""
        self._memory.wait(stream, event)


class ThreadState(threading.local):
    """What each thread has of its own: current stream, modes, and whether it makes a meta tensor on purpose."""

    stream = 0
    running: BackwardPass | None = None
    backward = (-1, 0)  # a graph task, and the stream that was current when it began
    explicit_meta = False
    inside = False
    function_mode: TorchFunctionMode | None = None


def _size(size: int) -> str:
    """As ``format_size`` in c10/cuda/CUDACachingAllocator.cpp."""
    if size <= KIB:
        return f"{size} bytes"
    for unit, name in ((KIB, "KiB"), (MIB, "MiB")):
        if size <= unit * 1024:
            return f"{size / unit:.2f} {name}"
    return f"{size / GIB:.2f} GiB"
