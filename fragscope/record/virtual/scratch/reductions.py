"""Reductions: a kernel whose blocks share the work of one result takes memory for their partial results.

Whether they do, and how many, follows from the launch that torch computes from shape, strides and the card's size.

Source: ``setReduceConfig`` and ``gpu_reduce_kernel`` in aten/src/ATen/native/cuda/Reduce.cuh (alike from 2.9 to 2.14);
``reorder_dimensions`` and ``coalesce_dimensions`` in aten/src/ATen/TensorIterator.cpp; accumulator types in the
Reduce*Kernel.cu files beside it. Equal to 600 recorded calls on an H100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch.plan import Plan, outputs_then

_HALF = (torch.float16, torch.bfloat16)
_INDEXED_32_BITS = 2**31 - 1
_THREADS = 512
_FEW, _MANY = 16, 256  # values a thread adds up, at least and at most
_WARP = 32
_WELFORD = 16
"""Bytes of a mean, a second moment and two counts in float32."""


def threads_of(card: Card) -> int:
    """Threads that a multiprocessor holds.

    Source: table of compute capabilities in the CUDA C++ Programming Guide.
    """
    major, minor = card.capability
    if (major, minor) == (7, 5):
        return 1024
    return 1536 if (major == 8 and minor >= 6) or major == 12 else 2048


def iterated(shape: Sequence[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Dimensions as a kernel walks them: fastest first, merged where the memory is one run.

    Args:
        shape: of the input.
        strides: bytes; of the result, 0 in dimensions that are reduced, then of the input.
    """
    order = list(range(len(shape) - 1, -1, -1))

    def compare(a: int, b: int) -> int:
        for number, of in enumerate(strides):
            if number == 0 and (of[a] == 0) != (of[b] == 0):
                return 1 if of[b] == 0 else -1
            if of[a] == 0 or of[b] == 0:
                continue
            if of[a] != of[b]:
                return -1 if of[a] < of[b] else 1
            if shape[a] > shape[b]:
                return 1
        return 0

    for start in range(1, len(shape)):
        later = start
        for earlier in range(start - 1, -1, -1):
            swaps = compare(order[earlier], order[later])
            if swaps > 0:
                order[earlier], order[later] = order[later], order[earlier]
                later = earlier
            elif swaps < 0:
                break
    sizes, steps = [shape[d] for d in order], [[of[d] for d in order] for of in strides]
    if len(sizes) < 2:
        return sizes, steps
    last = 0
    for dim in range(1, len(sizes)):
        if sizes[last] == 1 or sizes[dim] == 1 or all(sizes[last] * of[last] == of[dim] for of in steps):
            if sizes[last] == 1:
                for of in steps:
                    of[last] = of[dim]
            sizes[last] *= sizes[dim]
        else:
            last += 1
            for of in steps:
                of[last] = of[dim]
            sizes[last] = sizes[dim]
    return sizes[: last + 1], [of[: last + 1] for of in steps]


def partial_results(
    sizes: list[int], strides: list[list[int]], *, item: int, accumulator: int, vector: int, card: Card
) -> list[int]:
    """Bytes of the partial results and of the semaphores of one launch; empty where no blocks share a result.

    Args:
        sizes: of the dimensions, fastest first.
        strides: bytes, of the result and of the input.
        item: bytes of an input element.
        accumulator: bytes of what a thread adds up in.
        vector: elements that a thread loads at a time.
        card: the kernel runs on it.
    """
    result, source = strides
    reduced = sum(step == 0 for step in result)
    results = math.prod(n for n, step in zip(sizes, result, strict=True) if step != 0)
    each = math.prod(sizes) // results
    if sizes:
        is_fast = reduced == len(sizes) or source[0] < source[reduced]
        across, down, step = (each, results, source[0]) if is_fast else (results, each, source[reduced])
    else:
        is_fast, across, down, step = True, 1, 1, item
    wide = 1
    if step == item:
        if is_fast and across >= 128 and reduced == 1:
            across //= vector
        elif not is_fast:
            wide = 4
            for n in (sizes[reduced], *(s // item for d, s in enumerate(source) if d != reduced)):
                while n % wide:
                    wide //= 2
            across //= wide
    limit = _THREADS // wide
    columns, rows = (1 << (n.bit_length() - 1) if 0 < n < limit else max(1, min(n, limit)) for n in (across, down))
    width = min(columns, _WARP)
    height = min(rows, limit // width)
    width = min(columns, limit // height)
    inputs, outputs = (width, 1) if is_fast else (1, width)
    shares_block = -(-each // inputs) >= min(height * _FEW, _MANY)
    if shares_block:
        inputs *= height
    else:
        outputs *= height
    values = -(-each // inputs)
    grid = -(-(results // wide) // outputs)
    room = card.multiprocessors * (threads_of(card) // (width * height))
    if not shares_block or values < _MANY or grid > room:
        return []
    blocks = max(min(-(-room // grid), -(-values // _FEW)), -(-values // _MANY))
    if blocks <= 1:
        return []
    size = accumulator * results * blocks * (1 if is_fast else width * wide)
    return [size, 4 * grid]


def _strides(tensor: torch.Tensor, reduced: frozenset[int], item: int) -> list[list[int]]:
    """Bytes: of a new result of the remaining dimensions, and of the input."""
    result, step = [0] * tensor.dim(), item
    for dim in range(tensor.dim() - 1, -1, -1):
        if dim not in reduced:
            result[dim], step = step, step * tensor.shape[dim]
    return [result, [s * tensor.itemsize for s in tensor.stride()]]


def reduced_by(
    tensor: torch.Tensor, dims: Any, card: Card, *, result: int, accumulator: int, vectors: Sequence[int] = (4,)
) -> tuple[list[int], str]:
    """Scratch of one reduction, and why it is not known.

    Args:
        tensor: the input.
        dims: one dimension, several, or None and an empty list for all.
        card: the kernel runs on it.
        result: bytes of an element of the result.
        accumulator: bytes of an accumulator.
        vectors: numbers of elements loaded at a time that are possible.
    """
    if tensor.numel() == 0:
        return [], ""
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if max(tensor.numel(), reach * tensor.itemsize) > _INDEXED_32_BITS:
        return [], "of more than 2 GiB"
    given = [dims] if isinstance(dims, int) else list(dims or range(tensor.dim()))
    every = frozenset(d % tensor.dim() for d in given) if tensor.dim() else frozenset()
    sizes, strides = iterated(tensor.shape, _strides(tensor, every, result))
    found = [
        partial_results(sizes, strides, item=tensor.itemsize, accumulator=accumulator, vector=v, card=card)
        for v in vectors
    ]
    return found[0], "" if all(f == found[0] for f in found) else "of this type"


def _opmath(dtype: torch.dtype) -> int:
    return 4 if dtype in _HALF else dtype.itemsize


def _added(vectors: Callable[[torch.dtype], Sequence[int]], dims_at: int = 1) -> Callable[..., Plan]:
    """Sums and their like, which convert their input to the type of the result, unless that is float32."""

    def plan(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
        source, out = args[0], results[0]
        if source.is_complex() or out.is_complex():
            return outputs_then(1).guessed("of complex numbers")
        kept = out.dtype == source.dtype or (source.dtype in _HALF and out.dtype == torch.float32)
        read = source if kept else torch.empty_like(source, dtype=out.dtype, device="meta")
        dims = args[dims_at] if len(args) > dims_at else kwargs.get("dim")
        sizes, why = reduced_by(
            read, dims, card, result=out.itemsize, accumulator=_opmath(read.dtype), vectors=vectors(read.dtype)
        )
        made = [] if kept else [read.numel() * read.itemsize]
        return outputs_then(1, made + sizes).guessed(why)

    return plan


def _picked(accumulator: Callable[[torch.Tensor], int], *, flat: bool = False) -> Callable[..., Plan]:
    """Reductions that keep the type of their input while they run."""

    def plan(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
        source = args[0]
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        made: list[int] = []
        if flat and dims is None and not source.is_contiguous():
            made, source = [source.numel() * source.itemsize], source.contiguous()
        size = 16 if len(results) > 1 else accumulator(source)
        sizes, why = reduced_by(source, dims, card, result=results[0].itemsize, accumulator=size)
        return outputs_then(len(results), made + sizes).guessed(why)

    return plan


def _truth(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """A single number is converted and copied."""
    source = args[0]
    if source.numel() == 1 and source.dtype != torch.bool:
        return outputs_then(1, [1])
    return _picked(lambda t: t.itemsize)(args, kwargs, results, card)


def _moments(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
    """Variances; two values are loaded at a time."""
    source = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    single = source.dtype in (*_HALF, torch.float32)
    sizes, why = reduced_by(
        source, dims, card, result=results[0].itemsize, accumulator=_WELFORD if single else 2 * _WELFORD, vectors=(2,)
    )
    return outputs_then(len(results), sizes).guessed(why or ("" if single else "of this type"))


def _of_sums(dtype: torch.dtype) -> Sequence[int]:
    return (8,) if dtype in _HALF else (4,)


def _of_others(dtype: torch.dtype) -> Sequence[int]:
    return (4, 8) if dtype in _HALF else (4,)  # which of them was not seen


PLANS: dict[str, Callable[..., Plan]] = {
    "aten::sum": _added(_of_sums),
    "aten::nansum": _added(_of_others),
    "aten::prod": _added(_of_others),
    "aten::mean": _added(_of_others),
    "aten::linalg_vector_norm": _added(_of_others, dims_at=2),
    "aten::amax": _picked(lambda t: t.itemsize),
    "aten::amin": _picked(lambda t: t.itemsize),
    "aten::max": _picked(lambda t: t.itemsize, flat=True),
    "aten::min": _picked(lambda t: t.itemsize, flat=True),
    "aten::any": _truth,
    "aten::all": _truth,
    "aten::argmax": _picked(lambda t: 16, flat=True),
    "aten::argmin": _picked(lambda t: 16, flat=True),
    "aten::var": _moments,
    "aten::std": _moments,
    "aten::var_mean": _moments,
    "aten::std_mean": _moments,
}
