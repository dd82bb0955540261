"""Operators that return a number, or whose result is as large as values make it: they run where these are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fragscope.record.virtual.arguments import tensors_in
from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.storages import Entry, Place

_META = torch.device("meta")


class ByValue:
    """Runs them.

    Args:
        device: the card.
        plan_of: tells of an operator which plan its scratch follows; None where there is none.
    """

    def __init__(self, device: VirtualCard, plan_of: Callable[[Any], Any]) -> None:
        self._device = device
        self._plan_of = plan_of

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], entries: list[Entry]) -> Any:
        """An operator that returns a number, or whose result is as large as values make it."""
        device, name = self._device, func._schema.name
        on_card = any(e.place is Place.CARD for e in entries)
        waits = kwargs.get("output_size") is None and on_card
        if waits:
            device.wait_for_stream()
        result = device.values.compute(func, args, kwargs, entries)
        tensors = list(tensors_in((*args, *kwargs.values())))
        if result is None and name == "aten::_local_scalar_dense":
            result = device.values.number(tensors[0])
        elif result is None and name == "aten::masked_select":
            result = self._chosen(*tensors)
        elif result is None and name == "aten::repeat_interleave" and kwargs.get("output_size") is not None:
            result = torch.empty(kwargs["output_size"], dtype=tensors[0].dtype, device=_META)
        if result is None:
            raise device.unsupported(
                f"{name} needs the contents of a tensor on the card, which the virtual device does not have", tensors
            )
        values = list(tensors_in((result,)))
        shape = values[0].shape if values else torch.Size()
        if name == "aten::_unique2":
            values[0] = _with_room(values[0], args[0].numel())
        made = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=_META) for v in values]
        plan = self._plan_of(func)
        if plan is not None and on_card:
            device.follow_plan(name, plan(args, kwargs, made, device.card), made)
        elif name != "aten::_local_scalar_dense":
            device.estimate(name)
        for tensor, known in zip(made, values, strict=True):
            device.register(tensor)
            if known.device.type != "meta":
                device.values.attach(tensor, known)
        if name == "aten::_unique2":
            made[0].resize_(shape)
        if on_card:
            device.launched(name, tensors, made)
            if waits:  # the host reads a number, at least that of the result's elements
                device.memory.finished(device.stream)
        if isinstance(result, torch.Tensor):
            return made[0]
        return tuple(made) if isinstance(result, tuple) else result

    def _chosen(self, data: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """As many elements as a known mask picks from data that is not known."""
        known = self._device.values.on_host(mask)
        if known.device.type != "cpu":
            return None
        shape = torch.broadcast_shapes(data.shape, mask.shape)
        return torch.empty(int(known.expand(shape).count_nonzero()), dtype=data.dtype, device=_META)


def _with_room(values: torch.Tensor, count: int) -> torch.Tensor:
    """Values at the beginning of memory for so many, all of which a card keeps; nobody looks at the rest."""
    out = values.new_zeros(count)
    out[: len(values)] = values
    return out
