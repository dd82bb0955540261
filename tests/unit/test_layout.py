"""The layout at one event, held against what the GPU's allocator itself listed."""

import pytest
from builders import TRACES, replayed

from fragscope.errors import UsageError
from fragscope.measure import layout_at, timeline
from fragscope.trace import NO_ID, DecisionKind, DecisionLog, RequestKind, RequestLog, Trace, load_trace

MIB = 1024**2


@pytest.mark.parametrize(
    "name",
    ["fp8-dsv3-tp8.orig.default", "moe_list_stack-default", "train_vit-default", "streams-default", "oom-default"],
)
def test_the_last_layout_is_the_segment_list_of_the_recording(name: str) -> None:
    recorded = load_trace(TRACES / f"{name}.pickle.xz").final
    assert recorded is not None
    trace = replayed(name).trace
    layout = layout_at(trace, len(trace.requests) - 1)
    ours = [(s.addr, s.size, s.stream, tuple((b.addr, b.size, b.state) for b in s.blocks)) for s in layout]
    assert ours == [(s.addr, s.size, s.stream, s.blocks) for s in recorded]


@pytest.mark.parametrize("name", ["fp8-dsv3-tp8.fixed.default", "streams-default", "oom-default"])
def test_a_layout_adds_up_to_the_counters_at_its_event(name: str) -> None:
    trace = replayed(name).trace
    line = timeline(trace)
    rows = len(trace.requests)
    for row in (0, rows // 5, rows // 3, rows // 2, rows - 2):
        layout = layout_at(trace, row)
        assert sum(s.size for s in layout) == line.reserved[row]
        assert sum(s.stranded for s in layout) == line.stranded[row]
        states = {
            state: sum(b.size for s in layout for b in s.blocks if b.state == state)
            for state in ("allocated", "pending", "free")
        }
        assert states["allocated"] == line.allocated[row]
        assert states["allocated"] + states["pending"] == line.active[row]
        for segment in layout:
            assert segment.blocks[0].addr == segment.addr
            assert sum(b.size for b in segment.blocks) == segment.size


def _trace() -> Trace:
    requests, decisions = RequestLog(), DecisionLog()
    decisions.append(DecisionKind.SEGMENT_ALLOC, NO_ID, 0, 8 * MIB, 0, 0)
    for id_ in range(4):
        decisions.request = requests.append(RequestKind.ALLOC, id=id_, size=2 * MIB)
        decisions.append(DecisionKind.ALLOC, id_, 2 * MIB * id_, 2 * MIB, 0, 0)
    for id_ in (1, 2):
        decisions.request = requests.append(RequestKind.FREE, id=id_)
        decisions.append(DecisionKind.FREE_REQUESTED, id_, 2 * MIB * id_, 2 * MIB, 0, 0)
        decisions.append(DecisionKind.FREE_COMPLETED, id_, 2 * MIB * id_, 2 * MIB, 0, 0)
    return Trace(requests=requests.finish(), decisions=decisions.finish())


def test_neighbouring_holes_are_one_hole() -> None:
    (segment,) = layout_at(_trace(), 5)
    assert [(b.addr, b.size, b.state, b.id) for b in segment.blocks] == [
        (0, 2 * MIB, "allocated", 0),
        (2 * MIB, 4 * MIB, "free", NO_ID),
        (6 * MIB, 2 * MIB, "allocated", 3),
    ]
    assert segment.stranded == 4 * MIB


def test_a_row_the_trace_does_not_have_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="event 6: the trace has events 0 to 5"):
        layout_at(_trace(), 6)
