"""The kernels of scaled dot product attention, forward and backward.

Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu, flash_attn/flash_api.cpp and the kernels'
``workspace_elements_gq`` in mem_eff_attention/kernel_backward.h; cuDNN's workspaces from recordings of an H100
(``sweep_sdpa`` of tests/data/footprints).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch.plan import RECORDED, Plan, outputs_then
from fragscope.record.virtual.scratch.reductions import reduced_by

CUDNN_WORKSPACE = 256
"""Bytes that cuDNN's forward kernel took in every recording of more than one row."""
_SHORT = 512  # keys that one block works off
_PART = 128  # keys of a part, at least
_BLOCKS = 256  # that are wanted at a time
_FEWEST_PARTS = 4
_HALF = (torch.float16, torch.bfloat16)
_LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0))
"""Capabilities whose blocks may take what the largest tiles need."""
_STATE = 16
"""Bytes of a lock and a counter beside each tile that several blocks add to."""
_COLUMNS = 64  # of a tile of keys in the memory-efficient backward pass
_MANY_BLOCKS = 256  # that need no more of few keys
_MOST_PARTS = 200  # of keys, of all heads together
_FULL = 0.8  # of a card's multiprocessors that need no splitting of keys
_GOOD = 0.85  # of the best split's efficiency
_MOST_SPLITS = 128


def cudnn_workspace(query: torch.Tensor, key: torch.Tensor, card: Card) -> Plan:
    """What cuDNN's forward kernel takes after its results.

    For a single row it splits long keys, where few heads of keys leave the card empty: each part keeps a sum of the
    size of the output, a maximum and a sum in float32. The rule is told from 340 recorded calls.
    """
    plan = Plan()
    batch, heads, rows, head = query.shape
    if rows > 1:
        plan.pass_by(CUDNN_WORKSPACE)
    elif key.shape[2] > _SHORT:
        parts = min(_BLOCKS // (batch * key.shape[1]), key.shape[2] // _PART)
        if parts >= _FEWEST_PARTS:
            parts = 1 << (parts.bit_length() - 1)
            plan.pass_by(CUDNN_WORKSPACE // 2 + 4 * (head + 2) * batch * heads * parts)
    return plan if card.capability == RECORDED else plan.guessed("on this card")


def _cudnn(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    workspace = cudnn_workspace(args[0], args[1], card)
    first = Plan().out(2, 3, 0, 1)  # seed and offset
    return Plan(first.steps + workspace.steps, workspace.why)


def _cudnn_backward(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    query = args[1]
    # sums in float32 as large as the query, and those of its rows
    size = 4 * (query.numel() + math.prod(query.shape[:3])) + CUDNN_WORKSPACE
    batch, heads = query.shape[:2]
    for tensor in args[2:4]:  # heads that share a key have gradients of their own first
        if tensor.shape[1] != heads:
            size += batch * heads * tensor.shape[2] * tensor.shape[3] * tensor.itemsize
    plan = outputs_then(len(results), [size])
    return plan if card.capability == RECORDED else plan.guessed("on this card")


def _flash(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    query, key = args[:2]
    dropout = args[3] if len(args) > 3 else kwargs.get("dropout_p", 0.0)
    plan = Plan().out(0, 1)
    if dropout:
        return plan.take(16).out(3, 2, 4).give(0)
    batch, heads, rows, head = query.shape
    splits = _splits(batch * heads * -(-rows // 64), key.shape[2], head, card)
    if splits > 1:
        rounded = -(-head // 32) * 32 if head <= 128 else -(-head // 64) * 64
        if head <= 64:
            rounded = -(-head // 32) * 32
        sums = 4 * splits * batch * heads * rows
        return plan.take(sums, sums * rounded).out(2, 3, 4).give(0, 1)
    return plan.out(2, 3, 4)


def _splits(blocks: int, columns: int, head: int, card: Card) -> int:
    """In how many parts the keys are worked off side by side, when the queries alone do not fill the card.

    Source: ``num_splits_heuristic`` in flash_api.cpp.
    """
    places = 2 * card.multiprocessors
    if blocks >= _FULL * places:
        return 1
    tiles = -(-columns // (256 if head <= 64 else 128 if head <= 128 else 64))
    most = min(_MOST_SPLITS, places, tiles)
    found = {}
    for splits in range(1, most + 1):
        if splits > 1 and -(-tiles // splits) == -(-tiles // (splits - 1)):
            continue
        waves = blocks * splits / places
        found[splits] = waves / math.ceil(waves)
    best = max(found.values(), default=0.0)
    return next((splits for splits, efficiency in found.items() if efficiency >= _GOOD * best), 1)


def _flash_backward(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    gradient, query, _, _, output = args[:5]
    plan = Plan()
    for tensor in (gradient, output):
        if not tensor.transpose(1, 2).is_contiguous():
            plan.take(tensor.numel() * tensor.itemsize)
    batch, heads, rows, head = query.shape
    rows = -(-rows // 128) * 128
    step = 32 if head <= 128 else 64
    sums = 4 * batch * heads * rows
    return plan.out(*range(len(results))).take(sums, sums * (-(-head // step) * step))


def _efficient(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """Seed and offset stay on the host; wide heads of half precision are summed in float32."""
    query, value = args[0], args[2]
    plan = Plan().out(0, 1)
    if value.shape[3] > 128 and query.dtype in _HALF:
        batch, heads, rows, _ = query.shape
        plan.take(4 * batch * heads * rows * value.shape[3])
    return plan


def _efficient_backward(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    gradient, query, key, value, _, output = args[:6]
    batch, heads, rows, head = query.shape
    copied = [] if gradient.transpose(1, 2).is_contiguous() else [gradient.numel() * gradient.itemsize]
    plan = Plan().take(*copied).out(*range(len(results)))
    first = len(copied)
    sums = 4 * batch * heads * rows
    why = ""
    if query.dtype in _HALF:
        plan.take(sums)
    else:  # the sums of the products of gradient and output
        product = torch.empty(batch, rows, heads, output.shape[3], dtype=torch.float32, device="meta")
        shared, why = reduced_by(product, -1, card, result=4, accumulator=4)
        plan.take(4 * product.numel(), sums)
        if shared:
            plan.pass_by(*shared)
        if rows > 1 and heads > 1:
            plan.take(sums).give(first + 1, first)
        else:
            plan.give(first)
    widest = max(head, value.shape[3])
    high, wide, keeps = _tiles(query.dtype, widest)
    floats = -(-rows // high) * -(-head // wide) * (high * wide + _STATE // 4)
    if not keeps:
        columns = _COLUMNS * _parts_of_keys(batch * heads, key.shape[2])
        floats += columns * (-(-head // high) * high + -(-value.shape[3] // high) * high)
    if card.capability not in _LARGE_SHARED_MEMORY:
        why = why or "on this card"
    return plan.take(4 * batch * heads * floats).give(-2, -1).guessed(why)


def _parts_of_keys(blocks: int, columns: int) -> int:
    """In how many parts the keys are worked off side by side, where each needs room for gradients of its own.

    Source: ``launchKernel`` in attention_backward.cu.
    """
    demanded = torch.are_deterministic_algorithms_enabled()
    is_deterministic = demanded and not torch.is_deterministic_algorithms_warn_only_enabled()
    if is_deterministic or (blocks >= _MANY_BLOCKS and columns <= 2 * _COLUMNS):
        return 1
    return max(1, min(-(-columns // _COLUMNS), _MOST_PARTS // blocks))


def _tiles(dtype: torch.dtype, head: int) -> tuple[int, int, bool]:
    """Rows and columns of a tile of the query's gradient, and whether a block keeps those of key and value."""
    if head <= 64:
        return 64, 64, True
    if dtype in _HALF:
        return (128, 128, True) if head <= 128 else (128, 64, False)
    return 128, 64, True


PLANS: dict[str, Callable[..., Plan]] = {
    "aten::_scaled_dot_product_cudnn_attention": _cudnn,
    "aten::_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "aten::_scaled_dot_product_flash_attention": _flash,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention": _efficient,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}
