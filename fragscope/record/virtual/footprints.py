"""What an operator allocates on a CUDA card besides its outputs.

Three kinds of operator: those that allocate their outputs and nothing else, those whose temporaries are modelled here,
and all others, which make a result ``estimated``. Membership in the first two is checked against recordings of a real
card (tests/data/footprints).
"""

from __future__ import annotations

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
        "clone", "contiguous", "lift_fresh", "cat", "stack", "flip", "index_select", "gather", "repeat",
        "constant_pad_nd", "tril", "triu", "_unsafe_view", "_reshape_copy", "masked_fill", "masked_fill_",
        "index_copy_", "index_fill_", "index_add_", "scatter_",
        # kernels that keep what they need on chip
        "native_dropout", "nll_loss_forward", "nll_loss_backward", "mse_loss_backward", "smooth_l1_loss_backward",
        "huber_loss_backward",
        "glu", "glu_backward", "silu_backward", "median", "kthvalue", "searchsorted", "floor_divide", "complex",
        "select_backward", "slice_backward", "scatter_add_", "scatter_add", "index_add", "scatter",
        "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward",
        "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "upsample_bilinear2d", "upsample_bilinear2d_backward",
        "upsample_nearest2d", "reflection_pad1d",
        # what forward derivatives ask, and zeros that have no memory
        "is_same_size", "_has_same_storage_numel", "_efficientzerotensor",
        # optimizers
        "_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_amp_foreach_non_finite_check_and_unscale_",
    )
)  # fmt: skip
"""Operators that allocate their outputs, in order, and nothing else."""

ORDERED_ON_DEMAND = frozenset(
    f"aten::{name}{suffix}"
    for name in ("index_copy", "index_add", "scatter", "scatter_add", "scatter_reduce", "put", "cumsum")
    for suffix in ("", "_")
)
"""Operators that take other steps, or refuse, under ``torch.use_deterministic_algorithms``.

Source: uses of ``deterministicAlgorithms`` and ``alertNotDeterministic`` in aten/src/ATen/native/cuda.
"""
NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh",
        "_unsafe_view", "is_same_size", "_has_same_storage_numel", "_efficientzerotensor",
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

GEMMS = frozenset(
    f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot", "_scaled_mm")
)
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
}
"""Outputs that are allocated in another order than they are returned."""

# Handled by the dispatch mode itself, with their temporaries.
MODELLED = frozenset({"aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_", "aten::resize_"})


def is_known(func: Any) -> bool:
    """Whether an operator's allocations are its outputs and nothing else, or are modelled."""
    name = func._schema.name
    if name.startswith("aten::_foreach_"):  # one kernel for all, or the operator of each; those that reduce have plans
        return True
    return name in OUTPUTS_ONLY or name in MODELLED or torch.Tag.pointwise in func.tags


def takes_lt(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a matrix product goes to cuBLASLt, which scales, or adds the bias, in the same kernel.

    Source: ``useLtInterface`` in aten/src/ATen/native/cuda/Blas.cpp; ``scaled_gemm`` in CUDABlas.cpp of
    aten/src/ATen/cuda.
    """
    if func._schema.name == "aten::_scaled_mm":
        return True
    if func._schema.name != "aten::addmm" or kwargs.get("beta", 1) != 1:
        return False
    bias, _, matrix = args[:3]
    is_vector = bias.dim() == 1 and bias.is_contiguous() and bias.shape[0] == matrix.shape[1]
    return bool(is_vector and min(matrix.shape) > 1)


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
