"""The dispatch mode: sees every operator after autograd, keeps the books of memory, refuses what needs data."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from fragscope.record.virtual.accumulation import ADD, ADD_IN_PLACE, adds_itself, in_place, is_in_place
from fragscope.record.virtual.card import VirtualCard
from fragscope.record.virtual.footprints import (
    copy_temporaries,
    takes_lt,
)
from fragscope.record.virtual.inference import Inference
from fragscope.record.virtual.layouts import KEEPS_LAYOUT, channels_last_as
from fragscope.record.virtual.operand_types import check_index_put
from fragscope.record.virtual.overlaps import check_overlaps
from fragscope.record.virtual.scratch.indexed import accumulated
from fragscope.record.virtual.storages import Entry, Place, Storages
from fragscope.record.virtual.traits import Trait, tensors_in

_META = torch.device("meta")
_CUDA = torch.device("cuda", 0)
_CLONE = torch.ops.aten.clone.default
_MASKED_FILL = torch.ops.aten.masked_fill_.Scalar
_NONZERO = torch.ops.aten.nonzero.default
_LENGTHS_ON_HOST = ("aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward")
"""Operators that take a tensor of the host beside those on the card."""


class DispatchMode(TorchDispatchMode):
    """Runs operators on metadata and registers what they allocate."""

    def __init__(self, device: VirtualCard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._traits: dict[Any, Trait] = {}
        self._inference = Inference()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch.compile is refused on the virtual device; without this the first operator imports all of Dynamo."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if types:
            return self._of_subclass(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunction():
            if func is not ADD or torch._C._current_graph_task_id() == -1:
                return self._run(func, args, dict(kwargs or {}))
            with self._device.summing_gradients():
                return self._run(func, args, dict(kwargs or {}))

    def _of_subclass(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What classes of tensors make of an operator that have operators of their own, and tensors inside.

        Torch has switched the function mode off, and their code asks where these are.
        """
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
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and func is ADD:
            if is_in_place(args[0]):
                func = ADD_IN_PLACE
                if formula := adds_itself():
                    device.estimate(f"sums in {formula}")
        elif in_backward and args:
            func = in_place(func, args[0], storages.made_by)
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
            return self._to_copy(func, args, kwargs, made_on_card, entries)
        if name == "aten::copy_":
            return self._copy(func, args, kwargs, entries)
        if name in ("aten::index", "aten::index_put_", "aten::index_put"):
            return self._index(func, args, kwargs, entries)
        if trait.needs_values:
            return self._with_values(func, args, kwargs, entries)
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
            args, kwargs = _to_meta(args), {k: _to_meta(v) for k, v in kwargs.items()}
        try:
            out = func(*args, **kwargs) if trait.is_view else self._inference.run(func, args, kwargs)
        except NotImplementedError as e:
            if "meta" not in str(e).lower():
                raise
            if not trait.writes_only:
                raise device.unsupported(f"{name}: torch cannot tell the shape of its result without data") from None
            if not trait.is_known:
                device.estimate(name)
            for tensor in trait.written(args, kwargs):
                device.values.lose(tensor, name)
            return None
        except (RuntimeError, AssertionError) as e:  # torch's Python shape rules assert where a kernel raises
            if "no fake impl registered" in str(e):
                raise device.unsupported(
                    f"{name}: what it allocates is not known without a fake kernel (torch.library.register_fake)"
                ) from None
            raise _as_on_card(RuntimeError(str(e)) if isinstance(e, AssertionError) else e, args) from None
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

    def _trait(self, func: Any) -> Trait:
        trait = self._traits.get(func)
        if trait is None:
            trait = self._traits[func] = Trait(func)
        return trait

    def _with_values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], entries: list[Entry]) -> Any:
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
        plan = self._trait(func).plan
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

    def _lost(self, written: list[torch.Tensor], out: Any) -> Any:
        """What an operator returns that wrote what nobody knows into real tensors of the host: these themselves."""
        for tensor in written:
            if tensor.device.type == "cpu":
                self._lose(tensor)
        if not any(t.device.type == "cpu" for t in written):
            return out
        if isinstance(out, torch.Tensor):
            return written[0]
        return tuple(written) if isinstance(out, tuple) and len(out) == len(written) else out

    def _lose(self, real: torch.Tensor) -> None:
        """A real tensor of the host is written with what nobody knows."""
        if not self._device.storages.lose(real):
            raise self._device.unsupported(
                "a tensor of the host whose memory NumPy or another process shares would hold what the virtual device "
                "does not have"
            )

    def _chosen(self, data: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """As many elements as a known mask picks from data that is not known."""
        known = self._device.values.on_host(mask)
        if known.device.type != "cpu":
            return None
        shape = torch.broadcast_shapes(data.shape, mask.shape)
        return torch.empty(int(known.expand(shape).count_nonzero()), dtype=data.dtype, device=_META)

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
        if trait.is_gemm and all(t.numel() for t in (*outputs, *tensors_in(args))):  # torch asks for nothing else
            device.take_gemm_workspace(lt=takes_lt(func, args, kwargs))
        if trait.is_mutable:
            for tensor in tensors_in((*args, *kwargs.values())):
                entry = device.storages.find(tensor)
                if entry is not None and entry.place is Place.CARD:
                    device.resized(tensor, entry)

    def _to_copy(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], to_card: bool, entries: list[Entry]
    ) -> Any:
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

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], entries: list[Entry]) -> Any:
        storages, values = self._device.storages, self._device.values
        dst, src = args[0], args[1]
        dst_place, src_place = storages.place(dst), storages.place(src)
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        try:
            broadcast = tuple(torch.broadcast_shapes(dst.shape, src.shape))
        except RuntimeError as e:
            raise _as_on_card(e, (dst, src)) from None
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
                self._lose(dst)
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

    def _index(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], entries: list[Entry]) -> Any:
        device, storages = self._device, self._device.storages
        target: torch.Tensor = args[0]
        if storages.place(target) is not Place.CARD:
            raise device.unsupported("indexing a host tensor by a tensor on the card needs its contents", args[1])
        writes = func._schema.name != "aten::index"
        accumulate = writes and bool(args[3] if len(args) > 3 else kwargs.get("accumulate", False))
        if writes and not accumulate and _is_host_scalar(args[2]) and (mask := _only_mask(target, args[1])) is not None:
            if not func._schema.is_mutable:
                target = self._run(_CLONE, (target,), {})
            return self._run(_MASKED_FILL, (target, mask, args[2].item()), {})  # which needs no shape
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
                indices.extend(self._with_values(_NONZERO, (index,), {}, [entry]).unbind(1))
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
        with device.temporaries(scalar), device.index_temporaries(indices, on_host):
            values = tuple(_to_meta(a) for a in args[2:])
            out = self._inference.run(func, (target, moved, *values), kwargs)
            device.values.begin(func._schema.name, entries)
            for tensor in tensors_in(out):
                device.register(tensor)
            if accumulate:
                device.follow_plan("aten::index_put_", accumulated(target, indices, args[2], device.card), [])
            device.launched(func._schema.name, tensors_in([target, indices, *values]), tensors_in(out))
            written = [target] if func._schema.is_mutable else ()
            device.values.follow(func, (target, indices, *args[2:]), kwargs, out, entries, written)
        return out


def _with_room(values: torch.Tensor, count: int) -> torch.Tensor:
    """Values at the beginning of memory for so many, all of which a card keeps; nobody looks at the rest."""
    out = values.new_zeros(count)
    out[: len(values)] = values
    return out


def _as_on_card(error: RuntimeError, args: tuple[Any, ...]) -> RuntimeError:
    """Torch's Python shape rules word the commonest mistake in another way than its kernels do."""
    if not str(error).startswith("Attempting to broadcast"):
        return error
    shapes = [t.shape for t in tensors_in(args)]
    for a, b in itertools.pairwise(shapes):
        rank = max(len(a), len(b))
        for dim in range(rank - 1, -1, -1):
            m, n = (s[dim - rank + len(s)] if dim - rank + len(s) >= 0 else 1 for s in (a, b))
            if m not in (n, 1) and n != 1:
                return RuntimeError(
                    f"The size of tensor a ({m}) must match the size of tensor b ({n}) at non-singleton dimension {dim}"
                )
    return error


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


def _to_meta(value: Any) -> Any:
    """Real host tensors as metadata, so that they can meet host tensors of unknown contents."""
    if isinstance(value, torch.Tensor):
        return value.to(_META) if value.device.type == "cpu" else value
    if isinstance(value, list | tuple):
        return type(value)(_to_meta(v) for v in value)
    return value


def _follow_host(storages: Any, out: Any) -> None:
    for tensor in tensors_in(out):
        if tensor.device.type == "meta" and storages.find(tensor) is None:
            storages.follow(tensor, Place.HOST, None)
