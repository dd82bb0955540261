"""The layout at one event, held against what the GPU's allocator itself listed."""

import pytest
from builders import TRACES, replayed
from driven_traces import Driven

from fragscope.errors import UsageError
from fragscope.measure import layout_at, timeline
from fragscope.trace import NO_ID, DecisionKind, DecisionLog, RequestKind, RequestLog, Trace, load_trace

MIB = 1024**2


@pytest.mark.parametrize(
    "name",
    [
        "fp8-dsv3-tp8.orig.default",
        "fp8-dsv3-tp8.newest.expandable",
        "fp8-dsv3-tp8.newest.split20",
        "moe_list_stack-default",
        "train_vit-default",
        "streams-default",
        "oom-default",
    ],
)
def test_the_last_layout_is_the_segment_list_of_the_recording(name: str) -> None:
    recorded = load_trace(TRACES / f"{name}.pickle.xz").final
    assert recorded is not None
    trace = replayed(name).trace
    layout = layout_at(trace, len(trace.requests) - 1)
    ours = [
        (s.addr, s.size, s.stream, s.pool, s.expandable, tuple((b.addr, b.size, b.state) for b in s.blocks))
        for s in layout
    ]
    assert ours == [(s.addr, s.size, s.stream, s.pool, s.expandable, s.blocks) for s in recorded]


@pytest.mark.parametrize(
    "name",
    ["fp8-dsv3-tp8.fixed.default", "fp8-dsv3-tp8.newest.expandable", "streams-default", "oom-default"],
)
def test_a_layout_adds_up_to_the_counters_at_its_event(name: str) -> None:
    trace = replayed(name).trace
    line = timeline(trace)
    rows = len(trace.requests)
    for row in (0, rows // 5, rows // 3, rows // 2, rows - 2):
        layout = layout_at(trace, row)
        assert sum(s.size for s in layout) == line.reserved[row]
        assert sum(s.stranded for s in layout) == line.stranded[row]
        assert sum(s.releasable for s in layout) == line.releasable[row]
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


def test_a_mapped_range_ends_where_pages_are_unmapped_and_joins_where_they_come_back() -> None:
    made = Driven("2.11", 1024 * MIB, 1024 * MIB, "expandable_segments:True")
    for id_ in range(3):
        made.alloc(id_, 20 * MIB)
    made.free(1)
    made.empty_cache()
    made.alloc(3, 15 * MIB)
    base = layout_at(made.trace, 2)[0].addr

    def ranges(row: int) -> list[tuple[int, int]]:
        return [((s.addr - base) // MIB, s.size // MIB) for s in layout_at(made.trace, row)]

    assert [ranges(row) for row in (0, 2, 3, 4)] == [[(0, 20)], [(0, 60)], [(0, 60)], [(0, 20), (40, 20)]]
    (joined,) = layout_at(made.trace, 5)
    assert joined.expandable
    assert [(b.size // MIB, b.state) for b in joined.blocks] == [
        (20, "allocated"), (15, "allocated"), (5, "free"), (20, "allocated"),
    ]  # fmt: skip
    assert (joined.stranded, joined.releasable) == (5 * MIB, 0)


def test_a_private_pool_with_users_keeps_what_is_idle() -> None:
    made = Driven("2.11", 1024 * MIB, 1024 * MIB)
    made.create_pool(1)
    made.alloc(0, 5 * MIB, pool=1)
    made.release_pool(1)
    (held,), (released,) = layout_at(made.trace, 1), layout_at(made.trace, 2)
    assert (held.pool, held.pool_idle, held.stranded, held.releasable) == (1, 15 * MIB, 0, 0)
    assert (released.pool, released.pool_idle, released.stranded, released.releasable) == (1, 0, 15 * MIB, 0)


def test_a_row_the_trace_does_not_have_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="event 6: the trace has events 0 to 5"):
        layout_at(_trace(), 6)
