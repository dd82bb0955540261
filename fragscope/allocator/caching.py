"""The model of PyTorch's CUDA caching allocator (backend ``native``).

Each method follows the function of the same purpose in c10/cuda/CUDACachingAllocator.cpp; the order of steps is the
behaviour. What other streams have finished is told from outside (``uses_done``), because only the GPU knows.
"""

from __future__ import annotations

from dataclasses import dataclass

from fragscope.allocator.blocks import Block, BlockPool, Segment
from fragscope.allocator.conf import Conf
from fragscope.allocator.counters import Meter
from fragscope.allocator.driver import Device
from fragscope.allocator.rules import Rules, TieBreak
from fragscope.allocator.sizes import SMALL_SIZE, TOO_LARGE, round_size, segment_size, should_split
from fragscope.trace import NO_ID, DecisionKind, DecisionLog

_ALLOC = DecisionKind.ALLOC
_FREE_REQUESTED = DecisionKind.FREE_REQUESTED
_FREE_COMPLETED = DecisionKind.FREE_COMPLETED
_DEFAULT_POOL = 0


class OutOfMemoryError(Exception):
    """The allocator gave up on a request; everything it could release is released.

    Attributes:
        requested: bytes asked for.
        rounded: bytes after rounding, as torch's trace entry reports.
        segment: bytes that were asked of the driver, as torch's message reports.
        stream: the stream asked for.
        free: the driver's free bytes after the releases.
    """

    def __init__(self, requested: int, rounded: int, segment: int, stream: int, free: int) -> None:
        super().__init__(f"out of memory: {requested} bytes")
        self.requested = requested
        self.rounded = rounded
        self.segment = segment
        self.stream = stream
        self.free = free


@dataclass(slots=True)
class DriverCalls:
    """How often the driver was called."""

    alloc: int = 0
    free: int = 0
    sync: int = 0


class CachingAllocator:
    """One device's caching allocator.

    Args:
        device: memory and addresses.
        rules: behaviour of one torch release.
        conf: settings; only those that ``parse_conf`` lets through.
        memory_fraction: per-process memory fraction set before the first request, or None.
        log: collects decisions; the caller sets ``log.request`` before each call.

    Attributes:
        meter: byte counters with peaks.
        calls: driver calls; ``sync`` counts waits for all streams.
        retries: requests that released everything cached before they could be served or failed.
        ooms: requests that failed.
        address_ties: choices between equal-size blocks that came down to where the driver put their segments.
    """

    def __init__(
        self,
        device: Device,
        rules: Rules,
        conf: Conf | None = None,
        memory_fraction: float | None = None,
        log: DecisionLog | None = None,
    ) -> None:
        self.device = device
        self.rules = rules
        self.conf = conf or Conf()
        self.log = log
        self.meter = Meter()
        self.calls = DriverCalls()
        self.retries = 0
        self.ooms = 0
        self.address_ties = 0
        self.segments: dict[int, Segment] = {}
        self._large = BlockPool(small=False)
        self._small = BlockPool(small=True)
        self._pending: dict[int, Block] = {}  # id -> block whose deferred free waits, in the order of the frees
        self._finished: dict[int, Block] = {}  # of those, whose streams are done, in that order
        self._tie_is_address = rules.tie_break is TieBreak.ADDRESS
        self._tie_is_block = rules.tie_break is TieBreak.BLOCK_ORDER
        self._created = 0
        self._segments_made = 0
        self.limit: int | None = None
        if memory_fraction is not None:
            self.set_memory_fraction(memory_fraction)

    # --- what programs call -------------------------------------------------------------------------------------

    def malloc(self, size: int, stream: int = 0, id: int = NO_ID) -> Block:
        """Serve a request of ``size`` bytes.

        Raises:
            OutOfMemoryError: after everything cached was released in vain.
        """
        if size >= TOO_LARGE:
            raise OutOfMemoryError(size, size, size, stream, self.device.free)
        if self._finished:
            self._process_events()
        rounded = round_size(size)
        pool = self._small if rounded <= SMALL_SIZE else self._large
        block = self._get_free_block(pool, rounded, stream)
        if block is None:
            block = self._alloc_block(pool, rounded, stream)
        if block is None:
            self._release_cached_blocks()
            self.retries += 1
            block = self._alloc_block(pool, rounded, stream)
        if block is None:
            self.ooms += 1
            free = self.device.free
            if self.log is not None:
                self.log.append(DecisionKind.OOM, id, free, rounded, stream, _DEFAULT_POOL)
            raise OutOfMemoryError(size, rounded, segment_size(rounded), stream, free)
        return self._hand_out(pool, block, rounded, size, id)

    def free(self, block: Block) -> None:
        """The program lets go of a block; if other streams use it, its free is deferred until they are done."""
        assert block.allocated
        block.allocated = False
        meter = self.meter
        meter.allocated -= block.size
        meter.requested -= block.requested
        if self.log is not None:
            self.log.append(_FREE_REQUESTED, block.id, block.addr, block.size, block.segment.stream, _DEFAULT_POOL)
        if block.uses:
            block.uses = None
            block.pending = True
            self._pending[block.id] = block
        else:
            self._free_block(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Another stream uses the block; uses on its own stream change nothing."""
        if stream != block.segment.stream:
            if block.uses is None:
                block.uses = set()
            block.uses.add(stream)

    def uses_done(self, id: int) -> None:
        """Other streams are done with a freed block; the next ``malloc`` will notice."""
        block = self._pending.get(id)
        if block is not None:
            self._finished.setdefault(id, block)

    def empty_cache(self) -> None:
        """Wait for all streams and return every wholly idle segment."""
        self._release_cached_blocks()

    def set_memory_fraction(self, fraction: float) -> None:
        """``set_per_process_memory_fraction``: a limit on reserved bytes as a share of the device's total memory."""
        if fraction >= 1.0 and not self.rules.limit_at_fraction_one:
            self.limit = None
            return
        exact = fraction * self.device.total
        self.limit = int(exact + 0.5) if self.rules.limit_rounds else int(exact)

    # --- the allocator's own steps ------------------------------------------------------------------------------

    def _process_events(self) -> None:
        """Complete the deferred frees whose streams are done; polled only when memory is asked for."""
        finished, self._finished = self._finished, {}
        for block in finished.values():
            del self._pending[block.id]
            block.pending = False
            self._free_block(block)

    def _get_free_block(self, pool: BlockPool, rounded: int, stream: int) -> Block | None:
        block = pool.smallest(stream, rounded)
        if block is not None:
            if self._tie_is_address and pool.depends_on_placement(block):
                self.address_ties += 1
            pool.remove(block)
        return block

    def _alloc_block(self, pool: BlockPool, rounded: int, stream: int) -> Block | None:
        """Take a new segment from the driver; None if the limit or the device does not allow it."""
        size = segment_size(rounded)
        if self.limit is not None and self.meter.reserved + size > self.limit:
            return None
        addr = self.device.malloc(size)
        if addr is None:
            return None
        segment = Segment(addr, size, stream, pool, self._segments_made)
        self._segments_made += 1
        self.segments[addr] = segment
        block = Block(segment, addr, size, 0 if self._tie_is_address else self._created)
        self._created += 1
        segment.first = block
        self.meter.reserve(size)
        self.calls.alloc += 1
        if self.log is not None:
            self.log.append(DecisionKind.SEGMENT_ALLOC, NO_ID, addr, size, stream, _DEFAULT_POOL)
        return block

    def _hand_out(self, pool: BlockPool, block: Block, rounded: int, requested: int, id: int) -> Block:
        """Split the block if the rest is worth keeping, and give the front to the program."""
        segment, meter = block.segment, self.meter
        was_split = block.is_split
        remaining = block.size - rounded
        if should_split(rounded, remaining):
            rest = block
            tie = rest.tie
            if self._tie_is_block:
                tie = self._created
                self._created += 1
            block = Block(segment, rest.addr, rounded, tie)
            block.prev, block.next = rest.prev, rest
            if rest.prev is not None:
                rest.prev.next = block
            else:
                segment.first = block
            rest.prev = block
            rest.addr += rounded
            rest.size = remaining
            pool.insert(rest)
            meter.split(-rounded if was_split else remaining)
        elif was_split:
            meter.split(-block.size)
        block.allocated = True
        block.requested = requested
        block.id = id
        meter.strand(-block.size if segment.active else segment.size - block.size)
        segment.active += block.size
        if self.log is not None:
            self.log.append(_ALLOC, id, block.addr, block.size, segment.stream, _DEFAULT_POOL)
        meter.handed_out(block.size, requested)
        return block

    def _free_block(self, block: Block) -> None:
        """Merge the block with idle neighbours and put it into its pool."""
        segment, meter = block.segment, self.meter
        if self.log is not None:
            self.log.append(_FREE_COMPLETED, block.id, block.addr, block.size, segment.stream, _DEFAULT_POOL)
        size, change = block.size, 0
        pool = segment.pool
        for neighbour in (block.prev, block.next):
            if neighbour is not None and not neighbour.allocated and not neighbour.pending:
                change -= neighbour.size
                pool.remove(neighbour)
                self._absorb(block, neighbour)
        pool.insert(block)
        if block.is_split:
            change += block.size
        meter.split(change)
        meter.active -= size
        segment.active -= size
        meter.strand(size if segment.active else size - segment.size)

    @staticmethod
    def _absorb(block: Block, neighbour: Block) -> None:
        """``block`` takes over ``neighbour``; the object of the block being freed survives."""
        if neighbour is block.prev:
            block.addr = neighbour.addr
            block.prev = neighbour.prev
            if block.prev is not None:
                block.prev.next = block
            else:
                block.segment.first = block
        else:
            block.next = neighbour.next
            if block.next is not None:
                block.next.prev = block
        block.size += neighbour.size

    def _release_cached_blocks(self) -> None:
        """Wait for all streams, complete every deferred free, return idle segments: large ones first, then small."""
        self.calls.sync += 1
        if self._pending:
            self._finished = {**self._finished, **self._pending}  # those already finished keep their place in front
            self._process_events()
        for pool in (self._large, self._small):
            for block in pool.whole_segments():
                pool.remove(block)
                self._release_segment(block)

    def _release_segment(self, block: Block) -> None:
        segment = block.segment
        if self.log is not None:
            self.log.append(DecisionKind.SEGMENT_FREE, NO_ID, segment.addr, segment.size, segment.stream, _DEFAULT_POOL)
        self.calls.free += 1
        del self.segments[segment.addr]
        self.meter.reserved -= segment.size
        self.meter.segments -= 1
        self.device.release(segment.addr, segment.size)

    # --- looking in ---------------------------------------------------------------------------------------------

    @property
    def releasable(self) -> int:
        """Bytes that ``empty_cache()`` would return now, not counting deferred frees it would wait for."""
        return self.meter.reserved - self.meter.active - self.meter.stranded

    def must_release(self, size: int, stream: int) -> bool:
        """Whether a request can be served neither from what is cached nor by a new segment as things stand."""
        rounded = round_size(size)
        pool = self._small if rounded <= SMALL_SIZE else self._large
        if pool.smallest(stream, rounded) is not None:
            return False
        needed = segment_size(rounded)
        return needed > self.device.free or (self.limit is not None and self.meter.reserved + needed > self.limit)

    def blocks(self, segment: Segment) -> list[Block]:
        """The segment's blocks in address order."""
        out = []
        block = segment.first
        while block is not None:
            out.append(block)
            block = block.next
        return out
