"""Kernels that convert or copy an input first, or pass through another type.

Source: ``prepare_matrix_for_cublas`` and ``prepare_batch_matrix_for_cublas`` in aten/src/ATen/native/cuda/Blas.cpp: a
matrix needs one dimension of stride 1 and the other at least its length; ``where_self_out`` in TensorCompare.cpp;
``unary_op_impl_with_complex_to_float_out`` in UnaryOps.cpp; ``binary_cross_entropy_with_logits`` in Loss.cpp;
``isin_default_kernel_gpu`` in cuda/TensorCompare.cpp. Recorded on an H100 as ``sweep_transposed`` and ``sweep_isin`` of
tests/data/footprints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch.plan import Plan, outputs_then
from fragscope.record.virtual.scratch.reductions import reduced_by

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _product(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    plan = outputs_then(1, [_bytes(t) for t in tensors[-2:] if not _fits_blas(t)])
    return plan if "out" not in kwargs or _fits_blas(kwargs["out"]) else plan.guessed("into strided tensors")


def _vector(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    plan = outputs_then(len(results))
    is_strided = any(min(t.stride(), default=1) != 1 for t in args if isinstance(t, torch.Tensor) and t.numel() > 1)
    return plan.guessed("on strided tensors") if is_strided else plan


def _fits_blas(matrix: torch.Tensor) -> bool:
    (rows, columns), (down, right) = matrix.shape[-2:], matrix.stride()[-2:]
    return (right == 1 and down >= max(1, columns)) or (down == 1 and right >= max(1, rows))


def _scaled(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """With a scale for each matrix; others have kernels of their own."""
    plan = outputs_then(1)
    is_plain = all(scale.numel() == 1 for scale in args[2:4]) and args[0].dtype in _EIGHT_BITS
    return plan if is_plain else plan.guessed("with scales of rows or blocks")


def _where(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """Both choices come to their common type."""
    if len(args) < 3:
        return outputs_then(len(results)).guessed("of a condition alone")
    common = results[0].dtype
    converted = [t.numel() * common.itemsize for t in args[1:3] if t.dtype != common or t.device.type == "cpu"]
    return Plan().take(*converted).out(0).give(*range(len(converted)))


def _of_complex(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    return outputs_then(1, [_bytes(args[0])] if args[0].is_complex() else [])


def _embedding(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    indices = args[1]
    copy = [] if indices.is_contiguous() else [_bytes(indices)]
    return Plan().take(*copy).out(0).give(*range(len(copy)))


def _binary_cross_entropy(
    args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card
) -> Plan:
    source, target = args[:2]
    weight, positive = (args[n] if len(args) > n else kwargs.get(k) for n, k in ((2, "weight"), (3, "pos_weight")))
    reduction = args[4] if len(args) > 4 else kwargs.get("reduction", 1)
    plan = Plan().take(_bytes(source))
    if positive is not None:  # less one, by target
        less, weighted = plan.hold(_bytes(positive)), plan.hold(_bytes(target))
        plan.give(less, weighted)
    why = ""
    if any(t is not None and t.dtype != source.dtype for t in (target, weight, positive)):
        why = "of two types"
    if reduction == 0:
        return plan.out(0).guessed(why)
    losses = plan.hold(_bytes(source))
    shared, unsure = reduced_by(source, None, card, result=source.itemsize, accumulator=4)
    return plan.out(0).pass_by(*shared).give(losses, 0).guessed(why or unsure)


def _histogram(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """Bounds that are not given are looked for first."""
    source = args[0]
    least, most = (args[n] if len(args) > n else kwargs.get(k, 0) for n, k in ((2, "min"), (3, "max")))
    plan = outputs_then(1)
    if least != most or not source.numel():
        return plan
    shared, why = reduced_by(source, None, card, result=source.itemsize, accumulator=source.itemsize)
    return plan.pass_by(source.itemsize, *shared).pass_by(source.itemsize, *shared).guessed(why)


def _isin(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """Few are compared with all of them."""
    source, among = args[:2]
    plan = outputs_then(1)
    if not isinstance(source, torch.Tensor) or not isinstance(among, torch.Tensor):
        return plan
    if among.numel() >= 10 * math.pow(source.numel(), 0.145):
        return plan.guessed("of so many")
    pairs = torch.empty(*source.shape, among.numel(), dtype=torch.bool, device="meta")
    shared, why = reduced_by(pairs, -1, card, result=1, accumulator=1)
    return plan.take(pairs.numel(), source.numel()).pass_by(*shared).give(1, 0).guessed(why)


PLANS: dict[str, Callable[..., Plan]] = {
    "aten::mm": _product,
    "aten::bmm": _product,
    "aten::addmm": _product,
    "aten::baddbmm": _product,
    "aten::mv": _vector,
    "aten::addmv": _vector,
    "aten::dot": _vector,
    "aten::vdot": _vector,
    "aten::_scaled_mm": _scaled,
    "aten::where": _where,
    "aten::abs": _of_complex,
    "aten::angle": _of_complex,
    "aten::embedding": _embedding,
    "aten::binary_cross_entropy_with_logits": _binary_cross_entropy,
    "aten::histc": _histogram,
    "aten::isin": _isin,
}
