"""Free lists as ordered sets: what a treap answers is what a sorted list answers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragscope.allocator.engine import free_lists
from fragscope.allocator.engine.state import ADDR, LEFT, NONE, PRIORITY, RIGHT, ROOT, UNMAPPED_ROOT, State
from fragscope.allocator.engine.tables import new_state

Key = tuple[int, int, int, int]
"""Stream, bytes, tie, address: the order of a free list."""


class Lists:
    """Free lists, each beside a sorted list of (key, block)."""

    def __init__(self) -> None:
        self.s: State = new_state(1, 1, compiled=False)
        self.sorted: dict[tuple[int, int], list[tuple[Key, int]]] = {}
        self.blocks = 0

    def insert(self, stream: int, size: int, tie: int, priority: int, root: int = ROOT, which: int = 0) -> int:
        """A new block, at an address above all others."""
        block = self.blocks
        self.blocks += 1
        self.s.t[ADDR][block] = 512 * block
        self.s.t[PRIORITY][block] = priority
        free_lists.insert(self.s, root, which, block, stream, size, tie)
        self.of(root, which).append(((stream, size, tie, 512 * block), block))
        self.of(root, which).sort()
        return block

    def remove(self, at: int, root: int = ROOT, which: int = 0) -> None:
        """The block at a position of the order."""
        _, block = self.of(root, which).pop(at)
        free_lists.remove(self.s, root, which, block)

    def of(self, root: int, which: int) -> list[tuple[Key, int]]:
        return self.sorted.setdefault((root, which), [])

    def walk(self, root: int = ROOT, which: int = 0) -> list[int]:
        """All blocks, from the first one on."""
        found = []
        block = free_lists.first(self.s, root, which)
        while block != NONE:
            found.append(block)
            block = free_lists.following(self.s, block)
        return found

    def walk_back(self, root: int = ROOT, which: int = 0) -> list[int]:
        """All blocks, from the last one back."""
        found = []
        block = free_lists.last(self.s, root, which)
        while block != NONE:
            found.append(block)
            block = free_lists.preceding(self.s, block)
        return found

    def depths(self, root: int = ROOT, which: int = 0) -> Iterator[tuple[int, int]]:
        """Every block with its depth; checks on the way that no child has a higher priority."""
        t = self.s.t
        pending = [(t[root][which], 1)]
        while pending:
            block, depth = pending.pop()
            if block == NONE:
                continue
            yield block, depth
            for child in (t[LEFT][block], t[RIGHT][block]):
                assert child == NONE or t[PRIORITY][child] <= t[PRIORITY][block]
                pending.append((child, depth + 1))


def test_an_empty_list_has_no_first_block() -> None:
    lists = Lists()
    s = lists.s
    assert free_lists.first(s, ROOT, 0) == free_lists.last(s, ROOT, 0) == NONE
    assert free_lists.first_from(s, ROOT, 0, 0, 0, 0, 0) == free_lists.last_before(s, ROOT, 0, 9, 9, 9, 9) == NONE


def test_blocks_are_ordered_by_stream_then_size_then_tie_then_address() -> None:
    lists = Lists()
    low = lists.insert(0, 512, 0, 3)
    high = lists.insert(0, 512, 0, 1)
    younger = lists.insert(0, 512, 7, 4)
    larger = lists.insert(0, 1024, 0, 1)
    elsewhere = lists.insert(0x5100, 512, 0, 5)
    assert lists.walk() == [low, high, younger, larger, elsewhere]


def test_the_best_fit_is_the_first_block_from_a_size_on() -> None:
    lists = Lists()
    blocks = {size: lists.insert(0, size, 0, size % 7) for size in (4096, 512, 1024, 8192)}
    elsewhere = lists.insert(0x5100, 512, 0, 1)

    def best(size: int, stream: int = 0) -> int:
        return free_lists.first_from(lists.s, ROOT, 0, stream, size, -1, -1)

    assert best(513) == best(1024) == blocks[1024]
    assert best(1025) == blocks[4096]
    assert best(8193) == elsewhere, "of another stream: nothing on this one is large enough"
    assert best(513, 0x5100) == NONE


def test_lists_of_other_pools_and_of_unmapped_ranges_are_apart() -> None:
    lists = Lists()
    idle = lists.insert(0, 512, 0, 1)
    other = lists.insert(0, 512, 0, 2, which=3)
    unmapped = lists.insert(0, 0, 0, 3, root=UNMAPPED_ROOT)
    assert lists.walk() == [idle]
    assert lists.walk(which=3) == [other]
    assert lists.walk(UNMAPPED_ROOT) == [unmapped]
    lists.remove(0, which=3)
    assert (lists.walk(), lists.walk(which=3)) == ([idle], [])


keys = st.tuples(st.sampled_from([0, 0x5100, 0x5200]), st.integers(1, 6), st.integers(0, 2))
steps = st.one_of(
    st.tuples(st.just("insert"), keys, st.integers(0, 5)),  # few priorities: equal ones must do too
    st.tuples(st.just("insert"), keys, st.integers(0, 2**31)),
    st.tuples(st.just("remove"), st.integers(0, 10**6), st.none()),
)


@given(st.lists(steps, max_size=80), st.lists(st.tuples(keys, st.integers(-1, 80)), min_size=1, max_size=10))
def test_a_treap_answers_what_a_sorted_list_answers(
    steps: list[tuple[str, object, int | None]], asked: list[tuple[tuple[int, int, int], int]]
) -> None:
    lists = Lists()
    expected = lists.of(ROOT, 0)
    for what, argument, priority in steps:
        if what == "insert":
            assert isinstance(argument, tuple)
            assert priority is not None
            stream, size, tie = argument
            lists.insert(stream, size, tie, priority)
        elif expected:
            assert isinstance(argument, int)
            lists.remove(argument % len(expected))
        in_order = [block for _, block in expected]
        assert lists.walk() == in_order
        assert lists.walk_back() == in_order[::-1]
        assert sorted(block for block, _ in lists.depths()) == sorted(in_order)
    for (stream, size, tie), position in asked:
        key = (stream, size, tie, 512 * position)
        at = bisect_left(expected, (key, -1))
        later = expected[at][1] if at < len(expected) else NONE
        earlier = expected[at - 1][1] if at > 0 else NONE
        assert free_lists.first_from(lists.s, ROOT, 0, *key) == later
        assert free_lists.last_before(lists.s, ROOT, 0, *key) == earlier
        for _, block in expected:
            assert free_lists.before(lists.s, block, *key) is (block in [b for _, b in expected[:at]])


@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
def test_a_tree_stays_low_whatever_order_blocks_come_in(order: str) -> None:
    lists = Lists()
    number = 1
    for size in range(500):
        number = number * 48271 % 2147483647
        lists.insert(0, {"ascending": size, "descending": 500 - size, "equal": 7}[order], 0, number)
    assert max(depth for _, depth in lists.depths()) < 50  # 500 one below the other without priorities
