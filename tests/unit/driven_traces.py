"""Traces made by asking the allocator model one request after the other, with its own counters after each."""

from __future__ import annotations

from collections.abc import Sequence

from fragscope.allocator import FRACTION_UNIT, CachingAllocator, Counters, OutOfMemoryError, parse_conf, rules_for
from fragscope.trace import BlockState, RequestKind, RequestLog, SegmentState, Settings, Trace


class Driven:
    """An allocator that remembers what it was asked and what it held after that.

    Attributes:
        now: the model's counters after each request.
        segments: its segments after the requests where ``look`` was called, by request row.
    """

    def __init__(self, torch: str, total: int, capacity: int, conf: str = "") -> None:
        self._torch, self._total, self._conf = torch, total, conf
        self._rules = rules_for(torch).rules
        self.allocator = CachingAllocator(total, capacity, self._rules, parse_conf(conf, self._rules))
        self._log = RequestLog()
        self._confs: list[str] = []
        self._pools = 1
        self.now: list[Counters] = []
        self.segments: dict[int, tuple[SegmentState, ...]] = {}

    def alloc(self, id_: int, size: int, stream: int = 0, pool: int = 0) -> bool:
        self._note(RequestKind.ALLOC, id=id_, size=size, stream=stream, pool=pool)
        try:
            self.allocator.malloc(id_, size, stream, pool)
        except OutOfMemoryError:
            return self._done(served=False)
        return self._done()

    def free(self, id_: int) -> bool:
        self._note(RequestKind.FREE, id=id_)
        self.allocator.free(id_)
        return self._done()

    def record_stream(self, id_: int, stream: int) -> bool:
        self._note(RequestKind.RECORD_STREAM, id=id_, stream=stream)
        self.allocator.record_stream(id_, stream)
        return self._done()

    def uses_done(self, id_: int) -> bool:
        self._note(RequestKind.USES_DONE, id=id_)
        self.allocator.uses_done(id_)
        return self._done()

    def take_raw(self, id_: int, size: int) -> bool:
        self._note(RequestKind.RAW_ALLOC, id=id_, size=size)
        try:
            self.allocator.take_raw(id_, size)
        except OutOfMemoryError:
            return self._done(served=False)
        return self._done()

    def give_raw(self, id_: int, size: int) -> bool:
        self._note(RequestKind.RAW_FREE, id=id_, size=size)
        self.allocator.give_raw(id_, size)
        return self._done()

    def empty_cache(self, pool: int = 0) -> bool:
        self._note(RequestKind.EMPTY_CACHE, pool=pool)
        self.allocator.empty_cache(pool)
        return self._done()

    def limit(self, fraction: float) -> bool:
        self._note(RequestKind.MEMORY_FRACTION, size=round(fraction * FRACTION_UNIT))
        self.allocator.set_memory_fraction(fraction)
        return self._done()

    def set_conf(self, conf: str) -> bool:
        self._note(RequestKind.SETTINGS, size=len(self._confs))
        self._confs.append(conf)
        self.allocator.set_conf(parse_conf(conf, self._rules, self.allocator.conf))
        return self._done()

    def create_pool(self, pool: int, *, use_on_oom: bool = False, no_split: bool = False) -> bool:
        self._note(RequestKind.POOL_CREATE, pool=pool, size=use_on_oom + 2 * no_split)
        self.allocator.create_pool(pool, use_on_oom=use_on_oom, no_split=no_split)
        return self._done()

    def open_scope(self, pool: int) -> bool:
        self._note(RequestKind.SCOPE_OPEN, pool=pool)
        self.allocator.open_scope(pool)
        return self._done()

    def close_scope(self, pool: int) -> bool:
        self._note(RequestKind.SCOPE_CLOSE, pool=pool)
        self.allocator.close_scope()
        return self._done()

    def release_pool(self, pool: int) -> bool:
        self._note(RequestKind.POOL_RELEASE, pool=pool)
        self.allocator.release_pool(pool)
        return self._done()

    def begin_phase(self) -> bool:
        self._note(RequestKind.PHASE_BEGIN, phase=1)
        return self._done()

    def look(self) -> None:
        """Keep what lies where after the last request."""
        if self.now:
            self.segments[len(self.now) - 1] = as_recorded(self.allocator.segments())

    @property
    def trace(self) -> Trace:
        """Everything so far."""
        return Trace(
            requests=self._log.finish(),
            decisions=self.allocator.decisions(),
            phases=("", "load"),
            pools=((0, 0), *((0, number) for number in range(1, self._pools))),
            confs=tuple(self._confs),
            settings=Settings(conf=self._conf),
            torch=self._torch,
            device_total=self._total,
        )

    @property
    def peaks(self) -> Counters:
        """The model's own peaks, those inside requests too."""
        return self.allocator.peaks(self.allocator.program_peaks)

    def _note(self, kind: RequestKind, **columns: int) -> None:
        self._pools = max(self._pools, columns.get("pool", 0) + 1)
        self.allocator.row = self._log.append(kind, **columns)

    def _done(self, *, served: bool = True) -> bool:
        self.now.append(self.allocator.now)
        return served


def as_recorded(segments: Sequence[SegmentState]) -> tuple[SegmentState, ...]:
    """The allocator's segments as a recording tells them: what is idle without a gap is one block."""
    return tuple(_merged(s) for s in segments)


def _merged(segment: SegmentState) -> SegmentState:
    """With neighbouring free blocks as one.

    Unmapping leaves the idle parts of pages beside it as blocks of their own, which the allocator does not merge with
    idle neighbours that were there before.
    """
    blocks: list[tuple[int, int, BlockState]] = []
    for addr, size, state in segment.blocks:
        if blocks and blocks[-1][2] == state == "free":
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + size, "free")
        else:
            blocks.append((addr, size, state))
    return SegmentState(segment.addr, segment.size, segment.stream, segment.pool, tuple(blocks), segment.page)
