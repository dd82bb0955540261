"""A GPU that tests run ``--device cuda`` on: what CUDA answers, its recorder, and workers forked from the test.

The stand-in serves requests with a virtual device of its own, as the real allocator would.
"""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo  # which every virtual device imports: once here instead of in each worker

from fragscope.allocator import Card, ReplaySettings, rules_for
from fragscope.allocator.replay import SpanMeter
from fragscope.record.cuda import PhaseStatistics, RecorderOptions, Stacks
from fragscope.record.device_memory import DeviceMemory, How
from fragscope.record.virtual import VirtualDevice
from fragscope.suite import card_here, runner, worker
from fragscope.suite.server import Job
from fragscope.trace import Trace

MIB = 2**20
TOTAL = 500 * MIB
FREE = 100 * MIB + 1
NAME = "test-card"
_COUNTERS = ("allocated", "active", "reserved", "requested", "inactive_split")


@dataclass
class StandInCard:
    """The card.

    Attributes:
        log: a line for everything that CUDA was used for: what, process id, conf.
        free: bytes.
        wrong_reserved: bytes that PyTorch's statistics say beyond what the model says.
        wrong_address: the recording's last block lies elsewhere than where the model puts it.
        broken: asking it fails.
    """

    log: Path
    free: int = FREE
    wrong_reserved: int = 0
    wrong_address: bool = False
    broken: bool = False

    def used(self, what: str) -> list[tuple[int, str]]:
        """Process and conf of each use."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [(pid, conf) for name, pid, conf in lines if name == what]

    def note(self, what: str) -> None:
        conf = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        with self.log.open("a") as file:
            file.write(json.dumps([what, os.getpid(), conf]) + "\n")

    def properties(self, _device: int) -> Any:
        self.note("asked")
        if self.broken:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nhints follow")
        return SimpleNamespace(
            name="Test Card", total_memory=TOTAL, major=9, minor=0, multi_processor_count=4, L2_cache_size=MIB
        )

    def recorder(self, options: RecorderOptions) -> Any:
        assert options.stacks is Stacks.PYTHON  # reports name the lines
        return StandInRecorder(self)


class StandInRecorder:
    """What ``record.cuda.Recorder`` does, on the stand-in."""

    def __init__(self, card: StandInCard) -> None:
        card.note("recorded")
        self.card, self.total = card, TOTAL
        profile = Card(NAME, "Test Card", TOTAL, card.free, (9, 0), 4, MIB, "test")
        conf = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        settings = ReplaySettings(rules_for(str(torch.__version__)), NAME, TOTAL, card.free, conf)
        self.device = VirtualDevice(profile, settings)
        self.statistics: PhaseStatistics | None = None

    def start(self) -> None:
        self.device.__enter__()

    def begin_phase(self, name: str) -> None:
        self.device.memory.begin_phase(name)
        self._meter = SpanMeter(self.device.memory.allocator, name)

    def end_phase(self) -> None:
        span = self._meter.finish()
        peak, end = ({n: getattr(c, n) for n in _COUNTERS} for c in (span.peak, span.end))
        peak["reserved"] += self.card.wrong_reserved
        self.statistics = PhaseStatistics(peak, end)
        self.device.memory.end_phase()

    def take_device_memory(self, size: int, how: How) -> DeviceMemory:
        return self.device.take_device_memory(size, how)

    def discard(self) -> None:
        self.device.__exit__()

    def stop(self, provenance: dict[str, str]) -> Trace:
        trace = self.device.trace(provenance)
        self.device.__exit__()
        if self.card.wrong_address:
            assert trace.decisions is not None
            addresses = trace.decisions.addr.copy()
            addresses[-1] += 512
            trace = replace(trace, decisions=replace(trace.decisions, addr=addresses))
        return replace(trace, source="cuda")


class ForkedWorkers:
    """``WorkerServer`` with the test's own process as the server, so that workers know the stand-in.

    Attributes:
        preloaded: for each server, the files it was to import.
    """

    preloaded: ClassVar[list[list[str]]] = []

    def __init__(self, preload: Iterable[Path], jobs: int, timeout: float) -> None:
        self.preloaded.append([file.name for file in preload])

    @contextlib.contextmanager
    def running(self) -> Iterator[ForkedWorkers]:
        yield self

    def run(
        self, jobs: Sequence[Job], finished: Callable[[Job], Iterable[Job]], started: Callable[[Job], None]
    ) -> None:
        waiting = list(jobs)
        while waiting:
            job = waiting.pop(0)
            started(job)
            pid = os.fork()
            if pid == 0:
                try:
                    job.target(*job.args)
                except BaseException:
                    os.write(2, traceback.format_exc().encode())
                finally:
                    os._exit(1)
            job.code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            waiting[:0] = finished(job)


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> StandInCard:
    """Put the stand-in in the place of CUDA."""
    card = StandInCard(folder / "cuda.log")
    ForkedWorkers.preloaded.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", card.properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (card.free, TOTAL))
    monkeypatch.setattr(worker, "CudaRecorder", card.recorder)
    monkeypatch.setattr(runner, "WorkerServer", ForkedWorkers)
    monkeypatch.setattr(card_here, "WorkerServer", ForkedWorkers)
    return card
