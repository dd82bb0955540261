"""Requests and Decisions: the two event tables of a Trace, as numpy columns.

*Requests* are what a program asked of the allocator, in program order; they carry a lifetime id, never an address.
*Decisions* are what an allocator did about them; each row names the request it served. A recorded Trace has the
decisions of the real allocator, a replayed one those of the model, and both have the same form, so that they can be
compared row by row.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[Any]

NO_ID = -1
NO_STACK = -1
UNKNOWN_SIZE = -1
UNKNOWN_STREAM = -1
FRACTION_UNIT = 10**9  # how MEMORY_FRACTION requests store a fraction as an integer


class RequestKind(IntEnum):
    """What a program asked for. The value is stored; never renumber."""

    ALLOC = 1
    """``id`` begins to live: ``size`` bytes on ``stream`` from ``pool``."""
    FREE = 2
    """The program let go of ``id``."""
    RECORD_STREAM = 3
    """``id`` is used on ``stream`` too (``UNKNOWN_STREAM`` where a recording only shows that some stream used it)."""
    USES_DONE = 4
    """From here on, the other streams' work on the freed ``id`` is finished: its deferred free may complete."""
    EMPTY_CACHE = 5
    """``torch.cuda.empty_cache()``; with a private ``pool``, of that one only."""
    RELEASE_SEEN = 6
    """A recording shows cached segments being returned directly before an allocation that needed a new one: either
    an ``empty_cache()`` or the allocator's own retry. Replay decides, since it knows what fits."""
    MEMORY_FRACTION = 7
    """``set_per_process_memory_fraction``; ``size`` is the fraction times 10**9, rounded."""
    PHASE_BEGIN = 8
    """The measured phase ``phase`` begins; peaks start over."""
    PHASE_END = 9
    """The measured phase ``phase`` is over."""
    OBSERVATION = 10
    """The program read memory state; ``size`` indexes ``Trace.observations``."""
    POOL_CREATE = 11
    """``MemPool(...)`` makes the private ``pool`` or takes it once more; ``size`` is 1 for ``use_on_oom`` plus 2 for
    ``no_split``."""
    SCOPE_OPEN = 12
    """``use_mem_pool`` or a capture begins: the private ``pool`` has one user more, and a scope is open."""
    SCOPE_CLOSE = 13
    """The scope is closed; its user stays until ``POOL_RELEASE``."""
    POOL_RELEASE = 14
    """The private ``pool`` has one user less; without users its idle memory can be returned."""
    SETTINGS = 15
    """The allocator's settings change; ``size`` indexes ``Trace.confs``."""
    CAPTURE_BEGIN = 16
    """A stream is being captured into a CUDA graph."""
    CAPTURE_END = 17
    """It no longer is."""
    START = 18
    """Recording began when the allocator already held the segments of ``Trace.initial``; the first row, if any."""
    HELD = 19
    """``id`` was live then, ``size`` bytes asked for; one row for each such block, in the order of their addresses."""
    NON_TORCH = 20
    """Device memory in use was sampled: ``size`` bytes of this process (or of the whole device where ``Trace.lost``
    says so), the allocator's own among them."""
    RAW_ALLOC = 21
    """``id`` begins to live: ``size`` bytes that the program took of the driver itself, past the allocator."""
    RAW_FREE = 22
    """The program gave the ``size`` bytes of ``id`` back to the driver."""


ASKING = (RequestKind.ALLOC, RequestKind.RAW_ALLOC)
"""Requests for memory: they are served, or fail with a decision ``OOM``."""


class DecisionKind(IntEnum):
    """What an allocator did. The value is stored; never renumber."""

    SEGMENT_ALLOC = 1
    """A segment of ``size`` bytes came from the driver at ``addr``."""
    SEGMENT_FREE = 2
    """The segment at ``addr`` went back to the driver."""
    ALLOC = 3
    """A block of ``size`` bytes at ``addr`` was handed out for ``id`` (``UNKNOWN_SIZE`` where a recording has no
    block sizes)."""
    FREE_REQUESTED = 4
    """The block of ``id`` at ``addr`` is no longer the program's."""
    FREE_COMPLETED = 5
    """The block of ``id`` at ``addr`` is free to be handed out again."""
    OOM = 6
    """No memory: ``size`` is the rounded request, ``addr`` the driver's free bytes after everything was released."""
    SEGMENT_MAP = 7
    """``size`` bytes of an expandable segment were mapped at ``addr``."""
    SEGMENT_UNMAP = 8
    """``size`` bytes of an expandable segment were unmapped at ``addr``."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Request columns, each of shape ``(n,)``.

    Attributes:
        kind: uint8, a ``RequestKind``.
        id: int64, lifetime id or ``NO_ID``.
        size: int64, bytes asked for (other meanings: see ``RequestKind``).
        stream: int64, the raw stream handle; 0 is the default stream.
        pool: int32, index into ``Trace.pools``; 0 is the default pool.
        thread: int32, small number of the thread that asked.
        stack: int32, index into ``Trace.stacks`` or ``NO_STACK``.
        phase: int32, index into ``Trace.phases``; 0 is "no phase".
    """

    kind: Column
    id: Column
    size: Column
    stream: Column
    pool: Column
    thread: Column
    stack: Column
    phase: Column

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def start_rows(self) -> int:
        """How many of the first rows tell what stood when recording began, 0 where it began with the process.

        All of it stood at once: private pools, segments and blocks are there after the first of these rows.
        """
        if len(self) == 0 or self.kind[0] != RequestKind.START:
            return 0
        later = ~np.isin(self.kind, (RequestKind.START, RequestKind.POOL_CREATE, RequestKind.HELD))
        return int(np.argmax(later)) if bool(later.any()) else len(self)


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decision columns, each of shape ``(n,)``.

    Attributes:
        kind: uint8, a ``DecisionKind``.
        request: int64, row of the request that was being served.
        id: int64, lifetime id, or ``NO_ID`` for segments.
        addr: int64, address in bytes (for an OOM: the driver's free bytes).
        size: int64, bytes (see ``DecisionKind``).
        stream: int64, the raw stream handle.
        pool: int32, index into ``Trace.pools``.
    """

    kind: Column
    request: Column
    id: Column
    addr: Column
    size: Column
    stream: Column
    pool: Column

    def __len__(self) -> int:
        return len(self.kind)


REQUEST_DTYPES: dict[str, str] = {
    "kind": "u1", "id": "<i8", "size": "<i8", "stream": "<i8",
    "pool": "<i4", "thread": "<i4", "stack": "<i4", "phase": "<i4",
}  # fmt: skip
DECISION_DTYPES: dict[str, str] = {
    "kind": "u1", "request": "<i8", "id": "<i8", "addr": "<i8", "size": "<i8", "stream": "<i8", "pool": "<i4",
}  # fmt: skip

assert tuple(REQUEST_DTYPES) == tuple(f.name for f in fields(Requests))
assert tuple(DECISION_DTYPES) == tuple(f.name for f in fields(Decisions))

_ARRAY_CODES = {"u1": "B", "<i4": "i", "<i8": "q"}


class _ColumnLog:
    """Appends rows to typed arrays: 41 to 45 bytes a row instead of a Python tuple's several hundred."""

    _dtypes: dict[str, str]

    def __init__(self) -> None:
        self._columns = {name: array(_ARRAY_CODES[dtype]) for name, dtype in self._dtypes.items()}

    def __len__(self) -> int:
        return len(self._columns["kind"])

    def _to_numpy(self) -> dict[str, Column]:
        return {name: np.array(self._columns[name], dtype=dtype) for name, dtype in self._dtypes.items()}


class RequestLog(_ColumnLog):
    """Collects requests in program order.

    Attributes:
        thread: who asks for what is added now, where ``append`` is not told.
    """

    _dtypes = REQUEST_DTYPES

    def __init__(self) -> None:
        super().__init__()
        self.thread = 0

    def append(
        self,
        kind: RequestKind,
        *,
        id: int = NO_ID,
        size: int = 0,
        stream: int = 0,
        pool: int = 0,
        thread: int | None = None,
        stack: int = NO_STACK,
        phase: int = 0,
    ) -> int:
        """Add one request and return its row number."""
        c = self._columns
        c["kind"].append(kind)
        c["id"].append(id)
        c["size"].append(size)
        c["stream"].append(stream)
        c["pool"].append(pool)
        c["thread"].append(self.thread if thread is None else thread)
        c["stack"].append(stack)
        c["phase"].append(phase)
        return len(c["kind"]) - 1

    def finish(self) -> Requests:
        """The rows so far as columns; the log can go on."""
        return Requests(**self._to_numpy())


class DecisionLog(_ColumnLog):
    """Collects decisions in order.

    Attributes:
        request: row of the request being served; whoever drives the allocator sets it before each call.
    """

    _dtypes = DECISION_DTYPES

    def __init__(self) -> None:
        super().__init__()
        self.request = 0

    def append(self, kind: DecisionKind, id: int, addr: int, size: int, stream: int, pool: int) -> None:
        """Add one decision made while serving the current request."""
        c = self._columns
        c["kind"].append(kind)
        c["request"].append(self.request)
        c["id"].append(id)
        c["addr"].append(addr)
        c["size"].append(size)
        c["stream"].append(stream)
        c["pool"].append(pool)

    def finish(self) -> Decisions:
        """The rows so far as columns; the log can go on."""
        return Decisions(**self._to_numpy())


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a Python call stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


Stack = tuple[Frame, ...]
"""Innermost frame first, as PyTorch records them."""


class StackTable:
    """Interned call stacks: equal stacks share one index."""

    def __init__(self, stacks: Iterator[Stack] | tuple[Stack, ...] = ()) -> None:
        self._stacks: list[Stack] = []
        self._index: dict[Stack, int] = {}
        for stack in stacks:
            self.add(stack)

    def add(self, stack: Stack) -> int:
        """Index of the stack, added if new; ``NO_STACK`` for an empty one."""
        if not stack:
            return NO_STACK
        found = self._index.get(stack)
        if found is None:
            found = self._index[stack] = len(self._stacks)
            self._stacks.append(stack)
        return found

    def __getitem__(self, index: int) -> Stack:
        return () if index < 0 else self._stacks[index]

    def __len__(self) -> int:
        return len(self._stacks)

    def __iter__(self) -> Iterator[Stack]:
        return iter(self._stacks)

    def stripped(self) -> Self:
        """A table with no stacks at all, for a Trace that strangers may see."""
        return type(self)()
