"""Opening whatever the user names as a Trace."""

from __future__ import annotations

from pathlib import Path

from fragscope.trace.snapshot import read_snapshot
from fragscope.trace.store import is_fscope, read_trace
from fragscope.trace.trace import Trace


def load_trace(path: str | Path, device: int | None = None) -> Trace:
    """Open an ``.fscope`` file or a PyTorch memory snapshot (plain, ``.xz`` or ``.gz``); the content decides.

    Args:
        path: the file.
        device: CUDA device to take from a snapshot that holds several.

    Raises:
        InputFileError: exit code 5; one line with file and reason.
    """
    file = Path(path)
    return read_trace(file) if is_fscope(file) else read_snapshot(file, device)
