"""PyTorch memory snapshots (``torch.cuda.memory._snapshot()``, 2.9 and newer) as Traces.

A snapshot lists what the allocator did; what the program asked for is read out of it. What cannot be known is listed in
``Trace.lost``.
"""

from fragscope.trace.snapshot.read import read_snapshot, snapshot_to_trace, state_before

__all__ = ["read_snapshot", "snapshot_to_trace", "state_before"]
