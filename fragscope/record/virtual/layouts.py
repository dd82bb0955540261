"""Results whose channels come last on a card or do not, where torch's rules for shapes say otherwise.

Source: ``cudnn_conv_suggest_memory_format`` in aten/src/ATen/native/ConvUtils.h; ``batch_norm_choose_impl`` and
``cudnn_batch_norm`` in aten/src/ATen/native/Normalization.cpp and cudnn/BatchNorm.cpp.
"""

from __future__ import annotations

from typing import Any

import torch

KEEPS_LAYOUT = {
    "aten::convolution": ((0, 1), (0,)),
    "aten::convolution_backward": ((1, 2), (0, 1)),
    "aten::native_batch_norm": ((0,), (0,)),
    "aten::native_batch_norm_backward": ((1,), (0,)),
}
"""Positions of the arguments that decide, and of the results that follow."""
_LAST = torch.channels_last


def channels_last_as(op: str, args: tuple[Any, ...], out: Any) -> Any:
    """The results of an operator of ``KEEPS_LAYOUT``, laid out as on a card; they share the memory of what is given."""
    deciding, following = KEEPS_LAYOUT[op]
    lay_out = _with_them_last if any(_has_them_last(args[n]) for n in deciding) else _contiguous
    if isinstance(out, torch.Tensor):
        return lay_out(out)
    return tuple(lay_out(t) if n in following and t is not None else t for n, t in enumerate(out))


def _has_them_last(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=_LAST)


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    if not _has_them_last(tensor):
        return tensor
    _, channels, height, width = tensor.shape
    return tensor.as_strided(tensor.shape, (channels * height * width, height * width, width, 1))


def _with_them_last(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() != 4 or tensor.is_contiguous(memory_format=_LAST):
        return tensor
    _, channels, height, width = tensor.shape
    return tensor.as_strided(tensor.shape, (channels * height * width, 1, width * channels, channels))
