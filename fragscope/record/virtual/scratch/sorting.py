"""Sorting, running sums, the largest of rows.

Source: aten/src/ATen/native/cuda/Sort.cpp, SortStable.cu, TensorTopK.cu, TensorTopK.cpp, ScanKernels.cu; equal to
recordings of an H100 (``sweep_sort``, ``sweep_topk`` and ``sweep_cumsum`` of tests/data/footprints).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch import cub
from fragscope.record.virtual.scratch.plan import RECORDED, Plan, outputs_then

_SMALL_SORT = 4096
_MANY_SEGMENTS = 128
_WHOLE_CARD = 1_000_000  # elements that one sort keeps busy with
_DIGITS = 256
_BLOCK = 256
_TOPK_BLOCKS = 6  # a multiprocessor: 65,536 registers, of which a thread takes 40
_HALF = (torch.float16, torch.bfloat16)
_SORTED = (torch.float32, torch.int64, torch.int32, torch.bfloat16, torch.float16)
_NOT_SEEN = "of this type or size"


def _sort(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    source = args[0]
    plan = outputs_then(len(results))
    if source.dim() == 0 or source.numel() == 0:
        return plan
    given = kwargs.get("dim", -1) if "dim" in kwargs else next((a for a in args[1:] if type(a) is int), -1)
    dim = given % source.dim()
    count = source.shape[dim]
    segments = source.numel() // count
    if count <= _SMALL_SORT:
        return plan.take(8 * count)
    every, key = source.numel(), source.itemsize
    if card.capability != RECORDED or source.dtype not in _SORTED or every >= 2**31:
        return plan.guessed(_NOT_SEEN)
    if source.stride(dim) != 1 or not torch.ops.aten.is_non_overlapping_and_dense(source):
        plan.take(every * key, every * key, every * 8)
    return _sorted_rows(plan, segments, count, key)


def _sorted_rows(plan: Plan, segments: int, count: int, key: int) -> Plan:
    every = segments * count
    if segments == 1 or count >= _WHOLE_CARD:
        size = cub.radix_sort(count, key, 8)
        plan.take(8 * count)
        if size is None:
            return plan.guessed(_NOT_SEEN)
        for _ in range(segments):
            plan.pass_by(size)
        return plan
    if segments >= _MANY_SEGMENTS:
        return plan.take(8 * every).pass_by(cub.segmented_sort(every, key, 8))
    pairs, keys = (
        cub.radix_sort(every, key, 8),
        cub.radix_sort(every, 8, 0, -(-max(1, (segments - 1).bit_length()) // 8)),
    )
    assert pairs is not None and keys is not None  # there are more than 4,096 elements of known types
    return plan.take(8 * every, 8 * every).pass_by(key * every, pairs).pass_by(keys)


def _topk(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    source = args[0]
    plan = outputs_then(2)
    if source.dim() == 0 or source.numel() == 0:
        return plan
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", -1)) % source.dim()
    if not source.is_contiguous():
        plan.take(source.numel() * source.itemsize)
    length = source.shape[dim]
    rows = source.numel() // length
    if not _uses_many_blocks(rows, length):
        picked = results[0].shape[dim]
        return plan.guessed(_NOT_SEEN) if picked > _SMALL_SORT else plan
    if source.dtype not in (torch.float32, torch.int32, torch.bfloat16, torch.float16) or card.capability != RECORDED:
        return plan.guessed(_NOT_SEEN)
    a_thread = min(64, max(4, -(-length * rows // (card.multiprocessors * _TOPK_BLOCKS * _BLOCK))))
    blocks = rows * -(-length // (a_thread * _BLOCK))
    plan.take(rows * source.itemsize, 8 * rows, 2 * 4 * rows)
    plan.take(blocks * _DIGITS * 2, rows * _DIGITS * 4, blocks * 4, blocks * 4)
    size = cub.sum_by_key(blocks)
    return plan.pass_by(size).pass_by(size)


def _uses_many_blocks(rows: int, length: int) -> bool:
    """Source: ``should_use_multiblock`` in TensorTopK.cu."""
    for most, least in ((20, 20_000), (40, 10_000), (80, 8000), (199, 5000), (799, 3000), (4000, 800)):
        if rows <= most:
            return length >= least
    return length >= 400


def _running(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """Sums and products along one dimension."""
    source, out = args[0], results[0]
    plan = outputs_then(1)
    if source.dim() == 0 or source.numel() == 0:
        return plan
    if source.dtype != out.dtype:
        plan.take(out.numel() * out.itemsize)
    elif not source.is_contiguous():
        plan.take(source.numel() * source.itemsize)
    dim = (args[1] if len(args) > 1 else kwargs["dim"]) % source.dim()
    if source.numel() != source.shape[dim]:
        return plan
    size = None
    if out.dtype in _SORTED:
        size = cub.scan(source.numel(), out.itemsize, is_word=out.dtype not in _HALF)
    if size is None or card.capability != RECORDED:
        return plan.guessed(_NOT_SEEN)
    return plan.take(size)


PLANS: dict[str, Callable[..., Plan]] = {
    "aten::sort": _sort,
    "aten::topk": _topk,
    "aten::cumsum": _running,
    "aten::cumprod": _running,
}
