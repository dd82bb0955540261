"""Copies between the host and the card, and on either: what they take, who waits, and what of their values is known."""

from __future__ import annotations

from typing import Any

import torch

from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.footprints import copy_temporaries
from fragscope.record.virtual.operand_types import as_on_card
from fragscope.record.virtual.overlaps import check_overlaps
from fragscope.record.virtual.storages import Entry, Place

_META = torch.device("meta")


class Transfers:
    """Runs the operators that copy.

    Args:
        device: the card.
    """

    def __init__(self, device: VirtualCard) -> None:
        self._device = device

    def to_copy(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], to_card: bool, entries: list[Entry]
    ) -> Any:
        """``aten::_to_copy``: a new tensor of another type, layout or place."""
        device, storages = self._device, self._device.storages
        source: torch.Tensor = args[0]
        place = storages.place(source)
        wanted = kwargs.get("device")
        if wanted is None:
            to_card = place is Place.CARD
        kwargs["device"] = _META
        kwargs.pop("pin_memory", None)
        out: torch.Tensor = func(*args, **kwargs)
        if not to_card:
            real = device.values.compute(func, args, kwargs, entries) if place is Place.CARD else None
            if real is None:
                storages.follow(out, Place.HOST, None)
                device.values.follow(func, args, kwargs, out, entries, ())
            else:
                out = real
            device.launched(func._schema.name, [source], [])
            if place is Place.CARD:
                self._transfer(out, source, to_card=False, non_blocking=bool(kwargs.get("non_blocking")))
            return out
        device.register(out)
        device.launched(func._schema.name, [source], [out])
        if place is not Place.CARD:
            self._transfer(out, source, to_card=True, non_blocking=bool(kwargs.get("non_blocking")))
        device.values.follow(func, args, kwargs, out, entries, ())
        return out

    def copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], entries: list[Entry]) -> Any:
        """``aten::copy_``: into a tensor that is there."""
        storages, values = self._device.storages, self._device.values
        dst, src = args[0], args[1]
        dst_place, src_place = storages.place(dst), storages.place(src)
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        try:
            broadcast = tuple(torch.broadcast_shapes(dst.shape, src.shape))
        except RuntimeError as e:
            raise as_on_card(e, (dst, src)) from None
        if broadcast != tuple(dst.shape):
            raise RuntimeError(
                f"output with shape {list(dst.shape)} doesn't match the broadcast shape {list(broadcast)}"
            )
        if dst.device.type != "meta":
            if src_place is None:
                func(*args, **kwargs)
                storages.found(dst)
            elif values.compute(func, args, kwargs, entries[-1:]) is not None:
                storages.found(dst)
            else:
                self.lose(dst)
            if src_place is Place.CARD:
                self._device.launched(func._schema.name, [src], [])
                self._transfer(dst, src, to_card=False, non_blocking=non_blocking)
            return dst
        if dst is not src:
            check_overlaps([dst], [src])
        self._device.launched(func._schema.name, [src], [dst])
        to_card, from_card = dst_place is Place.CARD, src_place is Place.CARD
        if to_card != from_card:
            self._transfer(dst, src, to_card=to_card, non_blocking=non_blocking)
        values.follow(func, args, kwargs, dst, [] if src_place is None else entries[-1:], [dst])
        return dst

    def _transfer(self, dst: torch.Tensor, src: torch.Tensor, *, to_card: bool, non_blocking: bool) -> None:
        """Account for a copy between host and card."""
        sizes = copy_temporaries(dst, src, dst_on_card=to_card, src_on_card=not to_card, non_blocking=non_blocking)
        with self._device.temporaries(sizes):
            if not non_blocking:  # the host waits for the copy, and so for the stream it is on
                self._device.wait_for_stream()

    def lose(self, real: torch.Tensor) -> None:
        """A real tensor of the host is written with what nobody knows."""
        if not self._device.storages.lose(real):
            raise self._device.unsupported(
                "a tensor of the host whose memory NumPy or another process shares would hold what the virtual device "
                "does not have"
            )
