"""Request and decision columns, and the table of stacks."""

from __future__ import annotations

import numpy as np
import pytest

from fragscope.trace import (
    NO_ID,
    NO_STACK,
    DecisionKind,
    DecisionLog,
    Frame,
    Observation,
    RequestKind,
    RequestLog,
    StackTable,
    Trace,
)
from fragscope.trace.events import DECISION_DTYPES, REQUEST_DTYPES

INNER, OUTER = Frame("a.py", 1, "f"), Frame("b.py", 2, "g")


def test_stored_numbers_of_kinds_never_change() -> None:
    assert {k.name: k.value for k in RequestKind} == {
        "ALLOC": 1, "FREE": 2, "RECORD_STREAM": 3, "USES_DONE": 4, "EMPTY_CACHE": 5, "RELEASE_SEEN": 6,
        "MEMORY_FRACTION": 7, "PHASE_BEGIN": 8, "PHASE_END": 9, "OBSERVATION": 10, "POOL_CREATE": 11,
        "SCOPE_OPEN": 12, "SCOPE_CLOSE": 13, "POOL_RELEASE": 14, "SETTINGS": 15, "CAPTURE_BEGIN": 16,
        "CAPTURE_END": 17, "START": 18, "HELD": 19, **new_kinds(),
    }  # fmt: skip
    assert {k.name: k.value for k in DecisionKind} == {
        "SEGMENT_ALLOC": 1, "SEGMENT_FREE": 2, "ALLOC": 3, "FREE_REQUESTED": 4, "FREE_COMPLETED": 5, "OOM": 6,
        "SEGMENT_MAP": 7, "SEGMENT_UNMAP": 8,
    }  # fmt: skip


def new_kinds() -> dict[str, int]:
    """Kinds that a later version added after those fixed here."""
    return {k.name: k.value for k in RequestKind if k.value > 19}


def test_a_log_gives_columns_of_the_declared_types() -> None:
    log = RequestLog()
    assert log.append(RequestKind.ALLOC, id=0, size=2**40, stream=2**62, stack=3) == 0
    assert log.append(RequestKind.FREE, id=0) == 1
    requests = log.finish()
    assert len(requests) == len(log) == 2
    assert requests.size.tolist() == [2**40, 0]
    assert requests.stack.tolist() == [3, NO_STACK]
    for name, dtype in REQUEST_DTYPES.items():
        assert getattr(requests, name).dtype == np.dtype(dtype)


def test_decisions_carry_the_row_of_the_request_being_served() -> None:
    log = DecisionLog()
    log.append(DecisionKind.SEGMENT_ALLOC, NO_ID, 0x1000, 512, 0, 0)
    log.request = 7
    log.append(DecisionKind.ALLOC, 1, 0x1000, 512, 0, 0)
    decisions = log.finish()
    assert decisions.request.tolist() == [0, 7]
    for name, dtype in DECISION_DTYPES.items():
        assert getattr(decisions, name).dtype == np.dtype(dtype)


def test_a_log_goes_on_after_columns_were_taken() -> None:
    log = RequestLog()
    first = log.finish()
    log.append(RequestKind.EMPTY_CACHE)
    assert (len(first), len(log.finish())) == (0, 1)


def test_equal_stacks_share_an_index() -> None:
    table = StackTable()
    assert table.add((INNER, OUTER)) == 0
    assert table.add((INNER,)) == 1
    assert table.add((Frame("a.py", 1, "f"), Frame("b.py", 2, "g"))) == 0
    assert list(table) == [(INNER, OUTER), (INNER,)]


def test_no_stack_is_an_index_too() -> None:
    table = StackTable(((INNER,),))
    assert table.add(()) == NO_STACK
    assert table[NO_STACK] == ()
    assert len(table) == 1


def test_a_frame_reads_as_a_place() -> None:
    assert str(INNER) == "a.py:1 (f)"


def test_stripping_removes_stacks_and_places() -> None:
    log = RequestLog()
    log.append(RequestKind.ALLOC, id=0, size=1, stack=0)
    log.append(RequestKind.OBSERVATION, size=0, stack=0)
    trace = Trace(log.finish(), stacks=StackTable(((INNER,),)), observations=(Observation("mem_get_info", "a.py:3"),))
    stripped = trace.strip_stacks()
    assert len(stripped.stacks) == 0
    assert stripped.requests.stack.tolist() == [NO_STACK, NO_STACK]
    assert stripped.observations == (Observation("mem_get_info", ""),)
    assert trace.requests.stack.tolist() == [0, 0], "the original stays as it was"


@pytest.mark.parametrize(("kind", "count"), [(RequestKind.ALLOC, 2), (RequestKind.FREE, 0)])
def test_count_by_kind(kind: RequestKind, count: int) -> None:
    log = RequestLog()
    log.append(RequestKind.ALLOC, id=0, size=1)
    log.append(RequestKind.ALLOC, id=1, size=1)
    assert Trace(log.finish()).count(kind) == count
