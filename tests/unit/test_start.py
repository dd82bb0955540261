"""What stood when a recording began, found by undoing its entries on what stands at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from snapshots import BASE, MIB, entry

from fragscope.trace import BlockState, SegmentState
from fragscope.trace.start import ContradictionError, LiveBlock, StartState, start_state

NEVER = 2**62  # no max_split_size
LARGE = 20 * MIB


def segment(
    addr: int, size: int, blocks: Sequence[tuple[int, BlockState]] = (), *, expandable: bool = False, stream: int = 0
) -> SegmentState:
    """A segment whose blocks are given as (bytes, state); without them it is idle."""
    out, at = [], addr
    for length, state in blocks or [(size, "free")]:
        out.append((at, length, state))
        at += length
    return SegmentState(addr, size, stream, 0, tuple(out), expandable)


def live(addr: int, requested: int, size: int | None = None, *, pending: bool = False) -> LiveBlock:
    return LiveBlock(addr, requested, requested if size is None else size, pending, 0)


def freed(addr: int, size: int) -> list[dict[str, Any]]:
    return [entry("free_requested", addr, size), entry("free_completed", addr, size)]


def stood(
    entries: Sequence[Mapping[str, Any]],
    final: Sequence[SegmentState] = (),
    alive: Sequence[LiveBlock] = (),
    max_split_size: int = NEVER,
) -> StartState | None:
    return start_state(final, alive, entries, lambda _number, _entry: 0, max_split_size)


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
    state = stood(freed(BASE, 19 * MIB), [segment(BASE, LARGE, expandable=True)])
    assert blocks(state) == [(0, 19 * MIB, "allocated"), (19 * MIB, MIB, "free")]


def test_from_max_split_size_on_every_rest_stays() -> None:
    whole, split = 64 * MIB, 20 * MIB
    assert blocks(stood(freed(BASE, 40 * MIB), [segment(BASE, whole)], max_split_size=split)) == [
        (0, whole, "allocated")
    ]
    assert blocks(stood(freed(BASE, 16 * MIB), [segment(BASE, whole)], max_split_size=split))[0][1] == 16 * MIB


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
    state = stood(e, [segment(BASE, 2 * LARGE, expandable=True)], [live(BASE + LARGE, LARGE)])
    assert blocks(state) == [(0, LARGE, "free")]


def test_a_mapping_in_the_middle_leaves_two_ranges() -> None:
    state = stood([entry("segment_map", BASE + LARGE, LARGE)], [segment(BASE, 3 * LARGE, expandable=True)])
    assert state is not None
    assert [(s.addr - BASE, s.size, s.expandable) for s in state.segments] == [
        (0, LARGE, True),
        (2 * LARGE, LARGE, True),
    ]


@pytest.mark.parametrize(("at", "left"), [(0, [(1, 2)]), (1, [(0, 1), (2, 1)]), (2, [(0, 2)]), (1, [(0, 1)])])
def test_what_was_unmapped_joins_the_ranges_beside_it(at: int, left: list[tuple[int, int]]) -> None:
    final = [segment(BASE + first * LARGE, count * LARGE, expandable=True) for first, count in left]
    state = stood([entry("segment_unmap", BASE + at * LARGE, LARGE)], final)
    assert blocks(state) == [(0, (1 + sum(count for _, count in left)) * LARGE, "free")]


def test_ranges_of_different_streams_do_not_join() -> None:
    final = [segment(BASE, LARGE, expandable=True, stream=5)]
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
            [segment(BASE, 2 * MIB, expandable=True)],
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
