"""The model of PyTorch's CUDA caching allocator (backend ``native``): one device's allocator, asked request by request.

What it does is written in ``engine``; here its settings are set, its tables grown, and its state read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fragscope.allocator.conf import Conf
from fragscope.allocator.counters import Counters, PeakWatch, counters_now, segments_now, statistics
from fragscope.allocator.engine import decide as loop
from fragscope.allocator.engine import driver, free_lists, raw, requests, tables
from fragscope.allocator.engine import state as field
from fragscope.allocator.engine.compiled import compiled_decide
from fragscope.allocator.engine.kinds import REQUEST_EMPTY_CACHE
from fragscope.allocator.engine.restore import restore
from fragscope.allocator.engine.sizes import SMALL_SIZE, TOO_LARGE, round_size, segment_size
from fragscope.allocator.engine.tables import Saved
from fragscope.allocator.ranges import AddressRange
from fragscope.allocator.rules import Rules, TieBreak
from fragscope.trace import DECISION_DTYPES, BlockState, Decisions, SegmentState

_TIES = {
    TieBreak.ADDRESS: field.BY_ADDRESS,
    TieBreak.BLOCK_ORDER: field.BY_BLOCK,
    TieBreak.SEGMENT_ORDER: field.BY_SEGMENT,
}
_STATES: dict[int, BlockState] = {
    field.IDLE: "free",
    field.ALLOCATED: "allocated",
    field.WAITING: "pending",
    field.DEFERRED: "pending",
}


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


@dataclass(frozen=True, slots=True)
class DriverCalls:
    """How often the driver was called.

    Attributes:
        alloc: segments taken, and mappings into expandable segments.
        free: segments returned, and unmappings.
        sync: waits for all streams.
    """

    alloc: int = 0
    free: int = 0
    sync: int = 0

    def __sub__(self, other: DriverCalls) -> DriverCalls:
        return DriverCalls(self.alloc - other.alloc, self.free - other.free, self.sync - other.sync)


@dataclass(frozen=True, slots=True)
class BlockView:
    """A block that the program holds, or whose free waits for other streams; bytes."""

    addr: int
    size: int
    requested: int
    stream: int


class CachingAllocator:
    """One device's caching allocator. Allocations are named by the caller's ids: 0, 1, 2, ...

    Args:
        total: bytes of device memory in all; memory fractions refer to it.
        capacity: bytes that segments may take together: what is free once the context stands.
        rules: behaviour of one torch release.
        conf: settings at the start.
        memory_fraction: per-process memory fraction set before the first request, or None.
        compiled: run the compiled loop; needs numba. Then requests are served by ``decide`` only.
        logging: keep every decision and all of torch's statistics; without it only fragscope's own counters are kept.

    Attributes:
        conf: settings in force.
        row: row of the request being served, for the decisions made about it.
        program_peaks: peaks since the program itself reset them.
    """

    def __init__(
        self,
        total: int,
        capacity: int,
        rules: Rules,
        conf: Conf | None = None,
        memory_fraction: float | None = None,
        *,
        compiled: bool = False,
        logging: bool = True,
    ) -> None:
        self.rules = rules
        self._s = tables.new_state(total, capacity, compiled=compiled)
        self._decide: Callable[..., int] = compiled_decide() if compiled else loop.decide
        n = self._s.n
        n[field.TIE_BREAK] = _TIES[rules.tie_break]
        n[field.SCOPES_COUNT] = int(rules.scopes_defer)
        n[field.LENDS_FIRST] = int(rules.lends_first)
        n[field.LOGGING] = n[field.STATISTICS] = int(logging)
        self._watches: list[PeakWatch] = []
        self.program_peaks = PeakWatch(self._watches, self._s)
        self.conf = conf or Conf()
        self.set_conf(self.conf)
        if self.conf.per_process_memory_fraction != 1.0:
            self.set_memory_fraction(self.conf.per_process_memory_fraction)
        if memory_fraction is not None:
            self.set_memory_fraction(memory_fraction)

    # --- settings -----------------------------------------------------------------------------------------------

    def set_conf(self, conf: Conf) -> None:
        """``torch.cuda.memory._set_allocator_settings``: these settings hold from now on."""
        self.conf = conf
        n, f = self._s.n, self._s.f
        n[field.MAX_SPLIT] = conf.max_split_size
        n[field.NON_SPLIT_ROUNDING] = conf.max_non_split_rounding
        n[field.LARGE_SEGMENT] = conf.large_segment_size
        n[field.EXPANDABLE] = int(conf.expandable_segments)
        n[field.THROW] = int(conf.throw_on_cudamalloc_oom)
        n[field.REFUSE_ABOVE] = int(conf.per_process_memory_fraction * int(n[field.TOTAL]))
        for slot, divisions in enumerate(conf.roundup_power2_divisions):
            n[field.DIVISIONS + slot] = divisions
        f[field.GC_THRESHOLD] = conf.garbage_collection_threshold

    def set_memory_fraction(self, fraction: float) -> None:
        """``set_per_process_memory_fraction``: a limit on reserved bytes as a share of the device's total memory."""
        n = self._s.n
        if fraction >= 1.0 and not self.rules.limit_at_fraction_one:
            n[field.LIMIT] = field.NONE
            return
        exact = fraction * int(n[field.TOTAL])
        n[field.LIMIT] = int(exact + 0.5) if self.rules.limit_rounds else int(exact)

    def set_limit(self, limit: int | None) -> None:
        """A limit on reserved bytes, however it came about."""
        self._s.n[field.LIMIT] = field.NONE if limit is None else limit

    def begin_process(self, base: int, move_at: int) -> None:
        """Before any request: what the process holds of the driver's address space; see ``engine.driver``."""
        driver.begin_process(self._s, base, move_at)

    def give_addresses(self, segments: Sequence[tuple[int, int]], maps: Sequence[int] = ()) -> None:
        """Where the driver puts what comes next, as long as the same is asked for in the same order.

        Args:
            segments: address and bytes of each segment.
            maps: address of each mapping; a new expandable segment begins where the next one is made.
        """
        self._s = tables.with_given(self._s, segments, maps)

    # --- what programs call -------------------------------------------------------------------------------------

    def malloc(self, id: int, size: int, stream: int = 0, pool: int = 0) -> int:
        """Serve a request of ``size`` bytes and return its address.

        Raises:
            OutOfMemoryError: after everything cached was released in vain, or at once with
                ``throw_on_cudamalloc_oom``.
        """
        if pool >= self._s.n[field.POOLS]:
            self._s = tables.with_pools(self._s, pool + 1)
        self._make_room(id)
        s = self._s
        if requests.malloc(s, id, size, stream, pool) != requests.SERVED:
            rounded = int(s.n[field.FAILED_SIZE])
            asked = rounded if size >= TOO_LARGE else segment_size(s, rounded)
            raise OutOfMemoryError(size, rounded, asked, stream, self.free_memory)
        return int(s.t[field.ADDR][s.where[id]])

    def free(self, id: int) -> None:
        """The program lets go of a block; if other streams use it, its free is deferred until they are done."""
        self._make_room(0)
        if self._knows(id):
            requests.free(self._s, id)
        else:
            self._s.n[field.LOST_FREES] += 1

    def record_stream(self, id: int, stream: int) -> None:
        """Another stream uses the block; uses on its own stream change nothing."""
        self._make_room(0)
        if self._knows(id):
            requests.record_stream(self._s, id, stream)

    def uses_done(self, id: int) -> None:
        """Other streams are done with a freed block; the next ``malloc`` will notice."""
        if self._knows(id):
            requests.uses_done(self._s, id)

    def take_raw(self, id: int, size: int) -> None:
        """The program takes ``size`` bytes of device memory past the allocator, in the driver's pages.

        Raises:
            OutOfMemoryError: the driver has too little; what is cached stays.
        """
        self._make_room(id)
        if not raw.take_raw(self._s, id, size):
            raise OutOfMemoryError(size, size, size, 0, self.free_memory)

    def give_raw(self, id: int, size: int) -> None:
        """The program gives the ``size`` bytes of ``take_raw`` back."""
        raw.give_raw(self._s, id, size)

    def empty_cache(self, pool: int = 0) -> None:
        """Wait for all streams and return what is idle; with a private pool, only of that one if it is released."""
        self._make_room(0)
        s = self._s
        if isinstance(s.n, list):
            requests.release_cached(s, pool)
            return
        row, start = self.row, self.decided
        nothing = np.zeros(1, dtype=np.int64)
        self._decide(s, nothing + REQUEST_EMPTY_CACHE, nothing, nothing, nothing, nothing + pool, 0, 1)
        s.d[field.LOG_REQUEST][start : self.decided] = self.row = row

    def create_pool(self, pool: int, *, use_on_oom: bool = False, no_split: bool = False) -> None:
        """``MemPool(...)``: a private pool with one user, or one user more; it stays what it was made as."""
        self._s = tables.with_pools(self._s, pool + 1)
        requests.create_pool(self._s, pool)
        if use_on_oom:
            self._s.t[field.ON_OOM][pool] = 1
        if no_split:
            self._s.t[field.NO_SPLIT][pool] = 1

    def open_scope(self, pool: int) -> None:
        """``beginAllocateToPool``; which pool a request goes to is the caller's to say."""
        self._s = tables.with_pools(self._s, pool + 1)
        requests.open_scope(self._s, pool)

    def close_scope(self) -> None:
        """``endAllocateToPool``."""
        requests.close_scope(self._s)

    def begin_capture(self) -> None:
        """A stream is being captured into a CUDA graph."""
        self._s.n[field.CAPTURES] += 1

    def end_capture(self) -> None:
        """It no longer is."""
        self._s.n[field.CAPTURES] -= 1

    def release_pool(self, pool: int) -> None:
        """``releasePool``: one user less; without users the pool's idle memory can be returned."""
        requests.release_pool(self._s, pool)

    def restore(
        self, segments: Sequence[SegmentState], held: Sequence[tuple[int, int, int]], ranges: Sequence[AddressRange]
    ) -> None:
        """Hold what a recording began with, before any request; see ``engine.restore``."""
        blocks = sum(len(s.blocks) + 2 for s in segments)
        pools = max((s.pool for s in segments), default=0) + 1
        self._s = tables.with_pools(self._s, pools)
        while self._s.n[field.SPARE_BLOCKS] < 3 * blocks + loop.HEADROOM:
            self._s = tables.grow(self._s)
        while self._s.n[field.LOG_ROOM] < 3 * blocks + loop.HEADROOM:
            self._s = tables.grow_log(self._s)
        restore(self._s, segments, held, ranges)

    # --- many requests at once ----------------------------------------------------------------------------------

    def prepare(self, allocations: int, pools: int) -> None:
        """Room for ids below ``allocations`` and pools below ``pools``."""
        missing = allocations - len(self._s.where)
        if missing > 0:
            self._widen_where(missing)
        self._s = tables.with_pools(self._s, pools)

    def decide(self, columns: tuple[Any, Any, Any, Any, Any], start: int, stop: int) -> int:
        """Serve rows of requests until one needs the caller; see ``engine.decide``.

        Args:
            columns: kind, id, size, stream and pool, as lists, or as arrays for the compiled loop.
            start: first row.
            stop: row after the last.
        """
        row = self._decide(self._s, *columns, start, stop)
        while row < stop and loop.is_full(self._s):
            self._grow()
            row = self._decide(self._s, *columns, row, stop)
        return row

    def saved(self, id: int) -> Saved:
        """What releases and one request for ``id`` will change, for ``exchange``."""
        n, t = self._s.n, self._s.t
        ids = {id}
        block = n[field.FIRST_WAITING]
        while block >= 0:  # others that can end to live meanwhile
            ids.add(int(t[field.ID][block]))
            block = t[field.WAIT_NEXT][block]
        return tables.saved(self._s, ids, self.decided)

    def exchange(self, other: Saved) -> Saved:
        """Be as it was when that was saved, or would have become from there on; returns how it is now."""
        now = tables.saved(self._s, other.where, other.start)
        tables.restore(self._s, other)
        return now

    def trust_addresses(self) -> None:
        """The addresses given are a driver's own: choices by them count as ties only from the first other one on."""
        self._s.n[field.COUNT_TIES] = 0

    def stop_at_oom(self) -> None:
        """``decide`` returns at the first request that fails."""
        self._s.n[field.STOP_AT_OOM] = 1

    def _grow(self) -> None:
        if loop.lacks_blocks(self._s):
            self._s = tables.grow(self._s)
        else:
            self._s = tables.grow_log(self._s)

    def _make_room(self, id: int) -> None:
        while loop.is_full(self._s):
            self._grow()
        if id >= len(self._s.where):
            self._widen_where(max(id + 1 - len(self._s.where), len(self._s.where)))

    def _knows(self, id: int) -> bool:
        return 0 <= id < len(self._s.where)

    def _widen_where(self, by: int) -> None:
        where = self._s.where
        if isinstance(where, list):
            where.extend([field.NONE] * by)
        else:
            self._s = self._s._replace(where=np.concatenate([where, np.full(by, field.NONE)]))

    # --- looking in ---------------------------------------------------------------------------------------------

    @property
    def row(self) -> int:
        """Row of the request being served."""
        return int(self._s.n[field.REQUEST])

    @row.setter
    def row(self, row: int) -> None:
        self._s.n[field.REQUEST] = row

    @property
    def free_memory(self) -> int:
        """Bytes the driver would still give."""
        return int(self._s.n[field.CAPACITY]) - int(self._s.n[field.USED])

    @property
    def used_memory(self) -> int:
        """Bytes taken from the driver, in its pages."""
        return int(self._s.n[field.USED])

    @property
    def limit(self) -> int | None:
        """What the memory fraction allows to be reserved, bytes; None without one."""
        limit = int(self._s.n[field.LIMIT])
        return None if limit < 0 else limit

    @property
    def now(self) -> Counters:
        """The counters as they stand."""
        return counters_now(self._s)

    @property
    def segment_count(self) -> int:
        """Segments held; expandable ones are not counted."""
        return segments_now(self._s)

    @property
    def releasable(self) -> int:
        """Bytes that ``empty_cache()`` would return now, not counting deferred frees it would wait for."""
        now = self.now
        return now.reserved - now.active - now.stranded - now.pool_idle

    @property
    def calls(self) -> DriverCalls:
        """Driver calls so far."""
        n = self._s.n
        return DriverCalls(int(n[field.DRIVER_ALLOCS]), int(n[field.DRIVER_FREES]), int(n[field.SYNCS]))

    @property
    def allocs(self) -> int:
        """Requests for memory so far."""
        return int(self._s.n[field.ALLOCS])

    @property
    def retries(self) -> int:
        """Requests that released everything cached before they could be served or failed."""
        return int(self._s.n[field.RETRIES])

    @property
    def ooms(self) -> int:
        """Requests that failed."""
        return int(self._s.n[field.OOMS])

    @property
    def rejections(self) -> int:
        """Requests that ``throw_on_cudamalloc_oom`` refused."""
        return int(self._s.n[field.REJECTIONS])

    @property
    def first_oom(self) -> int | None:
        """Row of the first request that was not served: it failed, or was refused."""
        row = int(self._s.n[field.FIRST_OOM])
        return None if row < 0 else row

    @property
    def failures(self) -> int:
        """Requests that were not served: OOMs, rejections, and sizes beyond what any device has."""
        if self.first_oom is None:
            return 0
        return int(np.count_nonzero(np.asarray(self._s.where) == field.FAILED))

    def are_failed(self, ids: Any) -> Any:
        """Which of these allocations were asked for in vain, as an array."""
        return np.asarray(self._s.where)[ids] == field.FAILED

    def rounded(self, size: int) -> int:
        """Bytes of the block that serves a request of ``size`` bytes, under the settings in force."""
        return size if size >= TOO_LARGE else round_size(self._s, size)

    @property
    def address_ties(self) -> int:
        """Choices between equal-size blocks that came down to where the driver put their segments."""
        return int(self._s.n[field.TIES])

    @property
    def defects(self) -> int:
        """Times that the real allocator would have given the driver back what it never had from it."""
        return int(self._s.n[field.DEFECTS])

    @property
    def lost_frees(self) -> int:
        """Frees of allocations that were never made."""
        return int(self._s.n[field.LOST_FREES])

    @property
    def departed(self) -> bool:
        """Whether an address was needed that had not been given."""
        return bool(self._s.n[field.DEPARTED])

    def watch(self) -> PeakWatch:
        """Peaks from now on."""
        return PeakWatch(self._watches, self._s)

    def peaks(self, watch: PeakWatch) -> Counters:
        """The largest values that a watch has seen."""
        return watch.counters(self._s)

    def peak_segments(self, watch: PeakWatch) -> int:
        """Most segments at once that a watch has seen."""
        return watch.segments(self._s)

    def reset_program_peaks(self) -> None:
        """``torch.cuda.reset_peak_memory_stats()``."""
        self.program_peaks.reset(self._s)

    def statistics(self) -> dict[str, tuple[int, int, int, int]]:
        """The counters of ``torch.cuda.memory_stats()``: (current, peak, allocated, freed) of each."""
        return statistics(self._s, self.program_peaks)

    def block(self, id: int) -> BlockView:
        """Where an allocation lies.

        Raises:
            KeyError: it is not held.
        """
        t = self._s.t
        block = int(self._s.where[id]) if 0 <= id < len(self._s.where) else field.NONE
        if block < 0:
            raise KeyError(id)
        stream = t[field.SEG_STREAM][t[field.SEGMENT][block]]
        return BlockView(
            int(t[field.ADDR][block]), int(t[field.SIZE][block]), int(t[field.REQUESTED][block]), int(stream)
        )

    def cached(self, size: int, stream: int, pool: int, count: int) -> list[BlockView]:
        """The first cached blocks, in search order, that are large enough for a request of ``size`` bytes."""
        s = self._s
        rounded = round_size(s, size)
        which = 2 * pool + int(rounded > SMALL_SIZE)
        block = free_lists.first_from(s, field.ROOT, which, stream, rounded, -1, -1)
        out: list[BlockView] = []
        while block >= 0 and s.t[field.KEY_STREAM][block] == stream and len(out) < count:
            out.append(BlockView(int(s.t[field.ADDR][block]), int(s.t[field.SIZE][block]), 0, stream))
            block = free_lists.following(s, block)
        return out

    @property
    def decided(self) -> int:
        """How many decisions are in the log."""
        return int(self._s.n[field.LOGGED])

    def decisions(self, start: int = 0) -> Decisions:
        """The log from row ``start`` on; ids are the caller's. Columns may be the log's own: never change them."""
        columns = {}
        for at, (name, dtype) in enumerate(DECISION_DTYPES.items()):
            columns[name] = np.asarray(self._s.d[at][start : self.decided], dtype=dtype)
        return Decisions(**columns)

    def segments(self) -> tuple[SegmentState, ...]:
        """Segments, and contiguous mapped ranges of expandable ones, in address order."""
        t = self._s.t
        out = []
        for segment in range(int(self._s.n[field.COLUMNS])):
            block = int(t[field.SEG_FIRST][segment])
            stream, pool = int(t[field.SEG_STREAM][segment]), int(t[field.SEG_LIST][segment]) // 2
            page = int(t[field.SEG_PAGE][segment])
            blocks: list[tuple[int, int, BlockState]] = []
            while block >= 0:
                if t[field.STATE][block] == field.UNMAPPED:
                    out += _range(blocks, stream, pool, page)
                    blocks = []
                else:
                    state = _STATES[int(t[field.STATE][block])]
                    blocks.append((int(t[field.ADDR][block]), int(t[field.SIZE][block]), state))
                block = int(t[field.NEXT][block])
            out += _range(blocks, stream, pool, page)
        return tuple(sorted(out, key=lambda s: s.addr))


def _range(blocks: list[tuple[int, int, BlockState]], stream: int, pool: int, page: int) -> list[SegmentState]:
    if not blocks:
        return []
    start, end = blocks[0][0], blocks[-1][0] + blocks[-1][1]
    return [SegmentState(start, end - start, stream, pool, tuple(blocks), page)]
