"""The dispatch mode: sees every operator after autograd, keeps the books of memory, refuses what needs data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from fragscope.record.virtual.accumulation import ADD, ADD_IN_PLACE, adds_itself, in_place, is_in_place
from fragscope.record.virtual.arguments import as_metadata, tensors_in
from fragscope.record.virtual.by_value import ByValue
from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.footprints import (
    takes_lt,
)
from fragscope.record.virtual.indexing import INDEXING, Indexing
from fragscope.record.virtual.inference import Inference
from fragscope.record.virtual.layouts import KEEPS_LAYOUT, channels_last_as
from fragscope.record.virtual.operand_types import as_on_card
from fragscope.record.virtual.overlaps import check_overlaps
from fragscope.record.virtual.storages import Entry, Place, Storages
from fragscope.record.virtual.traits import Trait
from fragscope.record.virtual.transfers import Transfers

_META = torch.device("meta")
_CUDA = torch.device("cuda", 0)
_LENGTHS_ON_HOST = ("aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward")
"""Operators that take a tensor of the host beside those on the card."""


class DispatchMode(TorchDispatchMode):
    """Runs operators on metadata and registers what they allocate."""

    def __init__(self, device: VirtualCard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._traits: dict[Any, Trait] = {}
        self._inference = Inference()
        self._transfers = Transfers(device)
        self._by_value = ByValue(device, lambda func: self._trait(func).plan)
        self._indexing = Indexing(device, self._inference, self._by_value, self._run)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch.compile is refused on the virtual device; without this the first operator imports all of Dynamo."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if types:
            return self._of_subclass(func, types, args, kwargs or {})
        return self._plain(func, args, kwargs or {})

    def _plain(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunction():
            if func is not ADD or torch._C._current_graph_task_id() == -1:
                return self._run(func, args, dict(kwargs))
            with self._device.summing_gradients():
                return self._run(func, args, dict(kwargs))

    def _of_subclass(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What classes of tensors make of an operator that have operators of their own, and tensors inside.

        Torch has switched the function mode off, and their code asks where these are. One that is memory of the card
        itself runs as what it is: its class may leave the operator to torch, past this mode.
        """
        find = self._device.storages.find
        if all(find(t) is not None for t in tensors_in((*args, *kwargs.values())) if type(t) in types):
            return self._plain(func, args, kwargs)
        mode = self._device.function_mode
        if kwargs.get("device") == _META and not self._device.explicit_meta:
            kwargs = {**kwargs, "device": _CUDA}
        with contextlib.ExitStack() as stack:
            stack.enter_context(self)
            if mode is not None and mode not in _get_current_function_mode_stack():
                stack.enter_context(mode)
            for kind in types:
                out = kind.__torch_dispatch__(func, types, args, kwargs)
                if out is not NotImplemented:
                    return out
        return NotImplemented

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device, storages = self._device, self._device.storages
        asked = func
        if torch._C._current_graph_task_id() != -1 and args:
            func = self._in_backward(func, args[0])
        on_card, on_host, real, entries = _sort(storages, args, kwargs)
        wanted = kwargs.get("device")
        made_on_card = isinstance(wanted, torch.device) and (
            wanted.type == "cuda" or (wanted.type == "meta" and not device.explicit_meta)
        )
        if made_on_card:
            device.check_index(wanted)
            kwargs["device"] = _META
        if not on_card and not on_host and not made_on_card:
            return func(*args, **kwargs)
        if device.explicit_meta and isinstance(wanted, torch.device) and wanted.type == "meta":
            return func(*args, **kwargs)  # metadata of a tensor on the card, and none of its memory
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None  # nobody sees the numbers, and a generator of the card does not exist
        name = func._schema.name
        trait = self._trait(func)
        if trait.is_composite:
            with self:  # in inference mode torch asks before it takes such an operator apart
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if trait.made_of is not None and on_card and not real and not args[0].is_complex():
            with self:
                return trait.made_of(*args, **kwargs)
        known = device.values.begin(name, entries)
        if name == "aten::_to_copy":
            return self._transfers.to_copy(func, args, kwargs, made_on_card, entries)
        if name == "aten::copy_":
            return self._transfers.copy(func, args, kwargs, entries)
        if name in INDEXING:
            return self._indexing.run(func, args, kwargs, entries, of_formula=func is not asked)
        if trait.needs_values:
            return self._by_value.run(func, args, kwargs, entries)
        is_mixed = any(t.dim() for t in real) or (on_host and _has_extent_on_host(storages, args, kwargs))
        if on_card and is_mixed and name not in _LENGTHS_ON_HOST:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(in {name})"
            )
        if trait.check is not None and on_card:
            trait.check(*args, **kwargs)
        if trait.is_checked:
            check_overlaps(trait.written(args, kwargs), tensors_in((*args, *kwargs.values())))
        given, given_by_name = args, kwargs
        if on_host and not on_card and trait.is_mutable and (real or storages.has_lost):
            if not trait.has_kernel:
                return func(*args, **kwargs)
            if trait.fills and len(entries) == 1 and args[0].device.type == "cpu":
                out = func(*args, **kwargs)
                storages.found(args[0])
                return out
        if on_host and (real or storages.has_lost) and not trait.is_view:
            args, kwargs = as_metadata(args), {k: as_metadata(v) for k, v in kwargs.items()}
        out = self._outputs(func, trait, args, kwargs)
        if out is NotImplemented:
            return None
        if name in KEEPS_LAYOUT:
            out = channels_last_as(name, args, out)
        if made_on_card or on_card:
            self._account(func, trait, args, kwargs, out)
            if trait.has_kernel and device.memory.ordered:
                device.launched(name, *trait.accesses(args, kwargs, out))
        else:
            _follow_host(storages, out)
            if trait.is_mutable:
                out = self._lost(trait.written(given, given_by_name), out)
        if trait.is_view:
            return out
        written = trait.written(args, kwargs) if trait.is_mutable else ()
        if known or trait.fills or device.values.watches:
            device.values.follow(func, args, kwargs, out, entries, written)
        elif written:
            device.values.overwritten(written, name, next(e for e in entries if e.values is None))
        return out

    def _in_backward(self, func: Any, first: Any) -> Any:
        """What autograd calls without a dispatch mode, where it calls an operator with one.

        Args:
            func: the operator that it calls.
            first: its first argument.
        """
        if func is not ADD:
            return in_place(func, first, self._device.storages.made_by)
        if not is_in_place(first):
            return func
        if formula := adds_itself():
            self._device.estimate(f"sums in {formula}")
        return ADD_IN_PLACE

    def _outputs(self, func: Any, trait: Trait, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator's results as metadata; NotImplemented of one that only writes and has no rule for shapes.

        Raises:
            UnsupportedError: the results' shapes hang on data, or nobody wrote a rule for them.
            RuntimeError: what the operator itself refuses, as a card words it.
        """
        device, name = self._device, func._schema.name
        try:
            return func(*args, **kwargs) if trait.is_view else self._inference.run(func, args, kwargs)
        except NotImplementedError as e:
            if "meta" not in str(e).lower():
                raise
            if not trait.writes_only:
                raise device.unsupported(f"{name}: torch cannot tell the shape of its result without data") from None
            if not trait.is_known:
                device.estimate(name)
            for tensor in trait.written(args, kwargs):
                device.values.lose(tensor, name)
            return NotImplemented
        except (RuntimeError, AssertionError) as e:  # torch's Python shape rules assert where a kernel raises
            if "no fake impl registered" in str(e):
                raise device.unsupported(
                    f"{name}: what it allocates is not known without a fake kernel (torch.library.register_fake)"
                ) from None
            raise as_on_card(RuntimeError(str(e)) if isinstance(e, AssertionError) else e, args) from None

    def _trait(self, func: Any) -> Trait:
        trait = self._traits.get(func)
        if trait is None:
            trait = self._traits[func] = Trait(func)
        return trait

    def _lost(self, written: list[torch.Tensor], out: Any) -> Any:
        """What an operator returns that wrote what nobody knows into real tensors of the host: these themselves."""
        for tensor in written:
            if tensor.device.type == "cpu":
                self._transfers.lose(tensor)
        if not any(t.device.type == "cpu" for t in written):
            return out
        if isinstance(out, torch.Tensor):
            return written[0]
        return tuple(written) if isinstance(out, tuple) and len(out) == len(written) else out

    def _account(self, func: Any, trait: Trait, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Register outputs, and storages that an output argument made larger."""
        device = self._device
        outputs = [t for t in tensors_in(out) if t.device.type == "meta"]
        if trait.plan is not None:
            plan = trait.plan(args, kwargs, outputs, device.card)
            device.follow_plan(func._schema.name, plan, outputs)
        else:
            if not trait.is_known:
                device.estimate(func._schema.name)
            if trait.order is not None:
                outputs = [outputs[i] for i in trait.order]
            for tensor in outputs:
                device.register(tensor)
        if trait.may_be_ordered and torch.are_deterministic_algorithms_enabled():
            device.estimate(f"{func._schema.name} with deterministic algorithms")
        if trait.is_gemm and all(t.numel() for t in (*outputs, *tensors_in(args))):  # torch asks for nothing else
            device.take_gemm_workspace(lt=takes_lt(func, args, kwargs))
        if trait.is_mutable:
            for tensor in tensors_in((*args, *kwargs.values())):
                entry = device.storages.find(tensor)
                if entry is not None and entry.place is Place.CARD:
                    device.resized(tensor, entry)


def _sort(
    storages: Storages, args: Iterable[Any], kwargs: dict[str, Any]
) -> tuple[bool, bool, list[torch.Tensor], list[Entry]]:
    """Whether tensors on the card, and with unknown contents on the host, are among the arguments; real ones; entries.

    The entries are those of the followed tensors, in order.
    """
    on_card = on_host = False
    real: list[torch.Tensor] = []
    entries: list[Entry] = []
    for tensor in tensors_in((*args, *kwargs.values())):
        is_followed = tensor.device.type == "meta" or storages.has_lost
        entry = storages.find(tensor) if is_followed else None
        if entry is not None:
            entries.append(entry)
            if entry.place is Place.CARD:
                on_card = True
            elif entry.place is Place.HOST:
                on_host = True
        elif tensor.device.type == "cpu":
            real.append(tensor)
    return on_card, on_host, real, entries


def _has_extent_on_host(storages: Storages, args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor of unknown contents on the host is more than a number, which a card would take."""
    return any(t.dim() and storages.place(t) is Place.HOST for t in tensors_in((*args, *kwargs.values())))


def _follow_host(storages: Any, out: Any) -> None:
    for tensor in tensors_in(out):
        if tensor.device.type == "meta" and storages.find(tensor) is None:
            storages.follow(tensor, Place.HOST, None)
