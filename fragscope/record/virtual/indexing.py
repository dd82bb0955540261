"""Indexing by tensors and masks: what indices take on their way to the card, and which shape known masks make."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from fragscope.record.virtual.arguments import as_metadata, tensors_in
from fragscope.record.virtual.by_value import ByValue
from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.inference import Inference
from fragscope.record.virtual.operand_types import check_index_put
from fragscope.record.virtual.scratch.indexed import accumulated
from fragscope.record.virtual.storages import Entry, Place

_META = torch.device("meta")
_CLONE = torch.ops.aten.clone.default
_MASKED_FILL = torch.ops.aten.masked_fill_.Scalar
_NONZERO = torch.ops.aten.nonzero.default
INDEXING = ("aten::index", "aten::index_put_", "aten::index_put")
"""The operators."""


class Indexing:
    """Runs them.

    Args:
        device: the card.
        inference: tells what results look like.
        by_value: counts what a mask picks.
        again: runs another operator in place of this one.
    """

    def __init__(
        self,
        device: VirtualCard,
        inference: Inference,
        by_value: ByValue,
        again: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        self._device, self._inference = device, inference
        self._by_value, self._again = by_value, again

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], entries: list[Entry], *, of_formula: bool
    ) -> Any:
        """``aten::index``, ``aten::index_put`` and ``aten::index_put_``.

        Args:
            func: the operator.
            args: of the call.
            kwargs: of the call.
            entries: of the followed tensors in it.
            of_formula: a formula of derivatives asks, whose indices are not checked.
        """
        device, storages = self._device, self._device.storages
        target: torch.Tensor = args[0]
        if storages.place(target) is not Place.CARD:
            raise device.unsupported("indexing a host tensor by a tensor on the card needs its contents", args[1])
        writes = func._schema.name != "aten::index"
        accumulate = writes and bool(args[3] if len(args) > 3 else kwargs.get("accumulate", False))
        if writes and not accumulate and _is_host_scalar(args[2]) and (mask := _only_mask(target, args[1])) is not None:
            if not func._schema.is_mutable:
                target = self._again(_CLONE, (target,), {})
            return self._again(_MASKED_FILL, (target, mask, args[2].item()), {})  # which needs no shape
        if writes:
            check_index_put(target, args[2])
        indices: list[torch.Tensor | None] = []
        for index in args[1]:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                indices.append(index)
            elif index.device.type == "meta":
                device.wait_for_stream()  # a card counts what the mask picks
                entry = storages.find(index)
                if entry is None or entry.values is None:
                    raise device.unsupported(
                        "indexing by a mask on the card makes a shape that depends on its contents", [index]
                    )
                indices.extend(self._by_value.run(_NONZERO, (index,), {}, [entry]).unbind(1))
                if writes:
                    device.estimate("aten::index_put_ with a mask")
            else:
                indices.extend(index.nonzero().unbind(1))  # a mask on the host is known
                if writes:
                    device.estimate("aten::index_put_ with a mask of the host")
        moved = [i if i is None or i.device.type == "meta" else i.to(_META) for i in indices]
        on_host = [i is not None and i.device.type != "meta" for i in indices]
        if any(on_host):
            device.wait_for_stream()  # pageable copies of the indices wait for the stream
        scalar = [args[2].itemsize] if writes and args[2].device.type == "cpu" and args[2].dim() == 0 else []
        with device.temporaries(scalar), self._temporaries(indices, on_host):
            values = tuple(as_metadata(a) for a in args[2:])
            out = self._inference.run(func, (target, moved, *values), kwargs)
            device.values.begin(func._schema.name, entries)
            for tensor in tensors_in(out):
                device.register(tensor)
            if accumulate:
                is_functional = not func._schema.is_mutable
                if is_functional and not of_formula and torch._C._current_graph_task_id() != -1:
                    device.estimate("aten::index_put with accumulate in a backward pass")  # a formula's, or not
                plan = accumulated(target, indices, args[2], device.card, is_checked=not of_formula)
                device.follow_plan("aten::index_put_", plan, [])
            elif writes and torch.are_deterministic_algorithms_enabled():
                device.estimate("aten::index_put_ with deterministic algorithms")
            device.launched(func._schema.name, tensors_in([target, indices, *values]), tensors_in(out))
            written = [target] if func._schema.is_mutable else ()
            device.values.follow(func, (target, indices, *args[2:]), kwargs, out, entries, written)
        return out

    @contextlib.contextmanager
    def _temporaries(self, indices: Sequence[torch.Tensor | None], on_host: Sequence[bool]) -> Iterator[None]:
        """What indexing takes before its result.

        Host indices come to the card, int32 becomes int64, and several indices that are strided differently once they
        are broadcast become contiguous. The last index is given back first.

        Source: ``make_info`` and ``AdvancedIndex`` in aten/src/ATen/native/TensorAdvancedIndexing.cpp; recorded for the
        ``index_*`` cases of tests/gpu/footprint_cases.py.
        """
        given = [(i, there) for i, there in zip(indices, on_host, strict=True) if i is not None]
        shape = torch.broadcast_shapes(*(i.shape for i, _ in given))
        take = self._device.allocate
        copies: list[int | None] = [take(i.numel() * i.itemsize) if there else None for i, there in given]
        try:
            for position, (index, _) in enumerate(given):
                if index.dtype == torch.int32:
                    elements = index.numel() if index.shape == shape else math.prod(shape)
                    old, copies[position] = copies[position], take(elements * 8)
                    self._device.release(old)
            expanded = [i.expand(shape) for i, _ in given]
            if len({e.stride() for e in expanded}) > 1:
                olds: list[int | None] = []
                for position, index in enumerate(expanded):
                    if not index.is_contiguous():
                        olds.append(copies[position])
                        copies[position] = take(math.prod(shape) * 8)
                for id_ in olds:
                    self._device.release(id_)
            yield
        finally:
            for id_ in reversed(copies):
                self._device.release(id_)


def _only_mask(target: torch.Tensor, indices: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """The only index if it is a mask on the card, of dimensions that broadcast to those of ``target``.

    Raises:
        IndexError: the mask does not fit, as torch words it.

    Source: ``canDispatchToMaskedFill`` in aten/src/ATen/native/TensorAdvancedIndexing.cpp.
    """
    mask: torch.Tensor | None = None
    end = 0
    for index in indices:
        if index is None:
            end += 1
            continue
        if mask is not None or index.dtype not in (torch.bool, torch.uint8) or index.device.type != "meta":
            return None
        mask = index
        for dim in range(mask.dim()):
            if end + dim >= target.dim() or mask.shape[dim] != target.shape[end + dim]:
                raise IndexError(
                    f"The shape of the mask {list(mask.shape)} at index {dim} does not match the shape of the indexed "
                    f"tensor {list(target.shape)} at index {end + dim}"
                )
        end += mask.dim()
    if mask is not None:
        for _ in range(end, target.dim()):
            mask = mask.unsqueeze(-1)
    return mask


def _is_host_scalar(value: torch.Tensor) -> bool:
    return value.device.type == "cpu" and value.numel() == 1
