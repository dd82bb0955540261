"""The virtual device: runs tensor code that says ``cuda`` at full size without a GPU and without the memory.

Tensors on the card are *meta* tensors, which have shapes, types and strides but no data. A function mode makes them look
like CUDA tensors and a dispatch mode sees every operator, registers the storages it makes with an allocator model, and
follows them by weak reference until the last tensor that uses them is gone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fragscope.allocator import Card, OutOfMemoryError, ReplaySettings
from fragscope.errors import UnsupportedError
from fragscope.record.virtual.callsite import CallSites
from fragscope.record.virtual.card_memory import CardMemory
from fragscope.record.virtual.footprints import GEMM_WORKSPACE
from fragscope.record.virtual.storages import Entry, Place, Storages
from fragscope.trace import Trace
from fragscope.units import GIB, MIB


class VirtualDevice:
    """A CUDA card that exists only as an allocator model; use it as a context manager, in one thread.

    Args:
        card: what the card reports of itself.
        settings: memory, rules and conf its allocator works under.
        root: folder that file names in stacks are relative to.

    Attributes:
        memory: the allocator model and the log of requests.
        estimated: operators whose hidden temporaries are unknown: calls and first place, by name.
    """

    def __init__(self, card: Card, settings: ReplaySettings, root: Path | None = None) -> None:
        self.card = card
        self.memory = CardMemory(settings)
        self.sites = CallSites(root)
        self.storages = Storages(self.memory.free)
        self.estimated: dict[str, tuple[int, str]] = {}
        self.stream = 0
        self.explicit_meta = False
        self.gemm_workspaces: dict[int, int] = {}  # stream -> lifetime id
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> VirtualDevice:
        from fragscope.record.virtual.cuda_api import patched_cuda
        from fragscope.record.virtual.custom_ops import patched_custom_ops
        from fragscope.record.virtual.dispatch import DispatchMode
        from fragscope.record.virtual.functions import FunctionMode

        self._stack.enter_context(patched_cuda(self))
        self._stack.enter_context(patched_custom_ops(self))
        self._stack.enter_context(FunctionMode(self))
        self._stack.enter_context(DispatchMode(self))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self.storages.close()

    def trace(self, provenance: dict[str, str] | None = None) -> Trace:
        """What was asked so far, with the decisions made about it."""
        return self.memory.trace(provenance)

    # --- memory ---------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> int | None:
        """Allocate on the current stream; None for no bytes.

        Raises:
            torch.OutOfMemoryError: as on the card.
        """
        if size == 0:
            return None
        stack = self.sites.stack()
        try:
            return self.memory.alloc(size, self.stream, stack)
        except OutOfMemoryError as e:
            raise torch.OutOfMemoryError(self._oom_message(e)) from None

    def register(self, tensor: torch.Tensor) -> None:
        """Give a new tensor's storage its memory on the card, unless it is followed already."""
        if self.storages.find(tensor) is None:
            id_ = self.allocate(tensor.untyped_storage().nbytes())
            self.storages.follow(tensor, Place.CARD, id_)

    def resized(self, tensor: torch.Tensor, entry: Entry) -> None:
        """A storage on the card grew or shrank: the new memory is taken before the old is given back."""
        size = tensor.untyped_storage().nbytes()
        if size == entry.size:
            return
        old = entry.id
        entry.id = self.allocate(size)
        entry.size = size
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

    @contextlib.contextmanager
    def index_temporaries(self, indices: Sequence[torch.Tensor | None], on_host: Sequence[bool]) -> Iterator[None]:
        """What indexing takes before its result: host indices come to the card, then int32 becomes int64.

        Source: ``make_info`` in aten/src/ATen/native/TensorAdvancedIndexing.cpp.
        """
        given = [i for i in indices if i is not None]
        elements = math.prod(torch.broadcast_shapes(*(i.shape for i in given)))
        copies: list[int | None] = [
            self.allocate(elements * i.itemsize) if i is not None and there else None
            for i, there in zip(indices, on_host, strict=True)
        ]
        try:
            for position, index in enumerate(indices):
                if index is not None and index.dtype == torch.int32:
                    old, copies[position] = copies[position], self.allocate(elements * 8)
                    self._release(old)
            yield
        finally:
            for id_ in copies:
                self._release(id_)

    def _release(self, id_: int | None) -> None:
        if id_ is not None:
            self.memory.free(id_)

    def take_gemm_workspace(self) -> None:
        """cuBLAS's workspace, allocated by the first matrix product on a stream and kept."""
        if self.stream in self.gemm_workspaces:
            return
        size = GEMM_WORKSPACE.get(self.card.capability[0])
        if size is None:
            self.estimate("cuBLAS workspace")
            return
        self.gemm_workspaces[self.stream] = self.allocate(size) or 0

    # --- what cannot be known -------------------------------------------------------------------------------------

    def unsupported(self, what: str) -> UnsupportedError:
        """The error for something that cannot be known without data, at the user's line."""
        return UnsupportedError(what, self.sites.where())

    def estimate(self, op: str) -> None:
        """Note an operator whose hidden temporaries are unknown."""
        calls, where = self.estimated.get(op, (0, ""))
        self.estimated[op] = (calls + 1, where or self.sites.where() or "")

    def observe(self, what: str) -> None:
        """The program reads memory state."""
        self.memory.observe(what, self.sites.stack())

    def _oom_message(self, e: OutOfMemoryError) -> str:
        meter = self.memory.allocator.meter
        idle = meter.reserved - meter.allocated
        s = self.memory.settings
        return (
            f"CUDA out of memory. Tried to allocate {_size(e.requested)}. GPU 0 has a total capacity of "
            f"{_size(s.total)} of which {_size(e.free)} is free. Of the allocated memory {_size(meter.allocated)} is "
            f"allocated by PyTorch, and {_size(idle)} is reserved by PyTorch but unallocated. (virtual {self.card.name})"
        )


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"
