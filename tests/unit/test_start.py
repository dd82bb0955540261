"""What stood when a recording began, found by undoing its entries on what stands at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from snapshots import BASE, MIB, entry, settings

from fragscope.trace import BlockState, SegmentState
from fragscope.trace.start import (
    ContradictionError,
    LiveBlock,
    SizeRules,
    StartState,
    large_page,
    size_rules,
    start_state,
)

KIB, LARGE = 2**10, 20 * MIB


def segment(
    addr: int, size: int, blocks: Sequence[tuple[int, BlockState]] = (), *, page: int = 0, stream: int = 0
) -> SegmentState:
    """A segment whose blocks are given as (bytes, state); without them it is idle."""
    out, at = [], addr
    for length, state in blocks or [(size, "free")]:
        out.append((at, length, state))
        at += length
    return SegmentState(addr, size, stream, 0, tuple(out), page)


def live(addr: int, requested: int, size: int | None = None, *, pending: bool = False) -> LiveBlock:
    return LiveBlock(addr, requested, requested if size is None else size, pending, 0)


def freed(addr: int, size: int) -> list[dict[str, Any]]:
    return [entry("free_requested", addr, size), entry("free_completed", addr, size)]


def stood(
    entries: Sequence[Mapping[str, Any]],
    final: Sequence[SegmentState] = (),
    alive: Sequence[LiveBlock] = (),
    rules: SizeRules | None = None,
) -> StartState | None:
    return start_state(final, alive, entries, lambda _number, _entry: 0, rules or SizeRules())


def blocks(state: StartState | None) -> list[tuple[int, int, str]]:
    """Blocks of the only segment, their addresses counted from its beginning."""
    assert state is not None
    (only,) = state.segments
    return [(addr - only.addr, size, what) for addr, size, what in only.blocks]


# --- from process start on ----------------------------------------------------------------------------------------


def test_a_recording_from_the_first_request_on_began_with_nothing() -> None:
    e = [entry("segment_alloc", BASE, 2 * MIB), entry("alloc", BASE, 400)]
    assert stood(e, [segment(BASE, 2 * MIB)], [live(BASE, 400, 512)]) is None


def test_one_that_ends_with_nothing_began_with_nothing() -> None:
    e = [entry("segment_alloc", BASE, 2 * MIB), entry("alloc", BASE, 400), *freed(BASE, 400)]
    assert stood([*e, entry("segment_free", BASE, 2 * MIB)]) is None


# --- ordinary segments --------------------------------------------------------------------------------------------


def test_what_is_never_touched_stood_as_it_stands() -> None:
    state = stood([], [segment(BASE, 2 * MIB)], [live(BASE + 512, 400, 512)])
    assert blocks(state) == [(0, 512, "free"), (512, 512, "allocated"), (1024, 2 * MIB - 1024, "free")]


def test_what_was_handed_out_was_idle() -> None:
    state = stood([entry("alloc", BASE, 400)], [segment(BASE, 2 * MIB)], [live(BASE, 400, 512)])
    assert blocks(state) == [(0, 2 * MIB, "free")]


def test_what_was_freed_was_live() -> None:
    state = stood(freed(BASE, 400), [segment(BASE, 2 * MIB)])
    assert blocks(state) == [(0, 512, "allocated"), (512, 2 * MIB - 512, "free")]
    assert state is not None
    assert [(b.requested, b.size, b.pending) for b in state.live] == [(400, 512, False)]


def test_a_segment_that_went_back_stood() -> None:
    state = stood([*freed(BASE, 12 * MIB), entry("segment_free", BASE, 12 * MIB)])
    assert blocks(state) == [(0, 12 * MIB, "allocated")]


def test_a_segment_that_was_taken_did_not() -> None:
    e = [entry("segment_alloc", BASE, 2 * MIB), entry("alloc", BASE, 400)]
    state = stood(e, [segment(BASE, 2 * MIB), segment(2 * BASE, 2 * MIB)], [live(BASE, 400, 512)])
    assert state is not None
    assert [s.addr for s in state.segments] == [2 * BASE]


def test_segments_are_in_the_order_of_their_addresses() -> None:
    e = [entry("segment_free", BASE, 2 * MIB), entry("segment_free", 3 * BASE, 2 * MIB)]
    state = stood(e, [segment(2 * BASE, 2 * MIB)])
    assert state is not None
    assert [s.addr // BASE for s in state.segments] == [1, 2, 3]


# --- frees that wait ----------------------------------------------------------------------------------------------


def test_a_free_completed_without_its_request_was_pending() -> None:
    state = stood([entry("free_completed", BASE, 400)], [segment(BASE, 2 * MIB)])
    assert blocks(state)[0] == (0, 512, "pending")
    assert state is not None
    assert state.live[0].pending


def test_what_is_pending_at_the_end_and_untouched_was_pending() -> None:
    state = stood([], [segment(BASE, 2 * MIB)], [live(BASE, 400, 512, pending=True)])
    assert blocks(state)[0] == (0, 512, "pending")


def test_what_is_pending_at_the_end_and_was_freed_meanwhile_was_live() -> None:
    state = stood([entry("free_requested", BASE, 400)], [segment(BASE, 2 * MIB)], [live(BASE, 400, 512, pending=True)])
    assert blocks(state)[0] == (0, 512, "allocated")


# --- how large a freed block was ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("requested", "size"), [(0, 512), (1, 512), (512, 512), (513, 1024), (MIB, MIB)])
def test_blocks_are_multiples_of_512_bytes(requested: int, size: int) -> None:
    assert blocks(stood(freed(BASE, requested), [segment(BASE, 2 * MIB)]))[0] == (0, size, "allocated")


def test_a_rest_of_up_to_1_mib_stays_with_a_large_block() -> None:
    assert blocks(stood(freed(BASE, 19 * MIB), [segment(BASE, LARGE)])) == [(0, LARGE, "allocated")]
    beyond = stood(freed(BASE, 19 * MIB - 512), [segment(BASE, LARGE)])
    assert blocks(beyond) == [(0, 19 * MIB - 512, "allocated"), (19 * MIB - 512, MIB + 512, "free")]


def test_in_an_expandable_segment_no_rest_stays() -> None:
    state = stood(freed(BASE, 19 * MIB), [segment(BASE, LARGE, page=LARGE)])
    assert blocks(state) == [(0, 19 * MIB, "allocated"), (19 * MIB, MIB, "free")]


def test_from_max_split_size_on_every_rest_stays() -> None:
    whole, rules = 64 * MIB, SizeRules(max_split_size=20 * MIB)
    assert blocks(stood(freed(BASE, 40 * MIB), [segment(BASE, whole)], rules=rules)) == [(0, whole, "allocated")]
    assert blocks(stood(freed(BASE, 16 * MIB), [segment(BASE, whole)], rules=rules))[0][1] == 16 * MIB


@pytest.mark.parametrize(
    ("requested", "size"),
    [(MIB + 1, MIB + 256 * KIB), (5 * MIB + 1, 6 * MIB), (4 * MIB, 4 * MIB), (300, 512), (17 * MIB, 17 * MIB)],
)
def test_blocks_are_rounded_as_the_conf_says(requested: int, size: int) -> None:
    """Quarters of powers of two below 16 MiB (roundup_power2_divisions), nothing from there on."""
    rules = SizeRules(divisions=(4,) * 4 + (0,) * 12)
    state = stood(freed(BASE, requested), [segment(BASE, 4 * LARGE)], rules=rules)
    assert blocks(state)[0] == (0, size, "allocated")


def test_a_block_is_no_larger_than_its_room_whatever_the_conf_says_at_the_end() -> None:
    rules = SizeRules(divisions=(4,) * 16)
    final, alive = [segment(BASE, LARGE)], [live(BASE + MIB + 512, 2 * MIB)]
    assert blocks(stood(freed(BASE, MIB + 1), final, alive, rules))[0] == (0, MIB + 512, "allocated")


def test_blocks_that_may_have_been_larger_are_counted() -> None:
    """Of the large pool's, those before more idle memory than could be theirs."""

    def unsure(requested: int, *, size: int = LARGE, page: int = 0) -> int:
        state = stood(freed(BASE, requested), [segment(BASE, size, page=page)])
        assert state is not None
        return state.unsure

    assert unsure(12 * MIB) == 1
    assert unsure(19 * MIB) == 0
    assert unsure(LARGE) == 0
    assert unsure(12 * MIB, page=LARGE) == 0
    assert unsure(400, size=2 * MIB) == 0


def test_memory_handed_out_after_a_block_was_freed_does_not_tell_its_end() -> None:
    e = [*freed(BASE + 4096, 512), *freed(BASE, 400), entry("alloc", BASE, 4096), entry("alloc", BASE + 4096, 512)]
    state = stood(e, [segment(BASE, 2 * MIB)], [live(BASE, 4096), live(BASE + 4096, 512)])
    assert blocks(state)[:2] == [(0, 512, "allocated"), (512, 3584, "free")]


def test_the_first_memory_handed_out_behind_a_block_tells_its_end() -> None:
    e = [
        entry("alloc", BASE + 4096, 512), entry("alloc", BASE + 4608, 512), *freed(BASE + 4096, 512),
        entry("alloc", BASE + 4096, 512), *freed(BASE, 400),
    ]  # fmt: skip
    state = stood(e, [segment(BASE, 2 * MIB)], [live(BASE + 4096, 512), live(BASE + 4608, 512)])
    assert blocks(state)[0] == (0, 4096, "allocated")


def test_memory_behind_the_last_block_of_a_segment_is_that_segments() -> None:
    """What is handed out in a higher segment before does not hide what is handed out behind the block."""
    e = [entry("alloc", BASE + 8 * MIB, 512), entry("alloc", BASE + 4096, 512), *freed(BASE, 400)]
    final = [segment(BASE, 2 * MIB), segment(BASE + 8 * MIB, 2 * MIB)]
    state = stood(e, final, [live(BASE + 8 * MIB, 512), live(BASE + 4096, 512)])
    assert state is not None
    assert state.segments[0].blocks[0] == (BASE, 4096, "allocated")


def test_memory_handed_out_behind_a_block_begins_where_it_ends() -> None:
    """What lay between would have been handed out first: the first block was larger than what it was asked for."""
    e = [entry("alloc", BASE + 4096, 512), *freed(BASE, 400)]
    state = stood(e, [segment(BASE, 2 * MIB)], [live(BASE + 4096, 512)])
    assert blocks(state) == [(0, 4096, "allocated"), (4096, 2 * MIB - 4096, "free")]


def test_what_is_handed_out_in_the_next_segment_says_nothing_about_a_block() -> None:
    e = [entry("alloc", BASE + 2 * MIB, 512), *freed(BASE, 400)]
    final = [segment(BASE, 2 * MIB), segment(BASE + 2 * MIB, 2 * MIB)]
    state = stood(e, final, [live(BASE + 2 * MIB, 512)])
    assert state is not None
    assert state.segments[0].blocks[0] == (BASE, 512, "allocated")


# --- expandable segments ------------------------------------------------------------------------------------------


def test_what_was_mapped_was_not() -> None:
    e = [entry("segment_map", BASE + LARGE, LARGE), entry("alloc", BASE + LARGE, LARGE)]
    state = stood(e, [segment(BASE, 2 * LARGE, page=LARGE)], [live(BASE + LARGE, LARGE)])
    assert blocks(state) == [(0, LARGE, "free")]


def test_a_mapping_in_the_middle_leaves_two_ranges() -> None:
    state = stood([entry("segment_map", BASE + LARGE, LARGE)], [segment(BASE, 3 * LARGE, page=LARGE)])
    assert state is not None
    assert [(s.addr - BASE, s.size, s.expandable) for s in state.segments] == [
        (0, LARGE, True),
        (2 * LARGE, LARGE, True),
    ]


@pytest.mark.parametrize(("at", "left"), [(0, [(1, 2)]), (1, [(0, 1), (2, 1)]), (2, [(0, 2)]), (1, [(0, 1)])])
def test_what_was_unmapped_joins_the_ranges_beside_it(at: int, left: list[tuple[int, int]]) -> None:
    final = [segment(BASE + first * LARGE, count * LARGE, page=LARGE) for first, count in left]
    state = stood([entry("segment_unmap", BASE + at * LARGE, LARGE)], final)
    assert blocks(state) == [(0, (1 + sum(count for _, count in left)) * LARGE, "free")]


@pytest.mark.parametrize(
    ("size", "served", "page"),
    [(64 * MIB, [400], 2 * MIB), (64 * MIB, [MIB + 1], 32 * MIB), (64 * MIB, [3 * MIB, 400], 32 * MIB),
     (64 * MIB, [], 32 * MIB), (6 * MIB, [], 2 * MIB)],
)  # fmt: skip
def test_a_range_that_is_gone_at_the_end_had_the_pages_of_what_it_served(
    size: int, served: list[int], page: int
) -> None:
    """The small pool's requests are served from pages of 2 MiB, others from those that the conf names."""
    e = [step for asked in served for step in (entry("alloc", BASE, asked), *freed(BASE, asked))]
    state = stood([*e, entry("segment_unmap", BASE, size)], rules=SizeRules(large_page=32 * MIB))
    assert state is not None
    assert [s.page for s in state.segments] == [page]


@pytest.mark.parametrize(("requested", "page"), [(400, 2 * MIB), (3 * MIB, 32 * MIB)])
def test_a_range_that_is_gone_at_the_end_had_the_pages_of_what_it_held(requested: int, page: int) -> None:
    e = [*freed(BASE, requested), entry("segment_unmap", BASE, 64 * MIB)]
    state = stood(e, rules=SizeRules(large_page=32 * MIB))
    assert state is not None
    assert [s.page for s in state.segments] == [page]


def test_what_was_unmapped_had_the_pages_of_the_range_that_it_joins() -> None:
    state = stood([entry("segment_unmap", BASE + 2 * MIB, LARGE)], [segment(BASE, 2 * MIB, page=2 * MIB)])
    assert state is not None
    assert [(s.size, s.page) for s in state.segments] == [(LARGE + 2 * MIB, 2 * MIB)]


# --- what a snapshot's settings tell ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conf", "page"),
    [("", LARGE), ("expandable_segments:True", LARGE), ("large_segment_size_mb:32", 32 * MIB),
     ("expandable_segments:True, large_segment_size_mb : 64,max_split_size_mb:128", 64 * MIB),
     ("large_segment_size_mb:32,large_segment_size_mb:64", 64 * MIB), ("large_segment_size_mb:", LARGE)],
)  # fmt: skip
def test_the_page_of_the_large_pool_follows_from_the_conf(conf: str, page: int) -> None:
    assert large_page(conf) == page
    assert size_rules({}, conf).large_page == page


def test_the_settings_of_a_snapshot_tell_how_blocks_are_rounded_and_split() -> None:
    divisions = {str(2**n): 8 if n < 3 else 0 for n in range(16)}
    rules = size_rules({"max_split_size": 64 * MIB, "roundup_power2_divisions": divisions}, "")
    assert rules == SizeRules(64 * MIB, (8,) * 3 + (0,) * 13)
    assert size_rules(settings(), "") == SizeRules()


@pytest.mark.parametrize("divisions", [None, [], {"1": "x"}, {"1": -4}, {"1": 2**60}])
def test_values_that_are_none_leave_the_default(divisions: Any) -> None:
    assert size_rules({"max_split_size": "x", "roundup_power2_divisions": divisions}, "") == SizeRules()


def test_ranges_of_different_streams_do_not_join() -> None:
    final = [segment(BASE, LARGE, page=LARGE, stream=5)]
    state = stood([entry("segment_unmap", BASE + LARGE, LARGE)], final)
    assert state is not None
    assert [(s.addr - BASE, s.size, s.stream) for s in state.segments] == [(0, LARGE, 5), (LARGE, LARGE, 0)]


# --- entries that do not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "final", "alive", "why"),
    [
        ([entry("alloc", BASE, 400)], [segment(BASE, 2 * MIB)], [], "handed out last of all and is not live"),
        (freed(BASE, 400), [segment(BASE, 2 * MIB)], [live(BASE, 400, 512)], "is freed and lives on"),
        ([entry("free_requested", BASE, 400)], [segment(BASE, 2 * MIB)], [], "its end is not shown"),
        ([entry("segment_alloc", BASE, 2 * MIB)], [], [], "taken last of all and is not there at the end"),
        ([entry("segment_map", BASE, 2 * MIB)], [], [], "mapped last of all and is not mapped at the end"),
        (
            [entry("segment_map", BASE, 4 * MIB)],
            [segment(BASE, 2 * MIB, page=LARGE)],
            [],
            "mapped last of all and is not mapped at the end",
        ),
        (freed(BASE, 400), [], [], "memory is freed that lies in no segment"),
        (freed(2 * BASE, 400), [segment(BASE, 2 * MIB)], [], "lies in no segment"),
        (
            freed(BASE, 1024),
            [segment(BASE, 2 * MIB)],
            [live(BASE + 512, 400, 512)],
            "overlaps what lies behind it",
        ),
        (
            [],
            [segment(BASE, 2 * MIB)],
            [live(BASE, 4 * MIB)],
            "overlaps what lies behind it",
        ),
        ([], [segment(BASE + MIB, 2 * MIB)], [live(BASE, 512)], "lies in no segment"),
    ],
)
def test_what_does_not_lead_to_the_end_is_a_contradiction(
    entries: list[dict[str, Any]], final: list[SegmentState], alive: list[LiveBlock], why: str
) -> None:
    with pytest.raises(ContradictionError, match=why):
        stood(entries, final, alive)
