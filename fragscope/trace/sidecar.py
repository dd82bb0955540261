"""What a PyTorch snapshot leaves out, from a JSON file beside it.

Keys, all optional: ``torch`` (release), ``conf``, ``memory_fraction``, ``total_memory`` and ``capacity`` (bytes),
``card`` (a profile) or ``gpu`` (the name CUDA reports). Others are not read, so that the file may hold more.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from fragscope.errors import InputFileError, printable
from fragscope.trace.containers import read_at_most
from fragscope.trace.start import large_page, with_large_page
from fragscope.trace.trace import Trace
from fragscope.units import MIB, MOST_MEMORY

_FILE_LIMIT = 16 * MIB


class _Sidecar(msgspec.Struct):
    torch: str | None = None
    conf: str | None = None
    memory_fraction: float | None = None
    total_memory: int | None = None
    capacity: int | None = None
    card: str | None = None
    gpu: str | None = None


def with_sidecar(trace: Trace, path: Path) -> Trace:
    """The Trace with what the file says it was recorded under.

    Raises:
        InputFileError: the file is not readable, not JSON, or a value has the wrong type or is impossible.
    """
    raw = read_at_most(path, _FILE_LIMIT, "is too large for what a recording leaves out")
    try:
        said = msgspec.json.decode(raw, type=_Sidecar)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InputFileError(path, f"is not a sidecar: {printable(str(e), 120)}") from None
    if said.memory_fraction is not None and not 0.0 <= said.memory_fraction <= 1.0:
        raise InputFileError(path, f"'memory_fraction' is {said.memory_fraction}, not between 0 and 1")
    for key in ("total_memory", "capacity"):
        size = getattr(said, key)
        if size is not None and not 0 < size <= MOST_MEMORY:
            raise InputFileError(path, f"{key!r} is {size}, which is no device's memory in bytes")
    settings = trace.settings
    if said.conf is not None:
        trace = replace(
            trace,
            initial=with_large_page(trace.initial, large_page(said.conf)),
            final=None if trace.final is None else with_large_page(trace.final, large_page(said.conf)),
        )
    told = {
        code for code, value in (("torch_release", said.torch), ("allocator_settings", said.conf)) if value is not None
    }
    return replace(
        trace,
        lost=tuple(loss for loss in trace.lost if loss.code not in told),
        torch=said.torch or trace.torch,
        card=said.card or said.gpu or trace.card,
        device_total=said.total_memory or trace.device_total,
        settings=replace(
            settings,
            conf=settings.conf if said.conf is None else said.conf,
            memory_fraction=settings.memory_fraction if said.memory_fraction is None else said.memory_fraction,
            capacity=said.capacity or settings.capacity,
        ),
    )
