"""``torch.cuda`` as the chosen card answers it, patched in while a virtual device is active.

Queries of memory state are observations: the program may act on what it reads, so a replay under other settings would
have to be recorded anew.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.cuda
import torch.cuda.memory
import torch.testing
import torch.utils.dlpack
from torch.overrides import _get_current_function_mode_stack

from fragscope.errors import UnsupportedError
from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.card_memory import Recorded


@contextlib.contextmanager
def patched_cuda(device: VirtualCard) -> Iterator[None]:
    """Replace the functions of ``torch.cuda`` and ``torch.accelerator`` that a program asks, until the end."""
    api = _Cuda(device)
    module: Any
    with contextlib.ExitStack() as stack:
        for name in _Cuda.NAMES:
            for module in (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, getattr(api, name)))
        for name, target in _Cuda.ACCELERATOR.items():
            for module in (torch.accelerator, getattr(torch.accelerator, "memory", torch.accelerator)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, getattr(api, target)))
        # The method parses its argument as a real stream before any mode is asked.
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", api.record_stream))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(torch, "compile", api.refuse("torch.compile")))
        hooks = torch.autograd.graph.saved_tensors_hooks
        stack.enter_context(mock.patch.object(hooks, "__init__", api.saved_tensors_hooks(hooks.__init__)))
        pickled = api.reduce(torch.Tensor.__reduce_ex__)
        stack.enter_context(mock.patch.object(torch.Tensor, "__reduce_ex__", pickled))
        for module in (torch.utils.dlpack, torch):
            stack.enter_context(mock.patch.object(module, "to_dlpack", api.to_dlpack(torch._C._to_dlpack)))
        for module in (torch.testing, torch.testing._comparison):
            checked = api.assert_close(torch.testing.assert_close)
            stack.enter_context(mock.patch.object(module, "assert_close", checked))
        for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
            stack.enter_context(mock.patch.object(torch.cuda.nvtx, name, lambda *args, **kwargs: 0))
        rnn = torch.nn.RNNBase
        flatten = api.flatten_parameters(rnn.flatten_parameters)
        stack.enter_context(mock.patch.object(rnn, "flatten_parameters", flatten))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch, "Stream", api.Stream))
        stack.enter_context(mock.patch.object(torch, "Event", api.Event))
        yield


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """What ``copy.copy`` makes: another tensor on the same storage."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _Generator(torch.Generator):
    """A generator that may say it is on the card; the numbers are nobody's business."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, device="cpu" if torch.device(device).type == "cuda" else device)  # type: ignore[call-arg]

    def __init__(self, device: Any = "cpu") -> None:
        self._shown = torch.device("cuda", 0) if torch.device(device).type == "cuda" else torch.device(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device it was made for."""
        return self._shown


class _Stream:
    """A CUDA stream of the virtual card."""

    _handles = itertools.count(0x5500_0000_1000, 0x1000)

    def __init__(self, device: Any = None, priority: int = 0, *, _handle: int | None = None, **_: Any) -> None:
        self._api.check(device)
        if _handle is None:
            _handle = next(self._handles)
            self._api.memory.ordering.independent(_handle)
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
        self.wait_event(stream.record_event())

    def wait_event(self, event: _Event) -> None:
        event.wait(self)

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event if event is not None else self._api.Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return False

    def is_capturing(self) -> bool:
        return False

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5


class _Event:
    """A CUDA event of the virtual card."""

    _api: _Cuda

    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded: Recorded | None = None

    def record(self, stream: _Stream | None = None) -> None:
        self._recorded = self._api.memory.record_event(self._handle(stream))

    def synchronize(self) -> None:
        if self._recorded is not None:
            self._api.memory.finished_event(self._recorded)

    def wait(self, stream: _Stream | None = None) -> None:
        if self._recorded is not None:
            self._api.memory.wait(self._handle(stream), self._recorded)

    def _handle(self, stream: _Stream | None) -> int:
        return stream.cuda_stream if stream is not None else self._api.device.stream

    def query(self) -> bool:
        return self._recorded is None

    def elapsed_time(self, end: _Event) -> float:
        raise self._api.device.unsupported("Event.elapsed_time: a virtual device has no time")


class _Properties(SimpleNamespace):
    """``torch.cuda.get_device_properties``; how much memory the card has is an observation."""

    def __init__(self, device: VirtualCard, **facts: Any) -> None:
        super().__init__(**facts)
        self._device = device

    @property
    def total_memory(self) -> int:
        """Bytes of device memory."""
        self._device.observe("torch.cuda.get_device_properties().total_memory")
        return self._device.memory.settings.total


class _Statistics(dict[str, int]):
    """``torch.cuda.memory_stats``; a statistic that is not kept is refused, never 0."""

    def __init__(self, device: VirtualCard) -> None:
        super().__init__()
        self._device = device

    def __missing__(self, key: str) -> int:
        raise self._device.unsupported(f"torch.cuda.memory_stats()[{key!r}] is not kept on the virtual device")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a statistic that is kept; the default for names that torch does not know either."""
        if key not in self and key.count(".") == 2:
            return self[key]
        return super().get(key, default)


class _Cuda:
    """The answers of one virtual device; each method replaces the function of its name."""

    NAMES = (
        "is_available", "is_initialized", "init", "_lazy_init", "_lazy_call", "_is_in_bad_fork", "device_count",
        "current_device", "set_device", "get_device_name", "get_device_capability", "get_device_properties",
        "_exchange_device", "_maybe_exchange_device", "is_bf16_supported", "get_arch_list", "can_device_access_peer",
        "synchronize", "current_stream", "default_stream", "set_stream", "stream", "Stream", "Event", "ipc_collect",
        "is_current_stream_capturing", "ExternalStream", "get_stream_from_external", "StreamContext",
        "get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all", "initial_seed",
        "get_allocator_backend", "host_memory_stats", "_record_memory_history", "_snapshot", "_dump_snapshot",
        "utilization", "memory_usage", "device_memory_used", "list_gpu_processes", "temperature", "power_draw",
        "clock_rate", "get_sync_debug_mode", "set_sync_debug_mode", "graph_pool_handle", "make_graphed_callables",
        "change_current_allocator", "CUDAPluggableAllocator", "is_tf32_supported", "check_error",
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
        "get_memory_info": "mem_get_info", "get_device_capability": "accelerator_capability",
        "reset_accumulated_memory_stats": "reset_accumulated_memory_stats", "device_index": "device_index",
        "empty_host_cache": "init",
    }  # fmt: skip

    def __init__(self, device: VirtualCard) -> None:
        self.device = device
        self.memory = device.memory
        self._allocator = device.memory.allocator
        self.Stream: type[_Stream] = type("Stream", (_Stream,), {"_api": self})
        self.Event: type[_Event] = type("Event", (_Event,), {"_api": self})
        self._default = self.Stream(_handle=0)
        self._local = threading.local()
        self.StreamContext = self.stream
        for name in self._REFUSED:
            setattr(self, name, self.refuse(f"torch.cuda.{name}"))

    _REFUSED = (
        "MemPool", "use_mem_pool", "CUDAGraph", "graph", "caching_allocator_alloc", "caching_allocator_delete",
        "cudart", "graph_pool_handle", "make_graphed_callables", "change_current_allocator", "CUDAPluggableAllocator",
        "_record_memory_history", "_snapshot", "_dump_snapshot", "memory_snapshot", "memory_stats_as_nested_dict",
        "host_memory_stats", "utilization", "memory_usage", "device_memory_used", "list_gpu_processes", "temperature",
        "power_draw", "clock_rate",
    )  # fmt: skip

    def refuse(self, what: str) -> Callable[..., Any]:
        """A stand-in for something the virtual device does not do."""

        def refused(*args: Any, **kwargs: Any) -> Any:
            raise self.device.unsupported(f"{what} is not supported on the virtual device")

        return refused

    def to_dlpack(self, original: Any) -> Callable[..., Any]:
        """Hands out memory, which is not there."""

        def to_dlpack(tensor: torch.Tensor) -> Any:
            if self.device.storages.find(tensor) is not None:
                raise self.device.unsupported("DLPack hands out memory, which a virtual card does not have")
            return original(tensor)

        return to_dlpack

    def reduce(self, original: Any) -> Callable[..., Any]:
        """Pickling, which ``torch.save`` and ``copy.copy`` do."""

        def reduce(tensor: torch.Tensor, protocol: Any) -> Any:
            if sys._getframe(1).f_code is copy.copy.__code__:
                return _alias, (tensor,)
            if self.device.storages.find(tensor) is not None:
                raise self.device.unsupported(
                    "pickling or saving a tensor that was on the card needs its contents, which nobody has"
                )
            return original(tensor, protocol)

        return reduce

    def saved_tensors_hooks(self, original: Any) -> Callable[..., None]:
        """Torch calls these from inside operators, where it has switched the function mode off."""
        device = self.device

        def shown(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def call(value: Any) -> Any:
                mode = device.function_mode
                if mode is None or mode in _get_current_function_mode_stack():
                    return hook(value)
                with mode:
                    return hook(value)

            return call

        def init(hooks: Any, pack_hook: Any, unpack_hook: Any) -> None:
            original(hooks, shown(pack_hook), shown(unpack_hook))

        return init

    def assert_close(self, original: Any) -> Callable[..., None]:
        """Torch wraps what its comparison raises."""

        def assert_close(*args: Any, **kwargs: Any) -> None:
            try:
                original(*args, **kwargs)
            except RuntimeError as e:
                if isinstance(e.__cause__, UnsupportedError):
                    raise self.device.unsupported("assert_close needs the contents of tensors on the card") from None
                raise

        return assert_close

    def flatten_parameters(self, original: Any) -> Callable[[Any], None]:
        """Torch moves the weights into one piece for cuDNN; what that takes is unknown."""

        def flatten_parameters(module: Any) -> None:
            if any(w.is_cuda for w in module._flat_weights if isinstance(w, torch.Tensor)):
                self.device.estimate("RNNBase.flatten_parameters")
            else:
                original(module)

        return flatten_parameters

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
        self.check(device)

    def check(self, device: Any) -> None:
        """Refuse cards that are not there."""
        self.device.check_index(torch.device(device) if isinstance(device, str) else device)

    def _exchange_device(self, device: int) -> int:
        self.check(device)
        return 0

    _maybe_exchange_device = _exchange_device

    def get_device_name(self, device: Any = None) -> str:
        self.check(device)
        return self.device.card.product

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        self.check(device)
        return self.device.card.capability

    def accelerator_capability(self, device: Any = None) -> dict[str, Any]:
        raise self.device.unsupported("torch.accelerator.get_device_capability is not supported on the virtual device")

    @contextlib.contextmanager
    def device_index(self, device: int | None) -> Iterator[None]:
        self.check(device)
        yield

    def get_allocator_backend(self) -> str:
        return "native"

    def is_tf32_supported(self) -> bool:
        return self.device.card.capability[0] >= 8

    def check_error(self, result: int) -> None:
        """There are no driver calls to fail."""

    def get_sync_debug_mode(self) -> int:
        return 0

    def set_sync_debug_mode(self, mode: int | str) -> None:
        """Nothing waits."""

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        self.check(device)
        card = self.device.card
        return _Properties(
            self.device,
            name=card.product,
            major=card.capability[0],
            minor=card.capability[1],
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
        self.check(device)
        self.memory.finished()

    def current_stream(self, device: Any = None) -> _Stream:
        self.check(device)
        return self._streams[-1]

    @property
    def _streams(self) -> list[_Stream]:
        """The running thread's nested current streams."""
        if not hasattr(self._local, "streams"):
            self._local.streams = [self._default]
        return self._local.streams  # type: ignore[no-any-return]

    def ExternalStream(self, stream_ptr: int, device: Any = None, **_: Any) -> _Stream:  # noqa: N802 - torch's name
        return self.Stream(device, _handle=stream_ptr)

    def get_stream_from_external(self, data_ptr: int, device: Any = None) -> _Stream:
        return self.Stream(device, _handle=data_ptr)

    def default_stream(self, device: Any = None) -> _Stream:
        self.check(device)
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
            if entry is None and tensor.device.type == "cpu":
                raise NotImplementedError("record_stream is for tensors on a card; this one is on the host")
            if entry is not None and entry.id is not None:
                device.memory.record_stream(entry.id, stream.cuda_stream)

        return record_stream

    # --- memory ---------------------------------------------------------------------------------------------------

    def empty_cache(self) -> None:
        self.memory.empty_cache()

    def ipc_collect(self) -> None:
        """No memory is shared between processes."""

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        self.check(device)
        self.device.observe("torch.cuda.mem_get_info")
        return self._allocator.free_memory, self.memory.settings.total

    def memory_allocated(self, device: Any = None) -> int:
        self.check(device)
        self.device.observe("torch.cuda.memory_allocated")
        return self._allocator.now.allocated

    def memory_reserved(self, device: Any = None) -> int:
        self.check(device)
        self.device.observe("torch.cuda.memory_reserved")
        return self._allocator.now.reserved

    def max_memory_allocated(self, device: Any = None) -> int:
        self.check(device)
        self.device.observe("torch.cuda.max_memory_allocated")
        return self._allocator.peaks(self._allocator.program_peaks).allocated

    def max_memory_reserved(self, device: Any = None) -> int:
        self.check(device)
        self.device.observe("torch.cuda.max_memory_reserved")
        return self._allocator.peaks(self._allocator.program_peaks).reserved

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.check(device)
        self._allocator.reset_program_peaks()

    def reset_accumulated_memory_stats(self, device: Any = None) -> None:
        """Accumulated statistics are not kept."""

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        self.check(device)
        self.device.observe("torch.cuda.memory_stats")
        a = self._allocator
        out = _Statistics(self.device)
        for key, figures in a.statistics().items():
            name = key.replace(".small", ".small_pool").replace(".large", ".large_pool")
            for part, value in zip(("current", "peak", "allocated", "freed"), figures, strict=True):
                out[f"{name}.{part}"] = value
        out.update(num_alloc_retries=a.retries, num_ooms=a.ooms, num_oom_rejections=a.rejections)
        out.update(num_device_alloc=a.calls.alloc, num_device_free=a.calls.free, num_sync_all_streams=a.calls.sync)
        return out

    def memory_summary(self, device: Any = None, abbreviated: bool = False) -> str:
        self.check(device)
        self.device.observe("torch.cuda.memory_summary")
        now = self._allocator.now
        return f"virtual {self.device.card.name}: allocated {now.allocated}, reserved {now.reserved} bytes"

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

    def get_rng_state(self, device: Any = "cuda") -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8, device="cpu")

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [self.get_rng_state()]

    def set_rng_state(self, new_state: torch.Tensor, device: Any = "cuda") -> None:
        """No numbers are drawn."""

    def set_rng_state_all(self, new_states: Any) -> None:
        """No numbers are drawn."""

    def initial_seed(self) -> int:
        return 0

    def seed(self) -> None:
        """No numbers are drawn."""

    seed_all = seed
