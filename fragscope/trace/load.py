"""Opening whatever the user names as a Trace."""

from __future__ import annotations

from pathlib import Path

from fragscope.errors import InputFileError, UsageError
from fragscope.trace.open_recording import open_recording
from fragscope.trace.plausible import check_plausible
from fragscope.trace.recording import is_recording
from fragscope.trace.snapshot import read_snapshot
from fragscope.trace.store import is_fscope, read_trace
from fragscope.trace.trace import Trace


def load_trace(path: str | Path, device: int | None = None) -> Trace:
    """Open an ``.fscope`` file, a PyTorch memory snapshot (plain, ``.xz`` or ``.gz``) or a recording's folder.

    Args:
        path: the file.
        device: CUDA device to take from a snapshot or recording that holds several.

    Raises:
        InputFileError: exit code 5; one line with file and reason.
        UsageError: the file holds several devices and none was chosen, or not the one that was.
        UnmodelledError: it was recorded under settings whose events are not read.
    """
    file = Path(path)
    try:
        if is_recording(file):
            trace = open_recording(file, device)
        else:
            trace = read_trace(file) if is_fscope(file) else read_snapshot(file, device)
        check_plausible(trace, file)
    except MemoryError:
        raise InputFileError(file, "needs more memory than this process may use") from None
    if device is not None and device != trace.device:
        raise UsageError(f"{file}: no events for device {device}; the file has them for: {trace.device}")
    return trace
