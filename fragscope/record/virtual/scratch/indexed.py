"""Gradients that are added up by index: they sort the indices first; bags of embeddings.

Source: aten/src/ATen/native/cuda/Embedding.cu, EmbeddingBackwardKernel.cu, Indexing.cu and EmbeddingBag.cu; equal to
recordings of an H100 (``sweep_embedding_back`` and ``sweep_index_put`` of tests/data/footprints).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch import cub, reductions
from fragscope.record.virtual.scratch.plan import RECORDED, Plan, outputs_then

_UNSORTED = 3072
"""So many indices are added up one by one."""
_ROWS_A_THREAD = 10
_OF_MOST = 2  # the mode that keeps the largest of a bag


def _embedding(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    gradient, indices, words, padding, by_frequency = args[:5]
    count = indices.numel()
    if not gradient.is_contiguous():
        copied = _embedding((gradient.contiguous(), *args[1:]), kwargs, results, card)
        return copied.guessed("on strided tensors")
    if not indices.is_contiguous():
        copied = _embedding((gradient, indices.contiguous(), *args[2:]), kwargs, results, card)
        return Plan([("take", 8 * count), *((s, n + 1 if s == "give" else n) for s, n in copied.steps)], copied.why)
    if count <= _UNSORTED and not by_frequency and padding < 0:
        return outputs_then(1)
    if by_frequency or indices.dtype != torch.int64 or card.capability != RECORDED:
        return outputs_then(1).guessed("of this kind")
    if count <= _UNSORTED:  # with a padding index
        return outputs_then(1).guessed("with a padding index")
    each, rows = 8 * count, min(count, words)
    size = cub.radix_sort(count, 8, 8)
    unique = cub.unique_by_key(count)
    sums = cub.scan(rows, 8)
    if size is None or sums is None:
        return outputs_then(1).guessed("of so many indices")
    parts = count // _ROWS_A_THREAD + rows
    plan = Plan().take(each, each, each, size).give(3, 2).out(0)
    plan.take(each, 8).pass_by(each, unique).take(8 * rows, 8 * rows).pass_by(sums).take(8)
    return plan.take(8 * parts, 4 * parts * gradient.shape[-1])


def accumulated(
    target: torch.Tensor,
    indices: Sequence[torch.Tensor | None],
    values: torch.Tensor,
    card: Card,
    *,
    is_checked: bool,
) -> Plan:
    """Scratch of ``index_put_(accumulate=True)``: places in memory are made of the indices, and sorted.

    Args:
        target: what is written to.
        indices: known for those of the first dimensions, all of one shape.
        values: what is added.
        card: the kernel runs on it.
        is_checked: whether indices are in bounds is asked: a program's own, and not those of a formula.
    """
    given = [i for i in indices if i is not None]
    plan = Plan()
    if (
        not given
        or any(i is None for i in indices[: len(given)])
        or any(i.dtype != torch.int64 or i.shape != given[0].shape for i in given)
    ):
        return plan.guessed("with accumulate by such indices")
    if not target.is_contiguous() or any(i.dim() > 1 and not i.is_contiguous() for i in given):
        return plan.guessed("with accumulate on strided tensors")
    count = given[0].numel()
    each, slice_size = 8 * count, math.prod(target.shape[len(given) :])
    for number, index in enumerate(given):
        if is_checked:
            for operator in ("aten::max", "aten::min"):
                bound = plan.call(reductions.PLANS[operator]((index,), {}, [index.new_empty(())], card), 8)
                plan.pass_by(1).give(bound)
        plan.take(each, each).give(-2)
        if number:
            plan.give(-1)  # added to those of the first
    if not count or not slice_size:
        return plan
    if values.numel() != count * slice_size or not values.is_contiguous():
        plan.take(count * slice_size * values.itemsize)
    largest = (target.numel() - 1) // slice_size
    size = cub.radix_sort(count, 8, 8, passes=-(-max(1, largest.bit_length()) // 8))
    plan.take(each, each, each, size or 1)
    return plan if size is not None and card.capability == RECORDED else plan.guessed("with accumulate of so many")


def _bags(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """The sizes of bags and the bags of indices come first."""
    weight, indices, offsets = args[:3]
    mode = args[4] if len(args) > 4 else kwargs.get("mode", 0)
    is_plain = weight.is_contiguous() and indices.is_contiguous() and indices.dtype == offsets.dtype
    plan = Plan().out(2, 1, 0, 3)
    return plan if mode != _OF_MOST and is_plain else plan.guessed("of this kind")


PLANS: dict[str, Callable[..., Plan]] = {
    "aten::embedding_dense_backward": _embedding,
    "aten::_embedding_bag_forward_only": _bags,
}
