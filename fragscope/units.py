"""Byte counts at the edges: parsing what users write, formatting what they read. Inside, bytes are integers."""

from __future__ import annotations

import re

from fragscope.errors import UsageError, printable

KIB = 1024
MIB = 1024**2
GIB = 1024**3

MOST_MEMORY = 16 * 1024**4
"""Bytes beyond what any device has, by far: the largest has 0.3 TiB. Larger figures are refused where they come in."""

_FACTORS = {
    "": 1, "B": 1,
    "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024**4,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_SHOWN = 60  # characters of what is refused
_PATTERN = re.compile(r"\s*([0-9]{1,19})(?:\.([0-9]{1,18}))?\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int, where: str = "size") -> int:
    """Bytes from ``"2 GiB"``, ``"24 MB"``, ``"512"`` or an integer.

    KiB, MiB, GiB, TiB are powers of 1024; kB, MB, GB, TB of 1000; a bare integer is bytes. What a fraction such as
    "2.3 GiB" leaves of a byte is dropped: a byte count is above 2.3 GiB exactly when it is above the whole bytes in it.

    Args:
        text: what the user wrote.
        where: the place to name in an error, such as ``"--capacity"``.

    Raises:
        UsageError: for anything else.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise UsageError(f"{where}: {text!r} is not a byte count; write an integer or a size such as '2 GiB'")
    if isinstance(text, int):
        if text < 0:
            raise UsageError(f"{where}: {printable(str(text), _SHOWN)} is negative; a byte count is 0 or more")
        return text
    match = _PATTERN.fullmatch(text)
    if match is None or match[3] not in _FACTORS or (match[2] and match[3] in ("", "B")):
        raise UsageError(
            f"{where}: {printable(repr(text), _SHOWN)} is not a byte count; use an integer (bytes) or a number with "
            f"one of {', '.join(u for u in _FACTORS if u)}"
        )
    whole, fraction, unit = match[1], match[2] or "", match[3]
    scaled = int(whole + fraction) * _FACTORS[unit]
    return scaled // int(10 ** len(fraction))


def parse_memory(text: str | int, where: str) -> int:
    """A device's memory as ``parse_bytes`` reads it.

    Raises:
        UsageError: it is no byte count, or more than ``MOST_MEMORY``.
    """
    size = parse_bytes(text, where)
    if size > MOST_MEMORY:
        raise UsageError(f"{where}: {text} is more than any device has; {format_bytes(MOST_MEMORY)} are the most")
    return size


def format_bytes(count: int) -> str:
    """A byte count for people, in binary units with at most two decimals: ``9012.00 MiB``, ``512 B``.

    MiB is the largest unit up to 10,000 MiB, since engineers compare figures of that size; GiB above.
    """
    sign, size = ("-", -count) if count < 0 else ("", count)
    if size < KIB:
        return f"{sign}{size} B"
    if size < MIB:
        return f"{sign}{size / KIB:,.2f} KiB"
    if size < 10_000 * MIB:
        return f"{sign}{size / MIB:,.2f} MiB"
    return f"{sign}{size / GIB:,.2f} GiB"


def mib(count: int) -> str:
    """A byte count in MiB with two decimals and no unit, for table columns headed MiB."""
    return f"{count / MIB:,.2f}"
