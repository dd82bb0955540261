"""Which storages stand for memory on the card, followed by weak reference from birth to death."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

is_transformed: Callable[[torch.Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a tensor is what ``torch.func`` hands to a function in place of another, whose storage is the only one."""


class Place(Enum):
    """Where a metadata-only storage pretends to be."""

    CARD = "card"
    """On the virtual card: counted."""
    HOST = "host"
    """On the host, with contents that nobody knows (copied back from the card): not counted. It may be a real one."""
    META = "meta"
    """A meta tensor that the program itself asked for."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where values that are not known come from.

    Attributes:
        op: the operator that made or wrote them.
        size: bytes of the storage.
        id: lifetime id of the allocation it made, whose stack is on record; None where ``where`` says the place.
        where: ``file:line``, if it was looked up.
        reason: why they are unknown, where the operator's name does not say it.
    """

    op: str
    size: int
    id: int | None
    where: str = ""
    reason: str = ""


@dataclass(slots=True)
class Entry:
    """One followed storage.

    Attributes:
        place: where it pretends to be.
        id: lifetime id of its allocation, None if it has no bytes on the card.
        size: bytes.
        address: of its allocation, once somebody asked; None until then.
        reference: keeps the callback that ends it.
        op: the operator that made it.
        origin: where its values come from if they are unknown; None where that is the operator itself.
        values: its bytes on the host, None where they are unknown.
    """

    place: Place
    id: int | None
    size: int
    reference: weakref.ref[Any]
    op: str = ""
    origin: Origin | None = None
    address: int | None = None
    values: torch.UntypedStorage | None = None

    def root(self) -> Origin:
        """Where its unknown values come from."""
        if self.origin is None:
            self.origin = Origin(self.op, self.size, self.id)
        return self.origin


class Storages:
    """The registry of followed storages.

    Args:
        free: called with the lifetime id when a storage on the card dies.

    Attributes:
        valued: bytes of the values that are kept.
        op: the operator that runs, for storages that begin now.
        origin: of the first unknown values that it reads.
        has_lost: whether real storages of the host are, or were, among those that are followed.
    """

    def __init__(self, free: Callable[[int], None]) -> None:
        self._free = free
        self._entries: dict[int, Entry] = {}
        self.valued = 0
        self.op = ""
        self.origin: Origin | None = None
        self.has_lost = False

    def of(self, storage: torch.UntypedStorage) -> Entry | None:
        """The entry of a storage, None if it is not followed."""
        return self._entries.get(storage._cdata)

    def find(self, tensor: torch.Tensor) -> Entry | None:
        """The entry of a tensor's storage, None if it is not followed."""
        while is_transformed(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if tensor.layout is not torch.strided:
            return None  # it has no storage
        if not isinstance(tensor, UninitializedTensorMixin):
            return self._entries.get(tensor.untyped_storage()._cdata)
        with torch._C.DisableTorchFunctionSubclass():  # of a lazy module, which refuses all questions
            return self._entries.get(tensor.untyped_storage()._cdata)

    def place(self, tensor: torch.Tensor) -> Place | None:
        """Where a tensor pretends to be; None for tensors that are just what they are."""
        entry = self.find(tensor)
        return None if entry is None else entry.place

    def made_by(self, tensor: torch.Tensor) -> str:
        """The operator that made a tensor's storage; empty for what is not followed."""
        entry = self.find(tensor)
        return "" if entry is None else entry.op

    def follow(self, tensor: torch.Tensor, place: Place, id_: int | None) -> Entry:
        """Begin to follow a tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        registry = weakref.ref(self)

        def ended(_: object) -> None:
            live = registry()
            if live is not None:
                live._end(key)

        entry = Entry(place, id_, storage.nbytes(), weakref.ref(storage, ended), self.op, self.origin)
        self._entries[key] = entry
        return entry

    def lose(self, real: torch.Tensor) -> bool:
        """Nobody knows what a real storage of the host would hold from now on; whether that can be kept up.

        It cannot where others read its memory past torch: NumPy, or another process.
        """
        if self.find(real) is None:
            storage = real.untyped_storage()
            if not storage.resizable() or storage.is_shared():
                return False
            self.follow(real, Place.HOST, None)
            self.has_lost = True
        return True

    def found(self, real: torch.Tensor) -> None:
        """A real storage of the host was written all over with what is known, if the tensor covers it."""
        storage = real.untyped_storage()
        if real.is_contiguous() and real.numel() * real.itemsize == storage.nbytes():
            self._entries.pop(storage._cdata, None)

    def remember(self, entry: Entry) -> None:
        """Make room for the values of a storage; its bytes are not yet written."""
        entry.values = torch.UntypedStorage(entry.size)
        self.valued += entry.size

    def forget(self, entry: Entry) -> None:
        """The values of a storage are unknown from now on."""
        if entry.values is not None:
            self.valued -= entry.values.nbytes()
            entry.values = None

    def _end(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.forget(entry)
            if entry.id is not None:
                self._free(entry.id)

    def close(self) -> None:
        """Stop following; storages that still live no longer report their end."""
        self._entries.clear()
