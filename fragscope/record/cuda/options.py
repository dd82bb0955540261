"""How to record."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Stacks(StrEnum):
    """Which call stacks are recorded."""

    NONE = "none"
    PYTHON = "python"
    ALL = "all"
    """Python, TorchScript and C++ frames."""


@dataclass(frozen=True, slots=True)
class RecorderOptions:
    """How to record.

    Attributes:
        stacks: which call stacks; ``none`` is the cheapest and loses no event and no byte.
        device: CUDA device whose Trace is wanted; None is the current one when recording starts.
        max_entries: length of PyTorch's history, where that is needed; it bounds the recorder's own memory.
        sample_non_torch: seconds between samples of the device memory outside the allocator; None takes none.
        keep: folder for what is recorded, kept when the program ends or is killed; None is a temporary one.
        gives_way: another recorder may begin, and ends this one; otherwise there is one at a time.
    """

    stacks: Stacks = Stacks.NONE
    device: int | None = None
    max_entries: int = 1_000_000
    sample_non_torch: float | None = None
    keep: Path | None = None
    gives_way: bool = False
