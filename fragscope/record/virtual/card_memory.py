"""The memory of a virtual card: an allocator model online, and the log of everything asked of it. Knows no torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fragscope.allocator import (
    FRACTION_UNIT,
    CachingAllocator,
    OutOfMemoryError,
    ReplaySettings,
    parse_conf,
)
from fragscope.trace import (
    Observation,
    RequestKind,
    RequestLog,
    Settings,
    Stack,
    StackTable,
    Trace,
)


@dataclass(slots=True)
class _Use:
    """A freed block that another stream may still use."""

    id: int
    stream: int
    at: int  # position in the order of events


class CardMemory:
    """Serves allocations of a virtual card and records them as Requests, in program order.

    Args:
        settings: card, rules and conf to run under.

    Attributes:
        allocator: the model, with the decisions so far.
        requests: the log so far.
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
        self._streams: dict[int, int] = {}  # of live allocations
        self._uses: list[_Use] = []
        self._recorded_uses: dict[int, set[int]] = {}
        self._next_id = 0
        self._lock = _Turn(self._free)
        self.clock = 0  # counts allocations, frees and event records: the order that events refer to

    def alloc(self, size: int, stream: int, stack: Stack) -> int:
        """Allocate ``size`` bytes (more than 0) on a stream and return the lifetime id.

        Raises:
            OutOfMemoryError: as on the card; the failed request stays in the log.
        """
        with self._lock:
            id_ = self._next_id
            self._next_id += 1
            self.clock += 1
            self.allocator.row = self.requests.append(
                RequestKind.ALLOC, id=id_, size=size, stream=stream, stack=self.stacks.add(stack), phase=self._phase
            )
            try:
                self.allocator.malloc(id_, size, stream)
            except OutOfMemoryError:
                self._observe("OutOfMemoryError", stack)
                raise
            self._streams[id_] = stream
            return id_

    def free(self, id_: int) -> None:
        """The last reference to an allocation is gone. This may come at any point of the program."""
        self._lock.later(id_)

    def _free(self, id_: int) -> None:
        stream = self._streams.pop(id_)
        self.clock += 1
        self.allocator.row = self.requests.append(RequestKind.FREE, id=id_, stream=stream, phase=self._phase)
        for user in sorted(self._recorded_uses.pop(id_, ())):
            self._uses.append(_Use(id_, user, self.clock))
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

    def record_stream(self, id_: int, stream: int) -> None:
        """Another stream uses the allocation."""
        with self._lock:
            if stream == self._streams[id_]:
                return
            self.requests.append(RequestKind.RECORD_STREAM, id=id_, stream=stream, phase=self._phase)
            self.allocator.record_stream(id_, stream)
            self._recorded_uses.setdefault(id_, set()).add(stream)

    def mark(self) -> int:
        """A moment that ``finished(until=...)`` can refer to."""
        with self._lock:
            self.clock += 1
            return self.clock

    def finished(self, stream: int | None = None, until: int | None = None) -> None:
        """The host knows that work is done: on one stream or all, everything or only what came before ``until``.

        Deferred frees complete no earlier than this, which is the latest moment that a real card allows and therefore
        an upper bound of what they hold.
        """
        if not self._uses:
            return
        with self._lock:
            self._finished(stream, until)

    def _finished(self, stream: int | None = None, until: int | None = None) -> None:
        done = [u for u in self._uses if (stream is None or u.stream == stream) and (until is None or u.at <= until)]
        self._uses = [u for u in self._uses if u not in done]
        waiting = {u.id for u in self._uses}
        for id_ in dict.fromkeys(u.id for u in done):
            if id_ not in waiting:
                self.allocator.row = self.requests.append(RequestKind.USES_DONE, id=id_, phase=self._phase)
                self.allocator.uses_done(id_)

    def empty_cache(self) -> None:
        """``torch.cuda.empty_cache()``."""
        with self._lock:
            self._finished()
            self.allocator.row = self.requests.append(RequestKind.EMPTY_CACHE, phase=self._phase)
            self.allocator.empty_cache()

    def set_memory_fraction(self, fraction: float) -> None:
        """``torch.cuda.set_per_process_memory_fraction``."""
        with self._lock:
            self.allocator.row = self.requests.append(
                RequestKind.MEMORY_FRACTION, size=round(fraction * FRACTION_UNIT), phase=self._phase
            )
            self.allocator.set_memory_fraction(fraction)

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

    def end_phase(self) -> None:
        """The measured phase is over."""
        with self._lock:
            self.requests.append(RequestKind.PHASE_END, phase=self._phase)
            self._phase = 0

    def trace(self, provenance: dict[str, str] | None = None) -> Trace:
        """Everything so far as a Trace with decisions."""
        s = self.settings
        return Trace(
            requests=self.requests.finish(),
            decisions=self.allocator.decisions(),
            stacks=self.stacks,
            phases=tuple(self.phases),
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

    Args:
        free: carries out one free.
    """

    def __init__(self, free: Callable[[int], None]) -> None:
        self._free = free
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._release()
        self._drain()

    def later(self, id_: int) -> None:
        """Free now, or when the operation under way is over."""
        self._waiting.append(id_)
        self._drain()

    def _drain(self) -> None:
        # Whoever fails to get the lock leaves its frees to the holder, who looks again after letting go.
        while self._waiting and self._lock.acquire(blocking=False):
            self._release()

    def _release(self) -> None:
        try:
            while self._waiting:
                self._free(self._waiting.popleft())
        finally:
            self._lock.release()
