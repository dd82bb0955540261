"""Blocks, segments and the free lists that are searched for them."""

from __future__ import annotations

from bisect import bisect_left, insort


class Segment:
    """Memory of one ``cudaMalloc``.

    Attributes:
        addr: first byte.
        size: bytes.
        active: bytes in blocks that are not free.
        order: creation number.
        first: the block at ``addr``.
    """

    __slots__ = ("active", "addr", "first", "order", "pool", "size", "stream")

    def __init__(self, addr: int, size: int, stream: int, pool: BlockPool, order: int) -> None:
        self.addr = addr
        self.size = size
        self.stream = stream
        self.pool = pool
        self.order = order
        self.active = 0
        self.first: Block | None = None


class Block:
    """A contiguous part of a segment: handed out, waiting for other streams, or free.

    Attributes:
        addr: first byte.
        size: bytes.
        requested: bytes asked for, meaningful while not free.
        id: lifetime id, meaningful while not free.
        allocated: handed out and not yet freed by the program.
        uses: other streams that use the block.
        pending: streams whose work the deferred free still waits for.
        prev, next: neighbours inside the segment.
        tie: what orders equal-size blocks in a free list, before the address.
    """

    __slots__ = (
        "addr", "allocated", "id", "next", "pending", "prev", "requested", "segment", "size", "tie", "uses",
    )  # fmt: skip

    def __init__(self, segment: Segment, addr: int, size: int, tie: int) -> None:
        self.segment = segment
        self.addr = addr
        self.size = size
        self.tie = tie
        self.requested = 0
        self.id = -1
        self.allocated = False
        self.uses: set[int] | None = None
        self.pending = False
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def is_split(self) -> bool:
        """Whether the segment holds other blocks too."""
        return self.prev is not None or self.next is not None

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Place in a free list: stream, size, tie-break, address."""
        return (self.segment.stream, self.size, self.tie, self.addr)


class BlockPool:
    """The free blocks of one pool and size class, smallest sufficient block first.

    Attributes:
        small: whether it serves requests of up to 1 MiB.
        pool: index of the pool it belongs to; 0 is the default pool.
    """

    def __init__(self, small: bool, pool: int = 0) -> None:
        self.small = small
        self.pool = pool
        self._keys: list[tuple[int, int, int, int]] = []
        self._blocks: dict[int, Block] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def insert(self, block: Block) -> None:
        """Add a free block."""
        insort(self._keys, block.key)
        self._blocks[block.addr] = block

    def remove(self, block: Block) -> None:
        """Take out a block whose size and address are still those it was inserted with."""
        at = bisect_left(self._keys, block.key)
        assert self._keys[at][3] == block.addr
        del self._keys[at]
        del self._blocks[block.addr]

    def smallest(self, stream: int, size: int) -> Block | None:
        """The first block of ``stream`` with at least ``size`` bytes."""
        keys = self._keys
        at = bisect_left(keys, (stream, size, -1, -1))
        if at == len(keys) or keys[at][0] != stream:
            return None
        return self._blocks[keys[at][3]]

    def depends_on_placement(self, block: Block) -> bool:
        """Whether choosing this block over others of its size came down to where the driver put their segments.

        Blocks of one segment are ordered by their offsets, and whole idle segments of one size are interchangeable;
        anything else makes a different layout.
        """
        stream, size = block.segment.stream, block.size
        low = bisect_left(self._keys, (stream, size, -1, -1))
        high = bisect_left(self._keys, (stream, size + 1, -1, -1))
        if high - low < 2:
            return False
        tied = [self._blocks[k[3]] for k in self._keys[low:high]]
        if all(b.segment is block.segment for b in tied):
            return False
        return any(b.is_split for b in tied)

    def whole_segments(self) -> list[Block]:
        """Blocks that are a whole segment, in search order."""
        return [b for b in (self._blocks[k[3]] for k in self._keys) if not b.is_split]
