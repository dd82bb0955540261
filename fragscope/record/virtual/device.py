"""The virtual device: runs tensor code that says ``cuda`` at full size without a GPU and without the memory.

Tensors on the card are *meta* tensors, which have shapes, types and strides but no data. A function mode makes them
look like CUDA tensors and a dispatch mode sees every operator, registers the storages it makes with an allocator
model, and follows them by weak reference until the last tensor that uses them is gone.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from fragscope.allocator import Card, ReplaySettings
from fragscope.errors import UsageError
from fragscope.record.virtual.autocast import entering_autocast, patched_autocast
from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.cuda_api import patched_cuda
from fragscope.record.virtual.custom_ops import patched_custom_ops
from fragscope.record.virtual.device_type import patched_device_type
from fragscope.record.virtual.dispatch import DispatchMode
from fragscope.record.virtual.functions import FunctionMode
from fragscope.record.virtual.legacy_types import patched_types
from fragscope.record.virtual.ordering import LEGACY
from fragscope.record.virtual.storage_api import patched_storages
from fragscope.record.virtual.storages import Place
from fragscope.record.virtual.threads import patched_threads


class VirtualDevice(VirtualCard):
    """A CUDA card that exists only as an allocator model; use it once, as a context manager.

    Threads that the program starts meanwhile see the card, too, each with a current stream of its own.

    Args:
        card: what the card reports of itself.
        settings: memory, rules and conf its allocator works under.
        root: folder that file names in stacks are relative to.
    """

    def __init__(self, card: Card, settings: ReplaySettings, root: Path | None = None) -> None:
        super().__init__(card, settings, root)
        self._stack = contextlib.ExitStack()
        self._entered = False

    _active: ClassVar[VirtualDevice | None] = None

    def __enter__(self) -> VirtualDevice:
        if VirtualDevice._active is not None:
            raise UsageError("a virtual device is active already; leave it before entering another")
        if self._entered:
            raise UsageError("this virtual device was used before; make a new one for a new recording")
        # Shape rules, optimizers and much else import this part of torch at their first use. While the device is active
        # it would keep what is patched, and the import's caught errors would keep the frames of all callers alive.
        importlib.import_module("torch._dynamo")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_kept_default_device())
            stack.enter_context(patched_cuda(self))
            stack.enter_context(patched_types())
            stack.enter_context(patched_device_type())
            stack.enter_context(patched_storages(self))
            stack.enter_context(patched_custom_ops(self))
            stack.enter_context(patched_autocast(self.autocast))
            stack.enter_context(patched_threads(self.in_thread))
            stack.enter_context(self.in_thread())
            self._stack = stack.pop_all()
        self._entered = True
        VirtualDevice._active = self
        return self

    def __exit__(self, *exc: object) -> None:
        VirtualDevice._active = None
        try:
            self._stack.close()
        finally:
            self.storages.close()

    @classmethod
    def leave_active(cls) -> None:
        """Leave the device that is active, if any: a forked child goes on without the card of its parent."""
        if cls._active is not None:
            cls._active.__exit__(None, None, None)

    def kernel(
        self, what: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], stream: Any = None
    ) -> None:
        """A kernel that torch does not see reads and writes tensors on the card; see ``Case.kernel``.

        Raises:
            UsageError: a tensor is not on the card.
        """
        for tensor in (*reads, *writes):
            if self.storages.place(tensor) is not Place.CARD:
                raise UsageError(f"kernel {what!r}: one of its tensors is not on the card")
        for tensor in writes:
            self.values.lose(tensor, what)
        self.launched(what, reads, writes, LEGACY if stream is None else stream.cuda_stream)

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[None]:
        """The modes that show the card to the running thread; torch keeps them by thread."""
        state = self._thread
        if state.inside:
            yield
            return
        state.inside = True
        state.function_mode = FunctionMode(self)
        try:
            with entering_autocast(), state.function_mode, DispatchMode(self):
                yield
        finally:
            state.inside = False
            state.function_mode = None


@contextlib.contextmanager
def _kept_default_device() -> Iterator[None]:
    """A default device that the program sets would outlive the card, and ask for a real one."""
    context = torch._GLOBAL_DEVICE_CONTEXT
    before = getattr(context, "device_context", None)
    try:
        yield
    finally:
        if getattr(context, "device_context", None) is not before:
            torch.set_default_device(None if before is None else before.device)
        if before is None and hasattr(context, "device_context"):
            del context.device_context  # torch 2.9 asks a device of it
