"""``torch.cuda`` as the chosen card answers it, patched in while a virtual device is active."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.cuda
import torch.cuda.memory
import torch.cuda.tunable
import torch.nn.parallel
import torch.testing
import torch.utils.dlpack
from torch.overrides import _get_current_function_mode_stack

from fragscope.errors import UnsupportedError
from fragscope.record.virtual import fused_layers
from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.libraries_api import replace_libraries
from fragscope.record.virtual.memory_api import Memory
from fragscope.record.virtual.pools_api import Pools
from fragscope.record.virtual.streams_api import Streams
from fragscope.units import KIB

_MODULES: tuple[Any, ...] = (
    torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams, torch.cuda.graphs, torch.cuda.profiler,
)  # fmt: skip
REFUSED = {
    "CUDAPluggableAllocator": "an allocator of the program's own takes memory that the model does not see",
    "change_current_allocator": "an allocator of the program's own takes memory that the model does not see",
    "caching_allocator_enable": "without the caching allocator there is nothing to model",
    "caching_allocator_disabled": "without the caching allocator there is nothing to model",
    "_snapshot": "the case's own trace holds every request, with its stack",
    "_dump_snapshot": "the case's own trace holds every request, with its stack",
    "export_dot": "what a graph captured is not kept",
    "export_graph_data": "what a graph captured is not kept",
    "host_memory_stats": "pinned memory of the host is not modelled",
    "host_memory_stats_as_nested_dict": "pinned memory of the host is not modelled",
    "reset_accumulated_host_memory_stats": "pinned memory of the host is not modelled",
    "reset_peak_host_memory_stats": "pinned memory of the host is not modelled",
    "utilization": "no card is there to be measured",
    "memory_usage": "no card is there to be measured",
    "device_memory_used": "no card is there to be measured",
    "list_gpu_processes": "no card is there to be measured",
    "temperature": "no card is there to be measured",
    "power_draw": "no card is there to be measured",
    "clock_rate": "no card is there to be measured",
    "current_blas_handle": "no library runs that it could be a handle of",
    "current_solver_handle": "no library runs that it could be a handle of",
    "GreenContext": "parts of a card are not modelled",
}
"""Functions of ``torch.cuda`` that are refused, and why."""
REFUSED_MODULES = ("tunable", "jiterator", "nccl", "gds", "green_contexts", "graph_annotations")
"""Modules of ``torch.cuda`` whose functions are all refused."""
_JITERATOR = ("_create_jit_fn", "_create_multi_output_jit_fn")  # public in all but name


@contextlib.contextmanager
def patched_cuda(device: VirtualCard) -> Iterator[None]:
    """Replace the functions of ``torch.cuda`` and ``torch.accelerator`` that a program asks, until the end."""
    api = _Cuda(device)
    streams, memory = Streams(device), Memory(device)
    pools = Pools(device, memory.memory_snapshot)
    owners: tuple[Any, ...] = (api, streams, memory, pools)
    module: Any
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, new: Any, *, create: bool = False) -> None:
            stack.enter_context(mock.patch.object(owner, name, new, create=create))

        for owner in owners:
            for name in owner.NAMES:
                for module in _MODULES:
                    if hasattr(module, name):
                        replace(module, name, getattr(owner, name))
        for name, target in _Cuda.ACCELERATOR.items():
            answer = next(getattr(o, target) for o in owners if hasattr(o, target))
            for module in (torch.accelerator, getattr(torch.accelerator, "memory", torch.accelerator)):
                if hasattr(module, name):
                    replace(module, name, answer)
        for name, why in REFUSED.items():
            for module in _MODULES:
                if hasattr(module, name):
                    replace(module, name, api.refuse(f"torch.cuda.{name}", why))
        for group in REFUSED_MODULES:
            module = getattr(torch.cuda, group, None)
            for name in (*_functions(module), *(n for n in _JITERATOR if hasattr(module, n))):
                replace(module, name, api.refuse(f"torch.cuda.{group}.{name}"))
        replace_libraries(device, replace)
        for name in ("broadcast", "broadcast_coalesced", "reduce_add", "reduce_add_coalesced", "gather"):
            replace(torch.nn.parallel.comm, name, api.refuse(f"torch.nn.parallel.comm.{name}"))
        replace(torch._C, "_scatter", api.scatter, create=True)
        replace(torch._C, "_accelerator_setAllocatorSettings", memory._set_allocator_settings, create=True)
        script = api.refuse("moving a module of TorchScript", "its weights are out of sight of Python")
        replace(torch.jit._script.RecursiveScriptModule, "_apply", script, create=True)
        if hasattr(torch.accelerator, "Graph"):
            replace(torch.accelerator, "Graph", api.refuse("torch.accelerator.Graph", "write torch.cuda.CUDAGraph"))
        replace(torch.cuda, "default_generators", (_Generator("cuda"),))
        replace(torch.cuda.graph, "default_capture_stream", None)  # torch keeps the one it makes
        replace(torch._C, "_host_emptyCache", api.init, create=True)
        for name in ("nested_tensor", "as_nested_tensor", "nested_tensor_from_jagged"):
            replace(torch.nested, name, api.nested(getattr(torch.nested, name)))
        # The method parses its argument as a real stream before any mode is asked.
        replace(torch.Tensor, "record_stream", streams.record_stream)
        replace(torch.version, "cuda", "13.0")
        replace(torch.backends.cuda, "is_built", api.is_available)
        replace(torch, "compile", api.compile(torch.compile))
        replace(
            torch.export, "export", api.refuse("torch.export.export", "tracing needs tensors that are what they say")
        )
        dynamo: Any = importlib.import_module("torch._dynamo.eval_frame")
        replace(dynamo, "_callback_from_stance", api.compiled_before(dynamo._callback_from_stance))
        if torch.distributed.is_available():
            c10d = torch.distributed.distributed_c10d
            helper = api.new_group(c10d._new_process_group_helper)
            replace(c10d, "_new_process_group_helper", helper)
        backward = api.backward(torch.autograd.graph._engine_run_backward)
        for module in (torch.autograd, torch.autograd.graph):
            replace(module, "_engine_run_backward", backward)
        hooks = torch.autograd.graph.saved_tensors_hooks
        replace(hooks, "__init__", api.saved_tensors_hooks(hooks.__init__))
        replace(torch.Tensor, "__reduce_ex__", api.reduce(torch.Tensor.__reduce_ex__))
        for module in (torch.utils.dlpack, torch):
            replace(module, "to_dlpack", api.to_dlpack(torch._C._to_dlpack))
        for module in (torch.testing, torch.testing._comparison):
            replace(module, "assert_close", api.assert_close(torch.testing.assert_close))
        for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
            replace(torch.cuda.nvtx, name, lambda *args, **kwargs: 0)
        layer, heads = torch.nn.TransformerEncoderLayer, torch.nn.MultiheadAttention
        replace(layer, "forward", fused_layers.encoder_layer(device, layer.forward))
        replace(heads, "forward", fused_layers.attention(device, heads.forward))
        rnn = torch.nn.RNNBase
        replace(rnn, "flatten_parameters", api.flatten_parameters(rnn.flatten_parameters))
        replace(torch.amp.GradScaler, "_maybe_opt_step", api.optimizer_step())
        replace(torch._C._nn, "_parse_to", api.parse_to(torch._C._nn._parse_to))
        replace(torch, "get_device_module", api.get_device_module(torch.get_device_module))
        replace(torch, "Generator", _Generator)
        replace(torch, "Stream", streams.Stream)
        replace(torch, "Event", streams.Event)
        yield


def _functions(module: Any) -> list[str]:
    """Names of a module's public functions; none where this torch lacks the module."""
    if module is None:
        return []
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__
    ]


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """What ``copy.copy`` makes: another tensor on the same storage."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _GeneratorType(type(torch.Generator)):  # type: ignore[misc]
    """Generators from before the device are instances of what takes the class's place."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _RealGenerator)


_RealGenerator = torch.Generator


class _Generator(torch.Generator, metaclass=_GeneratorType):
    """A generator that may say it is on the card; the numbers are nobody's business."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, device="cpu" if torch.device(device).type == "cuda" else device)  # type: ignore[call-arg]

    def __init__(self, device: Any = "cpu") -> None:
        self._shown = torch.device("cuda", 0) if torch.device(device).type == "cuda" else torch.device(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device it was made for."""
        return self._shown


def _multiprocessor(threads: int, shared: int, for_block: int) -> dict[str, int]:
    return {
        "max_threads_per_multi_processor": threads,
        "shared_memory_per_multiprocessor": shared * KIB,
        "shared_memory_per_block_optin": for_block * KIB,
    }


_BY_CAPABILITY = {
    (8, 0): _multiprocessor(2048, 164, 163),
    (8, 6): _multiprocessor(1536, 100, 99),
    (8, 9): _multiprocessor(1536, 100, 99),
    (9, 0): _multiprocessor(2048, 228, 227),
    (10, 0): _multiprocessor(2048, 228, 227),
    (12, 0): _multiprocessor(1536, 100, 99),
}
"""Source: "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming Guide."""
_UNKNOWN_PROPERTIES = (
    "clock_rate", "memory_clock_rate", "memory_bus_width", "pci_bus_id", "pci_device_id", "pci_domain_id",
    "max_threads_per_multi_processor", "shared_memory_per_multiprocessor", "shared_memory_per_block_optin",
)  # fmt: skip


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

    def __getattr__(self, name: str) -> Any:
        if name in _UNKNOWN_PROPERTIES:
            raise self._device.unsupported(f"torch.cuda.get_device_properties().{name} is not known of this card")
        raise AttributeError(f"'_CudaDeviceProperties' object has no attribute {name!r}")


class _Runtime:
    """``torch.cuda.cudart()``."""

    cudaError = SimpleNamespace(success=0)  # noqa: N815 - CUDA's name

    def __init__(self, device: VirtualCard) -> None:
        self._device = device

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:  # noqa: N802 - CUDA's name
        return torch.cuda.mem_get_info(device)

    def cudaProfilerStart(self) -> int:  # noqa: N802 - CUDA's name
        return 0

    def cudaProfilerStop(self) -> int:  # noqa: N802 - CUDA's name
        return 0

    def __getattr__(self, name: str) -> Any:
        raise self._device.unsupported(f"torch.cuda.cudart().{name} is not supported on the virtual device")


class _Cuda:
    """The answers of one virtual device; each method replaces the function of its name."""

    NAMES = (
        "is_available", "is_initialized", "init", "_lazy_init", "_lazy_call", "_is_in_bad_fork", "device_count",
        "current_device", "set_device", "get_device_name", "get_device_capability", "get_device_properties",
        "_exchange_device", "_maybe_exchange_device", "is_bf16_supported", "get_arch_list", "can_device_access_peer",
        "ipc_collect", "get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all", "initial_seed",
        "get_sync_debug_mode", "set_sync_debug_mode", "is_tf32_supported", "check_error", "manual_seed",
        "manual_seed_all", "seed", "seed_all", "cudart", "_compile_kernel",
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
        self._seed = self._sync_debug_mode = 0

    def refuse(self, what: str, why: str = "") -> Callable[..., Any]:
        """A stand-in for something the virtual device does not do."""

        def refused(*args: Any, **kwargs: Any) -> Any:
            raise self.device.unsupported(f"{what} is not supported on the virtual device{': ' if why else ''}{why}")

        return refused

    def compile(self, original: Any) -> Callable[..., Any]:
        """``torch.compile``: what is only decorated, or runs with the compiler disabled, is no obstacle."""

        def compile(model: Any = None, **kwargs: Any) -> Any:
            if kwargs.get("disable") or torch._dynamo.config.disable:
                return original(model, **kwargs) if model is not None else lambda function: function
            if model is None:
                return lambda function: compile(function, **kwargs)
            if isinstance(model, torch.nn.Module):
                raise self._compiled()

            def compiled(*args: Any, **kwargs: Any) -> Any:
                raise self._compiled()

            return functools.wraps(model)(compiled)

        return compile

    def compiled_before(self, original: Any) -> Callable[[Any], Any]:
        """What every compiled function asks when it is called, also one that was made before the device was entered."""

        def callback(callback: Any) -> Any:
            if callable(callback) and not torch._dynamo.config.disable:
                raise self._compiled()
            return original(None if callable(callback) else callback)  # runs as it is written

        return callback

    def _compiled(self) -> UnsupportedError:
        return self.device.unsupported(
            "torch.compile is not supported on the virtual device, since what compiled code allocates is not known "
            "(TORCH_COMPILE_DISABLE=1 runs it as it is written)"
        )

    def optimizer_step(self) -> Callable[..., Any]:
        """``GradScaler`` leaves a step out when it finds infinities, which nobody knows: here it finds none."""

        def step(scaler: Any, optimizer: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
            self.device.estimate("GradScaler.step: taken to find no infinities")
            return optimizer.step(*args, **kwargs)

        return step

    def nested(self, original: Any) -> Callable[..., Any]:
        """Nested tensors, whose offsets are contents that decide what operators do."""

        def nested(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            flat = [t for item in (tensors, *args) for t in (item if isinstance(item, list | tuple) else [item])]
            wanted = kwargs.get("device")
            on_card = any(t.is_cuda for t in flat if isinstance(t, torch.Tensor))
            if on_card or (wanted is not None and torch.device(wanted).type == "cuda"):
                raise self.device.unsupported("nested tensors are not supported on the virtual device")
            return original(tensors, *args, **kwargs)

        return nested

    def new_group(self, original: Any) -> Callable[..., Any]:
        """What every process group is made by; those of NCCL need cards, one a process."""

        def new_group(size: int, rank: int, ranks: Any, backend: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                if "nccl" not in str(backend):
                    return original(size, rank, ranks, backend, *args, **kwargs)
            except RuntimeError as e:
                if "NCCL" not in str(e):
                    raise
            raise self.device.unsupported(
                "a process group of NCCL is not supported on the virtual device; fragscope.run_ranks runs ranks over "
                "gloo"
            )

        return new_group

    def parse_to(self, original: Any) -> Callable[..., Any]:
        """What ``Module.to`` reads its arguments with; a number is a card."""

        def parse_to(*args: Any, **kwargs: Any) -> Any:
            if args and type(args[0]) is int:
                args = (torch.device("cuda", args[0]), *args[1:])
            if args and isinstance(args[0], torch.Tensor):
                args = (args[0].device, args[0].dtype, *args[1:])
            if isinstance(kwargs.get("tensor"), torch.Tensor):
                tensor = kwargs.pop("tensor")
                args = (tensor.device, tensor.dtype, *args)
            if type(kwargs.get("device")) is int:
                kwargs["device"] = torch.device("cuda", kwargs["device"])
            return original(*args, **kwargs)

        return parse_to

    def get_device_module(self, original: Any) -> Callable[[Any], Any]:
        """The module of the card, which is the accelerator here."""

        def get_device_module(device: Any = None) -> Any:
            return torch.cuda if device is None else original(device)

        return get_device_module

    def scatter(self, tensor: torch.Tensor, devices: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
        """What ``DataParallel`` hands to its only card."""
        for index in devices:
            self.device.check_index(index)
        return (tensor.cuda(),)

    def cudart(self) -> _Runtime:
        """Calls of the CUDA runtime that programs make themselves."""
        return _Runtime(self.device)

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

    def backward(self, original: Any) -> Callable[..., Any]:
        """A backward pass, whose steps run on streams of their own."""

        def run(roots: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
            with self.device.backward(roots, gradients):
                return original(roots, gradients, *args, **kwargs)

        return run

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

    def check(self, device: Any) -> None:
        """Refuse cards that are not there."""
        self.device.check_index(device)

    set_device = check

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

    def _compile_kernel(self, *args: Any, **kwargs: Any) -> Any:
        raise self.device.unsupported(
            "torch.cuda._compile_kernel: what a kernel of the program's own touches is told with case.kernel"
        )

    @contextlib.contextmanager
    def device_index(self, device: int | None) -> Iterator[None]:
        self.check(device)
        yield

    def is_tf32_supported(self) -> bool:
        return self.device.card.capability[0] >= 8

    def check_error(self, result: int) -> None:
        """There are no driver calls to fail."""

    def get_sync_debug_mode(self) -> int:
        return self._sync_debug_mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        """Is remembered; nothing warns."""
        named = {"default": 0, "warn": 1, "error": 2}
        if isinstance(mode, str) and mode not in named:
            raise RuntimeError("invalid value of debug_mode, expected one of `default`, `warn`, `error`")
        self._sync_debug_mode = named[mode] if isinstance(mode, str) else mode

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
            max_threads_per_block=1024,
            regs_per_multiprocessor=65536,
            shared_memory_per_block=48 * KIB,
            is_integrated=0,
            is_multi_gpu_board=0,
            gcnArchName="",
            uuid="virtual",
            **_BY_CAPABILITY.get(card.capability, {}),
        )

    def get_arch_list(self) -> list[str]:
        major, minor = self.device.card.capability
        return [f"sm_{major}{minor}"]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        """Every card can hold such numbers, older ones compute in others."""
        return including_emulation or self.device.card.capability[0] >= 8

    def can_device_access_peer(self, device: Any, peer: Any) -> bool:
        return False

    def ipc_collect(self) -> None:
        """No memory is shared between processes."""

    # --- random numbers: nobody sees them -------------------------------------------------------------------------

    def manual_seed(self, seed: int) -> None:
        """Is remembered; nobody sees the numbers."""
        self._seed = int(seed)

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
        return self._seed

    def seed(self) -> None:
        """No numbers are drawn."""

    seed_all = seed
