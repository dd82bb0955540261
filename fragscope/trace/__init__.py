"""Requests, Decisions and the Trace that holds both; readers and writers."""

from fragscope.trace.events import (
    ASKING,
    DECISION_DTYPES,
    FRACTION_UNIT,
    NO_ID,
    NO_STACK,
    UNKNOWN_SIZE,
    UNKNOWN_STREAM,
    DecisionKind,
    DecisionLog,
    Decisions,
    Frame,
    RequestKind,
    RequestLog,
    Requests,
    Stack,
    StackTable,
)
from fragscope.trace.load import load_trace
from fragscope.trace.sidecar import with_sidecar
from fragscope.trace.store import write_trace
from fragscope.trace.trace import DEFAULT_POOL, BlockState, Loss, Observation, PoolId, SegmentState, Settings, Trace
from fragscope.trace.window import OwnRequests, own_requests

__all__ = [
    "ASKING",
    "DECISION_DTYPES",
    "DEFAULT_POOL",
    "FRACTION_UNIT",
    "NO_ID",
    "NO_STACK",
    "UNKNOWN_SIZE",
    "UNKNOWN_STREAM",
    "BlockState",
    "DecisionKind",
    "DecisionLog",
    "Decisions",
    "Frame",
    "Loss",
    "Observation",
    "OwnRequests",
    "PoolId",
    "RequestKind",
    "RequestLog",
    "Requests",
    "SegmentState",
    "Settings",
    "Stack",
    "StackTable",
    "Trace",
    "load_trace",
    "own_requests",
    "with_sidecar",
    "write_trace",
]
