"""Which pool the entries and segments of a snapshot belong to, named or not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from fragscope.trace.snapshot.shape import Checker
from fragscope.trace.trace import DEFAULT_POOL, PoolId


class PrivateRanges:
    """Which pool an address belongs to, for events that do not say it.

    Known are the segments of private pools that stand at the end, each from the event on that last made it.
    """

    def __init__(self, check: Checker, entries: Sequence[Any], segments: Sequence[Any], device: int) -> None:
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, PoolId]] = []  # end, first event, pool
        private = []
        for number, item in enumerate(segments):
            segment = check.mapping(item, f"segment {number}")
            pool = check.pool(segment, "segment_pool_id", f"segment {number}")
            if pool not in (None, DEFAULT_POOL) and segment.get("device") == device:
                addr = check.integer(segment, "address", f"segment {number}")
                private.append((addr, addr + check.integer(segment, "total_size", f"segment {number}"), pool))
        if not private:
            return
        private.sort()
        self._starts = [addr for addr, _, _ in private]
        since = [0] * len(private)
        for number, entry in enumerate(entries):
            if isinstance(entry, dict) and entry.get("action") in ("segment_alloc", "segment_free"):
                place: Any = entry.get("addr")
                at = bisect_right(self._starts, place) - 1 if isinstance(place, int) else -1
                if at >= 0 and place < private[at][1]:
                    since[at] = number + (entry["action"] == "segment_free")
        self._ranges = [(end, first, pool) for (_, end, pool), first in zip(private, since, strict=True)]

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def pool_at(self, number: int, addr: int) -> PoolId:
        """The pool of an address at an event."""
        at = bisect_right(self._starts, addr) - 1
        if at >= 0 and addr < self._ranges[at][0] and number >= self._ranges[at][1]:
            return self._ranges[at][2]
        return DEFAULT_POOL


class Pools:
    """Numbers for the pools that a snapshot names, in the order in which it names them.

    Attributes:
        ids: by number; 0 is the default pool.
        lacks_ids: whether some entry did not name its pool.
    """

    def __init__(self, check: Checker, private: PrivateRanges) -> None:
        self.ids: list[PoolId] = [DEFAULT_POOL]
        self.lacks_ids = False
        self._check = check
        self._private = private
        self._numbers = {DEFAULT_POOL: 0}

    def number(self, pool: PoolId) -> int:
        """The number of a pool, a new one for a pool not named before."""
        number = self._numbers.get(pool)
        if number is None:
            number = self._numbers[pool] = len(self.ids)
            self.ids.append(pool)
        return number

    def of(self, number: int, entry: Mapping[str, Any], where: str, addr: int | None) -> int:
        """The pool of the ``number``-th entry; what is not named follows from the address, if there is one."""
        pool = self._check.pool(entry, "pool_id", where)
        if pool is None:
            self.lacks_ids = True
            if addr is None or not self._private:
                return 0
            pool = self._private.pool_at(number, addr)
        return self.number(pool)
