"""A slow, obvious implementation of the whole allocator, to hold the fast one and the real binaries against.

It shares nothing with the package but settings and rules. Functions carry the names that PyTorch gives them, so that
each can be read beside ``c10/cuda/CUDACachingAllocator.cpp``. Every list is a plain list, every search walks it.

Where PyTorch's order is that of a hash table, it is this: frees that complete together in the order in which they were
told done, then in order of the frees; pools of either kind in order of their becoming so. What PyTorch answers with an
internal error is an AssertionError.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from model import Entry, SegmentView

from fragscope.allocator import Conf, Rules, TieBreak
from fragscope.allocator.conf import UNLIMITED
from fragscope.units import MIB

MIN_BLOCK = 512  # every block is a multiple of this
SMALL = 1 * MIB  # rounded requests up to this come from the small pool
SMALL_BUFFER = 2 * MIB  # a segment of the small pool
MIN_LARGE_ALLOC = 10 * MIB  # from here on a segment is as large as its request
ROUND_LARGE = 2 * MIB
DRIVER_PAGE = 2 * MIB
FIRST_INTERVAL = MIB.bit_length() - 1  # the table of divisions begins at 1 MiB
STATS = (
    "allocation", "segment", "active", "inactive_split",
    "allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes", "requested_bytes",
)  # fmt: skip
COUNTERS = ("num_alloc_retries", "num_ooms", "num_sync_all_streams", "num_device_alloc", "num_device_free")


def round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(eq=False)
class Segment:
    """What one cudaMalloc returned. ``blocks`` cover it completely, in address order."""

    addr: int
    size: int
    stream: int
    pool: Pool
    number: int  # counts segments as they are made: the tie-break from 2.13 on
    blocks: list[Block] = field(default_factory=list)


@dataclass(eq=False)
class ExpandableSegment(Segment):
    """A reserved address range; its blocks are mapped or not, and mapped in whole pages of ``page`` bytes."""

    page: int = 0

    @property
    def has_memory(self) -> bool:
        return any(block.mapped for block in self.blocks)


@dataclass(eq=False)
class Block:
    segment: Segment
    addr: int
    size: int
    number: int  # counts objects as they are made: the tie-break of 2.12
    mapped: bool = True
    allocated: bool = False
    requested: int = 0
    stream_uses: set[int] = field(default_factory=set)
    scope_uses: set[int] = field(default_factory=set)  # of those, recorded while a scope was open
    has_events: bool = False
    age_base: int = 0

    @property
    def stream(self) -> int:
        return self.segment.stream

    @property
    def pool(self) -> Pool:
        return self.segment.pool

    @property
    def end(self) -> int:
        return self.addr + self.size

    @property
    def expandable(self) -> bool:
        return isinstance(self.segment, ExpandableSegment)

    @property
    def previous(self) -> Block | None:
        place = self.segment.blocks.index(self)
        return self.segment.blocks[place - 1] if place > 0 else None

    @property
    def next(self) -> Block | None:
        place = self.segment.blocks.index(self)
        return self.segment.blocks[place + 1] if place + 1 < len(self.segment.blocks) else None

    @property
    def is_split(self) -> bool:
        return len(self.segment.blocks) > 1

    @property
    def is_free(self) -> bool:
        """Neither allocated nor waiting for other streams; mapped or not."""
        return not self.allocated and not self.has_events and not self.stream_uses


@dataclass(eq=False)
class Pool:
    """The small or the large half of the default pool or of a private pool."""

    number: int  # 0: the default pool
    is_small: bool
    tie_break: TieBreak
    blocks: list[Block] = field(default_factory=list)  # free and mapped, in the order of the comparator
    unmapped: list[Block] = field(default_factory=list)  # by stream and address
    get_free_blocks_calls: int = 0  # the clock of garbage collection

    def comparator(self, block: Block) -> tuple[int, ...]:
        match self.tie_break:
            case TieBreak.ADDRESS:
                return (block.stream, block.size, block.addr)
            case TieBreak.BLOCK_ORDER:
                return (block.stream, block.size, block.number)
            case TieBreak.SEGMENT_ORDER:
                return (block.stream, block.size, block.segment.number, block.addr)

    def insert_into_blocks(self, block: Block) -> None:
        block.age_base = self.get_free_blocks_calls
        insort(self.blocks, block, key=self.comparator)

    def insert_into_unmapped(self, block: Block) -> None:
        insort(self.unmapped, block, key=lambda b: (b.stream, b.addr))

    def lower_bound(self, stream: int, size: int) -> int:
        """Place of the first block of that stream and at least that size, or where it would be."""
        return sum((block.stream, block.size) < (stream, size) for block in self.blocks)

    def age(self, block: Block) -> int:
        return self.get_free_blocks_calls - block.age_base


@dataclass(eq=False)
class PrivatePool:
    small: Pool
    large: Pool
    users: int = 1

    @property
    def halves(self) -> tuple[Pool, Pool]:
        return (self.small, self.large)


@dataclass
class Request:
    requested: int
    size: int  # rounded
    alloc_size: int  # of the segment that would be made for it
    stream: int
    pool: Pool
    expandable: bool
    rejected: bool = False  # by throw_on_cudamalloc_oom: no OOM is traced or counted


@dataclass
class Stat:
    current: int = 0
    peak: int = 0
    allocated: int = 0
    freed: int = 0

    def change(self, amount: int) -> None:
        self.current += amount
        self.peak = max(self.peak, self.current)
        self.allocated += max(amount, 0)
        self.freed += max(-amount, 0)

    def values(self) -> tuple[int, ...]:
        return (self.current, self.peak, self.allocated, self.freed)


class Driver:
    """Physical memory in pages of 2 MiB, and addresses: those given, else ever higher ones of its own."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.segment_addresses: list[int] = []
        self.map_addresses: list[int] = []
        self._next_segment = 0x7F00_0000_0000
        self._next_reservation = 0x6000_0000_0000

    @property
    def free_bytes(self) -> int:
        return self.capacity - self.used

    def take(self, size: int) -> bool:
        """Takes physical memory, if there is enough."""
        if round_up(size, DRIVER_PAGE) > self.free_bytes:
            return False
        self.used += round_up(size, DRIVER_PAGE)
        return True

    def give(self, size: int) -> None:
        self.used -= round_up(size, DRIVER_PAGE)

    def malloc(self, size: int) -> int | None:
        if not self.take(size):
            return None
        addr = self.segment_addresses.pop(0) if self.segment_addresses else self._next_segment
        self._next_segment = max(self._next_segment, round_up(addr + size, DRIVER_PAGE))
        return addr

    def reserve(self, size: int, reserved: list[ExpandableSegment]) -> int:
        """Where the next mapping will be, unless that is in a range that is there already: the new one waits then."""
        addr = self._next_reservation
        if self.map_addresses and not any(s.addr <= self.map_addresses[0] < s.addr + s.size for s in reserved):
            addr = self.map_addresses[0]
        self._next_reservation = max(self._next_reservation, round_up(addr + size, 1024 * MIB) + 1024 * MIB)
        return addr


class ObviousAllocator:
    """The caching allocator of one device; see ``model.Model``."""

    def __init__(self, total: int, capacity: int, rules: Rules, conf: Conf | None = None) -> None:
        self.total = total
        self.rules = rules
        self.conf = conf or Conf()
        self.driver = Driver(capacity)
        self.release = tuple(int(part) for part in rules.release.split("."))

        self.small_blocks = Pool(0, True, rules.tie_break)
        self.large_blocks = Pool(0, False, rules.tie_break)
        self.private_pools: dict[int, PrivatePool] = {}
        self.freeable_pools: list[int] = []  # without users
        self.use_on_oom_pools: list[int] = []
        self.no_split_pools: set[int] = set()
        self.scopes: list[int] = []  # pools of the open allocation scopes

        self.all_segments: list[Segment] = []
        self.segments_made = 0
        self.block_objects_made = 0
        self.total_allocated_memory = 0
        self.limit: int | None = None

        self.live: dict[int, Block] = {}
        self.deferred: dict[int, Block] = {}  # freed in a scope, no event recorded yet; in order of the frees
        self.pending: dict[int, Block] = {}  # freed, events recorded; in order of the frees
        self.told_done: list[int] = []  # in order of the uses_done calls

        self.entries: list[Entry] = []
        self.stat = {f"{name}.{kind}": Stat() for name in STATS for kind in ("all", "small", "large")}
        self.oversize_allocations = Stat()
        self.oversize_segments = Stat()
        self.counter = dict.fromkeys(COUNTERS, 0)
        if self.conf.per_process_memory_fraction != 1.0:
            self.set_memory_fraction(self.conf.per_process_memory_fraction)

    # --- what the program does

    def give_addresses(self, segments: Sequence[tuple[int, int]], maps: Sequence[int]) -> None:
        self.driver.segment_addresses = [addr for addr, _ in segments]
        self.driver.map_addresses = list(maps)

    def malloc(self, id: int, size: int, stream: int, pool: int) -> bool:
        if not self.in_capture():
            self.process_events()
        rounded = self.round_size(size)
        request = Request(
            size, rounded, self.get_allocation_size(rounded), stream, self.get_pool(pool, rounded),
            self.conf.expandable_segments,
        )  # fmt: skip
        block = self.find_block(request)
        if block is None and request.rejected:
            return False
        if block is None:
            self.trace("oom", self.driver.free_bytes, request.size, stream, request.pool)
            self.counter["num_ooms"] += 1
            return False
        self.live[id] = self.alloc_found_block(block, request, self.should_split(block, request))
        return True

    def free(self, id: int) -> None:
        block = self.live.pop(id)
        block.allocated = False
        self.change("allocation", block.pool, -1)
        self.change("allocated_bytes", block.pool, -block.size)
        self.trace("free_requested", block.addr, block.requested, block.stream, block.pool)
        if block.size >= self.conf.max_split_size:
            self.oversize_allocations.change(-1)
        if not block.stream_uses:
            self.free_block(block)
        elif self.in_capture():
            self.deferred[id] = block
        else:
            self.insert_events(id, block)

    def record_stream(self, id: int, stream: int) -> None:
        block = self.live[id]
        if stream == block.stream:
            return
        block.stream_uses.add(stream)
        if self.in_capture():
            block.scope_uses.add(stream)

    def uses_done(self, id: int) -> None:
        if id in {**self.deferred, **self.pending} and id not in self.told_done:
            self.told_done.append(id)

    def empty_cache(self, pool: int = 0) -> None:
        self.release_cached_blocks(pool)

    def set_memory_fraction(self, fraction: float) -> None:
        if fraction < 1.0 or self.rules.limit_at_fraction_one:
            self.limit = int(fraction * self.total + (0.5 if self.rules.limit_rounds else 0.0))
        else:
            self.limit = None

    def set_conf(self, conf: Conf) -> None:
        self.conf = conf  # the limit stays: per_process_memory_fraction is read when the allocator begins

    def create_pool(self, pool: int, use_on_oom: bool, no_split: bool) -> None:
        self.create_or_incref_pool(pool)
        if use_on_oom and pool not in self.use_on_oom_pools:
            self.use_on_oom_pools.append(pool)
        if no_split:
            self.no_split_pools.add(pool)

    def begin_pool(self, pool: int) -> None:
        assert pool not in self.scopes, "PyTorch refuses to open a scope of a pool twice"
        self.create_or_incref_pool(pool)
        self.scopes.append(pool)

    def end_pool(self, pool: int) -> None:
        if self.conf.graph_capture_record_stream_reuse and self.release >= (2, 12):
            self.insert_events_deferred_until_no_capture(self.private_pools[pool])
        self.scopes.remove(pool)

    def release_pool(self, pool: int) -> None:
        private = self.private_pools[pool]
        private.users -= 1
        if private.users == 0:
            self.freeable_pools.append(pool)

    def create_or_incref_pool(self, pool: int) -> None:
        tie_break = self.rules.tie_break
        if pool not in self.private_pools:
            self.private_pools[pool] = PrivatePool(Pool(pool, True, tie_break), Pool(pool, False, tie_break))
        else:
            assert self.private_pools[pool].users > 0, "PyTorch refuses to use a released pool"
            self.private_pools[pool].users += 1

    # --- what the outside sees

    def take_entries(self) -> list[Entry]:
        taken, self.entries = self.entries, []
        return taken

    def stats(self) -> dict[str, tuple[int, ...]]:
        stats = {name: stat.values() for name, stat in self.stat.items()}
        stats["oversize_allocations"] = self.oversize_allocations.values()
        stats["oversize_segments"] = self.oversize_segments.values()
        return stats | {name: (value,) for name, value in self.counter.items()}

    def segments(self) -> list[SegmentView]:
        views = []
        for segment in sorted(self.all_segments, key=lambda s: s.addr):
            mapped: list[Block] = []
            for block in [*segment.blocks, None]:
                if block is not None and block.mapped:
                    mapped.append(block)
                elif mapped:
                    views.append(self.view(mapped))
                    mapped = []
        return views

    def view(self, blocks: list[Block]) -> SegmentView:
        first = blocks[0]
        return SegmentView(
            first.addr,
            blocks[-1].end - first.addr,
            first.stream,
            first.pool.number,
            first.expandable,
            tuple((b.addr, b.size, "allocated" if b.allocated else "free" if b.is_free else "pending") for b in blocks),
        )

    def trace(self, action: str, addr: int, size: int, stream: int, pool: Pool) -> None:
        self.entries.append(Entry(action, addr, size, stream, pool.number))

    def change(self, name: str, pool: Pool, amount: int) -> None:
        self.stat[f"{name}.all"].change(amount)
        self.stat[f"{name}.{'small' if pool.is_small else 'large'}"].change(amount)

    # --- sizes

    def round_size(self, size: int) -> int:
        if size < MIN_BLOCK:
            return MIN_BLOCK
        divisions = self.divisions(size)
        if divisions > 1 and size > MIN_BLOCK * divisions:
            return self.round_up_to_division(size, divisions)
        return round_up(size, MIN_BLOCK)

    def divisions(self, size: int) -> int:
        table = self.conf.roundup_power2_divisions
        interval = size.bit_length() - 1 - FIRST_INTERVAL
        return table[min(max(interval, 0), len(table) - 1)]

    def round_up_to_division(self, size: int, divisions: int) -> int:
        power = 1 << (size.bit_length() - 1)  # the largest not above size
        if size == power:
            return size
        step = power >> (divisions.bit_length() - 1)
        return 2 * power if step == 0 else round_up(size, step)

    def get_allocation_size(self, rounded: int) -> int:
        if rounded <= SMALL:
            return SMALL_BUFFER
        if rounded < MIN_LARGE_ALLOC:
            return self.conf.large_segment_size
        return round_up(rounded, ROUND_LARGE)

    # --- malloc

    def in_capture(self) -> bool:
        """Up to 2.12 every open scope counts as a capture; real ones never happen here."""
        return self.release <= (2, 12) and bool(self.scopes)

    def collects_garbage(self) -> bool:
        return self.limit is not None and self.conf.garbage_collection_threshold > 0

    def get_pool(self, number: int, rounded: int) -> Pool:
        if number == 0:
            return self.small_blocks if rounded <= SMALL else self.large_blocks
        private = self.private_pools[number]
        return private.small if rounded <= SMALL else private.large

    def find_block(self, request: Request) -> Block | None:
        """Ever more expensive ways to serve a request. Up to 2.10 use-on-oom pools come last."""
        block = self.get_free_block(request)
        if block is not None:
            return block
        if self.collects_garbage():
            self.garbage_collect_cached_blocks()
        block = self.alloc_block(request, is_retry=False)
        if block is not None or request.rejected:
            return block
        if self.release <= (2, 10):
            return self.release_and_alloc_block(request) or self.try_mempool_fallback(request)
        return self.try_mempool_fallback(request) or self.release_and_alloc_block(request)

    def release_and_alloc_block(self, request: Request) -> Block | None:
        block = None
        if self.release_available_cached_blocks(request):
            block = self.alloc_block(request, is_retry=False)
        if block is None and not self.in_capture():
            self.release_cached_blocks(0)
            block = self.alloc_block(request, is_retry=True)
        return block

    def get_free_block(self, request: Request) -> Block | None:
        pool = request.pool
        if self.collects_garbage():
            pool.get_free_blocks_calls += 1
        candidates = [b for b in pool.blocks if b.stream == request.stream and b.size >= request.size]
        if not candidates:
            return None
        if not candidates[0].expandable:
            block = candidates[0]
        elif request.expandable:
            block = self.least_expandable(candidates)
        else:
            ordinary = [b for b in candidates if not b.expandable]
            if not ordinary:
                return None
            block = ordinary[0]
        # Only this one candidate is held against the rules for oversize blocks.
        limit = self.conf.max_split_size
        if request.size < limit <= block.size:
            return None
        if request.size >= limit and block.size >= request.size + self.conf.max_non_split_rounding:
            return None
        pool.blocks.remove(block)
        return block

    def least_expandable(self, candidates: list[Block]) -> Block:
        """Walks on while the next block could grow to less; an ordinary block ends the walk."""
        block = candidates[0]
        for following in candidates[1:]:
            if not block.expandable or self.expandable_size(following) >= self.expandable_size(block):
                break
            block = following
        return block

    def expandable_size(self, block: Block) -> int:
        following = block.next
        return block.size + (following.size if following is not None and not following.mapped else 0)

    def should_split(self, block: Block, request: Request) -> bool:
        if block.pool.number in self.no_split_pools:
            return False
        remaining = block.size - request.size
        if block.pool.is_small or request.expandable:
            return remaining >= MIN_BLOCK
        return request.size < self.conf.max_split_size and remaining > SMALL

    def alloc_found_block(self, block: Block, request: Request, split: bool) -> Block:
        pool = block.pool
        already_split = block.is_split
        if split:
            rest = block  # the object that was there stays the tail
            block = self.new_block(rest.segment, rest.addr, request.size)
            rest.segment.blocks.insert(rest.segment.blocks.index(rest), block)
            rest.addr += request.size
            rest.size -= request.size
            pool.insert_into_blocks(rest)
            if not block.expandable:
                if already_split:
                    self.change("inactive_split_bytes", pool, -block.size)
                else:
                    self.change("inactive_split_bytes", pool, rest.size)
                    self.change("inactive_split", pool, 1)
        elif already_split and not block.expandable:
            self.change("inactive_split_bytes", pool, -block.size)
            self.change("inactive_split", pool, -1)
        block.allocated = True
        block.requested = request.requested
        self.trace("alloc", block.addr, block.requested, block.stream, pool)
        self.change("allocation", pool, 1)
        self.change("allocated_bytes", pool, block.size)
        self.change("active", pool, 1)
        self.change("active_bytes", pool, block.size)
        self.change("requested_bytes", pool, block.requested)
        if block.size >= self.conf.max_split_size:
            self.oversize_allocations.change(1)
        return block

    def new_block(self, segment: Segment, addr: int, size: int, mapped: bool = True) -> Block:
        self.block_objects_made += 1
        return Block(segment, addr, size, self.block_objects_made, mapped)

    def try_mempool_fallback(self, request: Request) -> Block | None:
        """Idle blocks of pools with use_on_oom, by ordinary rules."""
        if request.pool.number != 0:
            return None
        for number in self.use_on_oom_pools:
            self.begin_pool(number)
            inside = Request(
                request.requested, request.size, request.alloc_size, request.stream,
                self.get_pool(number, request.size), expandable=False,
            )  # fmt: skip
            block = self.get_free_block(inside)
            self.end_pool(number)
            self.release_pool(number)
            if block is not None:
                request.expandable = False  # as should_split sees it
                return block
        return None

    # --- free

    def free_block(self, block: Block) -> None:
        pool, original_size = block.pool, block.size
        self.trace("free_completed", block.addr, block.requested, block.stream, pool)
        splits = split_bytes = 0
        for neighbour in (block.previous, block.next):
            absorbed = self.try_merge_blocks(block, neighbour)
            if absorbed:
                splits -= 1
                split_bytes -= absorbed
        pool.insert_into_blocks(block)
        if block.is_split:
            splits += 1
            split_bytes += block.size
        if not block.expandable:
            self.change("inactive_split", pool, splits)
            self.change("inactive_split_bytes", pool, split_bytes)
        self.change("active", pool, -1)
        self.change("active_bytes", pool, -original_size)
        self.change("requested_bytes", pool, -block.requested)

    def try_merge_blocks(self, block: Block, neighbour: Block | None) -> int:
        """The bytes absorbed; the neighbour's object is gone then."""
        if neighbour is None or not neighbour.is_free or neighbour.mapped != block.mapped:
            return 0
        (block.pool.blocks if neighbour.mapped else block.pool.unmapped).remove(neighbour)
        block.segment.blocks.remove(neighbour)
        block.addr = min(block.addr, neighbour.addr)
        block.size += neighbour.size
        return neighbour.size

    # --- frees that wait for other streams

    def insert_events(self, id: int, block: Block) -> None:
        block.stream_uses = set()
        block.has_events = True
        self.pending[id] = block

    def insert_events_deferred_until_no_capture(self, only: PrivatePool | None = None) -> None:
        for id in self.told_first(self.deferred, only):
            block = self.deferred.pop(id)
            if block.stream_uses <= block.scope_uses:  # uses recorded in the scope are taken to be over
                block.stream_uses = set()
                self.forget(id)
                self.free_block(block)
            else:
                self.insert_events(id, block)
            block.scope_uses = set()

    def process_events(self) -> None:
        self.insert_events_deferred_until_no_capture()
        for id in list(self.told_done):
            self.complete(id)

    def synchronize_and_free_events(self, only: PrivatePool | None = None) -> None:
        assert not self.in_capture(), "PyTorch refuses to wait for streams during a capture"
        self.counter["num_sync_all_streams"] += 1
        self.insert_events_deferred_until_no_capture()
        for id in self.told_first(self.pending, only):
            self.complete(id)

    def told_first(self, waiting: dict[int, Block], only: PrivatePool | None) -> list[int]:
        """Ids in the order in which they complete; of one pool only, where one is given."""
        told = [id for id in self.told_done if id in waiting]
        ids = told + [id for id in waiting if id not in told]
        return [id for id in ids if only is None or waiting[id].pool in only.halves]

    def complete(self, id: int) -> None:
        block = self.pending.pop(id)
        block.has_events = False
        self.forget(id)
        self.free_block(block)

    def forget(self, id: int) -> None:
        if id in self.told_done:
            self.told_done.remove(id)

    # --- getting memory

    def alloc_block(self, request: Request, is_retry: bool) -> Block | None:
        if is_retry:
            self.counter["num_alloc_retries"] += 1
        wanted = self.total_allocated_memory + request.alloc_size
        if self.limit is not None and wanted > self.limit:
            return None
        if self.conf.throw_on_cudamalloc_oom and wanted > int(self.conf.per_process_memory_fraction * self.total):
            request.rejected = True
            return None
        if request.expandable:
            return self.try_allocate_expandable_block(request)
        addr = self.driver.malloc(request.alloc_size)
        if addr is None:
            return None
        size, pool = request.alloc_size, request.pool
        self.segments_made += 1
        segment = Segment(addr, size, request.stream, pool, self.segments_made)
        segment.blocks = [self.new_block(segment, addr, size)]
        self.all_segments.append(segment)
        self.total_allocated_memory += size
        self.change("segment", pool, 1)
        self.change("reserved_bytes", pool, size)
        if size >= self.conf.max_split_size:
            self.oversize_segments.change(1)
        self.counter["num_device_alloc"] += 1
        self.trace("segment_alloc", addr, size, request.stream, pool)
        return segment.blocks[0]

    def try_allocate_expandable_block(self, request: Request) -> Block | None:
        block = self.find_expandable_block(request)
        if not block.mapped and not self.map_block(block, min(block.size, request.size)):
            return None
        while block.size < request.size:
            following = block.next
            assert following is not None and not following.mapped
            # What was mapped so far stays, as cached memory, where the rest cannot be mapped.
            if not self.map_block(following, min(request.size - block.size, following.size)):
                return None
            block = following  # it absorbed the block
        request.pool.blocks.remove(block)
        return block

    def find_expandable_block(self, request: Request) -> Block:
        for unmapped in request.pool.unmapped:
            if unmapped.stream != request.stream:
                continue
            before = unmapped.previous
            first = before if before is not None and before.is_free else unmapped
            if self.available_address_space(first) >= request.size:
                return first
        return self.new_expandable_segment(request)

    def available_address_space(self, first: Block) -> int:
        blocks = first.segment.blocks
        size = 0
        for block in blocks[blocks.index(first) :]:
            if not block.is_free:
                break
            size += block.size
        return size

    def new_expandable_segment(self, request: Request) -> Block:
        page = SMALL_BUFFER if request.pool.is_small else self.conf.large_segment_size
        size = round_up(self.total + self.total // 8, page)
        self.segments_made += 1
        addr = self.driver.reserve(size, [s for s in self.all_segments if isinstance(s, ExpandableSegment)])
        segment = ExpandableSegment(addr, size, request.stream, request.pool, self.segments_made, page=page)
        segment.blocks = [self.new_block(segment, addr, size, mapped=False)]
        self.all_segments.append(segment)
        request.pool.insert_into_unmapped(segment.blocks[0])
        return segment.blocks[0]

    def map_block(self, block: Block, size: int) -> bool:
        segment, pool = block.segment, block.pool
        assert isinstance(segment, ExpandableSegment)
        size = round_up(size, segment.page)
        page_cost = round_up(segment.page, DRIVER_PAGE)
        if not self.driver.take(size // segment.page * page_cost):
            return False
        pool.unmapped.remove(block)
        if self.driver.map_addresses:
            self.place(segment, self.driver.map_addresses.pop(0))
        block.mapped = True
        addr = block.addr
        if size < block.size:
            rest = self.new_block(segment, addr + size, block.size - size, mapped=False)
            segment.blocks.insert(segment.blocks.index(block) + 1, rest)
            block.size = size
            pool.insert_into_unmapped(rest)
        for neighbour in (block.previous, block.next):
            self.try_merge_blocks(block, neighbour)
        pool.insert_into_blocks(block)
        self.total_allocated_memory += size
        self.change("reserved_bytes", pool, size)
        self.counter["num_device_alloc"] += 1
        self.trace("segment_map", addr, size, block.stream, pool)
        return True

    def place(self, segment: ExpandableSegment, addr: int) -> None:
        """Where a reservation lies shows with its first mapping, which may be long after it was made."""
        if not segment.has_memory:
            (only,) = segment.blocks
            segment.addr = only.addr = addr

    # --- returning memory

    def release_block(self, block: Block) -> None:
        assert not block.is_split, "PyTorch would hand a part of a segment to cudaFree"
        size, pool = block.size, block.pool
        self.counter["num_device_free"] += 1
        self.trace("segment_free", block.addr, size, block.stream, pool)
        self.driver.give(size)
        self.total_allocated_memory -= size
        self.change("segment", pool, -1)
        self.change("reserved_bytes", pool, -size)
        if size >= self.conf.max_split_size:
            self.oversize_segments.change(-1)
        pool.blocks.remove(block)
        self.all_segments.remove(block.segment)

    def unmap_block(self, block: Block) -> None:
        segment, pool = block.segment, block.pool
        assert isinstance(segment, ExpandableSegment)
        start = segment.addr + round_up(block.addr - segment.addr, segment.page)
        end = segment.addr + (block.end - segment.addr) // segment.page * segment.page
        if start >= end:
            return  # it holds no whole page
        size = end - start
        self.driver.give(size // segment.page * round_up(segment.page, DRIVER_PAGE))
        pool.blocks.remove(block)
        place = segment.blocks.index(block)
        if start > block.addr:
            before = self.new_block(segment, block.addr, start - block.addr)
            segment.blocks.insert(place, before)
            pool.insert_into_blocks(before)
            place += 1
        if end < block.end:
            after = self.new_block(segment, end, block.end - end)
            segment.blocks.insert(place + 1, after)
            pool.insert_into_blocks(after)
        block.addr, block.size, block.mapped = start, size, False
        for neighbour in (block.previous, block.next):
            self.try_merge_blocks(block, neighbour)
        pool.insert_into_unmapped(block)
        self.total_allocated_memory -= size
        self.change("reserved_bytes", pool, -size)
        self.counter["num_device_free"] += 1
        self.trace("segment_unmap", start, size, block.stream, pool)

    def release_blocks(self, pool: Pool) -> None:
        """All that is idle: whole segments at once, then whole pages of expandable ones."""
        idle = list(pool.blocks)
        for block in idle:
            if not block.expandable and not block.is_split:
                self.release_block(block)
        for block in idle:
            if block.expandable:
                self.unmap_block(block)
                if not block.is_split:  # nothing is mapped any more: the reservation is returned
                    pool.unmapped.remove(block)
                    self.all_segments.remove(block.segment)

    def release_cached_blocks(self, number: int) -> None:
        if number == 0 and not self.in_capture():
            self.synchronize_and_free_events()
            self.release_blocks(self.large_blocks)
            self.release_blocks(self.small_blocks)
        for freeable in list(self.freeable_pools):
            if number not in (0, freeable):
                continue
            private = self.private_pools[freeable]
            if number != 0:
                self.synchronize_and_free_events(private)
            self.release_blocks(private.small)
            self.release_blocks(private.large)
            if not self.holds_memory(private):
                self.freeable_pools.remove(freeable)
                del self.private_pools[freeable]
                # What may be left are reservations without any mapping.
                self.all_segments = [segment for segment in self.all_segments if segment.pool not in private.halves]

    def holds_memory(self, private: PrivatePool) -> bool:
        """PyTorch counts calls here, and miscounts those of expandable segments."""
        return any(
            segment.pool in private.halves and (not isinstance(segment, ExpandableSegment) or segment.has_memory)
            for segment in self.all_segments
        )

    def release_available_cached_blocks(self, request: Request) -> bool:
        """Oversize segments of the request's pool and stream: the smallest that is enough, else the largest ones."""
        limit = self.conf.max_split_size
        if limit == UNLIMITED:
            return False
        blocks = request.pool.blocks
        needed = max(request.size, limit)
        place = request.pool.lower_bound(request.stream, needed)
        if place < len(blocks) and blocks[place].stream == request.stream and not blocks[place].expandable:
            self.release_block(blocks[place])
            return True
        released = 0
        for block in reversed(blocks[:place]):
            if released >= needed or block.size < limit or block.stream != request.stream:
                break
            if not block.expandable:
                released += block.size
                self.release_block(block)
        return released >= needed

    def garbage_collect_cached_blocks(self) -> None:
        """Idle segments of the default pool that are at least as old as the average, until the share is kept."""
        assert self.limit is not None
        allowed = int(self.conf.garbage_collection_threshold * self.limit)
        excess = self.total_allocated_memory - allowed
        if excess <= 0:
            return
        pool = self.large_blocks
        idle = [block for block in pool.blocks if not block.is_split]
        total_age, count = sum(pool.age(block) for block in idle), len(idle)
        reclaimed, something_freed = 0, True
        while reclaimed < excess and something_freed and count > 0:
            threshold = total_age / count  # fixed for one pass
            something_freed = False
            for block in list(pool.blocks):
                if not block.is_split and not block.expandable and pool.age(block) >= threshold:
                    something_freed = True
                    reclaimed += block.size
                    total_age -= pool.age(block)
                    count -= 1
                    self.release_block(block)
