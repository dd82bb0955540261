"""Operators whose result is as large as values make it: their results are known when the plan is made.

Source: aten/src/ATen/native/cuda/Nonzero.cu, IndexKernel.cpp, UniqueCub.cu, SummaryOps.cu and Equal.cpp. Recorded on an
H100 as ``sweep_nonzero``, ``sweep_masked_select``, ``sweep_unique``, ``sweep_isin_many``, ``sweep_bincount`` and
``sweep_equal`` of tests/data/footprints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch import cub, reductions
from fragscope.record.virtual.scratch.plan import RECORDED, Plan, outputs_then

_COUNTED = (torch.float32, torch.bool)
"""Of these it was recorded how many blocks count many of them; few take one, whatever they are."""
_AT_ONCE = 2**31 - 1
_UNIQUE_OPTIONS = ((2, "return_inverse"), (3, "return_counts"))


def _nonzero(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """They are counted, then picked."""
    source = args[0]
    count = source.numel()
    plan = Plan()
    if not source.is_contiguous():
        plan.take(count * source.itemsize)
    plan.take(4).pass_by(cub.count_nonzero(count, card)).out(0)
    if source.dim():
        plan.pass_by(cub.select(count))
    is_seen = source.dtype in _COUNTED or count <= cub.COUNT_TILE
    is_sure = is_seen and 0 < count < _AT_ONCE and card.capability == RECORDED
    return plan if is_sure else plan.guessed("of this type or size")


def _chosen(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """An index by a mask."""
    source, mask = args[:2]
    if source.shape != mask.shape or not mask.dim():
        return outputs_then(1).guessed("of several shapes")
    plan = Plan()
    size = 8 * mask.dim() * results[0].numel()
    picked = plan.call(_nonzero((mask,), {}, results, card), size)
    return plan.out(0).give(picked)


def _unique(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """All are sorted, with their places where those are asked for. The result keeps room for all of them."""
    source = args[0]
    has_places, has_counts = (args[n] if len(args) > n else kwargs.get(k, False) for n, k in _UNIQUE_OPTIONS)
    count, plan = source.numel(), Plan()
    if not source.is_contiguous():
        plan.take(source.numel() * source.itemsize)
    size = cub.radix_sort(count, source.itemsize, 8 if has_places else 0)
    plan.take(count * source.itemsize)
    if has_places:
        numbers = plan.hold(8 * count)
        plan.take(8 * count).pass_by(size or 1).give(numbers).out(1)
        plan.take(8 * count).pass_by(cub.plain_sum(count)).give(-2)
    else:
        plan.pass_by(size or 1)
    plan.out(0).take(8).pass_by(cub.select(count))
    if has_counts or not count or source.dtype != torch.int64 or card.capability != RECORDED:
        return outputs_then(len(results)).guessed("of this kind")
    return plan


def _bounds(plan: Plan, source: torch.Tensor, card: Card) -> Plan:
    """The least and the largest element, each read by the host."""
    bound = source.new_empty(())
    for operator in ("aten::min", "aten::max"):
        plan.give(plan.call(reductions.PLANS[operator]((source,), {}, [bound], card), source.itemsize))
    return plan


def _counts(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """What bins take besides is on the chip."""
    source = args[0]
    weights = args[1] if len(args) > 1 else kwargs.get("weights")
    if not source.numel():
        return Plan().out(0)
    if weights is not None or source.dtype != torch.int64:
        return outputs_then(1).guessed("of this type or with weights")
    return _bounds(Plan(), source, card).out(0)


def _equal(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """What is one tensor or differs in shape is not looked at."""
    one, other = args[:2]
    is_one = (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.storage_offset() == other.storage_offset()
        and one.dtype == other.dtype
        and one.stride() == other.stride()
    )
    plan = Plan()
    if one.shape != other.shape or not one.numel() or is_one:
        return plan
    same = torch.empty_like(one, dtype=torch.bool)
    equal = plan.hold(same.numel())
    every = plan.call(reductions.PLANS["aten::all"]((same,), {}, [same.new_empty(())], card), 1)
    return plan.give(every, equal)


PLANS: dict[str, Callable[..., Plan]] = {
    "aten::nonzero": _nonzero,
    "aten::masked_select": _chosen,
    "aten::_unique2": _unique,
    "aten::bincount": _counts,
    "aten::equal": _equal,
}
