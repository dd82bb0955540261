"""Gradients that are added up by index: they sort the indices first.

Source: aten/src/ATen/native/cuda/Embedding.cu, EmbeddingBackwardKernel.cu and Indexing.cu; the sizes of CUB's storage
from recordings of an H100 (``sweep_embedding_back`` and ``sweep_index_put`` of tests/data/footprints).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch import cub
from fragscope.record.virtual.scratch.plan import RECORDED, Plan, outputs_then

_UNSORTED = 3072
"""So many indices are added up one by one."""
_ROWS_A_THREAD = 10
_UNIQUE_TILES = (4167, 4999)
"""A block drops the repeated among so many sorted indices, at least and at most."""


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
    unique = cub.tiled_states(count, 8, *_UNIQUE_TILES)
    sums = cub.scan(rows, 8)
    assert size is not None
    assert sums is not None
    parts = count // _ROWS_A_THREAD + rows
    plan = Plan().take(each, each, each, size).give(3, 2).out(0)
    plan.take(each, 8).pass_by(each, unique or 0).take(8 * rows, 8 * rows).pass_by(sums).take(8)
    plan.take(8 * parts, 4 * parts * gradient.shape[-1])
    return plan if unique is not None else plan.guessed("of so many indices")


def accumulated(target: torch.Tensor, indices: Sequence[torch.Tensor | None], values: torch.Tensor, card: Card) -> Plan:
    """Scratch of ``index_put_(accumulate=True)``.

    Args:
        target: what is written to.
        indices: known for a single one, of the first dimension.
        values: what is added.
        card: the kernel runs on it.
    """
    given = [i for i in indices if i is not None]
    if len(given) > 1 or not indices or indices[0] is None or given[0].dtype != torch.int64:
        return Plan().guessed("with accumulate by several indices")
    count, rows = given[0].numel(), target.shape[0]
    each = 8 * count
    size = cub.radix_sort(count, 8, 8, passes=-(-max(1, rows.bit_length()) // 8))
    plan = Plan()
    if torch._C._current_graph_task_id() == -1:  # a program's own indices are checked first
        plan.pass_by(8, 1).pass_by(8, 1)
    plan.take(each, each).give(-2)
    added = count * (target.numel() // max(1, rows))
    if values.numel() != added:
        plan.take(added * values.itemsize)
    plan.take(each, each, each, size or 1)
    if size is None or card.capability != RECORDED:
        plan.guessed("with accumulate of so many")
    return plan


PLANS: dict[str, Callable[..., Plan]] = {"aten::embedding_dense_backward": _embedding}
