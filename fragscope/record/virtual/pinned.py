"""Which host tensors a program pinned. Pinned or not, their memory is the host's, and none of the card."""

from __future__ import annotations

import weakref
from typing import Any

import torch


class Pinned:
    """Storages that the program pinned, followed by weak reference."""

    def __init__(self) -> None:
        self._storages: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take a host tensor for pinned from here on."""
        storage, storages = tensor.untyped_storage(), self._storages
        key = storage._cdata
        storages[key] = weakref.ref(storage, lambda _: storages.pop(key, None))
        return tensor

    def has(self, storage: torch.UntypedStorage) -> bool:
        """Whether it was pinned."""
        return storage._cdata in self._storages
