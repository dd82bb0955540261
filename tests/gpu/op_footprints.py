"""What each operator of a running program allocates, by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType

Footprint = dict[str, Any]


def footprints_of(program: Callable[[], object], device: str) -> dict[str, list[Footprint]]:
    """By operator, each footprint that a run of the program shows, and how often.

    ``events`` are those between its begin and its end: ``["alloc", bytes]`` and ``["free", n]``, n counting the
    operator's own allocations, in order; what is not freed is a result or kept. ``temporary`` is the most bytes that
    were held at a time besides what is left at the end. Bytes are those that PyTorch's profiler reports.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=True
    ) as profile:
        program()
    found: dict[str, dict[str, Footprint]] = {}
    for root in profile.profiler.kineto_results.experimental_event_tree():
        for node in _operators(root):
            footprint = _footprint(node, device)
            if footprint["events"]:
                known = found.setdefault(node.name, {}).setdefault(repr(footprint), {**footprint, "calls": 0})
                known["calls"] += 1
    return {name: list(kinds.values()) for name, kinds in sorted(found.items())}


def _operators(node: Any, within: str = "") -> Iterator[Any]:
    """ATen operators below a node, but for those inside one of the same name."""
    name = node.name if node.typed[0] == _EventType.TorchOp and node.name.startswith("aten::") else ""
    if name and name != within:
        yield node
    for child in node.children:
        yield from _operators(child, name or within)


def _allocations(node: Any) -> Iterator[Any]:
    if node.typed[0] == _EventType.Allocation:
        yield node
    for child in node.children:
        yield from _allocations(child)


def _footprint(node: Any, device: str) -> Footprint:
    events: list[list[Any]] = []
    live: dict[int, tuple[int, int]] = {}
    made = held = peak = 0
    for entry in sorted(_allocations(node), key=lambda e: e.start_time_ns):
        fields = entry.extra_fields
        if fields.device.type != device:
            continue
        if fields.alloc_size > 0:
            events.append(["alloc", fields.alloc_size])
            live[fields.ptr] = (made, fields.alloc_size)
            made, held = made + 1, held + fields.alloc_size
            peak = max(peak, held)
        elif fields.ptr in live:
            number, size = live.pop(fields.ptr)
            events.append(["free", number])
            held -= size
    return {"inputs": [_input(i) for i in node.extra_fields.inputs], "events": events, "temporary": peak - held}


def _input(value: Any) -> Any:
    if hasattr(value, "sizes"):
        return {"shape": list(value.sizes), "strides": list(value.strides), "dtype": str(value.dtype)}
    if isinstance(value, list | tuple):
        return [_input(v) for v in value]
    return value if isinstance(value, int | float | bool | str | type(None)) else str(value)
