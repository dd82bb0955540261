"""``torch.device(0)``: a number is a card, which torch would ask a real accelerator about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    with mock.patch.object(torch, "device", _DeviceType("device", (), names)):
        yield
