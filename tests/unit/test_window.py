"""A stretch of a Trace by itself: what is kept, what is carried over, what is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
from builders import begun_late, own_settings, recording
from requests_of import MIB, trace_of

from fragscope.allocator import replay
from fragscope.trace import (
    Loss,
    RequestKind,
    RequestLog,
    Requests,
    SegmentState,
    Settings,
    Trace,
    own_requests,
)

ALLOC, FREE = RequestKind.ALLOC, RequestKind.FREE
CREATE, OPEN, CLOSE, RELEASE = (
    RequestKind.POOL_CREATE,
    RequestKind.SCOPE_OPEN,
    RequestKind.SCOPE_CLOSE,
    RequestKind.POOL_RELEASE,
)


def rows(trace: Trace, *columns: str) -> list[tuple[Any, ...]]:
    """Kind and some columns of every request."""
    chosen = zip(*(getattr(trace.requests, c).tolist() for c in ("kind", *columns)), strict=True)
    return [(RequestKind(kind), *rest) for kind, *rest in chosen]


def logged(*requests: tuple[Any, ...], **fields: Any) -> Trace:
    """A trace of ``(kind, {column: value})``."""
    log = RequestLog()
    for kind, values in requests:
        log.append(kind, **values)
    pools = fields.pop("pools", ((0, 0), (0, 7), (9, 0), (0, 8)))
    return Trace(log.finish(), pools=pools, phases=("", "a", "b"), **fields)


def test_memory_from_before_is_left_out_with_all_that_is_done_to_it():
    trace = trace_of(
        ("alloc", 5, MIB),
        ("alloc", 6, MIB, 64),
        ("alloc", 9, 2 * MIB),  # the stretch begins
        ("free", 5),
        ("uses", 6, 128),
        ("uses", 9, 64),
        ("free", 9),
        ("free", 6),
        ("done", 6),
        ("done", 9),
    )
    own = own_requests(trace, 2)
    assert rows(own.trace, "id", "stream") == [
        (ALLOC, 0, 0),
        (RequestKind.RECORD_STREAM, 0, 1),
        (FREE, 0, 0),
        (RequestKind.USES_DONE, 0, 0),
    ]
    assert (own.foreign, own.failed) == (4, 0)
    assert own.trace.decisions is None


def test_an_id_that_is_used_again_is_foreign_until_the_stretch_asks_for_it():
    trace = trace_of(("alloc", 1, MIB), ("free", 1), ("alloc", 1, 2 * MIB), ("free", 1))
    own = own_requests(trace, 1)
    assert rows(own.trace, "size") == [(ALLOC, 2 * MIB), (FREE, 0)]
    assert own.foreign == 1


def test_what_stood_when_recording_began_is_from_before():
    state = SegmentState(2 << 30, 2 * MIB, 0, 0, ((2 << 30, 2 * MIB, "allocated"),))
    trace = logged(
        (RequestKind.START, {}),
        (RequestKind.HELD, {"id": 3, "size": 2 * MIB}),
        (ALLOC, {"id": 4, "size": MIB}),
        (FREE, {"id": 3}),
        initial=(state,),
        card="a card",
        device_total=2 << 40,
        settings=Settings(conf="max_split_size_mb:20", memory_fraction=0.5, capacity=2 << 35),
    )
    own = own_requests(trace)
    assert rows(own.trace, "id") == [(ALLOC, 0)]
    assert own.foreign == 1
    assert (own.trace.initial, own.trace.card, own.trace.device_total) == ((), None, None)
    assert own.trace.settings == Settings(conf="max_split_size_mb:20")


def test_requests_that_failed_gave_the_program_nothing():
    trace = trace_of(("alloc", 0, MIB), ("alloc", 1, 2**40), ("seen", "OutOfMemoryError"), ("free", 0), failed=[1])
    own = own_requests(trace)
    assert rows(own.trace, "id") == [(ALLOC, 0), (RequestKind.OBSERVATION, -1), (FREE, 0)]
    assert own.failed == 1


def test_the_stretch_ends_where_it_is_told_to():
    trace = trace_of(("alloc", 0, MIB), ("alloc", 1, MIB), ("free", 1), ("alloc", 2, MIB))
    assert rows(own_requests(trace, 1, 3).trace, "id") == [(ALLOC, 0), (FREE, 0)]
    assert rows(own_requests(trace, 3, 3).trace) == []


def test_settings_from_before_remain_in_force():
    trace = logged(
        (RequestKind.SETTINGS, {"size": 0}),
        (ALLOC, {"id": 0, "size": MIB}),
        (RequestKind.SETTINGS, {"size": 1}),
        (ALLOC, {"id": 1, "size": MIB}),
        confs=("expandable_segments:True", "max_split_size_mb:64"),
    )
    own = own_requests(trace, 3).trace
    assert rows(own, "size") == [(RequestKind.SETTINGS, 0), (RequestKind.SETTINGS, 1), (ALLOC, MIB)]


def test_a_pool_from_before_has_its_users_and_scopes_and_no_memory():
    trace = logged(
        (CREATE, {"pool": 1, "size": 2}),
        (OPEN, {"pool": 1}),
        (OPEN, {"pool": 2}),  # nothing of this one is asked for
        (ALLOC, {"id": 0, "size": MIB, "pool": 1}),
        (ALLOC, {"id": 1, "size": MIB, "pool": 1}),  # the stretch begins
        (CLOSE, {"pool": 2}),
        (RELEASE, {"pool": 2}),
        (CLOSE, {"pool": 1}),
        (RELEASE, {"pool": 1}),
        (RELEASE, {"pool": 1}),
        (RELEASE, {"pool": 1}),  # more than there were
    )
    own = own_requests(trace, 4)
    assert rows(own.trace, "pool", "size") == [
        (CREATE, 1, 2),
        (OPEN, 1, 0),
        (ALLOC, 1, MIB),
        (CLOSE, 1, 0),
        (RELEASE, 1, 0),
        (RELEASE, 1, 0),
    ]
    assert own.foreign == 3
    assert own.trace.pools == ((0, 0), (0, 1))


def test_users_that_were_gone_before_are_not_carried_over():
    trace = logged(
        (CREATE, {"pool": 1}),
        (OPEN, {"pool": 1}),
        (CLOSE, {"pool": 1}),
        (RELEASE, {"pool": 1}),
        (ALLOC, {"id": 0, "size": MIB, "pool": 1}),
        (CLOSE, {"pool": 1}),
        (RELEASE, {"pool": 1}),
    )
    own = own_requests(trace, 4)
    assert rows(own.trace) == [(CREATE,), (ALLOC,), (RELEASE,)]


def test_a_pool_that_nobody_made_has_the_user_its_first_request_gives_it():
    trace = logged((ALLOC, {"id": 0, "size": MIB, "pool": 3}), (RELEASE, {"pool": 3}), (RELEASE, {"pool": 3}))
    assert rows(own_requests(trace).trace, "pool") == [(ALLOC, 1), (RELEASE, 1)]


def test_a_capture_that_is_under_way_is_carried_over():
    begin, end = RequestKind.CAPTURE_BEGIN, RequestKind.CAPTURE_END
    trace = logged((begin, {}), (end, {}), (begin, {}), (ALLOC, {"id": 0, "size": MIB}), (end, {}), (end, {}))
    assert rows(own_requests(trace, 3).trace) == [(begin,), (ALLOC,), (end,)]


def test_phases_are_those_that_begin_in_the_stretch():
    begin, end = RequestKind.PHASE_BEGIN, RequestKind.PHASE_END
    trace = logged(
        (begin, {"phase": 1}),
        (ALLOC, {"id": 0, "size": MIB, "phase": 1}),
        (end, {"phase": 1}),
        (begin, {"phase": 2}),
        (end, {"phase": 2}),
    )
    assert rows(own_requests(trace, 1).trace, "phase") == [(ALLOC, 1), (begin, 2), (end, 2)]


def test_streams_and_pools_are_named_by_their_first_use():
    trace = logged(
        (ALLOC, {"id": 7, "size": MIB, "stream": 999, "pool": 2}),
        (ALLOC, {"id": 4, "size": MIB, "stream": 5, "pool": 1}),
        (RequestKind.RECORD_STREAM, {"id": 7, "stream": -1}),
        (ALLOC, {"id": 1, "size": MIB, "stream": 999}),
    )
    own = own_requests(trace).trace
    assert rows(own, "id", "stream", "pool") == [
        (ALLOC, 0, 1, 1),
        (ALLOC, 1, 2, 2),
        (RequestKind.RECORD_STREAM, 0, -1, 0),
        (ALLOC, 2, 1, 0),
    ]
    assert own.pools == ((0, 0), (1, 0), (0, 2))  # of a graph, of a MemPool


def test_threads_are_named_by_their_first_use():
    mine = [(ALLOC, {"id": 7, "size": MIB, "thread": 4}), (ALLOC, {"id": 8, "size": MIB, "thread": 9})]
    again = [(ALLOC, {"id": 9, "size": MIB, "thread": 4})]
    trace = logged((ALLOC, {"id": 1, "size": MIB, "thread": 2}), *mine, *again)
    assert rows(own_requests(trace, 1).trace, "thread") == [(ALLOC, 0), (ALLOC, 1), (ALLOC, 0)]


def test_releases_that_the_allocator_made_by_itself_are_left_out():
    trace = logged((RequestKind.RELEASE_SEEN, {}), (ALLOC, {"id": 0, "size": MIB}), (RequestKind.EMPTY_CACHE, {}))
    assert rows(own_requests(trace).trace) == [(ALLOC,), (RequestKind.EMPTY_CACHE,)]


def test_losses_are_those_that_concern_the_stretch():
    codes = ("late_start", "start_state", "empty_cache", "record_stream", "pool_ids", "gap")
    lost = tuple(Loss(code, "", 1) for code in codes)
    plain = logged((ALLOC, {"id": 0, "size": MIB}), lost=lost)
    assert [x.code for x in own_requests(plain).trace.lost] == ["gap"]
    every = logged(
        (ALLOC, {"id": 0, "size": MIB, "pool": 1}),
        (RequestKind.RECORD_STREAM, {"id": 0, "stream": 5}),
        (RequestKind.EMPTY_CACHE, {}),
        lost=lost,
    )
    assert [x.code for x in own_requests(every).trace.lost] == ["empty_cache", "record_stream", "pool_ids", "gap"]


def test_a_recording_from_process_start_is_its_own_stretch():
    trace = recording("fp8-dsv3-tp8.orig.default")
    settings = own_settings(trace)
    whole, own = replay(trace, settings), own_requests(trace)
    assert (own.foreign, own.failed) == (0, 0)
    again = replay(own.trace, settings)
    assert (again.whole.peak, again.whole.end, again.whole.calls) == (
        whole.whole.peak,
        whole.whole.end,
        whole.whole.calls,
    )


def test_a_recording_that_began_late_counts_only_what_it_asked_for():
    name = "fp8-dsv3-tp8.fixed.default"
    late = begun_late(name, 0.5)
    assert late.initial
    own = own_requests(late)
    r = late.requests
    ours = set(r.id[r.kind == ALLOC].tolist())
    live, most = 0, 0
    sizes: dict[int, int] = {}
    for kind, id, size in zip(r.kind.tolist(), r.id.tolist(), r.size.tolist(), strict=True):
        if kind == ALLOC:
            sizes[id] = size
            live += size
        elif kind == FREE and id in ours:
            live -= sizes.pop(id)
        most = max(most, live)
    decided = replay(own.trace, own_settings(late))
    assert (decided.whole.peak.requested, decided.whole.end.requested) == (most, live)
    assert own.foreign > 0
    assert not own.trace.count(RequestKind.HELD)


def test_nothing_is_shared_that_could_change_the_original():
    trace = trace_of(("alloc", 5, MIB, 64), ("free", 5))
    before = {name: getattr(trace.requests, name).copy() for name in Requests.__slots__}
    own = own_requests(trace)
    own.trace.requests.id[:] = 99
    for name, column in before.items():
        assert np.array_equal(getattr(trace.requests, name), column)
