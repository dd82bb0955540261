"""Device memory outside the caching allocator, from the samples a recorder took."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fragscope.trace import DecisionKind, RequestKind, Trace

Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NonTorch:
    """The non_torch series of a recording; bytes.

    A sample sees one instant, so that peaks are lower bounds: memory that was taken and given back between two samples
    was never seen. What the process did while a sample was taken can put it off by the size of a segment.

    Attributes:
        rows: shape ``(n,)``, row of each sample in the Trace's requests.
        non_torch: shape ``(n,)``, bytes in use less those that the allocator had reserved then.
        device_wide: whether other processes' memory is in it.
        peak: highest sample.
        peak_hbm: highest sum of reserved and non_torch, at samples and at every event with the sample before it.
    """

    rows: npt.NDArray[np.int64]
    non_torch: Bytes
    device_wide: bool
    peak: int
    peak_hbm: int


def non_torch(trace: Trace) -> NonTorch | None:
    """The non_torch series of a Trace; None where nothing was sampled or its decisions are not there."""
    rows = np.flatnonzero(trace.requests.kind == RequestKind.NON_TORCH)
    d = trace.decisions
    if not len(rows) or d is None:
        return None
    sign = np.zeros(len(d), dtype=np.int64)
    sign[(d.kind == DecisionKind.SEGMENT_ALLOC) | (d.kind == DecisionKind.SEGMENT_MAP)] = 1
    sign[(d.kind == DecisionKind.SEGMENT_FREE) | (d.kind == DecisionKind.SEGMENT_UNMAP)] = -1
    moved = np.flatnonzero(sign)
    at = d.request[moved]
    reserved = np.concatenate([[0], np.cumsum(sign[moved] * d.size[moved])])
    held = reserved[np.searchsorted(at, rows, side="left")]
    outside = np.asarray(trace.requests.size[rows], dtype=np.int64) - held
    # Between two samples the sum moves with the segments alone, as far as anybody knows.
    before = np.searchsorted(rows, at, side="right") - 1
    sums = reserved[1:] + outside[np.maximum(before, 0)]
    peak_hbm = max(int((held + outside).max()), int(sums.max()) if len(sums) else 0)
    device_wide = any(x.code == "non_torch_device_wide" for x in trace.lost)
    return NonTorch(rows, outside, device_wide, int(outside.max()), peak_hbm)
