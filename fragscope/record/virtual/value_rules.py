"""For which operators a computation on the host gives, bit for bit, the values that a card would have.

Integers and bools are exact wherever the result is defined. Floats are known where they are written down, moved or
compared, and where an operation is rounded once from exact operands (IEEE 754: + - * / in float32 and float64), or is
made of such operations here and there (quotients by a number of the host). Sums,
products of matrices and functions such as ``exp`` are rounded otherwise on a card, so their results are unknown; so are
random numbers, uninitialised memory, and what the order of parallel writes decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch

_REDUCED = frozenset({torch.float16, torch.bfloat16})
_FULL = frozenset({torch.float32, torch.float64})
_WHOLE = 2**24
"""Whole numbers below this are exact in float32."""


def _names(*names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names)


FILLED: dict[str, int | None] = {
    **dict.fromkeys(_names("zeros", "zeros_like", "new_zeros", "zero_"), 0),
    **dict.fromkeys(_names("ones", "ones_like", "new_ones"), 1),
    **dict.fromkeys(_names("full", "full_like", "fill_"), None),
    "aten::new_full": None,
}
"""Operators that write one number everywhere; None where it is an argument."""

_MADE = _names("arange", "eye", "tril_indices", "triu_indices", "scalar_tensor")
"""Made from arguments that are no tensors."""

_MOVED = _names(
    "clone", "contiguous", "lift_fresh", "_to_copy", "copy_", "cat", "stack", "flip", "roll", "repeat", "tril", "triu",
    "tril_", "triu_", "constant_pad_nd", "_unsafe_view", "_reshape_copy", "where", "masked_fill", "masked_fill_",
    "masked_select", "index", "index_put", "index_put_", "index_select", "gather", "take", "embedding", "index_fill",
    "index_fill_", "index_copy", "index_copy_", "scatter", "scatter_", "nonzero", "repeat_interleave",
    "_local_scalar_dense", "copy", "slice_scatter", "select_scatter",
)  # fmt: skip
"""Values come out as they went in, or converted."""

_COMPARED = _names(
    "eq", "ne", "lt", "le", "gt", "ge", "equal", "isnan", "isinf", "any", "all", "max", "min", "amax", "amin",
    "aminmax", "argmax", "argmin", "maximum", "minimum", "sort", "topk", "unique_dim", "unique_consecutive", "_unique2",
    "isin", "searchsorted", "bucketize", "logical_and", "logical_or", "logical_not", "logical_xor", "count_nonzero",
)  # fmt: skip
"""Values are held against each other."""

_ROUNDED_ONCE = _names(
    "add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "neg_", "abs", "abs_", "floor", "ceil",
    "trunc", "round", "sign", "relu", "clamp", "clamp_", "clamp_min", "clamp_max", "clamp_min_", "clamp_max_",
    "reciprocal", "reciprocal_", "_foreach_add", "_foreach_add_", "_foreach_sub", "_foreach_sub_", "_foreach_mul",
    "_foreach_mul_",
)  # fmt: skip
"""Floats of 32 and 64 bits come out rounded once."""

_SCALED = _names("add", "add_", "sub", "sub_", "rsub", "_foreach_add", "_foreach_add_", "_foreach_sub", "_foreach_sub_")
"""Of those, the ones that multiply by ``alpha`` first."""
_DIVIDED = _names("div", "div_")
_FLOORED = _names("floor_divide", "floor_divide_", "remainder", "fmod")
"""Whole quotients of floats and what is left: settled where quotients are small.

A card takes the exact rest of ``fmod``, divides what is left, or multiplies it by the reciprocal, and takes the nearest
whole number, as the host does: whichever way is rounded cannot matter as long as whole numbers are much further apart
than floats. Source: ``div_floor_kernel_cuda`` in aten/src/ATen/native/cuda/BinaryDivFloorKernel.cu, ``remainder`` and
``fmod`` in BinaryRemainderKernel.cu beside it; equal on an H100 for all whole numbers below 200,000 and eight divisors.
"""
_SMALL_QUOTIENT = {torch.float32: 2.0**20, torch.float64: 2.0**49}

_INTEGERS = _names(
    "sum", "prod", "cumsum", "cumprod", "scatter_add", "scatter_add_", "index_add", "index_add_",
    "bincount",
)  # fmt: skip
"""Besides pointwise operators: exact where all that goes in and comes out is integers and bools."""


class Rule(Enum):
    """Of which types an operator's values are exact."""

    MADE = "made"
    MOVED = "moved"
    COMPARED = "compared"
    ROUNDED_ONCE = "rounded once"
    FLOORED = "floored"
    INTEGERS = "integers"


def rule_of(func: Any) -> Rule | None:
    """The rule for an operator, None where its values are never known."""
    name = func._schema.name
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None
    for rule, names in (
        (Rule.MADE, _MADE | FILLED.keys()),
        (Rule.MOVED, _MOVED),
        (Rule.COMPARED, _COMPARED),
        (Rule.ROUNDED_ONCE, _ROUNDED_ONCE),
        (Rule.FLOORED, _FLOORED),
        (Rule.INTEGERS, _INTEGERS),
    ):
        if name in names:
            return rule
    return Rule.INTEGERS if torch.Tag.pointwise in func.tags else None


def may_compute(rule: Rule, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], types: Iterable[Any]) -> bool:
    """Whether what an operator makes of known arguments is exact, ``types`` being those of its inputs and outputs."""
    met = set(types)
    floats = {t for t in met if t.is_floating_point}
    if any(t.is_complex for t in met) or not floats <= _REDUCED | _FULL:
        return False
    if not floats:
        return True
    match rule:
        case Rule.MOVED:
            return True
        case Rule.MADE:
            whole = all(abs(n) < _WHOLE and float(n).is_integer() for n in args if isinstance(n, int | float))
            return func._schema.name != "aten::arange" or (floats <= _FULL and whole)
        case Rule.COMPARED:  # a number is rounded to a narrow type here, and not everywhere on a card
            return floats <= _FULL or not any(isinstance(a, float) for a in args)
        case Rule.ROUNDED_ONCE:
            return floats <= _FULL and "decimals" not in kwargs and _is_known(func._schema.name, args, kwargs, floats)
        case Rule.FLOORED:
            return floats <= _FULL
    return False


def _is_known(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], floats: set[Any]) -> bool:
    """Whether it is known of which operations a card makes what an operator's arguments ask for."""
    if name in _SCALED:
        return bool(kwargs.get("alpha", args[2] if len(args) > 2 else 1) == 1)
    if name in _DIVIDED:
        number, mode = _host_divisor(args, kwargs), kwargs.get("rounding_mode")
        if number is None or mode == "floor":
            return True
        # Whether the number is rounded to the type before its reciprocal is taken differs between releases.
        return mode is None and all(float(torch.tensor(number, dtype=t)) == number for t in floats)
    return True


def _host_divisor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The number of the host that is divided by; None where the divisor is on the card."""
    divisor = args[1] if len(args) > 1 else kwargs["other"]
    if isinstance(divisor, torch.Tensor):
        return None if divisor.device.type == "meta" else float(divisor.item())
    return float(divisor)


def evaluated(func: Any, args: tuple[Any, ...], host: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator makes of arguments on the host, ``args`` being those of the program.

    A card multiplies floats by the reciprocal of a number of the host, instead of dividing by it.
    Source: ``div_true_kernel_cuda`` in aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu; quotients of an H100 in
    tests/unit/test_virtual_values.py.
    """
    name = func._schema.name
    if name not in _DIVIDED or kwargs.get("rounding_mode") is not None:
        return func(*host, **kwargs)
    number = _host_divisor(args, kwargs)
    if number is None:
        return func(*host, **kwargs)
    dividend: torch.Tensor = host[0]
    dtype = torch.result_type(dividend, host[1] if len(host) > 1 else kwargs["other"])
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    reciprocal = 1 / torch.tensor(number, dtype=dtype)
    product = dividend.to(dtype) * reciprocal
    return dividend.copy_(product) if name == "aten::div_" else product


def settled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """A result without what a card might decide otherwise: None in place of each such output.

    The arguments are those on the host, written to by now where the operator writes.
    """
    check = _CHECKS.get(func._schema.name)
    return result if check is None else check(args, kwargs, result)


def representable(source: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a conversion to an integer type is defined for all values: of others each processor makes its own."""
    if not source.is_floating_point() or dtype.is_floating_point or dtype == torch.bool or source.numel() == 0:
        return True
    limits, whole = torch.iinfo(dtype), source.double().trunc()
    return bool(((whole >= float(limits.min)) & (whole < float(limits.max) + 1.0)).all())


def _converted(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    return result if representable(args[0], result.dtype) else None


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    return result if representable(args[1], result.dtype) else None


def _divided(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    return _floor_divided(args, kwargs, result) if kwargs.get("rounding_mode") == "floor" else result


def _floor_divided(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """The whole quotient; the dividend may be written over by now."""
    return result if _small(result) else None


def _rest(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    return result if not result.is_floating_point() or _small(args[0].to(result.dtype) / args[1]) else None


def _small(quotients: torch.Tensor) -> bool:
    limit = _SMALL_QUOTIENT.get(quotients.dtype)
    return limit is None or bool((quotients.abs() < limit).all())  # not so for what is no number


def _sorted(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Which of equal values comes first is not defined."""
    values, indices = result
    stable = kwargs.get("stable") or (len(args) > 1 and args[1] is True)
    dim = kwargs.get("dim", next((a for a in args[1:] if type(a) is int), -1))
    return values, indices if stable or not _ties(values, dim) else None


def _topped(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Which of equal values is taken is not defined, nor the order of what is not sorted."""
    source, k = args[0], args[1]
    dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
    largest = kwargs.get("largest", args[3] if len(args) > 3 else True)
    if not kwargs.get("sorted", args[4] if len(args) > 4 else True):
        return None, None
    values, indices = result
    if source.dim() == 0:
        return result
    one_more = torch.topk(source, min(k + 1, source.shape[dim]), dim, largest)[0]
    return values, None if _ties(one_more, dim) else indices


def _ties(ordered: torch.Tensor, dim: int) -> bool:
    """Whether neighbours in a dimension are equal, or both no numbers."""
    if ordered.dim() == 0:
        return False
    last = ordered.movedim(dim, -1)
    return bool(((last[..., 1:] == last[..., :-1]) | (last[..., 1:].isnan() & last[..., :-1].isnan())).any())


def _put(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Of several values written to one place, it is not defined which stays."""
    indices, values = args[1:3]
    accumulate = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
    if accumulate:
        return None if result.is_floating_point() else result
    there = result[tuple(slice(None) if i is None else i for i in indices)]
    return result if bool((there == values).all()) else None


def _scattered(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    dim, index, source = args[1:4]
    if kwargs.get("reduce") is not None or len(args) > 4:
        return None
    if not isinstance(source, torch.Tensor):
        return result
    written = source[tuple(slice(n) for n in index.shape)]
    return result if bool((result.gather(dim, index) == written).all()) else None


def _copied_by_index(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    dim, index, source = args[1:4]
    return result if bool((result.index_select(dim, index) == source).all()) else None


_CHECKS = {
    "aten::_to_copy": _converted,
    "aten::copy_": _copied,
    "aten::div": _divided,
    "aten::div_": _divided,
    "aten::floor_divide": _floor_divided,
    "aten::floor_divide_": _floor_divided,
    "aten::remainder": _rest,
    "aten::fmod": _rest,
    "aten::sort": _sorted,
    "aten::topk": _topped,
    "aten::index_put": _put,
    "aten::index_put_": _put,
    "aten::scatter": _scattered,
    "aten::scatter_": _scattered,
    "aten::index_copy": _copied_by_index,
    "aten::index_copy_": _copied_by_index,
}
