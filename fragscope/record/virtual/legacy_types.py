"""``torch.cuda.FloatTensor`` and its kind: types that name a device, which a build of torch for CPUs does not make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

_CUDA = torch.device("cuda", 0)
_NAMES = {
    "FloatTensor": torch.float32, "DoubleTensor": torch.float64, "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16, "LongTensor": torch.int64, "IntTensor": torch.int32, "ShortTensor": torch.int16,
    "CharTensor": torch.int8, "ByteTensor": torch.uint8, "BoolTensor": torch.bool,
}  # fmt: skip


class CudaType(type):
    """The type of ``torch.cuda.FloatTensor``: makes tensors on the card, and knows them."""

    dtype: torch.dtype
    is_cuda = True

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_cuda and value.dtype == cls.dtype

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Of sizes without contents, of numbers, or nothing."""
        if len(args) == 1 and isinstance(args[0], list | tuple) and not isinstance(args[0], torch.Size):
            return torch.tensor(args[0], dtype=cls.dtype, device=_CUDA)
        if len(args) == 1 and isinstance(args[0], torch.Tensor):
            return args[0].to(_CUDA, cls.dtype)
        return torch.empty(*(args or (0,)), dtype=cls.dtype, device=_CUDA)


def named(name: str) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype of ``torch.cuda.HalfTensor`` or ``torch.HalfTensor``; None for other names."""
    owner, _, kind = name.rpartition(".")
    dtype = _NAMES.get(kind)
    if dtype is None or owner not in ("torch", "torch.cuda"):
        return None
    return (_CUDA if owner == "torch.cuda" else torch.device("cpu")), dtype


@contextlib.contextmanager
def patched_types() -> Iterator[None]:
    """Let the types of ``torch.cuda`` make tensors on the card, until the end."""
    plain = torch.set_default_tensor_type

    def set_default(kind: Any) -> None:
        wanted = (_CUDA, kind.dtype) if isinstance(kind, CudaType) else named(kind) if isinstance(kind, str) else None
        if wanted is not None and wanted[0] == _CUDA:
            torch.set_default_device(_CUDA)
            torch.set_default_dtype(wanted[1])
            return
        plain(kind)
        torch.set_default_device(None)

    with contextlib.ExitStack() as stack:
        for name, dtype in _NAMES.items():
            stand_in = CudaType(name, (), {"dtype": dtype, "__module__": "torch.cuda"})
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in, create=True))
        stack.enter_context(mock.patch.object(torch, "set_default_tensor_type", set_default))
        yield
