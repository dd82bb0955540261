"""What a model of the allocator must answer to be compared with a binary, or with another model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from fragscope.allocator import Conf


class Entry(NamedTuple):
    """One line of the allocator's own trace.

    Attributes:
        action: as PyTorch names it: ``alloc``, ``free_requested``, ``free_completed``, ``segment_alloc``,
            ``segment_free``, ``segment_map``, ``segment_unmap`` or ``oom``.
        addr: bytes; for ``oom`` the driver's free bytes.
        size: bytes: requested for ``alloc`` and ``free_*``, rounded for ``oom``, of the segment or mapping otherwise.
        stream: raw stream handle.
        pool: number of the pool; 0 is the default pool.
    """

    action: str
    addr: int
    size: int
    stream: int
    pool: int


class SegmentView(NamedTuple):
    """A segment, or one contiguous mapped range of an expandable one; bytes.

    Attributes:
        blocks: ``(addr, size, state)`` in address order, state one of ``free``, ``allocated``, ``pending``.
    """

    addr: int
    size: int
    stream: int
    pool: int
    expandable: bool
    blocks: tuple[tuple[int, int, str], ...]


class Model(Protocol):
    """A device's caching allocator whose allocations are named by the caller's ids.

    Built with the device's total bytes, the bytes that segments may take together (its capacity), a release's rules and
    the Conf in force at the start.
    """

    def give_addresses(self, segments: Sequence[tuple[int, int]], maps: Sequence[int]) -> None:
        """Where the driver puts what comes next: ``(address, bytes)`` of segments, and addresses of mappings.

        Both in the order in which they will be made, replacing what was given before. A new expandable segment begins
        at the address of the mapping that is made next.
        """

    def malloc(self, id: int, size: int, stream: int, pool: int) -> bool:
        """Whether the request was served. ``pool`` is the pool that the open scopes select."""

    def free(self, id: int) -> None:
        """The program lets go of a live allocation."""

    def record_stream(self, id: int, stream: int) -> None:
        """A live allocation is used on ``stream`` too."""

    def uses_done(self, id: int) -> None:
        """All other streams are done with a freed allocation; noticed when the allocator next looks."""

    def empty_cache(self, pool: int = 0) -> None:
        """``emptyCache(pool)``: 0 waits for all streams and returns what is idle, else only that released pool."""

    def set_memory_fraction(self, fraction: float) -> None:
        """``setMemoryFraction``."""

    def set_conf(self, conf: Conf) -> None:
        """The effective settings from now on."""

    def create_pool(self, pool: int, use_on_oom: bool, no_split: bool) -> None:
        """``createOrIncrefPool``: made with one user, or one user more."""

    def begin_pool(self, pool: int) -> None:
        """``beginAllocateToPool``: one user more (made if new), and a scope is open."""

    def end_pool(self, pool: int) -> None:
        """``endAllocateToPool``: the scope is closed."""

    def release_pool(self, pool: int) -> None:
        """``releasePool``: one user less; without users its idle memory can be returned."""

    def take_entries(self) -> list[Entry]:
        """Trace entries since the last call."""

    def stats(self) -> dict[str, tuple[int, ...]]:
        """Counters by the names that the harness gives the binary's: ``allocated_bytes.all`` and so on with
        ``(current, peak, allocated, freed)`` for ``all``, ``small`` and ``large``; ``oversize_allocations`` and
        ``oversize_segments`` likewise; ``num_alloc_retries``, ``num_ooms``, ``num_sync_all_streams``,
        ``num_device_alloc`` and ``num_device_free`` with one value.
        """

    def segments(self) -> list[SegmentView]:
        """Segments as they stand, in address order."""
