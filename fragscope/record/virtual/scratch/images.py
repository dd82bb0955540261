"""Resampling, which copies images whose channels come last.

Source: aten/src/ATen/native/cuda/UpSampleBilinear2d.cu; recorded on an H100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch.plan import Plan, outputs_then


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _antialiased(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    source, out = args[0], results[0]
    copies = [] if out.is_contiguous() else [_bytes(out)]
    return outputs_then(1, copies + ([] if source.is_contiguous() else [_bytes(source)]))


def _antialiased_back(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    return outputs_then(1, [] if args[0].is_contiguous() else [_bytes(args[0])])


PLANS: dict[str, Callable[..., Plan]] = {
    "aten::_upsample_bicubic2d_aa": _antialiased,
    "aten::_upsample_bilinear2d_aa": _antialiased,
    "aten::_upsample_bicubic2d_aa_backward": _antialiased_back,
    "aten::_upsample_bilinear2d_aa_backward": _antialiased_back,
}
