"""The least memory that requests could need, and packings that come close."""

from __future__ import annotations

import numpy as np
import pytest
from requests_of import MIB, random_requests, trace_of

from fragscope.allocator import tape_of
from fragscope.search import Lives, best_fit, bound, first_fit, pack


def lives(*rows: tuple[int, int, int]) -> Lives:
    start, end, size = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return Lives(start, end, size)


def test_what_does_not_live_together_shares_memory() -> None:
    b = bound(tape_of(trace_of(("alloc", 0, 10 * MIB), ("free", 0), ("alloc", 1, 6 * MIB), ("alloc", 2, 6 * MIB))))
    assert (b.allocations, b.live, b.lower, b.packed, b.gap, b.event) == (3, 12 * MIB, 12 * MIB, 12 * MIB, 0, 3)


def test_requests_are_rounded_to_512_bytes_and_the_whole_to_pages() -> None:
    b = bound(tape_of(trace_of(("alloc", 0, 1), ("alloc", 1, 513))))
    assert (b.live, b.lower) == (512 + 1024, 2 * MIB)


def test_freed_memory_counts_until_other_streams_are_done() -> None:
    head = (("alloc", 0, 4 * MIB), ("uses", 0, 7), ("free", 0))
    more = ("alloc", 1, 4 * MIB)
    assert bound(tape_of(trace_of(*head, more))).live == 8 * MIB, "nobody says that the stream is done"
    assert bound(tape_of(trace_of(*head, ("done", 0), more))).live == 4 * MIB
    assert bound(tape_of(trace_of(*head, ("empty",), more))).live == 4 * MIB, "it waits for all streams"
    own = (("alloc", 0, 4 * MIB), ("uses", 0, 0), ("free", 0))
    assert bound(tape_of(trace_of(*own, more))).live == 4 * MIB, "a use on its own stream defers nothing"


def test_streams_and_size_classes_that_share_no_page_need_more() -> None:
    b = bound(
        tape_of(
            trace_of(
                ("alloc", 0, 3 * MIB, 0), ("alloc", 1, 3 * MIB, 5), ("alloc", 2, 512, 0),
                ("free", 0), ("free", 1), ("free", 2), ("alloc", 3, 7 * MIB, 5),
            )
        )
    )  # fmt: skip
    assert b.lower == 8 * MIB, "6 MiB and 512 B, later 7 MiB: 4 pages"
    assert b.lower_apart == 10 * MIB, "2 pages of each stream, and one for the small request"
    assert b.lower_kept == (4 + 8 + 2) * MIB


def test_requests_that_failed_and_were_got_over_are_left_out() -> None:
    trace = trace_of(
        ("alloc", 0, 4 * MIB), ("alloc", 1, 90 * MIB), ("free", 0), ("alloc", 2, 6 * MIB), failed=[1],
    )  # fmt: skip
    b = bound(tape_of(trace))
    assert (b.allocations, b.left_out, b.live) == (2, 1, 6 * MIB)
    fatal = trace_of(("alloc", 0, 4 * MIB), ("alloc", 1, 90 * MIB), ("free", 0), failed=[1])
    assert bound(tape_of(fatal)).live == 94 * MIB, "the one that ended the program is what it needs"


def test_nothing_needs_nothing() -> None:
    b = bound(tape_of(trace_of()))
    assert (b.lower, b.packed, b.gap_percent, b.event) == (0, 0, 0.0, -1)


def test_first_fit_takes_the_lowest_address_that_stays_free() -> None:
    some = lives((0, 10, 5), (1, 4, 3), (2, 9, 2), (5, 8, 3))
    #  0 lies at 0..5, 1 at 5..8, 2 at 8..10; where 1 lay, 3 has room once it is gone
    assert first_fit(some, np.arange(4)).tolist() == [0, 5, 8, 5]
    #  placed first, 3 takes 0..3, and 0 has to lie above it
    assert first_fit(some, np.array([3, 0, 1, 2])).tolist() == [3, 0, 8, 0]


def test_best_fit_takes_the_smallest_hole_that_is_large_enough() -> None:
    some = lives((0, 5, 6), (1, 9, 1), (2, 5, 4), (3, 9, 1), (6, 9, 3))
    assert best_fit(some).tolist() == [0, 6, 7, 11, 7], "of the holes 0..6 and 7..11 the smaller one"
    joined = lives((0, 3, 2), (1, 4, 2), (2, 9, 1), (5, 9, 4))
    assert best_fit(joined).tolist() == [0, 2, 4, 0], "two holes side by side are one"
    at_once = lives((0, 3, 2), (3, 5, 2))
    assert best_fit(at_once).tolist() == [0, 0], "a life ends before another begins at the same moment"
    grown = lives((0, 2, 4), (3, 9, 6))
    assert best_fit(grown).tolist() == [0, 0], "a hole at the top grows"


def test_a_search_ends_where_nothing_can_be_gained() -> None:
    some = lives((0, 4, 3), (1, 5, 3))
    packed = pack(some, enough=6)
    assert packed.best.height == 6
    assert [name for name, _ in packed.tried] == ["best fit in order of time"]


def test_what_the_budget_does_not_allow_is_skipped_and_said() -> None:
    some = lives(*((i, i + 3, 1 + i % 5) for i in range(50)))
    packed = pack(some, enough=0, budget=0.0)
    assert [name for name, _ in packed.tried] == ["best fit in order of time"]
    assert len(packed.skipped) >= 5
    assert not pack(some, enough=0, budget=60.0).skipped


def test_the_same_requests_give_the_same_answer() -> None:
    tape = tape_of(trace_of(*random_requests(3, 400, [MIB, 3 * MIB, 7 * MIB, 20 * MIB])))
    one, other = bound(tape), bound(tape)
    assert one.packing.tried == other.packing.tried
    assert one.packing.best.offset.tolist() == other.packing.best.offset.tolist()


@pytest.mark.parametrize("size", [0, 1])
def test_a_request_for_nothing_takes_a_block(size: int) -> None:
    assert bound(tape_of(trace_of(("alloc", 0, size)))).live == 512
