"""``rms_norm``: one kernel on a card, forward and backward, and several operators elsewhere.

Source: ``rms_norm_symint`` in aten/src/ATen/native/layer_norm.cpp; ``_fused_rms_norm`` in
tools/autograd/derivatives.yaml.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fragscope.record.virtual.card import VirtualCard


def rms_norm(
    device: VirtualCard,
    plain: Callable[..., torch.Tensor],
    source: torch.Tensor,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    eps: float | None,
) -> torch.Tensor:
    """As ``torch.rms_norm``, which ``plain`` is, of a tensor on the card."""
    if (
        not shape
        or tuple(source.shape[-len(shape) :]) != shape
        or (weight is not None and tuple(weight.shape) != shape)
    ):
        return plain(source, shape, weight, eps)  # which says what is wrong
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (source, weight)):
        device.estimate("aten::rms_norm of forward derivatives")
        return plain(source, shape, weight, eps)
    out: torch.Tensor = _RmsNorm.apply(source, weight, device, plain, shape, eps)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    """The two kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        source: torch.Tensor,
        weight: torch.Tensor | None,
        device: VirtualCard,
        plain: Any,
        shape: Any,
        eps: Any,
    ) -> torch.Tensor:
        """The result, and a value a row for the backward pass."""
        out = torch.empty_like(source, memory_format=torch.contiguous_format)
        kept = source.shape[: source.dim() - len(shape)] + (1,) * len(shape)
        rows = torch.empty(kept, dtype=torch.float64 if source.dtype == torch.float64 else torch.float32, device="meta")
        device.launched("aten::_fused_rms_norm", [source, *([] if weight is None else [weight])], [out, rows])
        ctx.save_for_backward(source, weight, rows)
        ctx.rest = device, plain, shape, eps
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Gradients of source and weight."""
        source, weight, rows = ctx.saved_tensors
        device, plain, shape, eps = ctx.rest
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # of second order: torch takes it apart
            device.estimate("aten::_fused_rms_norm_backward of second order")
            inputs = [t for t, wanted in zip((source, weight), needs, strict=True) if wanted]
            found = iter(torch.autograd.grad(plain(source, shape, weight, eps), inputs, gradient, create_graph=True))
            made = [next(found) if wanted else None for wanted in needs]
        else:
            made = list(
                torch.ops.aten._fused_rms_norm_backward(gradient, source, list(shape), rows, weight, list(needs))
            )
        return (*made, None, None, None, None)
