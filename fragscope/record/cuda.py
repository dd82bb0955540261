"""Recording a phase on a real GPU, through PyTorch's own allocator history.

The measured phase is marked by its position in the history. PyTorch's statistics over the phase are kept beside it, so
that the model's figures can be held against them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fragscope.trace import RequestKind, Trace
from fragscope.trace.snapshot import PhaseMark, snapshot_to_trace

_MAX_ENTRIES = 20_000_000
_STATISTICS = ("allocated_bytes", "active_bytes", "reserved_bytes", "requested_bytes", "inactive_split_bytes")


@dataclass(frozen=True, slots=True)
class PhaseStatistics:
    """PyTorch's own peaks and ends of the measured phase, in bytes, by counter name without ``_bytes``."""

    peak: dict[str, int]
    end: dict[str, int]


class CudaRecorder:
    """Records everything the current process allocates on ``cuda:0`` from now on.

    Attributes:
        statistics: of the measured phase, once it is over.
        total: bytes of device memory.
    """

    def __init__(self) -> None:
        torch.cuda.init()
        _, self.total = torch.cuda.mem_get_info()
        self.statistics: PhaseStatistics | None = None
        self._marks: list[PhaseMark] = []
        torch.cuda.memory._record_memory_history(
            enabled="all", context="alloc", stacks="python", max_entries=_MAX_ENTRIES, clear_history=True
        )

    def begin_phase(self, name: str) -> None:
        """The measured phase begins here; peaks start over."""
        torch.cuda.synchronize()
        self._marks.append(PhaseMark(self._position(), RequestKind.PHASE_BEGIN, name))
        torch.cuda.reset_peak_memory_stats()

    def end_phase(self) -> None:
        """The measured phase is over."""
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        self.statistics = PhaseStatistics(
            peak={s.removesuffix("_bytes"): stats[f"{s}.all.peak"] for s in _STATISTICS},
            end={s.removesuffix("_bytes"): stats[f"{s}.all.current"] for s in _STATISTICS},
        )
        self._marks.append(PhaseMark(self._position(), RequestKind.PHASE_END, ""))

    def finish(self, provenance: dict[str, str]) -> Trace:
        """Stop recording and return the Trace."""
        snapshot: Any = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        trace = snapshot_to_trace(snapshot, Path("the recording"), device=0, marks=self._marks)
        return replace(
            trace,
            torch=str(torch.__version__),
            device_total=self.total,
            lost=tuple(x for x in trace.lost if x.code != "torch_release"),
            source="cuda",
            provenance={**provenance, "gpu": torch.cuda.get_device_name(0)},
        )

    @staticmethod
    def _position() -> int:
        """Events in the history so far."""
        snapshot: Any = torch.cuda.memory._snapshot()
        return len(snapshot["device_traces"][0])
