"""A GPU for tests of the pytest plugin: one caching allocator for the whole process, as a real process has one.

What earlier tests leave behind decides where later memory lies and which segments are taken. Stream handles and
lifetime ids are such as no two processes share.
"""

from __future__ import annotations

import os
import sys

from fragscope.allocator import CachingAllocator, parse_conf, rules_for
from fragscope.errors import NotMeasuredError
from fragscope.testing import devices
from fragscope.trace import Frame, RequestKind, RequestLog, Settings, Stack, StackTable, Trace

MIB = 2**20
TOTAL = 1024 * MIB
RULES = rules_for("2.13.0")


class Memory:
    """A block that lives until it is freed."""

    def __init__(self, process: Process, id: int, size: int) -> None:
        self._process, self.id, self.size = process, id, size

    def free(self) -> None:
        self._process.free(self.id)


class Process:
    """What one process asks of the card."""

    def __init__(self, conf: str) -> None:
        self.conf = conf
        self.allocator = CachingAllocator(TOTAL, TOTAL, RULES.rules, parse_conf(conf, RULES.rules))
        self.sizes: dict[int, int] = {}
        self.next_id = 1000 * os.getpid()
        self.first_id = self.next_id
        self.recording: FakeRecorder | None = None
        self.handles = {name: 0x5500_0000_0000 + 4096 * os.getpid() + 64 * n for n, name in enumerate(("side", "copy"))}

    def alloc(self, mib: float, stream: str = "") -> Memory:
        size, id = int(mib * MIB), self.next_id
        self.next_id += 1
        handle = self.handles[stream] if stream else 0
        self._note(RequestKind.ALLOC, id=id, size=size, stream=handle, stack=stack())
        self.allocator.malloc(id - self.first_id, size, handle)
        self.sizes[id] = size
        return Memory(self, id, size)

    def free(self, id: int) -> None:
        del self.sizes[id]
        self._note(RequestKind.FREE, id=id)
        self.allocator.free(id - self.first_id)

    def empty_cache(self) -> None:
        self._note(RequestKind.EMPTY_CACHE)
        self.allocator.empty_cache()

    def _note(self, kind: RequestKind, *, stack: Stack = (), **values: int) -> None:
        if self.recording is not None:
            self.allocator.row = self.recording.append(kind, stack=stack, **values)


class FakeRecorder:
    """What records the process: its Trace begins with what the allocator holds already."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.log = RequestLog()
        self.stacks = StackTable()
        self.phases = [""]
        self.initial = process.allocator.segments()
        self.since = process.allocator.decided
        live = {process.allocator.block(id - process.first_id).addr: (id, size) for id, size in process.sizes.items()}
        if self.initial:
            self.append(RequestKind.START)
        for _, (id, size) in sorted(live.items()):
            self.append(RequestKind.HELD, id=id, size=size)
        process.recording = self

    def append(self, kind: RequestKind, *, stack: Stack = (), **values: int) -> int:
        return self.log.append(kind, stack=self.stacks.add(stack), **values)

    def begin_phase(self, name: str) -> None:
        self.phases.append(name)
        self.append(RequestKind.PHASE_BEGIN, phase=len(self.phases) - 1)

    def end_phase(self) -> None:
        self.append(RequestKind.PHASE_END, phase=len(self.phases) - 1)

    def stop(self) -> Trace:
        self.process.recording = None
        return Trace(
            requests=self.log.finish(),
            decisions=self.process.allocator.decisions(self.since),
            stacks=self.stacks,
            phases=tuple(self.phases),
            settings=Settings(conf=self.process.conf, capacity=TOTAL),
            torch="2.13.0",
            card="a small card",
            device_total=TOTAL,
            initial=self.initial,
            source="cuda",
        )


def stack() -> Stack:
    """The calling code, innermost frame first, as PyTorch records it."""
    frame = sys._getframe(2)
    out = []
    while frame is not None:
        out.append(Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(out)


class FakeGpu:
    """Where the plugin finds it."""

    reason: str | None = None
    broken: str | None = None

    def why_not(self) -> str | None:
        return self.reason

    def prepare(self) -> None:
        """Nothing is kept here between tests."""

    def start(self) -> FakeRecorder:
        if self.broken is not None:
            raise NotMeasuredError(self.broken)
        return FakeRecorder(process)


process = Process(os.environ.get("FAKE_CONF", ""))
alloc, empty_cache = process.alloc, process.empty_cache


def install() -> None:
    """Tests of this process are recorded on the stand-in."""
    devices.gpu = FakeGpu
