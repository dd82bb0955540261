"""The Trace: one process on one device, what it asked for and what an allocator did."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fragscope.trace.events import NO_STACK, Decisions, RequestKind, Requests, StackTable

PoolId = tuple[int, int]
DEFAULT_POOL: PoolId = (0, 0)
BlockState = Literal["free", "allocated", "pending"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Allocator settings in force while the requests were made.

    Attributes:
        conf: the ``PYTORCH_ALLOC_CONF`` string, ``""`` for defaults.
        memory_fraction: per-process memory fraction, None where unknown or never set.
        capacity: bytes that segments could take together, None where unknown.
        recorded: settings a PyTorch snapshot reports, flattened to strings; empty for traces made by the model.
    """

    conf: str = ""
    memory_fraction: float | None = None
    capacity: int | None = None
    recorded: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loss:
    """Something a recording does not hold. Carried and shown, never hidden.

    Attributes:
        code: stable identifier, such as ``"late_start"``.
        detail: one sentence for people.
        events: how many events are concerned.
    """

    code: str
    detail: str
    events: int = 0


@dataclass(frozen=True, slots=True)
class SegmentState:
    """One segment, or a contiguous mapped range of an expandable one, as it stood at the end of a recording; bytes.

    Attributes:
        blocks: ``(addr, size, state)`` in address order, state one of ``free``, ``allocated``, ``pending``.
        page: bytes that its expandable segment maps at a time; 0 for an ordinary segment.
    """

    addr: int
    size: int
    stream: int
    pool: int
    blocks: tuple[tuple[int, int, BlockState], ...]
    page: int = 0

    @property
    def expandable(self) -> bool:
        """Whether it is a contiguous mapped range of an expandable segment."""
        return self.page > 0


@dataclass(frozen=True, slots=True)
class Observation:
    """A point where the program read memory state and may have acted on what it saw.

    Attributes:
        what: the call, such as ``"torch.cuda.mem_get_info"`` or ``"OutOfMemoryError"``.
        where: ``file:line`` of the caller, ``""`` if unknown.
    """

    what: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests of one process on one device, with the decisions made about them if there are any.

    Attributes:
        requests: event columns in program order.
        decisions: event columns in allocator order, or None for bare requests.
        stacks: interned call stacks.
        phases: names; index 0 is ``""``, no phase.
        pools: pool ids; index 0 is the default pool.
        observations: what ``OBSERVATION`` rows refer to.
        confs: what ``SETTINGS`` rows refer to.
        settings: allocator settings in force.
        torch: release whose allocator made the decisions, None where the file does not say.
        card: name of the device profile, None where unknown.
        device: CUDA device index.
        device_total: bytes of device memory in all, None where unknown.
        initial: segments that stood when recording began, empty where it began with the process. Blocks that are not
            free are those of the ``HELD`` rows, in this order.
        final: segments at the end as the recording shows them, None for traces made by the model.
        lost: what the recording does not hold.
        placement: whether the segments' addresses come from a driver (``recorded``) or a model of it (``modelled``).
        source: where the requests come from: ``snapshot``, ``virtual`` or ``cuda``.
        provenance: command, commit, time and the like; values are plain text.
    """

    requests: Requests
    decisions: Decisions | None = None
    stacks: StackTable = field(default_factory=StackTable)
    phases: tuple[str, ...] = ("",)
    pools: tuple[PoolId, ...] = (DEFAULT_POOL,)
    observations: tuple[Observation, ...] = ()
    confs: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    torch: str | None = None
    card: str | None = None
    device: int = 0
    device_total: int | None = None
    initial: tuple[SegmentState, ...] = ()
    final: tuple[SegmentState, ...] | None = None
    lost: tuple[Loss, ...] = ()
    placement: Literal["recorded", "modelled"] = "modelled"
    source: str = "virtual"
    provenance: dict[str, str] = field(default_factory=dict)

    def strip_stacks(self) -> Trace:
        """The same Trace without call stacks, safe to show to strangers."""
        requests = replace(self.requests, stack=np.full(len(self.requests), NO_STACK, dtype="<i4"))
        observations = tuple(Observation(o.what) for o in self.observations)
        return replace(self, requests=requests, stacks=self.stacks.stripped(), observations=observations)

    def count(self, kind: RequestKind) -> int:
        """How many requests are of this kind."""
        return int(np.count_nonzero(self.requests.kind == kind))
