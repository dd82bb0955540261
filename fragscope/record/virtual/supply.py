"""Values that a scenario supplies where the virtual device has none; on a GPU they are not asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fragscope.errors import UsageError
from fragscope.record.virtual.device import VirtualDevice
from fragscope.record.virtual.values import Supplied


def supply(tensor: torch.Tensor, values: Any) -> None:
    """Say what a tensor on the virtual card holds, so that the code after this can use it.

    Without an active virtual device nothing happens: a card has values of its own.

    Args:
        tensor: on the card. A view is enough if the rest of its storage is known.
        values: a tensor on the host, a list or a number, of a shape that broadcasts to the tensor's.

    Raises:
        UsageError: the tensor is not on the card, is a part of unknown memory, or the values do not fit its shape.
    """
    device = VirtualDevice._active
    if device is None:
        return
    if not device.values.supply(tensor, values, "supply"):
        raise UsageError("supply: the tensor is not on the card, or is a part of memory whose rest is unknown")


@contextlib.contextmanager
def supplied(op: str, values: float | bool | Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Inside the block, results of an operator that are unknown on the virtual card have these values.

    ``with fragscope.supplied("argmax", 17):`` lets a loop that generates tokens go on with 17 wherever the model's
    choice is unknown; ``supplied("item", 0.0)`` answers every number that the program reads. Without an active virtual
    device nothing happens. Of several blocks with the same operator the innermost counts.

    Args:
        op: name of an ATen operator, ``argmax`` or ``aten::argmax``, or ``item`` for numbers read by the host.
        values: a number for each element of results that are integers or bools, or a function that is called with
            each unknown result (metadata only) and returns a tensor on the host of its shape, or None to leave it
            unknown; for ``item`` one that is called with the tensor and returns a number.

    Raises:
        UsageError: there is no such operator, or its result's shape depends on values.
    """
    name = op if op.startswith("aten::") else f"aten::{op}"
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    if packet is None:
        raise UsageError(f"supplied: torch has no operator {op!r}")
    overloads = [getattr(packet, o) for o in packet.overloads()]
    if name != "aten::item" and all(torch.Tag.dynamic_output_shape in o.tags for o in overloads):
        raise UsageError(f"supplied: the shape of {op}'s result depends on values; supply those that it reads")
    device = VirtualDevice._active
    if device is None:
        yield
        return
    said = Supplied(name, values)
    device.values.supplied.append(said)
    try:
        yield
    finally:
        device.values.supplied.remove(said)
