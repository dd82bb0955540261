"""Private pools as programs use them: ``torch.cuda.MemPool`` and CUDA graphs.

A graph is captured into a pool of its own, whose memory stays while the graph lives. Replaying one moves no memory.
What torch and its libraries keep for a graph besides its tensors is unknown, so that captures are estimated.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.scopes import Scope
from fragscope.record.virtual.storages import Entry
from fragscope.trace import PoolId


class MemPool:
    """``torch.cuda.MemPool``."""

    _pools: Pools  # set on the subclass that belongs to one virtual device

    def __init__(self, allocator: Any = None, use_on_oom: bool = False, no_split: bool = False) -> None:
        device = self._pools.device
        if allocator is not None:
            raise device.unsupported("MemPool with an allocator of its own takes memory that the model does not see")
        self._id = self._pools.new_id()
        self._users = 1
        self._number = device.memory.create_pool(self._id, use_on_oom=bool(use_on_oom), no_split=bool(no_split))

    @property
    def id(self) -> PoolId:
        """The pool's name."""
        return self._id

    def use_count(self) -> int:
        """How many use it."""
        return self._users

    def snapshot(self, include_traces: bool = True) -> list[dict[str, Any]]:
        """Its segments and blocks."""
        return self._pools.snapshot(self._id)

    def __del__(self) -> None:
        number = getattr(self, "_number", None)  # of one that could not be made
        if number is not None:
            self._pools.device.memory.release_pool(number, empties=True)


class CUDAGraph:
    """``torch.cuda.CUDAGraph``."""

    _pools: Pools

    def __init__(self, keep_graph: bool = False) -> None:
        self._scope: Scope | None = None
        self._pool: PoolId | None = None
        self._held: int | None = None  # number of the pool, once captured
        self._written: list[Entry] = []

    def capture_begin(
        self, pool: PoolId | None = None, capture_error_mode: str = "global", check_input_liveness: bool = False
    ) -> None:
        """Work on the current stream, and on those that wait for it, is captured from here on."""
        device = self._pools.device
        if self._scope is not None or self._held is not None:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a new graph, create a new instance."
            )
        if device.stream == 0:
            raise RuntimeError(
                "CUDA graphs must be captured on a non-default stream. (However, after capture, it's ok to replay them "
                "on the default stream.)"
            )
        device.estimate("CUDA graph capture")
        self._pool = tuple(pool) if pool is not None else self._pools.handle()  # type: ignore[assignment]
        number = device.memory.open_scope(self._pool)  # type: ignore[arg-type]
        device.memory.capture(begins=True)
        device.values.begin_capture()
        self._scope = device.scopes.begin(Scope(number, streams={device.stream}))

    def capture_end(self) -> None:
        """Work is done as usual again; what was captured keeps its memory until the graph is gone."""
        if self._scope is None:
            raise RuntimeError("CUDAGraph.capture_end without a capture under way")
        device, scope, self._scope = self._pools.device, self._scope, None
        device.scopes.end(scope)
        device.memory.capture(begins=False)
        self._written = device.values.end_capture()
        device.memory.close_scope(scope.pool)
        if scope.is_broken:
            device.memory.release_pool(scope.pool)
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
        self._held = scope.pool

    def replay(self) -> None:
        """What was captured runs once more, in the same memory."""
        if self._held is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self._pools.device.values.replayed(self._written)

    def reset(self) -> None:
        """The graph is gone."""
        held, self._held = self._held, None
        if held is not None:
            self._pools.device.memory.release_pool(held)

    def pool(self) -> PoolId:
        """The name of its pool, which other graphs may share."""
        if self._pool is None:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    def instantiate(self) -> None:
        """Takes no memory that the allocator would see."""

    def enable_debug_mode(self) -> None:
        """Nothing is kept for it."""

    def __del__(self) -> None:
        if self.__dict__.get("_held") is not None:  # one that was never made has nothing
            self.reset()

    def __getattr__(self, name: str) -> Any:
        if name in ("debug_dump", "raw_cuda_graph", "raw_cuda_graph_exec", "get_graph_data"):
            raise self._pools.device.unsupported(
                f"CUDAGraph.{name} needs a graph, which the virtual device has not made"
            )
        raise AttributeError(f"'CUDAGraph' object has no attribute {name!r}")


class Pools:
    """Private pools of one virtual device; each method replaces the function of its name.

    Args:
        device: whose memory they are of.
        snapshot: ``torch.cuda.memory_snapshot`` of one pool.
    """

    NAMES = ("MemPool", "use_mem_pool", "CUDAGraph", "graph_pool_handle", "is_current_stream_capturing")

    def __init__(self, device: VirtualCard, snapshot: Callable[[PoolId], list[dict[str, Any]]]) -> None:
        self.device = device
        self.snapshot = snapshot
        self._users, self._graphs = itertools.count(1), itertools.count(1)
        self.MemPool = type("MemPool", (MemPool,), {"_pools": self})
        self.CUDAGraph = type("CUDAGraph", (CUDAGraph,), {"_pools": self})

    def new_id(self) -> PoolId:
        """A name for a pool that the program makes."""
        return 0, next(self._users)

    def handle(self) -> PoolId:
        """A name for a graph's pool."""
        return next(self._graphs), 0

    graph_pool_handle = handle

    @contextlib.contextmanager
    def use_mem_pool(self, pool: MemPool, device: Any = None) -> Iterator[None]:
        """Requests of the running thread go to the pool."""
        self.device.check_index(device)
        memory, scopes = self.device.memory, self.device.scopes
        number = memory.open_scope(pool.id)
        scope = scopes.begin(Scope(number, thread=threading.get_ident()))
        pool._users += 1
        try:
            yield
        finally:
            scopes.end(scope)
            memory.close_scope(number)
            memory.release_pool(number)
            pool._users -= 1

    def is_current_stream_capturing(self) -> bool:
        """Whether work on the current stream is captured."""
        return self.device.scopes.is_captured(self.device.stream)
