"""What torch takes for the device, where it does not ask a tensor's attribute.

``torch.device(0)``: a number is a card, which torch would ask a real accelerator about. Lists of tensors are grouped by
device below Python, and by the group's device it is decided whether one kernel works on all of a list.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

_REAL = torch.device


class _DeviceType(type):
    """Stands for the type ``torch.device``, whose instances all are what they ever were."""

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.device:
        if args and type(args[0]) is int:
            args = ("cuda", *args)
        return _REAL(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _REAL)

    def __subclasscheck__(cls, other: type) -> bool:
        return other in (cls, _REAL)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is _REAL

    def __hash__(cls) -> int:
        return hash(_REAL)

    def __getattr__(cls, name: str) -> Any:
        return getattr(_REAL, name)


@contextlib.contextmanager
def patched_device_type() -> Iterator[None]:
    """Let numbers name cards, until the end."""
    names = {"__module__": "torch", "__qualname__": "device", "__doc__": _REAL.__doc__}
    kind, group = _DeviceType("device", (), names), "_group_tensors_by_device_and_dtype"
    with (
        mock.patch.object(torch, "device", kind),
        mock.patch.object(torch._C, group, _grouped(getattr(torch._C, group))),
    ):
        yield


def _grouped(real: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    """Groups of tensors on the card are of the card."""

    def group(lists: list[list[torch.Tensor | None]], with_indices: bool = False) -> dict[Any, Any]:
        return {_placed(key, found): found for key, found in real(lists, with_indices).items()}

    return group


def _placed(key: tuple[torch.device, Any], found: tuple[list[list[torch.Tensor | None]], Any]) -> tuple[Any, Any]:
    device, dtype = key
    tensors = (t for tensors in found[0] for t in tensors if t is not None)
    return (_REAL("cuda", 0) if device.type == "meta" and any(t.is_cuda for t in tensors) else device), dtype
