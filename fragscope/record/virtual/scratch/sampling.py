"""Drawing by probabilities, and permutations.

Source: ``multinomial_out`` in aten/src/ATen/native/Distributions.cpp, cuda/Randperm.cu beside it and
``check_supported_max_int_with_precision`` in TensorFactories.h. Recorded on an H100 as ``sweep_multinomial``,
``types_multinomial`` and ``sweep_randperm`` of tests/data/footprints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch import cub, reductions, sorting
from fragscope.record.virtual.scratch.plan import RECORDED, Plan

_FEW_EQUAL = math.log(0.9)
"""No two of the numbers that a permutation is sorted by are equal, with a probability of nine in ten."""
_SMALL_KEY = 32  # bits
_RECORDED_TYPES = (torch.float32, torch.bfloat16)


def _multinomial(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """Probabilities are checked on the card; then the largest of them, each divided by a random number, is drawn."""
    source, count = args[:2]
    plan = Plan().out(0)
    if not results[0].numel():
        return plan
    if count > 1 and (args[2] if len(args) > 2 else kwargs.get("replacement", False)):
        return plan.guessed("with replacement")
    if source.dtype not in _RECORDED_TYPES:
        plan.guessed("of this type")

    def reduced(operator: str, *of: Any, result: torch.Tensor) -> int:
        return plan.call(reductions.PLANS[operator](of, {}, [result], card), result.numel() * result.itemsize)

    number, truth = source.new_empty(()), torch.empty((), dtype=torch.bool, device="meta")
    most = reduced("aten::max", source, result=number)
    is_finite = plan.hold(1)
    least = reduced("aten::min", source, result=number)
    is_positive = plan.hold(1)
    plan.take(1).give(is_positive, least, is_finite, most)  # what is kept says whether all are valid
    if source.dim() == 1:
        total = reduced("aten::sum", source, result=number)
        plan.take(1).give(total)
    else:
        rows = source.new_empty(source.shape[0])
        totals = reduced("aten::sum", source, [1], result=rows)
        are_zero = plan.hold(len(rows))
        reduced("aten::any", torch.empty_like(rows, dtype=torch.bool), result=truth)
        plan.give(are_zero, totals)
    plan.pass_by(1)
    drawn = torch.empty_like(source)
    plan.take(drawn.numel() * drawn.itemsize)
    if count == 1:
        plan.call(reductions.PLANS["aten::argmax"]((drawn, -1, True), {}, results, card), 0)
    else:
        values = torch.empty_like(results[0], dtype=source.dtype)
        plan.take(values.numel() * values.itemsize)
        plan.call(sorting.PLANS["aten::topk"]((drawn, count), {}, [values, *results], card), 0, 0)
    return plan


def _permutation(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """Numbers in order are sorted by random keys, of as many bits as make equal ones unlikely."""
    count, out = args[0], results[0]
    plan = Plan().out(0).pass_by(out.itemsize)  # a number, to see whether the type holds it
    if count == 0:
        return plan
    bits = min(64, math.ceil(math.log2(count - (6 * count**2 + 1) / (12 * _FEW_EQUAL))))
    key = 4 if bits <= _SMALL_KEY else 8
    plan.take(count * out.itemsize, count * key, count * key)
    size = cub.radix_sort(count, key, 8, -(-bits // 8))
    if size is None or out.dtype != torch.int64 or card.capability != RECORDED:
        return plan.guessed("of this type")
    return plan.pass_by(size)


PLANS: dict[str, Callable[..., Plan]] = {
    "aten::multinomial": _multinomial,
    "aten::randperm": _permutation,
}
