"""Operands that an operator's kernel refuses on a card and torch's rules for shapes take, in the words of torch.

Code that mixes types would otherwise run here and fail on a card. Of empty operands no kernel is asked.

Source: ``addmm_out_cuda_impl`` and ``ADDMM_META`` in cuda/Blas.cpp and LinearAlgebra.cpp of aten/src/ATen/native, the
checks of Convolution.cpp, LossNLL.cpp and TensorAdvancedIndexing.cpp there; ``processErrorMsg`` in
torch/csrc/Exceptions.cpp.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from fragscope.record.virtual.arguments import tensors_in

_NAMES = {
    torch.bool: ("Bool", "bool"),
    torch.uint8: ("Byte", "unsigned char"),
    torch.int8: ("Char", "signed char"),
    torch.int16: ("Short", "short int"),
    torch.int32: ("Int", "int"),
    torch.int64: ("Long", "long int"),
    torch.float16: ("Half", "c10::Half"),
    torch.bfloat16: ("BFloat16", "c10::BFloat16"),
    torch.float32: ("Float", "float"),
    torch.float64: ("Double", "double"),
    torch.complex64: ("ComplexFloat", "c10::complex<float>"),
    torch.complex128: ("ComplexDouble", "c10::complex<double>"),
}
"""What torch calls a type in messages: as a scalar type, and as one of C++."""

_LEGACY = ("Byte", "Char", "Double", "Float", "Int", "Long", "Short", "Half")
_MULTIPLIED = frozenset(t for t in _NAMES if t.is_floating_point or t.is_complex)


def _scalar(tensor: torch.Tensor) -> str:
    return _NAMES[tensor.dtype][0] if tensor.dtype in _NAMES else str(tensor.dtype).removeprefix("torch.").capitalize()


def _cpp(tensor: torch.Tensor) -> str:
    return _NAMES[tensor.dtype][1] if tensor.dtype in _NAMES else f"c10::{_scalar(tensor)}"


def _tensor_type(tensor: torch.Tensor) -> str:
    name = _scalar(tensor)
    return f"torch.cuda.{name}Tensor" if name in _LEGACY else f"CUDA{name}Type"


def _mm(first: torch.Tensor, second: torch.Tensor, *rest: Any, **named: Any) -> None:
    for which, matrix in (("self", first), ("mat2", second)):
        if matrix.dim() != 2:
            raise RuntimeError(f"{which} must be a matrix")
    _multiply(first, second, "addmm_cuda")


def _addmm(bias: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *rest: Any, **named: Any) -> None:
    for which, tensor in (("self", bias), ("mat1", first)):
        if tensor.dtype != second.dtype:
            raise RuntimeError(
                f"{which} and mat2 must have the same dtype, but got {_scalar(tensor)} and {_scalar(second)}"
            )
    for which, matrix in (("mat1", first), ("mat2", second)):
        if matrix.dim() != 2:
            raise RuntimeError(f"{which} must be a matrix, got {matrix.dim()}-D tensor")
    _multiply(first, second, "addmm_cuda")


def _multiply(first: torch.Tensor, second: torch.Tensor, kernel: str) -> None:
    (rows, inner), (other, columns) = first.shape, second.shape
    if inner != other:
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({rows}x{inner} and {other}x{columns})")
    if first.dtype != second.dtype:
        raise RuntimeError(f"expected mat1 and mat2 to have the same dtype, but got: {_cpp(first)} != {_cpp(second)}")
    if first.numel() and second.numel():
        _has_kernel(first, kernel)


def _bmm(first: torch.Tensor, second: torch.Tensor, *rest: Any, **named: Any) -> None:
    if first.dtype != second.dtype:
        raise RuntimeError(f"expected scalar type {_scalar(first)} but found {_scalar(second)}")
    if first.numel() and second.numel():
        _has_kernel(first, "baddbmm_cuda")


def _mv(matrix: torch.Tensor, vector: torch.Tensor, **named: Any) -> None:
    if matrix.dtype != vector.dtype:
        given = ", ".join((_scalar(vector), _scalar(matrix)))
        raise RuntimeError(f"addmv input tensors must have the same dtype, but got {given}, and {_scalar(vector)}")
    if matrix.numel():
        _has_kernel(matrix, "addmv_impl_cuda")


def _dot(first: torch.Tensor, second: torch.Tensor, **named: Any) -> None:
    if first.dtype != second.dtype:
        raise RuntimeError(
            f"dot : expected both vectors to have same dtype, but found {_scalar(first)} and {_scalar(second)}"
        )
    _has_kernel(first, "dot")


def _has_kernel(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in _MULTIPLIED:
        raise RuntimeError(f"\"{name}\" not implemented for '{_scalar(tensor)}'")


def _convolution(source: torch.Tensor, weight: torch.Tensor, *rest: Any, **named: Any) -> None:
    if source.dtype != weight.dtype and source.numel() and weight.numel():
        raise RuntimeError(
            f"Input type ({_tensor_type(source)}) and weight type ({_tensor_type(weight)}) should be the same"
        )


def _layer_norm(source: torch.Tensor, shape: Any, *parameters: Any, **named: Any) -> None:
    """The host's kernel takes parameters in float32 beside a narrower input; the card's does not."""
    for parameter in parameters:
        if isinstance(parameter, torch.Tensor) and parameter.dtype != source.dtype and source.numel():
            raise RuntimeError(f"expected scalar type {_scalar(source)} but found {_scalar(parameter)}")


def _nll_loss(source: torch.Tensor, target: torch.Tensor, *rest: Any, **named: Any) -> None:
    if target.dtype not in (torch.int64, torch.uint8) and target.numel():
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {_scalar(target)}")


def _index_copy(target: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, **named: Any) -> None:
    if target.dtype != source.dtype:
        raise RuntimeError(
            "index_copy_(): self and source expected to have the same dtype, but got (self) "
            f"{_scalar(target)} and (source) {_scalar(source)}"
        )


def _index_add(target: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, **named: Any) -> None:
    if target.dtype != source.dtype:
        raise RuntimeError(
            f"index_add_(): self ({_scalar(target)}) and source ({_scalar(source)}) must have the same scalar type"
        )


def check_index_put(target: torch.Tensor, values: torch.Tensor) -> None:
    """Refuse values of another type than the target.

    Raises:
        RuntimeError: as torch does.
    """
    if target.dtype != values.dtype:
        raise RuntimeError(
            "Index put requires the source and destination dtypes match, got "
            f"{_scalar(target)} for the destination and {_scalar(values)} for the source."
        )


CHECKS: dict[str, Callable[..., None]] = {
    "aten::mm": _mm,
    "aten::addmm": _addmm,
    "aten::bmm": _bmm,
    "aten::mv": _mv,
    "aten::dot": _dot,
    "aten::vdot": _dot,
    "aten::convolution": _convolution,
    "aten::native_layer_norm": _layer_norm,
    "aten::nll_loss_forward": _nll_loss,
    "aten::index_copy": _index_copy,
    "aten::index_copy_": _index_copy,
    "aten::index_add": _index_add,
    "aten::index_add_": _index_add,
}
"""By operator, what is asked of its arguments; raises RuntimeError."""


def as_on_card(error: RuntimeError, args: tuple[Any, ...]) -> RuntimeError:
    """Torch's Python shape rules word the commonest mistake in another way than its kernels do."""
    if not str(error).startswith("Attempting to broadcast"):
        return error
    shapes = [t.shape for t in tensors_in(args)]
    for a, b in itertools.pairwise(shapes):
        rank = max(len(a), len(b))
        for dim in range(rank - 1, -1, -1):
            m, n = (s[dim - rank + len(s)] if dim - rank + len(s) >= 0 else 1 for s in (a, b))
            if m not in (n, 1) and n != 1:
                return RuntimeError(
                    f"The size of tensor a ({m}) must match the size of tensor b ({n}) at non-singleton dimension {dim}"
                )
    return error
