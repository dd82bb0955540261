"""From the folder of chunks that a recorder left to files: one for each device that the process used."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fragscope.errors import InputFileError
from fragscope.trace import Trace, write_trace
from fragscope.trace.rank_set import SUFFIX, of_device


def pack(
    folder: Path, *, strip_stacks: bool, provenance: Mapping[str, str], opened: Trace | None = None
) -> tuple[Path, ...]:
    """Write a folder's recording as files beside it, named like it; then the folder goes.

    Args:
        folder: the recording, ended or torn.
        strip_stacks: leave call stacks out.
        provenance: what the Traces are to carry besides what they carry already.
        opened: the Trace of one device, where the caller has it.

    Raises:
        InputFileError: there is nothing in it that can be read.
        OSError: a file cannot be written; the folder stays.
    """
    from fragscope.trace.open_recording import open_recording  # noqa: PLC0415

    devices = recorded_devices(folder)
    if not devices:
        raise InputFileError(folder, "holds no events")
    files = []
    for device in devices:
        trace: Trace = opened if opened is not None and opened.device == device else open_recording(folder, device)
        trace = replace(trace, provenance={**trace.provenance, **provenance})
        name = folder.name if len(devices) == 1 else of_device(folder.name, device)
        files.append(folder.with_name(f"{name}{SUFFIX}"))
        write_trace(trace.strip_stacks() if strip_stacks else trace, files[-1])
    shutil.rmtree(folder, ignore_errors=True)
    return tuple(files)


def recorded_devices(folder: Path) -> tuple[int, ...]:
    """CUDA devices that a folder's recording has events of."""
    from fragscope.trace.open_recording import devices_of  # noqa: PLC0415

    try:
        return tuple(devices_of(folder))
    except InputFileError:  # not even a chunk
        return ()
