"""The shape of a decoded snapshot: what type and range each of its values must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fragscope.errors import InputFileError
from fragscope.trace.trace import PoolId
from fragscope.units import MOST_MEMORY

ACTIONS = frozenset(
    {
        "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap",
        "oom", "snapshot", "annotate",
    }
)  # fmt: skip
"""Actions of trace entries, of all releases."""
MAX_INT = 2**63 - 1
MAX_SIZE = 2**62 - 1  # no device has that much, and sums of a few stay within 64 bits


class Checker:
    """Type checks that say which file and which place is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        """A dict."""
        if not isinstance(value, dict):
            raise InputFileError(self.path, f"{where}: a dict is expected, not {type(value).__name__}")
        return value

    def sequence(self, value: Any, where: str) -> Sequence[Any]:
        """A list or tuple."""
        if not isinstance(value, list | tuple):
            raise InputFileError(self.path, f"{where}: a list is expected, not {type(value).__name__}")
        return value

    def integer(self, entry: Mapping[str, Any], key: str, where: str, high: int = MAX_INT) -> int:
        """The value of a key, an integer between 0 and ``high``."""
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputFileError(self.path, f"{where}: {key!r} should be an integer, not {type(value).__name__}")
        if not 0 <= value <= high:
            raise InputFileError(self.path, f"{where}: {key!r} is {value:#x}, outside what an address or size can be")
        return value

    def text(self, entry: Mapping[str, Any], key: str, where: str) -> str:
        """The value of a key, a string."""
        value = entry.get(key)
        if not isinstance(value, str):
            raise InputFileError(self.path, f"{where}: {key!r} should be text, not {type(value).__name__}")
        return value

    def pool(self, entry: Mapping[str, Any], key: str, where: str) -> PoolId | None:
        """The value of a key, a pair of integers; None where it is missing."""
        value = entry.get(key)
        if value is None:
            return None
        good = isinstance(value, list | tuple) and len(value) == 2
        if not good or not all(isinstance(v, int) and 0 <= v <= MAX_INT for v in value):
            raise InputFileError(self.path, f"{where}: {key!r} should be a pair of integers")
        return (int(value[0]), int(value[1]))


def is_plain(entry: Any) -> bool:
    """Whether an entry has what undoing it needs; an ``oom`` has no address."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("action"), str)
        and _is_within(entry.get("size"), MOST_MEMORY)
        and _is_within(entry.get("stream"), MAX_INT)
        and _is_within(entry.get("addr", 0), MAX_INT - MOST_MEMORY)
    )


def _is_within(value: Any, most: int) -> bool:
    return isinstance(value, int) and 0 <= value <= most
