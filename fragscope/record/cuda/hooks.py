"""Notes what PyTorch's history leaves out, where a program does it through Python.

Each hook stands in for one function of torch and calls it. What C++ code does by itself (``record_stream`` by a
communication library, say) passes by unseen and is inferred from the events, as it is for snapshots.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fragscope.record.cuda.edge import Notes
from fragscope.trace import RequestKind
from fragscope.trace.chunks import RELEASED, note
from fragscope.trace.events import FRACTION_UNIT

_ABSENT = object()

# What of torch._C reads memory state, and what a program calls to get there. All of torch.cuda goes through these.
OBSERVING = {
    "_cuda_memoryStats": "torch.cuda.memory_stats",
    "_cuda_memorySnapshot": "torch.cuda.memory_snapshot",
    "_accelerator_getDeviceStats": "torch.accelerator.memory_stats",
    "_accelerator_getMemoryInfo": "torch.accelerator.get_memory_info",
}

_quiet = threading.local()


@contextmanager
def quietly() -> Iterator[None]:
    """What this thread does meanwhile is the recorder's own, and not noted."""
    before = getattr(_quiet, "on", False)
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = before


def is_quiet() -> bool:
    """Whether this thread's calls are the recorder's own."""
    return bool(getattr(_quiet, "on", False))


@contextmanager
def installed(torch: Any, notes: Notes) -> Iterator[None]:
    """While entered, the program's calls are noted."""
    patches = _Patches()
    try:
        for patch in (_releases, _settings, _streams, _pools, _captures, _observations, _histories):
            patch(torch, notes, patches)
        yield
    finally:
        patches.undo()


class _Patches:
    """Attributes that were replaced, and what they were."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def replace(
        self,
        owner: Any,
        name: str,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
        missing: Callable[..., Any] | None = None,
    ) -> None:
        """Put a wrapper in place of a function, if this release has it; ``missing`` stands for one that it lacks."""
        original = getattr(owner, name, missing)
        if original is None:
            return
        own = vars(owner).get(name, _ABSENT)
        made = functools.wraps(original)(wrap(original))
        setattr(owner, name, made)
        self._replaced.append((owner, name, own, made))

    def undo(self) -> None:
        """Put everything back, but for what someone else has replaced since."""
        for owner, name, own, made in reversed(self._replaced):
            if vars(owner).get(name) is not made:
                continue
            if own is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self._replaced.clear()


def _releases(torch: Any, notes: Notes, patches: _Patches) -> None:
    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def empty_cache(*args: Any, **kwargs: Any) -> Any:
            if is_quiet():
                return call(*args, **kwargs)
            notes.note(note(RequestKind.EMPTY_CACHE))
            try:
                return call(*args, **kwargs)
            finally:
                notes.note(RELEASED)

        return empty_cache

    for name in ("_cuda_emptyCache", "_accelerator_emptyCache"):
        patches.replace(torch._C, name, wrap)


def _settings(torch: Any, notes: Notes, patches: _Patches) -> None:
    def fraction(call: Callable[..., Any]) -> Callable[..., Any]:
        def set_fraction(value: float, *args: Any, **kwargs: Any) -> Any:
            done = call(value, *args, **kwargs)
            device = args[0] if args and isinstance(args[0], int) else -1
            notes.note(note(RequestKind.MEMORY_FRACTION), device=device, size=round(value * FRACTION_UNIT))
            return done

        return set_fraction

    def conf(call: Callable[..., Any]) -> Callable[..., Any]:
        def set_conf(text: str, *args: Any, **kwargs: Any) -> Any:
            done = call(text, *args, **kwargs)
            notes.note(note(RequestKind.SETTINGS), text=text)
            return done

        return set_conf

    patches.replace(torch._C, "_cuda_setMemoryFraction", fraction)
    for name in ("_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings"):
        patches.replace(torch._C, name, conf)


def _streams(torch: Any, notes: Notes, patches: _Patches) -> None:
    plain = (torch.Tensor, torch.nn.Parameter)

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def record_stream(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Subclasses have no memory of their own, or refuse to say where it is; what they wrap passes by as well.
            if type(self) in plain and self.is_cuda:
                with contextlib.suppress(Exception):
                    stream = args[0] if args else kwargs["s"]
                    handle = int(stream.cuda_stream)
                    begin = self.untyped_storage().data_ptr()
                    notes.note(note(RequestKind.RECORD_STREAM), device=self.get_device(), addr=begin, stream=handle)
            return call(self, *args, **kwargs)

        return record_stream

    patches.replace(torch.Tensor, "record_stream", wrap)


def _pools(torch: Any, notes: Notes, patches: _Patches) -> None:
    def device_of(args: tuple[Any, ...]) -> int:
        return args[0] if args and isinstance(args[0], int) else -1

    def noted(kind: RequestKind, *, first: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def pooled(*args: Any, **kwargs: Any) -> Any:
                pool = args[1] if len(args) > 1 else (0, 0)
                if first:
                    notes.note(note(kind), device=device_of(args), pool=tuple(pool))
                done = call(*args, **kwargs)
                if not first:
                    notes.note(note(kind), device=device_of(args), pool=tuple(pool))
                return done

            return pooled

        return wrap

    for owner in (torch._C, torch.cuda.memory):
        for name in ("_cuda_beginAllocateToPool", "_cuda_beginAllocateCurrentThreadToPool"):
            patches.replace(owner, name, noted(RequestKind.SCOPE_OPEN, first=True))
        patches.replace(owner, "_cuda_endAllocateToPool", noted(RequestKind.SCOPE_CLOSE, first=False))
        patches.replace(owner, "_cuda_releasePool", noted(RequestKind.POOL_RELEASE, first=False))

    def made(call: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            call(self, *args, **kwargs)
            options = _flag(kwargs, args, "use_on_oom", 1) + 2 * _flag(kwargs, args, "no_split", 2)
            notes.note(note(RequestKind.POOL_CREATE), size=options, pool=tuple(self.id))

        return init

    def dropped(call: Callable[..., Any]) -> Callable[..., Any]:
        def delete(self: Any) -> None:
            notes.note(note(RequestKind.POOL_RELEASE), pool=tuple(self.id))
            call(self)

        return delete

    pool = getattr(torch.cuda, "MemPool", None)
    if pool is not None:
        patches.replace(pool, "__init__", made)
        patches.replace(pool, "__del__", dropped, _nothing)


def _nothing(self: Any) -> None:
    del self


def _flag(kwargs: dict[str, Any], args: tuple[Any, ...], name: str, position: int) -> int:
    value = kwargs.get(name, args[position] if len(args) > position else False)
    return 1 if value else 0


def _captures(torch: Any, notes: Notes, patches: _Patches) -> None:
    # Up to 2.11 a graph does not tell its pool before the capture is over. Both ends of the scope bear a number, by
    # which a reader gives the pool of the end to the beginning.
    numbers = itertools.count(1)
    begun: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
    pools: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()

    def begin(call: Callable[..., Any]) -> Callable[..., Any]:
        def capture_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
            done = call(self, *args, **kwargs)
            begun[self] = number = next(numbers)
            notes.note(note(RequestKind.SCOPE_OPEN), addr=number)
            notes.note(note(RequestKind.CAPTURE_BEGIN))
            return done

        return capture_begin

    def end(call: Callable[..., Any]) -> Callable[..., Any]:
        def capture_end(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return call(self, *args, **kwargs)
            finally:
                notes.note(note(RequestKind.CAPTURE_END))
                with contextlib.suppress(RuntimeError):  # the capture failed, and there is no graph
                    pools[self] = tuple(self.pool())
                notes.note(note(RequestKind.SCOPE_CLOSE), addr=begun.get(self, 0), pool=pools.get(self, (0, 0)))

        return capture_end

    def ended(call: Callable[..., Any]) -> Callable[..., Any]:
        def end_of_life(self: Any) -> Any:
            pool = pools.pop(self, None)
            if pool is not None:  # captured, and not reset since: its pool has one user less
                notes.note(note(RequestKind.POOL_RELEASE), pool=pool)
            return call(self)

        return end_of_life

    graph = getattr(torch.cuda, "CUDAGraph", None)
    if graph is not None:
        patches.replace(graph, "capture_begin", begin)
        patches.replace(graph, "capture_end", end)
        patches.replace(graph, "reset", ended)
        patches.replace(graph, "__del__", ended, _nothing)


def _observations(torch: Any, notes: Notes, patches: _Patches) -> None:
    def observing(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def observe(*args: Any, **kwargs: Any) -> Any:
                if not is_quiet():
                    notes.note(note(RequestKind.OBSERVATION), text=f"{what}\n{caller()}")
                return call(*args, **kwargs)

            return observe

        return wrap

    for name, what in OBSERVING.items():
        patches.replace(torch._C, name, observing(what))
    runtime = getattr(torch._C, "_cudart", None)
    if runtime is not None:
        patches.replace(runtime, "cudaMemGetInfo", observing("torch.cuda.mem_get_info"))


def _histories(torch: Any, notes: Notes, patches: _Patches) -> None:
    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def record_history(*args: Any, **kwargs: Any) -> Any:
            if not is_quiet():
                with contextlib.suppress(Exception), quietly():
                    notes.history_wanted()
            return call(*args, **kwargs)

        return record_history

    for name in ("_cuda_record_memory_history", "_cuda_record_memory_history_legacy"):
        patches.replace(torch._C, name, wrap)


def caller() -> str:
    """``file:line`` of the innermost frame that is neither torch's nor the recorder's; ``""`` if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "fragscope.")) and module not in ("torch", "fragscope", "functools"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
