"""Operators that torch makes of others, on a card too, but not where shapes are all there is.

Each takes what the operator takes; the operators it calls are seen one by one. What it returns takes the place of the
operator's result.

Source: aten/src/ATen/native/SoftMax.cpp (``_safe_softmax``), ReduceOps.cpp (``logsumexp``), Loss.cpp (``mse_loss``,
``smooth_l1_loss``, ``huber_loss``), TensorCompare.cpp (``allclose``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_aten = torch.ops.aten


def _safe_softmax(source: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """Rows of minus infinity become zeros."""
    out = _aten._softmax(source if dtype is None else source.to(dtype), dim, False)
    masked = _aten.isneginf(source)
    rows = _aten.all.dim(masked, dim, True)
    zero = _aten.scalar_tensor(0.0, dtype=out.dtype, device=out.device)
    _aten.where.self_out(rows, zero, out, out=out)
    del zero, rows, masked
    return out


def _logsumexp(source: torch.Tensor, dims: Any, keepdim: bool = False) -> Any:
    if not source.dtype.is_floating_point:
        source = source.to(torch.get_default_dtype())
    if not source.numel():
        return _aten.log_(_aten.sum.dim_IntList(_aten.exp(source), dims, keepdim))
    most = _aten.amax(source, dims, True)
    sizes = _aten.abs(most)
    infinite = _aten.eq.Scalar(sizes, float("inf"))
    _aten.masked_fill_.Scalar(most, infinite, 0)
    del infinite, sizes
    powers = _aten.exp_(_aten.sub.Tensor(source, most))
    out = _aten.sum.dim_IntList(powers, dims, keepdim)
    del powers
    _aten.log_(out)
    return _aten.add_.Tensor(out, most if keepdim else most.view(out.shape))


def _kept_loss(source: torch.Tensor, target: torch.Tensor, reduction: int = 1, *rest: Any) -> Any:
    """The mean is written into the memory of the losses of all elements, which it keeps."""
    common = torch.promote_types(source.dtype, target.dtype)
    if reduction == 0:
        return _aten.empty_like(_broadcast(source, target), dtype=common)
    out = _aten.empty_like(_broadcast(source, target), dtype=common)
    losses = _aten.empty_like(out)
    out.resize_(())
    into = _aten.mean.out if reduction == 1 else _aten.sum.IntList_out
    into(losses, [], out=out)
    return out


def _loss(source: torch.Tensor, target: torch.Tensor, reduction: int = 1, *rest: Any) -> Any:
    losses = _aten.empty_like(_broadcast(source, target), dtype=source.dtype)
    if reduction == 0:
        return losses
    return _aten.mean(losses) if reduction == 1 else _aten.sum(losses)


def _all_close(a: torch.Tensor, b: torch.Tensor, *how: Any, **named: Any) -> Any:
    close = torch.isclose(a, b, *how, **named)
    every = _aten.all(close)
    answer = _aten.item(every)
    del every, close
    return answer


def _broadcast(a: torch.Tensor, b: torch.Tensor) -> Any:
    return a if a.shape == b.shape else torch.broadcast_tensors(a, b)[0]


COMPOSITES: dict[str, Callable[..., Any]] = {
    "aten::_safe_softmax": _safe_softmax,
    "aten::logsumexp": _logsumexp,
    "aten::mse_loss": _kept_loss,
    "aten::smooth_l1_loss": _kept_loss,
    "aten::huber_loss": _loss,
    "aten::allclose": _all_close,
}
"""By name of the operator."""
