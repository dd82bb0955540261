"""``torch.UntypedStorage`` of tensors on the virtual card: address, device, size, and no contents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.storages import Entry, Place

_META = torch.device("meta")
_CONTENTS = (
    "__getitem__",
    "__setitem__",
    "__iter__",
    "tolist",
    "_write_file",
    "_share_cuda_",
    "__reduce__",
    "_byteswap",
)


@contextlib.contextmanager
def patched_storages(device: VirtualCard) -> Iterator[None]:
    """Let storages answer for the card, until the end."""
    cls = torch.UntypedStorage
    api = _Storages(device)
    with contextlib.ExitStack() as stack:
        for name in ("data_ptr", "to", "cuda", "cpu", "clone", "resize_", "copy_", "fill_", "get_device", "is_pinned"):
            replacement = api.method(getattr(cls, name), getattr(api, name))
            stack.enter_context(mock.patch.object(cls, name, replacement))
        for name in _CONTENTS:
            if hasattr(cls, name):
                stack.enter_context(mock.patch.object(cls, name, api.method(getattr(cls, name), api.refuse(name))))
        stack.enter_context(mock.patch.object(cls, "__new__", api.new(cls.__new__)))
        real_device, real_cuda = cls.device.__get__, cls.is_cuda.fget  # type: ignore[attr-defined]
        stack.enter_context(mock.patch.object(cls, "device", property(lambda s: api.device_of(s, real_device))))
        stack.enter_context(mock.patch.object(cls, "is_cuda", property(lambda s: api.on_card(s) or bool(real_cuda(s)))))
        yield


class _Storages:
    """Methods take the original and the storage; they are asked only for storages that the device follows."""

    def __init__(self, device: VirtualCard) -> None:
        self._device = device

    def method(self, original: Any, ours: Callable[..., Any]) -> Callable[..., Any]:
        """``ours`` for followed storages and for moves to the card, the original for all others."""
        moves = getattr(original, "__name__", "") in ("to", "cuda", "copy_", "is_pinned")

        def call(storage: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
            entry = self._device.storages.of(storage)
            if entry is None and not moves:
                return original(storage, *args, **kwargs)
            return ours(original, storage, entry, *args, **kwargs)

        return call

    def new(self, original: Any) -> Callable[..., Any]:
        """Storages that the program makes on the card."""

        def new(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
            wanted = None if device is None else torch.device(device)
            if wanted is None or wanted.type != "cuda":
                return original(cls, *args, **kwargs, **({} if device is None else {"device": device}))
            size = args[0] if args else kwargs.get("size", 0)
            if not isinstance(size, int):
                raise self._device.unsupported("a storage on the card made of numbers needs somewhere to keep them")
            return torch.empty(size, dtype=torch.uint8, device=wanted).untyped_storage()

        return new

    def on_card(self, storage: torch.UntypedStorage) -> bool:
        """Whether the storage stands for memory on the card."""
        entry = self._device.storages.of(storage)
        return entry is not None and entry.place is Place.CARD

    def device_of(self, storage: torch.UntypedStorage, real: Any) -> torch.device:
        """The device that the storage pretends to be on."""
        entry = self._device.storages.of(storage)
        if entry is None:
            return real(storage)  # type: ignore[no-any-return]
        return torch.device("cuda", 0) if entry.place is Place.CARD else torch.device("cpu")

    def data_ptr(self, original: Any, storage: torch.UntypedStorage, entry: Entry) -> int:
        return 0 if entry.id is None else self._device.memory.address(entry.id)

    def get_device(self, original: Any, storage: torch.UntypedStorage, entry: Entry) -> int:
        return 0 if entry.place is Place.CARD else -1

    def is_pinned(self, original: Any, storage: torch.UntypedStorage, entry: Entry | None, device: Any = None) -> bool:
        return self._device.pinned.has(storage)

    def to(
        self,
        original: Any,
        storage: torch.UntypedStorage,
        entry: Entry | None,
        *,
        device: Any,
        non_blocking: bool = False,
    ) -> torch.UntypedStorage:
        wanted = torch.device(device)
        if wanted.type == "cuda":
            self._device.check_index(wanted)
            here = entry is not None and entry.place is Place.CARD
            return storage if here else self._made(storage, Place.CARD, entry)
        if entry is None:
            return original(storage, device=device, non_blocking=non_blocking)  # type: ignore[no-any-return]
        if wanted.type == "cpu":
            return storage if entry.place is Place.HOST else self._made(storage, Place.HOST, entry)
        raise self._device.unsupported(f"moving a storage from the card to {wanted}")

    def cuda(
        self,
        original: Any,
        storage: torch.UntypedStorage,
        entry: Entry | None,
        device: Any = None,
        non_blocking: bool = False,
    ) -> torch.UntypedStorage:
        return self.to(original, storage, entry, device=torch.device("cuda", device or 0))

    def cpu(self, original: Any, storage: torch.UntypedStorage, entry: Entry) -> torch.UntypedStorage:
        return self.to(original, storage, entry, device="cpu")

    def clone(self, original: Any, storage: torch.UntypedStorage, entry: Entry) -> torch.UntypedStorage:
        return self._made(storage, entry.place, entry)

    def copy_(
        self,
        original: Any,
        storage: torch.UntypedStorage,
        entry: Entry | None,
        source: torch.UntypedStorage,
        non_blocking: bool = False,
    ) -> torch.UntypedStorage:
        if entry is not None:
            self._device.storages.forget(entry)
            return storage
        if self._device.storages.of(source) is not None:
            raise self._device.unsupported("copying a storage from the card into a host storage needs its contents")
        return original(storage, source, non_blocking)  # type: ignore[no-any-return]

    def fill_(self, original: Any, storage: torch.UntypedStorage, entry: Entry, value: Any) -> torch.UntypedStorage:
        self._device.storages.forget(entry)
        return storage

    def resize_(self, original: Any, storage: torch.UntypedStorage, entry: Entry, size: int) -> torch.UntypedStorage:
        out: torch.UntypedStorage = original(storage, size)
        if entry.place is Place.CARD:
            self._device.storage_resized(storage.nbytes(), entry)
        return out

    def refuse(self, name: str) -> Callable[..., Any]:
        """For methods that read or write contents."""

        def refused(*args: Any, **kwargs: Any) -> Any:
            raise self._device.unsupported(
                f"UntypedStorage.{name} needs contents that the virtual device does not have"
            )

        return refused

    def _made(self, like: torch.UntypedStorage, place: Place, source: Entry | None) -> torch.UntypedStorage:
        tensor = torch.empty(like.nbytes(), dtype=torch.uint8, device="cuda" if place is Place.CARD else _META)
        if place is Place.HOST:
            self._device.storages.follow(tensor, Place.HOST, None)
        else:
            self._device.memory.finished(self._device.stream)
            bytes_ = like if source is None else source.values
            if bytes_ is not None:
                self._device.values.attach(tensor, torch.empty(0, dtype=torch.uint8).set_(bytes_))
        return tensor.untyped_storage()
