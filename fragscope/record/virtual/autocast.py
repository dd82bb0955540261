"""``torch.autocast("cuda")`` for tensors on the virtual card.

Torch casts in a layer above autograd, which operators enter by the kind of their tensors; metadata tensors are of no
kind that it knows. So operators enter it whatever their tensors are, and find rules that ask the device which tensors
are on the card. Torch itself keeps whether autocast is on, for which type, and how deep.

Source: ``CastPolicy`` and the operator lists of aten/src/ATen/autocast_mode.h, ``cached_cast`` in autocast_mode.cpp.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fragscope.record.virtual.storages import Place, Storages

LOWER = (
    "_convolution.deprecated", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "prelu", "addmm", "addmv", "addr", "matmul",
    "einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "_scaled_dot_product_flash_attention", "scaled_dot_product_attention", "cudnn_convolution",
    "cudnn_convolution_transpose",
)  # fmt: skip
"""Operators that run in the lower precision."""

FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss",
    "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm",
    "logsumexp", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d", "_upsample_nearest_exact2d",
    "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa",
)  # fmt: skip
"""Operators that run in float32; ``rms_norm`` in torch from 2.12 on (pytorch#174824)."""

FLOAT32_RESULT = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList",
)  # fmt: skip
"""Operators whose result is float32 unless the program names another type."""

NORMS = {"norm.Scalar": "ScalarOpt_dtype", "norm.ScalarOpt_dim": "ScalarOpt_dim_dtype"}
"""Operators that go to an overload which takes the type of the result."""

WIDEST = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add",
)  # fmt: skip
"""Operators that run in the widest type among their tensors."""

BANNED = ("binary_cross_entropy",)
"""Operators that are refused, since their result is unsafe in the lower precision."""

_KEY = "AutocastCUDA"


class Autocast:
    """Casts of one virtual device.

    Args:
        storages: which tensors are on the card.
    """

    def __init__(self, storages: Storages) -> None:
        self._storages = storages
        self._casts: dict[int, list[tuple[weakref.ref[torch.Tensor], torch.Tensor]]] = {}  # lives on after its weight

    @staticmethod
    def dtype() -> torch.dtype | None:
        """The lower precision in force in the running thread, None while autocast is off."""
        return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A tensor, or a list of them, as an operator gets it that runs in a type."""
        if isinstance(value, torch.Tensor):
            return self._cast(value, dtype) if self._is_eligible(value) else value
        if isinstance(value, list | tuple):
            return type(value)(self.cast(v, dtype) for v in value)
        return value

    def _is_eligible(self, tensor: torch.Tensor) -> bool:
        is_float = tensor.dtype.is_floating_point and tensor.dtype != torch.float64
        return is_float and self._storages.place(tensor) is Place.CARD

    def _cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Weights that take part in autograd are cast once and kept until the outermost autocast ends."""
        if tensor.dtype == dtype:
            return tensor
        is_kept = (
            tensor.dtype == torch.float32
            and dtype == torch.get_autocast_dtype("cuda")
            and tensor.requires_grad
            and tensor.is_leaf
            and not tensor._is_view()
            and torch.is_autocast_cache_enabled()
        )
        if not is_kept:
            return tensor.to(dtype)
        known = self._casts.setdefault(id(tensor), [])
        for weight, cast in known:
            if weight() is tensor:
                return cast
        known.append((weakref.ref(tensor), tensor.to(dtype)))
        return known[-1][1]

    def clear(self) -> None:
        """Let go of the weights that were cast, by whatever thread."""
        self._casts.clear()

    def widest(self, values: tuple[Any, ...], lower: torch.dtype) -> torch.dtype:
        """The widest type among tensors, at least the lower precision.

        Raises:
            RuntimeError: one is of a floating-point type that is neither of the two; as torch does.
        """
        current = lower
        for value in values:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if not isinstance(tensor, torch.Tensor) or not self._is_eligible(tensor):
                    continue
                if torch.float32 in (tensor.dtype, current):
                    current = torch.float32
                elif tensor.dtype != lower:
                    raise RuntimeError("Unexpected floating ScalarType in at::autocast::prioritize")
        return current

    # --- rules: what an operator becomes -------------------------------------------------------------------------

    def _lower(self, op: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._run_in(op, torch.get_autocast_dtype("cuda"), args, kwargs)

    def _float32(self, op: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._run_in(op, torch.float32, args, kwargs)

    def _promoted(self, op: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            dtype = self.widest((*args, *kwargs.values()), torch.get_autocast_dtype("cuda"))
            return self._run_in(op, dtype, args, kwargs)

        return run

    def _float32_result(self, op: Any) -> Callable[..., Any]:
        position = [a.name for a in op._schema.arguments].index("dtype")

        def run(*args: Any, **kwargs: Any) -> Any:
            is_named = kwargs.get("dtype") is not None or (len(args) > position and args[position] is not None)
            if self._is_eligible(args[0]) and not is_named:
                args = args[:position]
                kwargs["dtype"] = torch.float32
            return op(*args, **kwargs)

        return run

    def _norm(self, op: Any, typed: Any) -> Callable[..., Any]:
        arguments = op._schema.arguments

        def run(*args: Any, **kwargs: Any) -> Any:
            given = [args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(arguments)]
            dtype = torch.float32 if self._is_eligible(given[0]) else given[0].dtype
            return typed(*given, dtype=dtype)

        return run

    def _banned(self, op: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not any(self._is_eligible(a) for a in args if isinstance(a, torch.Tensor)):
                return op(*args, **kwargs)
            raise RuntimeError(
                f"torch.nn.functional.{op._schema.name.partition('::')[2]} and torch.nn.BCELoss are unsafe to "
                "autocast; use torch.nn.functional.binary_cross_entropy_with_logits or torch.nn.BCEWithLogitsLoss"
            )

        return run

    def _run_in(self, op: Any, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Torch's binaries cast the last argument first: recorded for convolutions and linear layers (train_vit-default
        # of tests/data/traces).
        named = {k: self.cast(v, dtype) for k, v in reversed(kwargs.items())}
        cast = [self.cast(a, dtype) for a in reversed(args)]
        return op(*reversed(cast), **named)

    def rules(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Operators that this torch casts, and what they become."""
        for names, rule in (
            (LOWER, self._lower),
            (FLOAT32, self._float32),
            (FLOAT32_RESULT, self._float32_result),
            (WIDEST, self._promoted),
            (BANNED, self._banned),
        ):
            for name in names:
                if casts(name):
                    yield name, rule(_operator(name))
        for name, typed in NORMS.items():
            yield name, self._norm(_operator(name), getattr(torch.ops.aten.norm, typed))


def casts(name: str) -> bool:
    """Whether the torch that is installed has a cast for an operator; releases differ in that."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", _KEY)


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


@contextlib.contextmanager
def patched_autocast(autocast: Autocast) -> Iterator[None]:
    """Let operators follow the device's rules while autocast is on, until the end."""
    library = torch.library.Library("aten", "IMPL", _KEY)
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))
    clear = torch.clear_autocast_cache

    def below(rule: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunctionSubclass(), torch._C._ExcludeDispatchKeyGuard(excluded):
                return rule(*args, **kwargs)

        return run

    def clear_all() -> None:
        autocast.clear()
        clear()

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name, rule in autocast.rules():
                library.impl(name, below(rule))
        with mock.patch.object(torch, "clear_autocast_cache", clear_all):
            yield
    finally:
        autocast.clear()
        library._destroy()


def entering_autocast() -> contextlib.AbstractContextManager[Any]:
    """Operators of the running thread enter the casting layer; torch leaves it out itself while autocast is off."""
    return torch._C._IncludeDispatchKeyGuard(getattr(torch._C.DispatchKey, _KEY))
