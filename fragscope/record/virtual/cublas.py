"""cuBLAS's handles and workspaces: which thread has which handle, and what its products take on a stream.

Every thread takes a handle when it first multiplies matrices, one that an ended thread gave back or else a new one, and
keeps it until it ends. The thread of autograd, which runs all backward passes, has one of its own. A handle takes a
workspace at its first product on a stream, and cuBLASLt, which adds a bias or scales in the same kernel, one more.
Workspaces are kept.

Source: aten/src/ATen/cuda/CublasHandlePool.cpp and detail/DeviceThreadHandles.h beside it; recorded on an H100 with
torch 2.11 (tests/data/streams, and ``linear_forward_backward`` of tests/data/footprints).
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable

import torch

from fragscope.record.virtual.footprints import GEMM_RECORDED, LT_WORKSPACE, gemm_workspace


class _Reserved:
    """A handle that a thread has; it dies with the thread."""

    def __init__(self, handle: int) -> None:
        self.handle = handle


class Cublas:
    """Handles and workspaces of one card.

    Args:
        capability: of the card; asked when a workspace is taken.
        allocate: takes bytes on the current stream and returns the lifetime id.
        estimate: told what is not known.

    Attributes:
        workspaces: lifetime ids by library, handle and stream.
    """

    def __init__(
        self,
        capability: Callable[[], tuple[int, int]],
        allocate: Callable[[int], int | None],
        estimate: Callable[[str], None],
    ) -> None:
        self._capability, self._allocate, self._estimate = capability, allocate, estimate
        self.workspaces: dict[tuple[str, int, int], int] = {}
        self._numbers = itertools.count()
        self._given_back: list[int] = []
        self._running: set[int] = set()  # handles of the program's threads besides the main one
        self._local = threading.local()
        self._of_autograd: int | None = None
        self._autograd_unsure = False

    def backward(self) -> None:
        """A backward pass begins: the first one starts autograd's thread.

        Whether that takes over a handle given back was not seen.
        """
        if self._of_autograd is None:
            self._autograd_unsure = bool(self._given_back)
            self._of_autograd = next(self._numbers)

    def take(self, stream: int, *, lt: bool) -> None:
        """Take what a product on the current stream, by its handle, takes besides its result.

        Args:
            stream: handle of the current one.
            lt: the product goes to cuBLASLt.
        """
        handle = self._handle()
        capability = self._capability()
        if ("cuBLAS", handle, stream) not in self.workspaces:
            if capability not in GEMM_RECORDED:
                self._estimate("cuBLAS workspace")
            self.workspaces["cuBLAS", handle, stream] = self._allocate(gemm_workspace(capability)) or 0
        if lt and ("cuBLASLt", handle, stream) not in self.workspaces:
            self.workspaces["cuBLASLt", handle, stream] = self._allocate(LT_WORKSPACE) or 0

    def _handle(self) -> int:
        """The running thread's handle."""
        if torch._C._current_graph_task_id() != -1:
            self.backward()
            if self._autograd_unsure:
                self._estimate("cuBLAS workspace of backward passes after threads")
            assert self._of_autograd is not None
            return self._of_autograd
        reserved: _Reserved | None = getattr(self._local, "reserved", None)
        if reserved is None:
            if self._running:  # which of them ends, or begins, first is a matter of time
                self._estimate("cuBLAS workspaces of threads that run at once")
            handle = self._given_back.pop() if self._given_back else next(self._numbers)
            reserved = self._local.reserved = _Reserved(handle)
            if threading.current_thread() is not threading.main_thread():
                self._running.add(handle)
                weakref.finalize(reserved, self._give_back, handle).atexit = False
        return reserved.handle

    def _give_back(self, handle: int) -> None:
        self._running.discard(handle)
        self._given_back.append(handle)
