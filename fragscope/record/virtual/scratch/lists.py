"""Operators on lists of tensors, and on groups of matrices.

Source: ``foreach_tensor_norm_cuda`` in aten/src/ATen/native/cuda/ForeachReduceOp.cu; ``_grouped_mm`` as recorded on an
H100 (``sweep_grouped_mm`` of tests/data/footprints).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch.plan import RECORDED, Plan, outputs_then

_CHUNK = 65_536  # elements of a tensor that one block works on
_ARGUMENTS = 60  # bytes of a problem's pointers, sizes and strides
_GROUPED_WORKSPACE = 67_584


def _norm(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """Partial results of all chunks of all tensors, before the results."""
    tensors, order = args[0], args[1] if len(args) > 1 else 2
    chunks = max((-(-t.numel() // _CHUNK) for t in tensors), default=0)
    plan = Plan().take(len(tensors) * chunks * max(4, tensors[0].itemsize)).out(*range(len(results)))
    same = len({t.dtype for t in tensors}) == 1 and kwargs.get("dtype") in (None, tensors[0].dtype)
    is_fast = (
        same and order in (1, 2, float("inf")) and all(t.is_contiguous() and t.dtype.is_floating_point for t in tensors)
    )
    return plan if is_fast else outputs_then(len(results)).guessed("of this kind")


def _grouped_mm(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    ends = args[2] if len(args) > 2 else kwargs.get("offs")
    plan = outputs_then(1)
    if ends is None or card.capability != RECORDED or args[0].dtype != torch.bfloat16:
        return plan.guessed("of this kind")
    return plan.take(_ARGUMENTS * ends.numel(), _GROUPED_WORKSPACE)


def _most(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    return outputs_then(len(results)).guessed("of lists")


PLANS: dict[str, Callable[..., Plan]] = {
    "aten::_foreach_norm": _norm,
    "aten::_foreach_max": _most,
    "aten::_foreach_powsum": _most,
    "aten::_grouped_mm": _grouped_mm,
}
