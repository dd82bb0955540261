"""The function mode: makes metadata-only tensors look like CUDA tensors to the code that uses them."""

from __future__ import annotations

import dis
import functools
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fragscope.record.virtual.arguments import tensors_in
from fragscope.record.virtual.attention import Attention
from fragscope.record.virtual.autocast import casts
from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.fused_norm import rms_norm
from fragscope.record.virtual.legacy_types import CudaType, named
from fragscope.record.virtual.storages import Place, is_transformed

_META = torch.device("meta")
_CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_GRAD: Any = torch.Tensor.grad
_KEPT_GRAD, _OWNER = "_fragscope_grad", "_fragscope_owner"  # attributes of tensors; see _set_data
_Handler = Callable[..., Any]
# Functions that build a host tensor from Python data first, and then copy it to the device.
_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)


def _of_lazy_modules(move: _Handler) -> _Handler:
    """A method that moves tensors, for parameters and buffers without a shape too, which refuse most questions."""

    @functools.wraps(move)
    def moved(self: FunctionMode, func: Any, tensor: torch.Tensor, /, *args: Any, **kwargs: Any) -> Any:
        if not is_lazy(tensor):
            return move(self, func, tensor, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            out = move(self, func, tensor.detach(), *args, **kwargs)
            return out.as_subclass(type(tensor)) if isinstance(tensor, UninitializedBuffer) else out

    return moved


class FunctionMode(TorchFunctionMode):
    """Rewrites device arguments and answers what a CUDA tensor would answer."""

    def __init__(self, device: VirtualCard) -> None:
        super().__init__()
        self._device = device
        self._attends = Attention(device)
        self._bodies: dict[Any, _Handler | None] = {}
        self._running: set[Any] = set()
        tensor: Any = torch.Tensor
        self._handlers: dict[Any, _Handler] = {
            tensor.device.__get__: self._get_device,
            tensor.is_cuda.__get__: self._is_cuda,
            tensor.is_meta.__get__: self._is_meta,
            tensor.is_cpu.__get__: self._is_cpu,
            tensor.data.__set__: self._set_data,
            tensor.grad.__get__: self._get_grad,
            tensor.grad.__set__: self._set_grad,
            tensor.get_device: self._device_index,
            tensor.data_ptr: self._data_ptr,
            tensor.cuda: self._cuda,
            tensor.cpu: self._cpu,
            tensor.to: self._to,
            tensor.pin_memory: self._pin_memory,
            tensor.is_pinned: self._is_pinned,
            tensor.__repr__: self._repr,
            tensor.__format__: self._format,
            tensor.type: self._type,
            tensor.__setitem__: self._setitem,
            tensor.share_memory_: self._share_memory,
            tensor.softmax: self._softmax(torch.softmax),
            torch.softmax: self._softmax(torch.softmax),
            tensor.log_softmax: self._softmax(torch.log_softmax),
            torch.log_softmax: self._softmax(torch.log_softmax),
            torch._C._nn.one_hot: self._one_hot,
            torch._C._nn.linear: self._linear,
            torch.nn.functional.scaled_dot_product_attention: self._attention,
            torch.dropout: self._dropout,
            torch.nn.functional.dropout: self._functional_dropout,
            torch.rms_norm: self._rms_norm,
            torch.nn.functional.rms_norm: self._rms_norm,
            torch._has_compatible_shallow_copy_type: self._compatible,
            torch._nested_tensor_from_mask_left_aligned: self._left_aligned,
        }
        for refused in (tensor.numpy, tensor.tolist, tensor.__array__, tensor.__dlpack__):
            self._handlers[refused] = self._needs_data(refused)
        self._handlers[tensor.__cuda_array_interface__.__get__] = self._array_interface
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
            for module in (torch, torch._C._VariableFunctions):
                self._handlers[getattr(module, name)] = self._estimated(name)
        for name in ("quantize_per_tensor", "quantize_per_tensor_dynamic", "quantize_per_channel"):
            self._handlers[getattr(torch, name)] = self._quantized
        for made in _FROM_DATA:
            self._handlers[made] = self._from_data(made)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = self._handlers.get(func)
        if handler is not None:
            return handler(func, *args, **kwargs)
        if "device" in kwargs or "pin_memory" in kwargs:
            return self._with_device(func, args, dict(kwargs))
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function; inside one that is written in Python, tensors still look like CUDA tensors.

        Torch switches this mode off while ``__torch_function__`` runs, and a Python function would hand itself over to
        the mode again if it were on. So the mode is on and the function's own question is answered with no.
        """
        if type(func) is not FunctionType or func in self._running:
            return func(*args, **kwargs)
        if func not in self._bodies:
            self._bodies[func] = _without_question(func)
        body = self._bodies[func]
        if body is None:
            return func(*args, **kwargs)
        self._running.add(func)
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self._running.discard(func)

    def _with_device(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.pop("pin_memory", False):  # pinned memory is host memory, and this host has no driver to pin it
            if _is_cuda(_parse(kwargs.get("device"))):
                raise RuntimeError("Only dense CPU tensors can be pinned")
            return self._device.pinned.add(self._with_device(func, args, kwargs))
        wanted = _parse(kwargs.get("device"))
        if wanted is None:
            return self._call(func, args, kwargs)
        if wanted.type == "cuda":
            self._device.check_index(wanted)
            kwargs["device"] = _META
        elif wanted.type == "meta":
            self._device.explicit_meta = True
            try:
                return func(*args, **kwargs)
            finally:
                self._device.explicit_meta = False
        return self._call(func, args, kwargs)

    def _place(self, tensor: torch.Tensor) -> Place | None:
        return self._device.storages.place(tensor)

    # --- identity -------------------------------------------------------------------------------------------------

    def _get_device(self, func: Any, tensor: torch.Tensor, *rest: Any) -> torch.device:
        real: torch.device = func(tensor, *rest)
        if real.type != "meta":
            return real
        place = self._place(tensor)
        return _CUDA if place is Place.CARD else _CPU if place is Place.HOST else real

    def _is_cuda(self, func: Any, tensor: torch.Tensor, *rest: Any) -> bool:
        # Tensors with others inside, which have no memory themselves, are where their class says.
        return bool(func(tensor, *rest)) or self._place(tensor) is Place.CARD

    def _is_cpu(self, func: Any, tensor: torch.Tensor, *rest: Any) -> bool:
        return bool(func(tensor, *rest)) or self._place(tensor) is Place.HOST

    def _is_meta(self, func: Any, tensor: torch.Tensor, *rest: Any) -> bool:
        return bool(func(tensor, *rest)) and self._place(tensor) is None

    def _device_index(self, func: Any, tensor: torch.Tensor) -> int:
        return 0 if self._place(tensor) is Place.CARD else int(func(tensor))

    def _data_ptr(self, func: Any, tensor: torch.Tensor) -> int:
        entry = None if is_transformed(tensor) else self._device.storages.find(tensor)
        if entry is None or entry.id is None:
            return int(func(tensor))
        return self._device.memory.address(entry.id) + int(tensor.storage_offset()) * tensor.itemsize

    def _type(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            if self._place(tensor) is Place.CARD:
                return str(func(torch.empty(0, dtype=tensor.dtype))).replace("torch.", "torch.cuda.", 1)
            return func(tensor)
        kind = args[0] if args else kwargs.get("dtype")
        wanted = named(kind) if isinstance(kind, str) else None
        if isinstance(kind, CudaType):
            wanted = _CUDA, kind.dtype
        if wanted is None:
            return func(tensor, *args, **kwargs)
        return self._to(torch.Tensor.to, tensor, *wanted, *args[1:])

    # --- moving ---------------------------------------------------------------------------------------------------

    @_of_lazy_modules
    def _cuda(
        self,
        func: Any,
        tensor: torch.Tensor,
        device: Any = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> torch.Tensor:
        wanted = _parse(device)
        if wanted is not None:
            if wanted.type != "cuda":
                raise RuntimeError(f"Invalid device, must be cuda device, but got {wanted}")
            self._device.check_index(wanted)
        if self._place(tensor) is Place.CARD:
            return tensor
        self._refuse_meta(tensor)
        return self._move(tensor, to_card=True, non_blocking=non_blocking, memory_format=memory_format)

    @_of_lazy_modules
    def _cpu(
        self, func: Any, tensor: torch.Tensor, memory_format: torch.memory_format = torch.preserve_format
    ) -> torch.Tensor:
        if self._place(tensor) is not Place.CARD:
            return tensor
        return self._move(tensor, to_card=False, memory_format=memory_format)

    def _refuse_meta(self, tensor: torch.Tensor) -> None:
        """A meta tensor that the program itself made has nothing to copy, which ``Module.to`` relies on."""
        if tensor.device.type == "meta" and self._place(tensor) is None:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    def _move(self, tensor: torch.Tensor, *, to_card: bool, **kwargs: Any) -> torch.Tensor:
        """Across the host's border; autograd sees an ordinary copy."""
        if to_card and tensor.device.type == "meta":
            # A host tensor of unknown contents is metadata already: the copy must be asked for.
            kwargs["copy"] = True
        return tensor.to(_META if to_card else _CPU, **kwargs)

    @_of_lazy_modules
    def _to(self, func: Any, tensor: torch.Tensor, /, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (args and isinstance(args[0], torch.Tensor)) or "tensor" in kwargs:
            other = args[0] if args else kwargs.pop("tensor")
            place = self._place(other)
            target = _CUDA if place is Place.CARD else _CPU if place is Place.HOST else other.device
            args = (target, other.dtype, *args[1:])
        elif args and isinstance(args[0], str | int | torch.device):
            args = (_parse(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _parse(kwargs["device"])
        named = "device" in kwargs
        wanted = kwargs.get("device") if named else args[0] if args and isinstance(args[0], torch.device) else None
        if not isinstance(wanted, torch.device):
            return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]
        place = self._place(tensor)
        if wanted.type == "meta":
            if place is not None:
                kwargs["copy"] = True  # torch would take the tensor for metadata already
            self._device.explicit_meta = True
            try:
                return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]
            finally:
                self._device.explicit_meta = False
        if wanted.type == "cuda":
            self._device.check_index(wanted)
            self._refuse_meta(tensor)
            wanted = _META
            if place is Place.HOST:
                kwargs["copy"] = True
        elif place is Place.HOST:
            wanted = None  # it is there already
        if named:
            kwargs["device"] = wanted
            if wanted is None:
                del kwargs["device"]
        else:
            args = args[1:] if wanted is None else (wanted, *args[1:])
        if not args and not kwargs:
            return tensor
        return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]

    def _from_data(self, made: Any) -> _Handler:
        def build(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.pop("pin_memory", False):
                return self._device.pinned.add(build(func, *args, **kwargs))
            wanted = _parse(kwargs.pop("device", None))
            if wanted is None and made is torch.Tensor.new_tensor and self._place(args[0]) is Place.CARD:
                wanted = _CUDA
            if wanted is None and made is not torch.Tensor.new_tensor:
                wanted = _default_device()
            if wanted is None and made in (torch.as_tensor, torch.asarray) and isinstance(args[0], torch.Tensor):
                return func(*args, **kwargs)  # type: ignore[no-any-return]
            if wanted is not None and wanted.type == "meta":
                self._device.explicit_meta = True
                try:
                    return func(*args, device=_META, **kwargs)  # type: ignore[no-any-return]
                finally:
                    self._device.explicit_meta = False
            if made is torch.Tensor.new_tensor:
                args, kwargs["dtype"] = args[1:], kwargs.get("dtype") or args[0].dtype
            requires_grad = kwargs.pop("requires_grad", False)
            if args and isinstance(args[0], torch.Tensor) and self._place(args[0]) is not None:
                target = _META if wanted is None or wanted.type == "cuda" else wanted
                out = args[0].to(target, dtype=kwargs.get("dtype"), copy=made is not torch.as_tensor)
            else:
                make: Any = torch.tensor if made is torch.Tensor.new_tensor else func
                try:
                    out = make(*args, **({} if wanted is None else {"device": _CPU}), **kwargs)
                except RuntimeError as e:
                    if "meta tensors" not in str(e):
                        raise
                    out = make(*self._numbers(args), **({} if wanted is None else {"device": _CPU}), **kwargs)
                if wanted is not None and wanted.type == "cuda":
                    self._device.check_index(wanted)
                    out = out.to(_META)
            return out.detach().requires_grad_() if requires_grad else out

        return build

    def _numbers(self, data: Any) -> Any:
        """Nested data with the numbers of tensors on the card in their place."""
        if isinstance(data, list | tuple):
            return type(data)(self._numbers(d) for d in data)
        if not isinstance(data, torch.Tensor) or self._place(data) is None:
            return data
        if data.dim() and self._device.values.of(data) is None:
            raise self._device.unsupported("the numbers of a tensor on the card are not known", [data])
        return self._cpu(torch.Tensor.cpu, data).tolist() if data.dim() else data.item()

    def _pin_memory(self, func: Any, tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        if self._place(tensor) is Place.CARD:
            raise RuntimeError("cannot pin 'torch.cuda.Tensor' only dense CPU tensors can be pinned")
        if self._is_pinned(func, tensor):
            return tensor
        return self._device.pinned.add(tensor.clone())

    def _is_pinned(self, func: Any, tensor: torch.Tensor, device: Any = None) -> bool:
        return self._device.pinned.has(tensor.untyped_storage())

    def _share_memory(self, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._place(tensor) is Place.CARD else func(tensor)

    def _format(self, func: Any, tensor: torch.Tensor, spec: str) -> str:
        if tensor.dim() == 0 and self._place(tensor) is not None:
            if self._device.values.of(tensor) is None and self._device.values.number(tensor) is None:
                raise self._device.unsupported("formatting a number that was on the card needs its value", [tensor])
            return format(tensor.item(), spec)
        return str(self._call(func, (tensor, spec), {}))

    def _repr(self, func: Any, tensor: torch.Tensor, **kwargs: Any) -> str:
        """Show no values. Errors and logs show tensors, so this does not fail; a card would compute to show them."""
        text: str = func(tensor, **kwargs)
        place = self._place(tensor)
        if place is Place.CARD:
            self._device.estimate("Tensor.__repr__")
        shown = {Place.CARD: "device='cuda:0'", Place.HOST: "device='cpu', contents unknown"}.get(place)  # type: ignore[arg-type]
        return text if shown is None else text.replace("device='meta'", shown, 1)

    # --- what torch decides by device ----------------------------------------------------------------------------

    def _setitem(self, func: Any, tensor: torch.Tensor, index: Any, value: Any) -> None:
        """A number that is written into a CUDA tensor stays on the host; torch would put it beside metadata."""
        if isinstance(value, int | float | complex) and self._place(tensor) is Place.CARD:
            value = torch.tensor(value, dtype=tensor.dtype)
        func(tensor, index, value)

    def _dropout(self, func: Any, tensor: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        """One kernel on a card, several operators elsewhere."""
        if self._place(tensor) is Place.CARD:
            if p == 0 or not train or not tensor.numel():
                return tensor
            if 0 < p < 1:
                return torch.native_dropout(tensor, p, True)[0]
        return func(tensor, p, train)  # type: ignore[no-any-return]

    def _softmax(self, plain: Any) -> _Handler:
        """float16 to float32 is one kernel on a card; elsewhere the input is converted first."""

        def softmax(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
            if dtype is None and self._device.autocast.dtype() is not None:
                dtype = torch.float32
            if self._place(tensor) is Place.CARD and tensor.dtype == torch.half and dtype == torch.float32:
                if is_transformed(tensor) or forward_ad.unpack_dual(tensor).tangent is not None:
                    self._device.estimate(f"{plain.__name__} from float16 to float32 in torch.func")
                elif torch.is_grad_enabled() and tensor.requires_grad:
                    self._device.estimate(f"{plain.__name__} from float16 to float32 with gradients")
                else:
                    if not tensor.is_contiguous():
                        self._device.estimate(f"{plain.__name__} on a strided tensor")
                    out = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
                    self._device.launched(f"aten::{plain.__name__}", [tensor], [out])
                    return out
            return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]

        return softmax

    def _linear(
        self, func: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What is not one product with the bias in it adds the bias in place, but not while a dispatch mode is active.

        Source: ``linear`` in aten/src/ATen/native/Linear.cpp; ``isTensorSubclassLike`` beside it; ``attention_layer``
        of tests/data/footprints.
        """
        if bias is None or input.dim() <= 2 or input.is_contiguous() or self._place(input) is not Place.CARD:
            return func(input, weight, bias)  # type: ignore[no-any-return]
        if any(is_transformed(t) for t in (input, weight, bias)):  # a card does not either
            return func(input, weight, bias)  # type: ignore[no-any-return]
        lower = self._device.autocast.dtype()
        if lower is not None:
            bias, weight, input = (self._device.autocast.cast(t, lower) for t in (bias, weight, input))
        return torch.matmul(input, weight.t()).add_(bias)

    def _one_hot(self, func: Any, tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
        """Zeros and a scatter on a card, a comparison for metadata."""
        if self._place(tensor) is not Place.CARD:
            return func(tensor, num_classes)  # type: ignore[no-any-return]
        if num_classes <= 0:
            self._device.wait_for_stream()
            known = self._device.values.of(tensor)
            if known is None:
                raise self._device.unsupported("one_hot without num_classes needs the largest class", [tensor])
            self._device.estimate("one_hot without num_classes")
            num_classes = int(known.max()) + 1
        out = torch.zeros(*tensor.shape, num_classes, dtype=torch.int64, device=_META)
        return out.scatter_(-1, tensor.unsqueeze(-1), 1)

    def _estimated(self, name: str) -> _Handler:
        """A function that picks another implementation on a card, whose temporaries are unknown."""

        def note(func: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            if any(self._place(t) is Place.CARD for t in tensors):
                self._device.estimate(name)
            return func(*args, **kwargs)

        return note

    def _attention(self, func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if any(isinstance(t, torch.Tensor) and self._place(t) is Place.CARD for t in (*args, *kwargs.values())):
            return self._attends(func, *args, **kwargs)
        return func(*args, **kwargs)  # type: ignore[no-any-return]

    def _quantized(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Torch's rule for the result's type says that of the input, four times as large."""
        if any(self._place(t) is Place.CARD for t in tensors_in((*args, *kwargs.values()))):
            raise self._device.unsupported("tensors of quantized types are not supported on the virtual device")
        return func(*args, **kwargs)

    def _left_aligned(self, func: Any, tensor: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether an encoder may leave out padding in nested tensors, which depends on the mask: it is taken not to."""
        if self._place(tensor) is not Place.CARD:
            return bool(func(tensor, mask))
        self._device.estimate("TransformerEncoder with a padding mask and without gradients")
        return False

    def _functional_dropout(
        self, func: Any, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if inplace:
            return func(input, p, training, inplace)  # type: ignore[no-any-return]
        return self._dropout(func, input, p, training)

    def _rms_norm(
        self,
        func: Any,
        input: torch.Tensor,
        normalized_shape: Any,
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> torch.Tensor:
        """One kernel on a card, which also writes a value a row for the backward pass; several operators elsewhere."""
        if self._place(input) is not Place.CARD:
            return func(input, normalized_shape, weight, eps)  # type: ignore[no-any-return]
        if self._device.autocast.dtype() is not None and casts("rms_norm"):
            input, weight = self._device.autocast.cast((input, weight), torch.float32)
        if weight is not None and weight.dtype != input.dtype:  # torch has no kernel for this
            return func(input, normalized_shape, weight, eps)  # type: ignore[no-any-return]
        if is_transformed(input) or (weight is not None and is_transformed(weight)):
            self._device.estimate("aten::rms_norm in torch.func")
            return func(input, normalized_shape, weight, eps)  # type: ignore[no-any-return]
        if not input.is_contiguous():
            self._device.estimate("aten::rms_norm on strided tensors")
        return rms_norm(self._device, func, input, tuple(normalized_shape), weight, eps)

    # --- parameters that move in place ----------------------------------------------------------------------------

    def _compatible(self, func: Any, a: torch.Tensor, b: torch.Tensor) -> bool:
        """On a real card host and CUDA tensors may exchange their contents, which ``Module.to`` relies on."""
        if self._place(a) is not None or self._place(b) is not None:
            return True
        return bool(func(a, b))

    def _set_data(self, func: Any, tensor: torch.Tensor, value: torch.Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():  # parameters of lazy modules refuse what is asked here
            self._exchange_data(func, tensor, value)

    def _exchange_data(self, func: Any, tensor: torch.Tensor, value: torch.Tensor) -> None:
        if (tensor.device.type == "meta") == (value.device.type == "meta"):
            func(tensor, value)
            return
        # The metadata tensor and a host tensor are of different kinds here, where they would not be on a card: so the
        # Python object gets another implementation, and what hangs on the old one moves along.
        if not tensor.is_leaf:
            raise self._device.unsupported("setting .data across devices on a tensor that is not a leaf")
        requires_grad, grad = tensor.requires_grad, self._get_grad(_GRAD.__get__, tensor)
        hooks = [getattr(tensor, name, None) for name in _HOOKS]
        alias = value.detach()
        try:
            torch._C._swap_tensor_impl(tensor, alias)
        except RuntimeError:
            raise self._device.unsupported(
                "setting .data across devices while a graph that uses the tensor is alive (its loss, or an output)"
            ) from None
        tensor.requires_grad_(requires_grad)
        if requires_grad:
            for name, value_of in zip(_HOOKS, hooks, strict=True):
                setattr(tensor, name, value_of)
        vars(tensor).pop(_KEPT_GRAD, None)
        if grad is not None:
            # Torch refuses a gradient on another device, so it is kept beside until it moves, too.
            setattr(tensor, _KEPT_GRAD, grad)
            setattr(grad, _OWNER, weakref.ref(tensor))
        owner = vars(tensor).pop(_OWNER, lambda: None)()
        if owner is not None and vars(owner).get(_KEPT_GRAD) is tensor:
            owner.grad = tensor

    def _get_grad(self, func: Any, tensor: torch.Tensor, *rest: Any) -> torch.Tensor | None:
        kept: torch.Tensor | None = vars(tensor).get(_KEPT_GRAD)
        return func(tensor, *rest) if kept is None else kept

    def _set_grad(self, func: Any, tensor: torch.Tensor, grad: torch.Tensor | None) -> None:
        vars(tensor).pop(_KEPT_GRAD, None)
        func(tensor, grad)

    def _array_interface(self, func: Any, tensor: torch.Tensor, *rest: Any) -> Any:
        if self._place(tensor) is Place.CARD:
            raise self._device.unsupported(
                "__cuda_array_interface__ hands out memory, which a virtual card does not have"
            )
        return func(tensor, *rest)

    def _needs_data(self, refused: Any) -> _Handler:
        name = getattr(refused, "__name__", str(refused))

        def refuse(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._place(tensor) is None:
                return func(tensor, *args, **kwargs)
            if name == "tolist" and self._place(tensor) is Place.CARD:
                self._device.not_captured()
            if name == "tolist" and self._device.values.of(tensor) is not None:
                return self._cpu(torch.Tensor.cpu, tensor).tolist()
            raise self._device.unsupported(
                f"Tensor.{name} needs the contents of a tensor that was on the card, which nobody has", [tensor]
            )

        return refuse


def _parse(device: Any) -> torch.device | None:
    if device is None or isinstance(device, torch.device):
        return device
    if isinstance(device, int):
        return torch.device("cuda", device)
    return torch.device(device)


def _is_cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def _default_device() -> torch.device | None:
    """The device that ``with torch.device(...)`` or ``set_default_device`` set, which acts after this mode."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, DeviceContext):
            return mode.device
    return None


_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _without_question(func: FunctionType) -> _Handler | None:
    """The function with its question whether a mode wants to handle it answered with no; None if others ask it."""
    asked = [q for q in _QUESTIONS if q in func.__globals__ and q in func.__code__.co_names]
    if not asked or any(i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for i in dis.get_instructions(func)):
        return None
    names = _Globals(func, asked)
    body = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


class _Globals(dict[str, Any]):
    """A function's globals as they are when they are asked for, less the questions, which are answered with no."""

    def __init__(self, func: FunctionType, asked: list[str]) -> None:
        super().__init__(dict.fromkeys(asked, lambda *args: False), __builtins__=func.__builtins__)
        self._globals = func.__globals__

    def __missing__(self, name: str) -> Any:
        return self._globals[name]
