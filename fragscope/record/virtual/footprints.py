"""What an operator allocates on a CUDA card besides its outputs.

Three kinds of operator: those that allocate their outputs and nothing else, those whose temporaries are modelled here,
and all others, which make a result ``estimated``. Membership in the first two is checked against recordings of a real
card (tests/data/footprints).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fragscope.units import KIB, MIB

OUTPUTS_ONLY = frozenset(
    f"aten::{name}"
    for name in (
        # made from nothing
        "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros",
        "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange", "eye", "linspace", "scalar_tensor",
        "rand", "rand_like", "randn", "randn_like", "randint", "tril_indices", "triu_indices",
        # filled in place
        "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_",
        # copies and rearrangements
        "clone", "contiguous", "lift_fresh", "cat", "stack", "flip", "roll", "index_select", "gather", "embedding",
        "repeat", "constant_pad_nd", "tril", "triu", "_unsafe_view", "_reshape_copy", "masked_fill", "masked_fill_",
        "index_copy_", "index_fill_", "index_add_", "scatter_",
        # kernels that keep what they need on chip
        "_softmax", "_log_softmax", "native_layer_norm", "native_dropout", "_fused_rms_norm",
        "_foreach_add_", "_foreach_mul_", "_foreach_lerp_", "_foreach_addcmul_", "_foreach_addcdiv_", "_foreach_sqrt",
        "_foreach_div_", "_foreach_copy_",
    )
)  # fmt: skip
"""Operators that allocate their outputs, in order, and nothing else."""

NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh",
        "_unsafe_view",
    )
)  # fmt: skip
"""Operators, besides views, that touch no memory."""

SHAPE_OF_INPUT = frozenset(
    f"aten::{name}"
    for name in (
        "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones",
        "new_full",
    )
)  # fmt: skip
"""Operators that look at the shape of their input and do not read it."""

GEMMS = frozenset({"aten::mm", "aten::bmm", "aten::addmm"})
"""Outputs only, once the stream has its cuBLAS workspace, which the first of them allocates after its output."""

GEMM_RECORDED = frozenset({(9, 0)})
"""Compute capabilities whose matrix products were recorded; on others they make a result ``estimated``."""


def gemm_workspace(capability: tuple[int, int]) -> int:
    """Bytes of that workspace on a card.

    Source: ``parseChosenWorkspaceSize`` in aten/src/ATen/cuda/CublasHandlePool.cpp. Blackwell has as much as Hopper in
    the newest releases; earlier ones gave it what other cards have.
    """
    return 32 * MIB if capability[0] in (9, 10, 12) else 4096 * KIB * 2 + 16 * KIB * 8


LT_WORKSPACE = MIB
"""Bytes of cuBLASLt's, recorded on an H100. Source: ``_getWorkspaceSize`` in aten/src/ATen/cuda/CUDABlas.cpp."""

OUTPUT_ORDER = {
    "aten::native_dropout": (1, 0),  # the mask comes first
    "aten::_scaled_dot_product_cudnn_attention": (2, 3, 0, 1),  # seed and offset come first
    "aten::_scaled_dot_product_efficient_attention": (0, 1),  # seed and offset stay on the host
}
"""Outputs that are allocated in another order than they are returned, or of which some are not on the card."""

# Handled by the dispatch mode itself, with their temporaries.
MODELLED = frozenset({"aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_", "aten::resize_"})


def is_known(func: Any) -> bool:
    """Whether an operator's allocations are its outputs and nothing else, or are modelled."""
    name = func._schema.name
    return name in OUTPUTS_ONLY or name in MODELLED or name in GEMMS or torch.Tag.pointwise in func.tags


def adds_bias(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a matrix product goes to cuBLASLt, which adds the bias in the same kernel.

    Source: ``useLtInterface`` in aten/src/ATen/native/cuda/Blas.cpp.
    """
    if func._schema.name != "aten::addmm" or kwargs.get("beta", 1) != 1:
        return False
    bias, _, matrix = args[:3]
    is_vector = bias.dim() == 1 and bias.is_contiguous() and bias.shape[0] == matrix.shape[1]
    return bool(is_vector and min(matrix.shape) > 1)


_CONTIGUOUS_ONLY = frozenset(
    f"aten::{name}"
    for name in (
        "_softmax",
        "_log_softmax",
        "native_layer_norm",
        "native_dropout",
        "_fused_rms_norm",
        "embedding",
        "roll",
    )
)
"""Operators whose CUDA kernels first copy an input that is not contiguous."""


CUDNN_WORKSPACE = 256
"""Bytes that cuDNN's attention took in every recording so far; a lower bound elsewhere."""


def _flash_sums(args: tuple[Any, ...]) -> list[int]:
    batch, heads, rows, head = args[1].shape
    rows = -(-rows // 128) * 128
    step = 32 if head <= 128 else 64
    return [4 * batch * heads * rows, 4 * batch * heads * rows * (-(-head // step) * step)]


_SCRATCH: dict[str, Callable[[tuple[Any, ...]], list[int]]] = {
    "aten::_scaled_dot_product_cudnn_attention": lambda args: [CUDNN_WORKSPACE],
    # sums in float32 as large as the query, and those of its rows
    "aten::_scaled_dot_product_cudnn_attention_backward": lambda args: [
        4 * (args[1].numel() + math.prod(args[1].shape[:3])) + CUDNN_WORKSPACE
    ],
    "aten::_scaled_dot_product_flash_attention_backward": _flash_sums,
    "aten::_softmax_backward_data": lambda args: [args[0].numel() * args[0].itemsize],  # gradient times result
}


def scratch(func: Any, args: tuple[Any, ...]) -> list[int]:
    """Bytes that an operator takes after its outputs and gives back, as far as that is known; there may be more.

    Source: recordings of an H100 with torch 2.11 for cuDNN's attention (``sdpa`` of tests/data/footprints, and the
    backward passes of tests/data/traces/train_vit-default) and for softmax (``softmax_backward``); ``mha_bwd`` in
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp for the flash kernel.
    """
    sizes = _SCRATCH.get(func._schema.name)
    return [] if sizes is None else sizes(args)


_COMPLEX_FIRST = frozenset({"aten::abs", "aten::angle"})


def needs_copies(func: Any, args: tuple[Any, ...]) -> str:
    """Why a known operator makes whole copies of its inputs first, or an empty string.

    Source: ``.contiguous()`` in the operators' CUDA files; ``prepare_matrix_for_cublas`` and
    ``prepare_batch_matrix_for_cublas`` in aten/src/ATen/native/cuda/Blas.cpp: a matrix needs one dimension of stride 1
    and the other at least its length; ``where_self_out`` in TensorCompare.cpp converts the two choices to their common
    type; ``unary_op_impl_with_complex_to_float_out`` in UnaryOps.cpp makes a complex result first.
    """
    name = func._schema.name
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    strided = mixed = False
    if name == "aten::where":
        mixed = len({t.dtype for t in tensors[1:]}) > 1
    elif name in _COMPLEX_FIRST:
        mixed = any(t.is_complex() for t in tensors)
    elif name in _CONTIGUOUS_ONLY:
        strided = not all(t.is_contiguous() for t in tensors)
    elif name in GEMMS:
        strided = not all(_fits_blas(t) for t in tensors[-2:])
    return "on strided tensors" if strided else "with types to convert" if mixed else ""


def _fits_blas(matrix: torch.Tensor) -> bool:
    (rows, columns), (down, right) = matrix.shape[-2:], matrix.stride()[-2:]
    return (right == 1 and down >= max(1, columns)) or (down == 1 and right >= max(1, rows))


def copy_temporaries(
    dst: torch.Tensor, src: torch.Tensor, *, dst_on_card: bool, src_on_card: bool, non_blocking: bool
) -> list[int]:
    """Bytes that a copy between host and card takes on the card besides its destination.

    Source: ``copy_requires_temporaries`` and ``copy_kernel_cuda`` in aten/src/ATen/native/cuda/Copy.cu: a copy that
    is not one run of bytes goes through a contiguous tensor; blocking copies convert types on the host, others on
    the card.
    """
    if dst_on_card == src_on_card:
        return []
    same_type = dst.dtype == src.dtype
    if same_type and _same_dense_layout(dst, src):
        return []
    elements = dst.numel()
    if dst_on_card:
        if non_blocking:  # the card converts: the source's bytes arrive first
            staged = not (dst.is_contiguous() and same_type)
            return [elements * src.itemsize] if staged else []
        return [] if dst.is_contiguous() else [elements * dst.itemsize]
    sizes = []
    if non_blocking and not same_type:
        sizes.append(elements * dst.itemsize)
    elif not src.expand_as(dst).is_contiguous():
        sizes.append(elements * src.itemsize)
    return sizes


def _same_dense_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both tensors are one run of bytes in the same order."""
    if a.shape != b.shape:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    strides = [(x, y) for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n != 1]
    return all(x == y for x, y in strides) and torch.ops.aten.is_non_overlapping_and_dense(a)
