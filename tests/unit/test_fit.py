"""The smallest memory for requests, and why less does not do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from requests_of import MIB, random_requests, trace_of

from fragscope.allocator import replay
from fragscope.errors import UsageError
from fragscope.search import Subject, fit, subject_of
from fragscope.search.fit import PAGE, UNLIMITED
from fragscope.trace import Trace


def subject(*requests: tuple, **fields: object) -> Subject:
    return subject_of(trace_of(*requests, **fields), "t")


def smallest(subject: Subject, conf: str = "") -> int:
    """The smallest capacity from which on all run, each page tried."""
    settings = replace(subject.settings, conf=conf, limit=UNLIMITED)

    def runs(pages: int) -> bool:
        return not replay(subject.tape, replace(settings, capacity=pages * PAGE), compiled=False).whole.ooms

    top = replay(subject.tape, replace(settings, capacity=UNLIMITED), compiled=False).whole.peak.reserved // PAGE
    return max([-1, *(p for p in range(top) if not runs(p))]) * PAGE + PAGE


def test_cached_memory_goes_back_before_a_request_fails() -> None:
    f = fit(subject(("alloc", 0, 30 * MIB), ("free", 0), ("alloc", 1, 40 * MIB)), "")
    assert f.unlimited == 70 * MIB, "with memory enough the first segment stays"
    assert f.capacity == f.lowest == 40 * MIB
    assert (f.retries, f.calls.free, f.calls_unlimited.free) == (1, 1, 0)
    x = f.failure
    assert x is not None
    assert (x.capacity, x.event, x.requested, x.reserved, x.allocated) == (38 * MIB, 2, 40 * MIB, 0, 0)
    assert (x.left, x.needed, x.idle) == (38 * MIB, 40 * MIB, ())


def test_expandable_segments_need_less_but_map_whole_pages() -> None:
    s = subject(("alloc", 0, 30 * MIB), ("free", 0), ("alloc", 1, 50 * MIB))
    f = fit(s, "expandable_segments:True")
    assert f.capacity == f.unlimited == 60 * MIB, "three pages of 20 MiB"
    assert f.failure is not None
    assert f.failure.needed == 60 * MIB


def reasons(s: Subject, conf: str = "") -> dict[str, tuple[int, int]]:
    f = fit(s, conf)
    assert f.failure is not None
    return {idle.code: (idle.bytes, idle.pieces) for idle in f.failure.idle}


def test_idle_pieces_beside_live_blocks_are_too_small() -> None:
    s = subject(("alloc", 0, 8 * MIB), ("alloc", 1, 8 * MIB), ("free", 0), ("alloc", 2, 9 * MIB))
    f = fit(s, "")
    assert f.capacity == 40 * MIB, "two segments of 20 MiB"
    x = f.failure
    assert x is not None
    assert (x.event, x.reserved, x.allocated, x.stranded) == (3, 20 * MIB, 8 * MIB, 12 * MIB)
    (idle,) = x.idle
    assert (idle.code, idle.bytes, idle.pieces, idle.largest) == ("too_small", 12 * MIB, 2, 8 * MIB)


def test_idle_memory_of_another_stream_is_no_use() -> None:
    s = subject(("alloc", 0, 8 * MIB), ("alloc", 1, 8 * MIB, 5))
    assert reasons(s) == {"other_stream": (12 * MIB, 1)}


def test_idle_memory_of_the_other_size_class_is_no_use() -> None:
    s = subject(("alloc", 0, 512), ("alloc", 1, 8 * MIB))
    assert reasons(s) == {"other_size_class": (2 * MIB - 512, 1)}
    assert reasons(subject(("alloc", 0, 8 * MIB), ("alloc", 1, 512))) == {"other_size_class": (12 * MIB, 1)}


def test_idle_memory_beyond_the_split_limit_is_no_use() -> None:
    # Expandable pages of 64 MiB: the hole from 10 to 120 MiB holds no whole one, and is above the limit.
    s = subject(
        ("alloc", 0, 10 * MIB), ("alloc", 1, 110 * MIB), ("alloc", 2, 8 * MIB), ("free", 1), ("alloc", 3, 40 * MIB)
    )
    conf = "expandable_segments:True,large_segment_size_mb:64,max_split_size_mb:64"
    assert reasons(s, conf) == {"split_limit": (110 * MIB, 1)}
    assert fit(s, "expandable_segments:True,large_segment_size_mb:64").capacity == 128 * MIB


def test_memory_that_another_stream_still_uses_is_waited_for_before_a_request_fails() -> None:
    s = subject(("alloc", 0, 30 * MIB), ("uses", 0, 9), ("free", 0), ("alloc", 1, 30 * MIB))
    f = fit(s, "")
    assert (f.capacity, f.unlimited) == (30 * MIB, 60 * MIB)
    assert f.calls.sync == 1


def test_more_memory_can_be_worse_and_then_the_answer_is_the_safe_one() -> None:
    sizes = [k * MIB for k in (3, 8, 12, 21, 22, 24, 30, 34, 40, 48)]
    s = subject(*random_requests(171, 24, sizes))
    f = fit(s, "", compiled=False)
    assert f.lowest is not None
    assert f.capacity is not None
    assert f.lowest < f.failing[0] <= f.failing[-1] == f.capacity - PAGE
    assert f.capacity == smallest(s)
    assert f.failure is not None
    assert f.failure.capacity == f.failing[-1]


@pytest.mark.parametrize("conf", ["", "expandable_segments:True", "max_split_size_mb:20"])
@pytest.mark.parametrize("seed", range(6))
def test_the_answer_is_that_of_trying_every_page(seed: int, conf: str) -> None:
    s = subject(*random_requests(seed, 30, [k * MIB for k in (1, 3, 8, 12, 21)]))
    assert fit(s, conf, compiled=False).capacity == smallest(s, conf)


def test_a_recorded_limit_is_lifted() -> None:
    s = subject(("fraction", 0.0001), ("alloc", 0, 30 * MIB))
    assert fit(s, "").capacity == 30 * MIB


def test_a_request_that_no_memory_serves() -> None:
    f = fit(subject(("alloc", 0, 4 * MIB), ("alloc", 1, 2**55)), "")
    assert f.capacity is None
    assert f.cards == ()
    assert f.failure is not None
    assert f.failure.event == 1


def test_a_request_that_torch_refuses_at_once_does_not_count() -> None:
    assert fit(subject(("alloc", 0, 2**61), ("alloc", 1, 30 * MIB)), "").capacity == 30 * MIB


def test_no_requests_need_no_memory() -> None:
    f = fit(subject(("empty",)), "")
    assert (f.capacity, f.failure, f.unlimited) == (0, None, 0)


def test_the_program_read_the_state_of_memory() -> None:
    s = subject(("alloc", 0, 30 * MIB), ("seen", "torch.cuda.mem_get_info"))
    with pytest.raises(
        UsageError, match=r"called torch.cuda.mem_get_info at loader.py:7 at event 1 .*--assume-unchanged"
    ):
        fit(s, "")
    f = fit(s, "", assume_unchanged=True)
    assert f.capacity == 30 * MIB
    assert {a.code for a in f.assumptions} == {"observations"}


def caught() -> Trace:
    return trace_of(("alloc", 0, 30 * MIB), ("alloc", 1, 90 * MIB), ("free", 0), ("alloc", 2, 40 * MIB), failed=[1])


def test_the_program_caught_an_oom() -> None:
    s = subject_of(caught(), "t")
    with pytest.raises(UsageError, match="caught an OOM at event 1 "):
        fit(s, "")
    f = fit(s, "", assume_unchanged=True)
    assert f.capacity == 40 * MIB, "without the request that failed, which the program got over"
    assert "ooms_caught" in {a.code for a in f.assumptions}


def test_an_oom_that_ended_the_program_is_part_of_what_it_needs() -> None:
    s = subject(("alloc", 0, 30 * MIB), ("alloc", 1, 90 * MIB), ("free", 0), failed=[1])
    f = fit(s, "")
    assert f.capacity == 120 * MIB
    assert "ends_with_oom" in {a.code for a in f.assumptions}


def test_a_snapshot_does_not_show_what_the_program_read() -> None:
    f = fit(subject(("alloc", 0, 30 * MIB), source="snapshot"), "")
    assert "observations_unseen" in {a.code for a in f.assumptions}


def test_cards_it_fits() -> None:
    assert "h100-80gb" in fit(subject(("alloc", 0, 30 * MIB)), "").cards
    assert "h100-80gb" not in fit(subject(("alloc", 0, 90 * 2**30)), "").cards
