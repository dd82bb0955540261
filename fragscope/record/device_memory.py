"""Device memory that a scenario takes past the caching allocator, on whatever device it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from fragscope.errors import UsageError

How = Literal["cuMemCreate", "cudaMalloc"]
"""Who is asked: ``cuMemCreate`` gives whole pages, ``cudaMalloc`` takes the bytes as they are."""


class DeviceMemory:
    """A block of it; held until ``free()``, or until the process ends.

    Attributes:
        size: bytes taken; for ``cuMemCreate`` what was asked for, rounded up to the granularity that the driver
            recommends (2 MiB).
        how: who gave it.
    """

    __slots__ = ("_give", "how", "size")

    def __init__(self, size: int, how: How, give: Callable[[], None]) -> None:
        self.size = size
        self.how = how
        self._give: Callable[[], None] | None = give

    def free(self) -> None:
        """Give the block back.

        Raises:
            UsageError: it was given back before.
        """
        if self._give is None:
            raise UsageError(f"device memory of {self.size} bytes ({self.how}) is freed twice")
        give, self._give = self._give, None
        give()

    def __repr__(self) -> str:
        state = "freed" if self._give is None else "held"
        return f"<device memory, {self.size} bytes by {self.how}, {state}>"


def check_request(size: object, how: object) -> None:
    """Refuse what no driver is asked for.

    Raises:
        UsageError: the size is no positive number of bytes, or ``how`` none of ``How``.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UsageError(f"device memory of {size!r} bytes: a positive whole number is needed")
    if how not in get_args(How):
        raise UsageError(f"device memory by {how!r}: it is one of {', '.join(get_args(How))}")
