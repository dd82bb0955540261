"""Normalisation.

Source: aten/src/ATen/native/cuda/group_norm_kernel.cu, Normalization.cu, layer_norm_kernel.cu; recorded on an H100 as
``sweep_group_norm``, ``sweep_batch_norm`` and ``sweep_layer_norm_back`` of tests/data/footprints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch.plan import Plan, outputs_then

_MANY_ROWS = 65_536


def _accumulated(dtype: torch.dtype) -> int:
    return 4 if dtype in (torch.float16, torch.bfloat16) else dtype.itemsize


def _group(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    batch, channels, size = args[3], args[4], _accumulated(args[0].dtype)
    plan = outputs_then(3)
    if args[1] is None and args[2] is None:
        return plan
    if args[5] == 1:  # one element a channel has a kernel of its own
        return plan.guessed("of single elements")
    return plan.take(*[batch * channels * size] * 2)


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """Without training cuDNN returns no means: what torch's rule makes of them is not on the card."""
    source, is_training = args[0], args[5]
    plan = outputs_then(3) if is_training or not _is_of_cudnn(*args[:6]) else Plan().out(0)
    return plan.guessed("with channels last") if is_training and not source.is_contiguous() else plan


def _is_of_cudnn(source: torch.Tensor, weight: Any, bias: Any, mean: Any, variance: Any, is_training: bool) -> bool:
    """Source: ``_select_batch_norm_backend`` in aten/src/ATen/native/Normalization.cpp."""
    if weight is None or bias is None or source.dim() < 3 or not torch.backends.cudnn.enabled:
        return False
    if (mean is None or variance is None) and not is_training:
        return False
    if torch.bfloat16 in (source.dtype, weight.dtype) or (source.dtype == torch.half and weight.dtype == torch.half):
        return False
    return source.shape[0] <= (880_801 if is_training else 65_535)


def _batch_backward(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    plan = outputs_then(len(results))
    return plan if args[0].is_contiguous() and args[1].is_contiguous() else plan.guessed("on strided tensors")


def _group_backward(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    batch, channels, groups, size = args[5], args[6], args[8], _accumulated(args[1].dtype)
    plan = outputs_then(len(results))
    if args[7] == 1 or len(results) < 3:
        return plan.guessed("of this kind")
    a_channel, a_group = batch * channels * size, batch * groups * size
    return plan.take(a_channel, a_channel, a_group, a_group, a_channel).give(3, 2, 4, 1, 0)


def _copied_first(results: tuple[int, ...]) -> Callable[..., Plan]:
    """A kernel that copies an input that is not contiguous before anything else."""

    def plan(args: tuple[Any, ...], kwargs: dict[str, Any], outs: list[torch.Tensor], card: Card) -> Plan:
        source = args[0]
        copy = [] if source.is_contiguous() else [source.numel() * source.itemsize]
        return Plan().take(*copy).out(*results).give(*range(len(copy)))

    return plan


def _layer_backward(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    plan = _copied_first(tuple(range(len(results))))(args[1:], kwargs, results, card)
    return _of_rows(args, plan)


def _rms_backward(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    plan = outputs_then(len(results))
    return _of_rows(args, plan if args[1].is_contiguous() else plan.guessed("on strided tensors"))


def _of_rows(args: tuple[Any, ...], plan: Plan) -> Plan:
    """Beyond so many rows the gradient of the weight is added up by parts, which nobody recorded."""
    gradient, source, shape = args[:3]
    if source.numel() > _MANY_ROWS * max(1, math.prod(shape)):
        return plan.guessed("of so many rows")
    return plan if gradient.is_contiguous() else plan.guessed("on strided tensors")


def _log_softmax_backward(
    args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card
) -> Plan:
    plan = outputs_then(1)
    return plan if args[0].is_contiguous() and args[1].is_contiguous() else plan.guessed("on strided tensors")


def _copied_last(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    source = args[0]
    return outputs_then(1, [] if source.is_contiguous() else [source.numel() * source.itemsize])


def _softmax_backward(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """The gradient times the result comes to memory once."""
    gradient, result = args[:2]
    plan = outputs_then(1, [gradient.numel() * gradient.itemsize])
    return plan if gradient.is_contiguous() and result.is_contiguous() else plan.guessed("on strided tensors")


PLANS: dict[str, Callable[..., Plan]] = {
    "aten::native_group_norm": _group,
    "aten::native_group_norm_backward": _group_backward,
    "aten::native_batch_norm": _batch,
    "aten::native_batch_norm_backward": _batch_backward,
    "aten::_fused_rms_norm_backward": _rms_backward,
    "aten::_log_softmax_backward_data": _log_softmax_backward,
    "aten::native_layer_norm": _copied_first((0, 1, 2)),
    "aten::native_layer_norm_backward": _layer_backward,
    "aten::roll": _copied_first((0,)),
    "aten::_softmax": _copied_last,
    "aten::_log_softmax": _copied_last,
    "aten::_softmax_backward_data": _softmax_backward,
}
