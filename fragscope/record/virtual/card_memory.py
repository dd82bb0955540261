"""The memory of a virtual card: an allocator model online, and the log of everything asked of it. Knows no torch."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Set
from dataclasses import dataclass

from fragscope.allocator import (
    FRACTION_UNIT,
    CachingAllocator,
    OutOfMemoryError,
    ReplaySettings,
    parse_conf,
)
from fragscope.record.virtual.extent import Extent
from fragscope.record.virtual.ordering import Ordering
from fragscope.record.virtual.shadow import Clock, Place
from fragscope.trace import (
    DEFAULT_POOL,
    Observation,
    PoolId,
    RequestKind,
    RequestLog,
    Settings,
    Stack,
    StackTable,
    Trace,
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event on a stream.

    Attributes:
        stream: handle of the stream.
        at: position in the order of events.
        clock: what is over when it is.
    """

    stream: int
    at: int
    clock: Clock


class CardMemory:
    """Serves allocations of a virtual card and records them as Requests, in program order.

    Args:
        settings: card, rules and conf to run under.

    Attributes:
        allocator: the model, with the decisions so far.
        requests: the log so far.
        ordering: order of the work of the measured phase.
        ordered: whether work is followed now.
    """

    def __init__(self, settings: ReplaySettings) -> None:
        self.settings = settings
        self.allocator = CachingAllocator(
            settings.total,
            settings.capacity,
            settings.rules.rules,
            parse_conf(settings.conf, settings.rules.rules),
            settings.memory_fraction,
        )
        self.requests = RequestLog()
        self.stacks = StackTable()
        self.phases: list[str] = [""]
        self._phase = 0
        self.observations: list[Observation] = []
        self.pools: list[PoolId] = [DEFAULT_POOL]
        self.confs: list[str] = []
        self._streams: dict[int, int] = {}  # of live allocations
        # Freed blocks that other streams may still use: by stream when each was freed, the oldest first, and its id;
        # and by id how many streams those are.
        self._uses: dict[int, deque[tuple[int, int]]] = defaultdict(deque)
        self._users: dict[int, int] = {}
        self._recorded_uses: dict[int, set[int]] = {}
        self._next_id = 0
        self._lock = _Turn()
        self.ordering = Ordering()
        self.ordered = False
        self.clock = 0  # counts allocations, frees and event records: the order that events refer to
        self._over: dict[int | None, int] = {}  # by stream, None for all: up to where the host knows that work is done

    def alloc(self, size: int, stream: int, stack: Stack, pool: int = 0) -> int:
        """Allocate ``size`` bytes (more than 0) on a stream, from a pool, and return the lifetime id.

        Raises:
            OutOfMemoryError: as on the card; the failed request stays in the log.
        """
        with self._lock:
            id_ = self._next_id
            self._next_id += 1
            self.clock += 1
            self.allocator.row = self.requests.append(
                RequestKind.ALLOC,
                id=id_,
                size=size,
                stream=stream,
                pool=pool,
                stack=self.stacks.add(stack),
                phase=self._phase,
            )
            released = self.allocator.calls.free if self.ordered else 0
            try:
                self.allocator.malloc(id_, size, stream, pool)
            except OutOfMemoryError:
                self._observe("OutOfMemoryError", stack)
                raise
            finally:  # a request that fails gave back what it could as well
                if self.ordered:
                    self._released(released)
            self._streams[id_] = stream
            return id_

    def free(self, id_: int) -> None:
        """The last reference to an allocation is gone. This may come at any point of the program."""
        self._lock.later(lambda: self._free(id_))

    def _free(self, id_: int) -> None:
        stream = self._streams.pop(id_)
        self.clock += 1
        self.allocator.row = self.requests.append(RequestKind.FREE, id=id_, stream=stream, phase=self._phase)
        users = sorted(self._recorded_uses.pop(id_, ()))
        for user in users:
            self._uses[user].append((self.clock, id_))
            self._users[id_] = len(users)
        if users and self.ordered:
            block = self.allocator.block(id_)
            self.ordering.freed(block.addr, block.addr + block.size, users)
        self.allocator.free(id_)

    def take_raw(self, size: int, stack: Stack) -> int:
        """The program takes ``size`` bytes (more than 0) of the driver itself; returns the lifetime id.

        Raises:
            OutOfMemoryError: the driver has too little; the failed request stays in the log.
        """
        with self._lock:
            id_ = self._next_id
            self._next_id += 1
            self.allocator.row = self.requests.append(
                RequestKind.RAW_ALLOC, id=id_, size=size, stack=self.stacks.add(stack), phase=self._phase
            )
            try:
                self.allocator.take_raw(id_, size)
            except OutOfMemoryError:
                self._observe("OutOfMemoryError", stack)
                raise
            return id_

    def give_raw(self, id_: int, size: int) -> None:
        """The program gives the ``size`` bytes of ``take_raw`` back."""
        with self._lock:
            self.allocator.row = self.requests.append(RequestKind.RAW_FREE, id=id_, size=size, phase=self._phase)
            self.allocator.give_raw(id_, size)

    @property
    def live(self) -> int:
        """Allocations that the program holds."""
        return len(self._streams)

    def address(self, id_: int) -> int:
        """Address of a live allocation."""
        return self.allocator.block(id_).addr

    def made_at(self, id_: int) -> str:
        """``file:line`` of an allocation, also of one that is freed by now; empty where no stack was there."""
        requests = self.requests.finish()
        rows = ((requests.id == id_) & (requests.kind == RequestKind.ALLOC)).nonzero()[0]
        stack = self.stacks[int(requests.stack[rows[0]])] if len(rows) else ()
        return f"{stack[0].file}:{stack[0].line}" if stack else ""

    def requested_by_address(self) -> dict[int, int]:
        """Bytes asked for, of what the program holds, by address."""
        blocks = (self.allocator.block(id_) for id_ in self._streams)
        return {b.addr: b.requested for b in blocks}

    def record_stream(self, id_: int, stream: int) -> None:
        """Another stream uses the allocation."""
        with self._lock:
            if stream == self._streams[id_]:
                return
            self.requests.append(RequestKind.RECORD_STREAM, id=id_, stream=stream, phase=self._phase)
            self.allocator.record_stream(id_, stream)
            self._recorded_uses.setdefault(id_, set()).add(stream)

    def launch(
        self,
        stream: int,
        what: str,
        where: Callable[[], Place | None],
        reads: list[tuple[int, Extent]],
        writes: list[tuple[int, Extent]],
    ) -> None:
        """Work on a stream reads and writes bytes of allocations; see ``Ordering.launch``."""
        with self._lock:
            self.ordering.launch(stream, what, where(), reads, writes)

    def record_event(self, stream: int, *, counts: bool = True) -> Recorded:
        """An event is recorded on a stream; one that does not count only tells where the stream is."""
        with self._lock:
            self.clock += int(counts)
            return Recorded(stream, self.clock, self.ordering.record(stream) if self.ordered else [])

    def wait(self, stream: int, event: Recorded) -> None:
        """A stream waits for an event; memory is not moved by it."""
        if self.ordered:
            with self._lock:
                self.ordering.wait(stream, event.clock)

    def finished(self, stream: int | None = None) -> None:
        """The host knows that the work so far of one stream, or of all, is done.

        Deferred frees complete no earlier than this, which is the latest moment that a real card allows and therefore
        an upper bound of what they hold.
        """
        with self._lock:
            if self.ordered and stream is None:
                self.ordering.host_waits_for_all()
            elif self.ordered and stream is not None:
                self.ordering.host_waits_for_stream(stream)
            self._finished(stream)

    def finished_work(self, besides: Set[int] = frozenset()) -> None:
        """All later work comes after all work so far, except for that of some streams."""
        with self._lock:
            self.ordering.host_waits_for_all(besides)

    def finished_event(self, event: Recorded) -> None:
        """The host knows that what came before an event on its stream is done."""
        with self._lock:
            if self.ordered:
                self.ordering.host_waits(event.clock)
            self._finished(event.stream, event.at)

    def _released(self, before: int) -> None:
        """The allocator gave memory back to the driver, which waits for the card.

        Source: ``unmapHandles`` in c10/cuda/CUDACachingAllocator.cpp, which says so of cudaFree and waits itself.
        """
        if self.allocator.calls.free != before:
            self.ordering.host_waits_for_all()

    def is_over(self, event: Recorded) -> bool:
        """Whether the host has waited for what came before an event."""
        return event.at <= max(self._over.get(event.stream, 0), self._over.get(None, 0))

    def _finished(self, stream: int | None = None, until: int | None = None) -> None:
        self._over[stream] = max(self._over.get(stream, 0), self.clock if until is None else until)
        if not self._users:
            return
        done = []
        for uses in self._uses.values() if stream is None else [self._uses[stream]]:
            while uses and (until is None or uses[0][0] <= until):
                freed, id_ = uses.popleft()
                self._users[id_] -= 1
                if not self._users[id_]:
                    del self._users[id_]
                    done.append((freed, id_))
        for _, id_ in sorted(done):
            self.allocator.row = self.requests.append(RequestKind.USES_DONE, id=id_, phase=self._phase)
            self.allocator.uses_done(id_)

    # --- private pools --------------------------------------------------------------------------------------------

    def create_pool(self, name: PoolId, *, use_on_oom: bool = False, no_split: bool = False) -> int:
        """``MemPool(...)`` makes a private pool with one user; returns its number."""
        with self._lock:
            pool = self._new_pool(name)
            self._append(RequestKind.POOL_CREATE, pool, size=int(use_on_oom) + 2 * int(no_split))
            self.allocator.create_pool(pool, use_on_oom=use_on_oom, no_split=no_split)
            return pool

    def open_scope(self, name: PoolId) -> int:
        """``use_mem_pool`` or a capture begins: the pool has one user more; returns its number."""
        with self._lock:
            pool = self.pools.index(name) if name in self.pools else self._new_pool(name)
            self._append(RequestKind.SCOPE_OPEN, pool)
            self.allocator.open_scope(pool)
            return pool

    def close_scope(self, pool: int) -> None:
        """It ends; its user stays until the pool is released."""
        with self._lock:
            self._append(RequestKind.SCOPE_CLOSE, pool)
            self.allocator.close_scope()

    def release_pool(self, pool: int, *, empties: bool = False) -> None:
        """A pool has one user less, and may return what is idle in it. This may come at any point of the program."""

        def release() -> None:
            self._append(RequestKind.POOL_RELEASE, pool)
            self.allocator.release_pool(pool)
            if empties:
                self._append(RequestKind.EMPTY_CACHE, pool)
                self.allocator.empty_cache(pool)

        self._lock.later(release)

    def capture(self, *, begins: bool) -> None:
        """A stream begins, or ceases, to be captured into a CUDA graph."""
        with self._lock:
            self._append(RequestKind.CAPTURE_BEGIN if begins else RequestKind.CAPTURE_END, 0)
            (self.allocator.begin_capture if begins else self.allocator.end_capture)()

    def _new_pool(self, name: PoolId) -> int:
        self.pools.append(name)
        return len(self.pools) - 1

    def _append(self, kind: RequestKind, pool: int, size: int = 0) -> None:
        self.allocator.row = self.requests.append(kind, pool=pool, size=size, phase=self._phase)

    # --- what else programs call ----------------------------------------------------------------------------------

    def empty_cache(self) -> None:
        """``torch.cuda.empty_cache()``."""
        with self._lock:
            self._finished()
            self.allocator.row = self.requests.append(RequestKind.EMPTY_CACHE, phase=self._phase)
            released = self.allocator.calls.free if self.ordered else 0
            self.allocator.empty_cache()
            if self.ordered:
                self._released(released)

    def set_memory_fraction(self, fraction: float) -> None:
        """``torch.cuda.set_per_process_memory_fraction``."""
        with self._lock:
            self.allocator.row = self.requests.append(
                RequestKind.MEMORY_FRACTION, size=round(fraction * FRACTION_UNIT), phase=self._phase
            )
            self.allocator.set_memory_fraction(fraction)

    def set_conf(self, text: str) -> None:
        """``torch.cuda.memory._set_allocator_settings``.

        Raises:
            UsageError: the release does not take such a conf, or the model does not cover it.
        """
        with self._lock:
            conf = parse_conf(text, self.settings.rules.rules, self.allocator.conf)
            self._append(RequestKind.SETTINGS, 0, size=len(self.confs))
            self.confs.append(text)
            self.allocator.set_conf(conf)

    def observe(self, what: str, stack: Stack) -> None:
        """The program reads memory state."""
        with self._lock:
            self._observe(what, stack)

    def _observe(self, what: str, stack: Stack) -> None:
        where = f"{stack[0].file}:{stack[0].line}" if stack else ""
        self.requests.append(RequestKind.OBSERVATION, size=len(self.observations), phase=self._phase)
        self.observations.append(Observation(what, where))

    def begin_phase(self, name: str) -> None:
        """The measured phase begins."""
        with self._lock:
            self.phases.append(name)
            self._phase = len(self.phases) - 1
            self.requests.append(RequestKind.PHASE_BEGIN, phase=self._phase)
            self.ordering.begin()
            self.ordered = True

    def end_phase(self) -> None:
        """The measured phase is over."""
        with self._lock:
            self.requests.append(RequestKind.PHASE_END, phase=self._phase)
            self._phase = 0
            self.ordered = False

    def trace(self, provenance: dict[str, str] | None = None) -> Trace:
        """Everything so far as a Trace with decisions."""
        s = self.settings
        return Trace(
            requests=self.requests.finish(),
            decisions=self.allocator.decisions(),
            stacks=self.stacks,
            phases=tuple(self.phases),
            pools=tuple(self.pools),
            confs=tuple(self.confs),
            observations=tuple(self.observations),
            settings=Settings(conf=s.conf, memory_fraction=s.memory_fraction, capacity=s.capacity),
            torch=s.rules.torch,
            card=s.card,
            device_total=s.total,
            source="virtual",
            provenance=provenance or {},
        )


class _Turn:
    """One operation on the books at a time, and frees between operations.

    The end of a tensor is reported by a weak reference, at any point of any thread: while another thread is inside an
    operation, or, when a garbage collection strikes, in the middle of one of this thread's own. Such frees wait until
    the operation is over.

    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._release()
        self._drain()

    def later(self, free: Callable[[], None]) -> None:
        """Carry out a free now, or when the operation under way is over."""
        self._waiting.append(free)
        self._drain()

    def _drain(self) -> None:
        # Whoever fails to get the lock leaves its frees to the holder, who looks again after letting go.
        while self._waiting and self._lock.acquire(blocking=False):
            self._release()

    def _release(self) -> None:
        try:
            while self._waiting:
                self._waiting.popleft()()
        finally:
            self._lock.release()
