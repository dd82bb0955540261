"""Results whose channels come last on a card or do not, where torch's rules for shapes say otherwise.

Source: ``cudnn_conv_suggest_memory_format`` in aten/src/ATen/native/ConvUtils.h; ``batch_norm_choose_impl`` and
``cudnn_batch_norm`` in aten/src/ATen/native/Normalization.cpp and cudnn/BatchNorm.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

KEEPS_LAYOUT = {
    "aten::convolution": ((0, 1), (0,)),
    "aten::convolution_backward": ((1, 2), (0, 1)),
    "aten::native_batch_norm": ((0,), (0,)),
    "aten::native_batch_norm_backward": ((1,), (0,)),
}
"""Positions of the arguments that decide, and of the results that follow."""
_CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")
_DIMS = (4, 5)  # of images and of volumes


def channels_last_as(op: str, args: tuple[Any, ...], out: Any) -> Any:
    """The results of an operator of ``KEEPS_LAYOUT``, laid out as on a card; they share the memory of what is given."""
    deciding, following = KEEPS_LAYOUT[op]
    given = [args[n] for n in deciding]
    is_refused = op in _CONVOLUTIONS and any(t.dtype == torch.float64 for t in given)
    lay_out = _with_them_last if not is_refused and any(_has_them_last(t) for t in given) else _contiguous
    if isinstance(out, torch.Tensor):
        return lay_out(out)
    return tuple(lay_out(t) if n in following and t is not None else t for n, t in enumerate(out))


def _has_them_last(tensor: torch.Tensor) -> bool:
    """Whether a tensor's strides are in the order of such a layout; gaps do not matter.

    Source: ``is_channels_last_strides_2d_s4`` and ``is_channels_last_strides_3d_s5`` in c10/core/MemoryFormat.h.
    """
    if tensor.dim() not in _DIMS or tensor.stride(1) == 0:
        return False
    least = 0
    for dim in _inner_first(tensor):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == tensor.stride(1)):
            return False
        least = stride * max(size, 1)
    return True


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_contiguous() or not _has_them_last(tensor):
        return tensor
    return _laid_out(tensor, range(tensor.dim() - 1, -1, -1))


def _with_them_last(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() not in _DIMS:
        return tensor
    return _laid_out(tensor, _inner_first(tensor))


def _inner_first(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dimensions in the order of memory where channels come last."""
    return (1, *range(tensor.dim() - 1, 1, -1), 0)


def _laid_out(tensor: torch.Tensor, inner_first: Iterable[int]) -> torch.Tensor:
    strides, step = [0] * tensor.dim(), 1
    for dim in inner_first:
        strides[dim], step = step, step * max(tensor.shape[dim], 1)
    return tensor if list(tensor.stride()) == strides else tensor.as_strided(tensor.shape, strides)
