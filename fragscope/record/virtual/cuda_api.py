"""``torch.cuda`` as the chosen card answers it, patched in while a virtual device is active.

Queries of memory state are observations: the program may act on what it reads, so a replay under other settings would
have to be recorded anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.cuda
import torch.cuda.memory

if TYPE_CHECKING:
    from fragscope.record.virtual.device import VirtualDevice


@contextlib.contextmanager
def patched_cuda(device: VirtualDevice) -> Iterator[None]:
    """Replace the functions of ``torch.cuda`` and ``torch.accelerator`` that a program asks, until the end."""
    api = _Cuda(device)
    with contextlib.ExitStack() as stack:
        for name in _Cuda.NAMES:
            for module in (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, getattr(api, name)))
        for name, target in _Cuda.ACCELERATOR.items():
            for module in (torch.accelerator, getattr(torch.accelerator, "memory", None)):
                if module is not None and hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, getattr(api, target)))
        # The method parses its argument as a real stream before any mode is asked.
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", api.record_stream))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(torch.autocast, "__enter__", api.refuse_autocast))
        stack.enter_context(mock.patch.object(torch, "compile", api.refuse("torch.compile")))
        yield


class _Stream:
    """A CUDA stream of the virtual card."""

    _next_handle = 0x5500_0000_0000

    def __init__(self, device: Any = None, priority: int = 0, *, _handle: int | None = None, **_: Any) -> None:
        if _handle is None:
            type(self)._next_handle += 0x1000
            _handle = self._next_handle
        self.cuda_stream = _handle
        self.stream_id = _handle
        self.priority = priority
        self.device = torch.device("cuda", 0)
        self.device_index = 0

    _api: _Cuda  # set on the subclass that belongs to one virtual device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)

    def __enter__(self) -> _Stream:
        self._api.push(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._api.pop()

    def synchronize(self) -> None:
        self._api.memory.finished(self.cuda_stream)

    def wait_stream(self, stream: _Stream) -> None:
        """Ordering between streams; memory is not moved by it."""

    def wait_event(self, event: _Event) -> None:
        """Ordering between streams; memory is not moved by it."""

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event if event is not None else self._api.Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return False

    def is_capturing(self) -> bool:
        return False


class _Event:
    """A CUDA event of the virtual card."""

    _api: _Cuda

    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded: tuple[int, int] | None = None

    def record(self, stream: _Stream | None = None) -> None:
        memory = self._api.memory
        memory.clock += 1
        self._recorded = (stream.cuda_stream if stream is not None else self._api.device.stream, memory.clock)

    def synchronize(self) -> None:
        if self._recorded is not None:
            self._api.memory.finished(*self._recorded)

    def wait(self, stream: _Stream | None = None) -> None:
        """Ordering between streams; memory is not moved by it."""

    def query(self) -> bool:
        return self._recorded is None

    def elapsed_time(self, end: _Event) -> float:
        raise self._api.device.unsupported("Event.elapsed_time: a virtual device has no time")


class _Cuda:
    """The answers of one virtual device; each method replaces the function of its name."""

    NAMES = (
        "is_available", "is_initialized", "init", "_lazy_init", "_lazy_call", "_is_in_bad_fork", "device_count",
        "current_device", "set_device", "get_device_name", "get_device_capability", "get_device_properties",
        "_exchange_device", "_maybe_exchange_device", "is_bf16_supported", "get_arch_list", "can_device_access_peer",
        "synchronize", "current_stream", "default_stream", "set_stream", "stream", "Stream", "Event", "ipc_collect",
        "is_current_stream_capturing",
        "empty_cache", "mem_get_info", "memory_allocated", "max_memory_allocated", "memory_reserved",
        "max_memory_reserved", "memory_stats", "memory_stats_as_nested_dict", "memory_summary", "memory_snapshot",
        "reset_peak_memory_stats", "reset_accumulated_memory_stats", "set_per_process_memory_fraction",
        "get_per_process_memory_fraction", "manual_seed", "manual_seed_all", "seed", "seed_all", "MemPool",
        "use_mem_pool", "CUDAGraph", "graph", "caching_allocator_alloc", "caching_allocator_delete", "cudart",
    )  # fmt: skip
    ACCELERATOR = {  # noqa: RUF012 - a constant table
        "is_available": "is_available", "device_count": "device_count", "current_accelerator": "current_accelerator",
        "current_device_index": "current_device", "current_device_idx": "current_device",
        "set_device_index": "set_device", "set_device_idx": "set_device", "current_stream": "current_stream",
        "set_stream": "set_stream", "synchronize": "synchronize", "empty_cache": "empty_cache",
        "memory_allocated": "memory_allocated", "max_memory_allocated": "max_memory_allocated",
        "memory_reserved": "memory_reserved", "max_memory_reserved": "max_memory_reserved",
        "memory_stats": "memory_stats", "reset_peak_memory_stats": "reset_peak_memory_stats",
        "get_memory_info": "mem_get_info",
    }  # fmt: skip

    def __init__(self, device: VirtualDevice) -> None:
        self.device = device
        self.memory = device.memory
        self._meter = device.memory.allocator.meter
        self._peak_allocated = self._peak_reserved = 0
        self.Stream = type("Stream", (_Stream,), {"_api": self})
        self.Event = type("Event", (_Event,), {"_api": self})
        self._default = self.Stream(_handle=0)
        self._streams = [self._default]
        for name in ("MemPool", "use_mem_pool", "CUDAGraph", "graph", "caching_allocator_alloc", "cudart"):
            setattr(self, name, self.refuse(f"torch.cuda.{name}"))
        self.caching_allocator_delete = self.refuse("torch.cuda.caching_allocator_delete")

    def refuse(self, what: str) -> Callable[..., Any]:
        """A stand-in for something the virtual device does not do."""

        def refused(*args: Any, **kwargs: Any) -> Any:
            raise self.device.unsupported(f"{what} is not supported on the virtual device")

        return refused

    def refuse_autocast(self, context: Any) -> Any:
        """``torch.autocast("cuda")``: metadata tensors take no part in it, so its casts would go uncounted."""
        if context.device == "cuda":
            raise self.device.unsupported("torch.autocast is not supported on the virtual device")
        return self._enter_autocast(context)

    _enter_autocast = staticmethod(torch.autocast.__enter__)

    # --- the card -------------------------------------------------------------------------------------------------

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def init(self) -> None:
        """Nothing to start."""

    _lazy_init = init

    def _lazy_call(self, call: Callable[[], None], **kwargs: Any) -> None:
        """What waits for a real card is never due."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def current_accelerator(self, check_available: bool = False) -> torch.device:
        return torch.device("cuda")

    def set_device(self, device: Any) -> None:
        self._check(device)

    def _check(self, device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index if device is not None else 0
        if index not in (None, 0, -1):
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device}; the virtual device has one card, cuda:0)")

    def _exchange_device(self, device: int) -> int:
        self._check(device)
        return 0

    _maybe_exchange_device = _exchange_device

    def get_device_name(self, device: Any = None) -> str:
        self._check(device)
        return self.device.card.product

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        self._check(device)
        return self.device.card.capability

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        self._check(device)
        card = self.device.card
        return SimpleNamespace(
            name=card.product,
            major=card.capability[0],
            minor=card.capability[1],
            total_memory=self.memory.settings.total,
            multi_processor_count=card.multiprocessors,
            L2_cache_size=card.l2,
            warp_size=32,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536,
            shared_memory_per_block=49152,
            is_integrated=0,
            is_multi_gpu_board=0,
            gcnArchName="",
            uuid="virtual",
        )

    def get_arch_list(self) -> list[str]:
        major, minor = self.device.card.capability
        return [f"sm_{major}{minor}"]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return self.device.card.capability[0] >= 8

    def can_device_access_peer(self, device: Any, peer: Any) -> bool:
        return False

    # --- streams --------------------------------------------------------------------------------------------------

    def synchronize(self, device: Any = None) -> None:
        self._check(device)
        self.memory.finished()

    def current_stream(self, device: Any = None) -> _Stream:
        self._check(device)
        return self._streams[-1]

    def default_stream(self, device: Any = None) -> _Stream:
        self._check(device)
        return self._default

    def set_stream(self, stream: _Stream | None) -> None:
        if stream is not None:
            self._streams[-1] = stream
            self.device.stream = stream.cuda_stream

    @contextlib.contextmanager
    def stream(self, stream: _Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        self.push(stream)
        try:
            yield
        finally:
            self.pop()

    def push(self, stream: _Stream) -> None:
        self._streams.append(stream)
        self.device.stream = stream.cuda_stream

    def pop(self) -> None:
        self._streams.pop()
        self.device.stream = self._streams[-1].cuda_stream

    def is_current_stream_capturing(self) -> bool:
        return False

    @property
    def record_stream(self) -> Callable[[torch.Tensor, _Stream], None]:
        """A stand-in for ``Tensor.record_stream``."""
        device = self.device

        def record_stream(tensor: torch.Tensor, stream: _Stream) -> None:
            entry = device.storages.find(tensor)
            if entry is not None and entry.id is not None:
                device.memory.record_stream(entry.id, stream.cuda_stream)

        return record_stream

    # --- memory ---------------------------------------------------------------------------------------------------

    def empty_cache(self) -> None:
        self.memory.empty_cache()

    def ipc_collect(self) -> None:
        """No memory is shared between processes."""

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        self._check(device)
        self.device.observe("torch.cuda.mem_get_info")
        return self.memory.allocator.device.free, self.memory.settings.total

    def memory_allocated(self, device: Any = None) -> int:
        self.device.observe("torch.cuda.memory_allocated")
        return self._meter.allocated

    def memory_reserved(self, device: Any = None) -> int:
        self.device.observe("torch.cuda.memory_reserved")
        return self._meter.reserved

    def max_memory_allocated(self, device: Any = None) -> int:
        self.device.observe("torch.cuda.max_memory_allocated")
        return self._meter.program_peak_allocated

    def max_memory_reserved(self, device: Any = None) -> int:
        self.device.observe("torch.cuda.max_memory_reserved")
        return self._meter.program_peak_reserved

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self._meter.reset_program_peak()

    def reset_accumulated_memory_stats(self, device: Any = None) -> None:
        """Accumulated statistics are not kept."""

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        self.device.observe("torch.cuda.memory_stats")
        m, a = self._meter, self.memory.allocator
        out: dict[str, int] = {}
        for key, value in (
            ("allocated_bytes", m.allocated),
            ("active_bytes", m.active),
            ("reserved_bytes", m.reserved),
            ("requested_bytes", m.requested),
            ("inactive_split_bytes", m.inactive_split),
            ("segment", m.segments),
        ):
            out[f"{key}.all.current"] = value
        out["allocated_bytes.all.peak"] = m.program_peak_allocated
        out["reserved_bytes.all.peak"] = m.program_peak_reserved
        out.update(num_alloc_retries=a.retries, num_ooms=a.ooms)
        out.update(num_device_alloc=a.calls.alloc, num_device_free=a.calls.free, num_sync_all_streams=a.calls.sync)
        return out

    def memory_stats_as_nested_dict(self, device: Any = None) -> Any:
        raise self.device.unsupported("torch.cuda.memory_stats_as_nested_dict is not supported on the virtual device")

    def memory_summary(self, device: Any = None, abbreviated: bool = False) -> str:
        self.device.observe("torch.cuda.memory_summary")
        m = self._meter
        return f"virtual {self.device.card.name}: allocated {m.allocated}, reserved {m.reserved} bytes"

    def memory_snapshot(self, *args: Any, **kwargs: Any) -> Any:
        raise self.device.unsupported("torch.cuda.memory_snapshot is not supported on the virtual device")

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        self.memory.set_memory_fraction(fraction)
        self._fraction = fraction

    _fraction = 1.0

    def get_per_process_memory_fraction(self, device: Any = None) -> float:
        return self._fraction

    # --- random numbers: nobody sees them -------------------------------------------------------------------------

    def manual_seed(self, seed: int) -> None:
        """No numbers are drawn."""

    manual_seed_all = manual_seed

    def seed(self) -> None:
        """No numbers are drawn."""

    seed_all = seed
