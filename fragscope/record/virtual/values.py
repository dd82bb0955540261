"""Real values of small tensors on the virtual card, kept beside their storages.

A storage whose bytes are all known has a storage of the host beside it, with the same bytes at the same offsets. So
views, aliases and writes in place need nothing of their own: an operator runs once on metadata, for the shapes, and
once more on these bytes, through tensors of the same offset, shape and strides. One value of a storage that is not
known makes all of it unknown; a write that covers all of it makes it known again.

Values take no part in what is recorded: what they allocate lies on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch

from fragscope.errors import UsageError
from fragscope.record.virtual.arguments import tensors_in
from fragscope.record.virtual.storages import Entry, Origin, Place, Storages
from fragscope.record.virtual.value_rules import FILLED, Rule, evaluated, may_compute, representable, rule_of, settled
from fragscope.units import KIB, MIB, format_bytes

LARGEST = MIB
"""Bytes of the largest storage whose values are kept."""
LARGEST_OF_FLOATS = 64 * KIB
"""The same for floats, which seldom steer a program: weights are not worth their copies."""
TOTAL = 256 * MIB
"""Bytes of all values that are kept at a time."""

_CPU = torch.device("cpu")
_OVERWRITTEN = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})
_UNDEFINED = "a card may decide them otherwise"
_TOO_LARGE = f"values are kept up to {format_bytes(LARGEST)}, of floats up to {format_bytes(LARGEST_OF_FLOATS)}"


@dataclass(frozen=True, slots=True)
class Supplied:
    """What a scenario says of an operator's results where they are unknown.

    Attributes:
        name: of the operator, ``aten::argmax``.
        values: a number for all elements that are integers or bools, or a function of each result.
    """

    name: str
    values: float | bool | Callable[[torch.Tensor], torch.Tensor | None]


class Values:
    """Keeps the values of storages up to date as operators run.

    Args:
        storages: the followed storages.
        where: ``file:line`` of the program.

    Attributes:
        supplied: what a scenario supplies, the innermost last.
    """

    def __init__(self, storages: Storages, where: Callable[[], str | None]) -> None:
        self._storages = storages
        self._where = where
        self._rules: dict[Any, Rule | None] = {}
        self.supplied: list[Supplied] = []
        self._captured: list[Entry] | None = None

    # --- reading --------------------------------------------------------------------------------------------------

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A tensor of the host on the values of a followed tensor; None where they are unknown."""
        entry = self._storages.find(tensor)
        return None if entry is None or entry.values is None else _view(tensor, entry.values)

    def known(self, entries: Iterable[Entry]) -> bool:
        """Whether all values of some storages are known."""
        return all(e.values is not None for e in entries)

    def explain(self, tensors: Iterable[torch.Tensor], found: Callable[[Origin], str]) -> str:
        """Why the values of the first unknown of some tensors are not there; empty where nothing is to be said."""
        for tensor in tensors:
            entry = self._storages.find(tensor)
            if entry is not None and entry.values is None:
                return f"; its values derive from {found(entry.root())}"
        return ""

    def on_host(self, value: Any) -> Any:
        """An argument with tensors of known values in place of followed ones."""
        if isinstance(value, torch.Tensor):
            is_followed = value.device.type == "meta" or self._storages.has_lost
            entry = self._storages.find(value) if is_followed else None
            if entry is None:
                return value
            return value.to("meta") if entry.values is None else _view(value, entry.values)
        if isinstance(value, list | tuple):
            return type(value)(self.on_host(v) for v in value)
        return value

    # --- computing ------------------------------------------------------------------------------------------------

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], entries: list[Entry]) -> Any:
        """What an operator whose result's shape depends on values makes; None where it is not known.

        The result is a number, a tensor of the host or a tuple of them.
        """
        rule = self._rule(func)
        if rule is None or not self.known(entries):
            return None
        if func._schema.name == "aten::_unique2":
            args = (args[0], True, *args[2:])  # a card sorts, asked or not
        host = self.on_host(args)
        try:
            result = settled(func, host, kwargs, func(*host, **self._for_host(kwargs)))
        except Exception:  # what fails here on known values may fail on a card in its own way
            return None
        types = (t.dtype for t in tensors_in((args, list(kwargs.values()), result)))
        return result if may_compute(rule, func, args, kwargs, types) else None

    def begin(self, name: str, entries: list[Entry]) -> bool:
        """An operator is about to run: what it makes derives from its inputs. Whether all of those are known."""
        storages = self._storages
        storages.op = name
        for entry in entries:
            if entry.values is None:
                storages.origin = entry.root()
                return False
        storages.origin = None
        return True

    @property
    def watches(self) -> bool:
        """Whether every operator is to be followed, also those with unknown inputs."""
        return bool(self.supplied) or self._captured is not None

    def follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, entries: list[Entry], writes: Any
    ) -> None:
        """An operator ran on metadata: compute its results' values, or note why they are not known.

        ``entries`` are those of its inputs, and ``writes`` the tensors among its arguments that it writes to.
        """
        name = func._schema.name
        if self._captured is not None:
            self._capture(name, (*tensors_in((out,)), *writes))
            return
        rule = self._rule(func)
        unknown = next((e for e in entries if e.values is None), None)
        if name in FILLED or name in _OVERWRITTEN:
            done = self._fill(func, args, kwargs, out)
        elif rule is None or unknown is not None:
            done = False
        else:
            done = self._compute(func, rule, args, kwargs, out, writes)
        if done:
            return
        self.overwritten(writes, name, unknown)
        if unknown is None:
            for tensor in tensors_in((out,)):
                entry = self._storages.find(tensor)
                if entry is None or entry.values is not None:
                    continue
                if entry.size == 0:
                    self._storages.remember(entry)
                elif rule is not None and not _fits(tensor, entry) and entry.origin is None:
                    entry.origin = Origin(name, entry.size, entry.id, reason=_TOO_LARGE)
        if self.supplied:
            self._supply(name, out)

    def overwritten(self, writes: Iterable[torch.Tensor], name: str, unknown: Entry | None) -> None:
        """An operator wrote what is not known."""
        for tensor in writes:
            self._lose(tensor, None if unknown is None else unknown.root(), name)

    # --- CUDA graphs ----------------------------------------------------------------------------------------------

    def begin_capture(self) -> None:
        """Operators are captured from here on: they compute nothing until the graph is replayed."""
        self._captured = []

    def end_capture(self) -> list[Entry]:
        """Operators compute again; returns the storages that a replay writes to."""
        captured, self._captured = self._captured, None
        return captured or []

    def replayed(self, written: Iterable[Entry]) -> None:
        """A graph ran, from whatever its inputs hold now."""
        for entry in written:
            if entry.values is not None:
                self._storages.forget(entry)
                entry.origin = Origin("CUDAGraph.replay", entry.size, None, self._where() or "")

    def _capture(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        assert self._captured is not None
        for tensor in tensors:
            entry = self._storages.find(tensor)
            if entry is not None:
                self._captured.append(entry)
                self._storages.forget(entry)
                entry.origin = Origin(name, entry.size, entry.id, reason="it is captured into a CUDA graph")

    def _rule(self, func: Any) -> Rule | None:
        if func not in self._rules:
            self._rules[func] = rule_of(func)
        return self._rules[func]

    def _fill(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
        """One number everywhere, or all of another tensor."""
        name = func._schema.name
        entry = self._storages.find(out)
        if (
            entry is None
            or entry.place is not Place.CARD
            or not _fits(out, entry)
            or not may_compute(Rule.MADE, func, (), {}, (out.dtype,))
        ):
            return False
        source: Any = FILLED.get(name)
        if source is None:
            source = kwargs.get(
                "fill_value", args[2] if name == "aten::new_full" else args[1] if len(args) > 1 else None
            )
        if isinstance(source, torch.Tensor):
            source = self.on_host(source)
            if source.device.type != "cpu" or not representable(source, out.dtype) or source.is_complex():
                return False
        elif isinstance(source, complex) or (
            isinstance(source, float) and isnan(source) and not out.dtype.is_floating_point
        ):
            return False
        if entry.values is None:
            if not self._covers(out, entry):
                return False
            if not self._know(entry):
                return False
        try:
            values = _view(out, entry.values)
            values.copy_(source) if isinstance(source, torch.Tensor) else values.fill_(source)
        except Exception:  # a number that the type does not hold
            self._lose(out, None, name)
            return True
        return True

    def _compute(
        self, func: Any, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, writes: list[torch.Tensor]
    ) -> bool:
        outputs = list(tensors_in((out,)))
        made = [self._storages.find(t) for t in outputs]
        if any(e is None or e.place is not Place.CARD or not _fits(t, e) for t, e in zip(outputs, made, strict=True)):
            return False
        tensors = tensors_in((args, list(kwargs.values()), out))
        if not may_compute(rule, func, args, kwargs, (t.dtype for t in tensors)):
            return False
        try:
            host = self.on_host(args)
            for tensor in tensors_in((host, list(kwargs.values()))):
                if tensor.device.type != "cpu":
                    return False
            result = settled(func, host, kwargs, evaluated(func, args, host, self._for_host(kwargs)))
        except Exception:  # what fails here may fail on a card in its own way, or not at all
            return False
        results = list(result) if isinstance(result, list | tuple) else [result] if outputs else []
        if len(results) != len(outputs):
            return False
        for tensor, entry, values in zip(outputs, made, results, strict=True):
            if any(tensor is w for w in writes):
                if values is None:
                    return False
                continue
            assert entry is not None
            if values is None or values.shape != tensor.shape or not self._keep(tensor, entry, values):
                entry.origin = entry.origin or Origin(func._schema.name, entry.size, entry.id, reason=_UNDEFINED)
        return True

    def attach(self, tensor: torch.Tensor, values: torch.Tensor) -> bool:
        """Give a followed tensor its values; whether they are kept."""
        entry = self._storages.find(tensor)
        return entry is not None and _fits(tensor, entry) and self._keep(tensor, entry, values)

    def supply(self, tensor: torch.Tensor, values: Any, what: str) -> bool:
        """A scenario says what a followed tensor holds, of whatever size; whether that can be kept.

        Raises:
            UsageError: the values do not fit; ``what`` supplied them.
        """
        given = _given(tensor, values, what)
        entry = self._storages.find(tensor)
        if entry is None or entry.place is not Place.CARD:
            return False
        if entry.values is None and not self._covers(tensor, entry):
            return False
        if entry.values is None:
            self._storages.remember(entry)
        _view(tensor, entry.values).copy_(given)
        return True

    def number(self, tensor: torch.Tensor) -> Any:
        """The number that a scenario supplies where the program reads one; None where it supplies none."""
        said = self._said("aten::item")
        return said.values(tensor) if said is not None and callable(said.values) else said and said.values

    def lose(self, tensor: torch.Tensor, what: str) -> None:
        """Something wrote to a tensor that nobody computes."""
        self._lose(tensor, None, what)

    def _lose(self, tensor: torch.Tensor, origin: Origin | None, what: str) -> None:
        entry = self._storages.find(tensor)
        if entry is not None and entry.values is not None:
            self._storages.forget(entry)
            entry.origin = origin or Origin(what, entry.size, None, self._where() or "")

    def _supply(self, name: str, out: Any) -> None:
        said = self._said(name)
        if said is None:
            return
        for tensor in tensors_in((out,)):
            entry = self._storages.find(tensor)
            if entry is None or entry.values is not None:
                continue
            if callable(said.values):
                values = said.values(tensor)
                if values is not None:
                    self.supply(tensor, values, f"supplied({name!r})")
            elif not tensor.dtype.is_floating_point:
                self.supply(tensor, said.values, f"supplied({name!r})")

    def _said(self, name: str) -> Supplied | None:
        return next((s for s in reversed(self.supplied) if s.name == name), None)

    def _covers(self, tensor: torch.Tensor, entry: Entry) -> bool:
        """Whether a tensor is all of its storage."""
        return tensor.numel() * tensor.itemsize == entry.size and bool(
            torch.ops.aten.is_non_overlapping_and_dense(tensor)
        )

    def _keep(self, tensor: torch.Tensor, entry: Entry | None, values: torch.Tensor) -> bool:
        if entry is None or not self._covers(tensor, entry) or not self._know(entry):
            return False
        _view(tensor, entry.values).copy_(values)
        return True

    def _know(self, entry: Entry) -> bool:
        if entry.values is None:
            if self._storages.valued + entry.size > TOTAL:
                return False
            self._storages.remember(entry)
        return True

    def _for_host(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        out = {k: self.on_host(v) for k, v in kwargs.items()}
        if "device" in out:
            out["device"] = _CPU
        return out


def _given(tensor: torch.Tensor, values: Any, what: str) -> torch.Tensor:
    try:
        given = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError):
        given = None
    if given is None or given.device.type != "cpu":
        raise UsageError(f"{what}: the values must be a tensor on the host, a list or a number")
    try:
        torch.broadcast_to(given, tensor.shape)
    except RuntimeError:
        shapes = f"{tuple(given.shape)}, the tensor {tuple(tensor.shape)}"
        raise UsageError(f"{what}: the values have the shape {shapes}") from None
    return given


def _fits(tensor: torch.Tensor, entry: Entry) -> bool:
    return entry.size <= (LARGEST_OF_FLOATS if tensor.dtype.is_floating_point else LARGEST)


def _view(tensor: torch.Tensor, values: torch.UntypedStorage | None) -> torch.Tensor:
    assert values is not None
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(values, tensor.storage_offset(), tensor.shape, tensor.stride())
