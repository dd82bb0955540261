"""Kinds of requests and decisions as plain integers, which interpreted code compares faster than enumerations."""

from __future__ import annotations

from fragscope.trace import DecisionKind, RequestKind

NOTHING = 0  # no request: a row that asks for nothing
REQUEST_ALLOC = int(RequestKind.ALLOC)
REQUEST_FREE = int(RequestKind.FREE)
REQUEST_RECORD_STREAM = int(RequestKind.RECORD_STREAM)
REQUEST_USES_DONE = int(RequestKind.USES_DONE)
REQUEST_EMPTY_CACHE = int(RequestKind.EMPTY_CACHE)
REQUEST_OBSERVATION = int(RequestKind.OBSERVATION)
REQUEST_SCOPE_OPEN = int(RequestKind.SCOPE_OPEN)
REQUEST_SCOPE_CLOSE = int(RequestKind.SCOPE_CLOSE)
REQUEST_POOL_RELEASE = int(RequestKind.POOL_RELEASE)
REQUEST_HELD = int(RequestKind.HELD)
REQUEST_RAW_ALLOC = int(RequestKind.RAW_ALLOC)
REQUEST_RAW_FREE = int(RequestKind.RAW_FREE)

DECISION_SEGMENT_ALLOC = int(DecisionKind.SEGMENT_ALLOC)
DECISION_SEGMENT_FREE = int(DecisionKind.SEGMENT_FREE)
DECISION_ALLOC = int(DecisionKind.ALLOC)
DECISION_FREE_REQUESTED = int(DecisionKind.FREE_REQUESTED)
DECISION_FREE_COMPLETED = int(DecisionKind.FREE_COMPLETED)
DECISION_OOM = int(DecisionKind.OOM)
DECISION_SEGMENT_MAP = int(DecisionKind.SEGMENT_MAP)
DECISION_SEGMENT_UNMAP = int(DecisionKind.SEGMENT_UNMAP)
