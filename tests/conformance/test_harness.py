"""The parts of the harness that no binary is needed for."""

from __future__ import annotations

import pytest
from answers import Answers, Counters
from binary import COUNTERS
from completions import Completions, noticed
from generator import THEMES, generate, themes_of
from model import Entry
from oracles import RELEASES
from programs import Op, Pools, Program, legal
from shrink import shrink

from fragscope.allocator import parse_conf, rules_for

A, B = 0x1000, 0x2000


def program(*ops: Op) -> Program:
    return Program("by hand", "2.9", 2**30, 2**30, 0, "", list(ops))


def answers(*entries: list[Entry]) -> Answers:
    return Answers(list(entries), [[] for _ in entries], {})


def entry(action: str, addr: int) -> Entry:
    return Entry(action, addr, 100, 0, 0)


def two_frees_that_wait(*order: int) -> tuple[Program, Answers]:
    """Two blocks of stream 0 are used on stream 8 and freed; the next allocation finds both done, in this order."""
    ops: list[Op] = [["alloc", 1, 100, 0], ["alloc", 2, 100, 0], ["use", 1, 8], ["use", 2, 8], ["free", 1], ["free", 2]]
    happened = [[entry("alloc", A)], [entry("alloc", B)], [], [], *([entry("free_requested", a)] for a in (A, B))]
    ops += [["done", 8], ["alloc", 3, 100, 0]]
    happened += [[], [*(entry("free_completed", a) for a in order), entry("alloc", A)]]
    return program(*ops), answers(*happened)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("theme", THEMES)
def test_generated_programs_make_sense_and_come_again(release: str, theme: str) -> None:
    if theme not in themes_of(release):
        with pytest.raises(ValueError, match=theme):
            generate(7, release, 300, theme)
        return
    made = generate(7, release, 300, theme)
    assert made == generate(7, release, 300, theme)
    assert made.runs_on(release)
    assert len(made.ops) >= 300
    assert legal(made.ops) == made.ops
    rules = rules_for(release).rules
    conf = parse_conf(made.conf, rules)
    for op in made.ops:
        if op[0] == "conf":
            split = conf.max_split_size
            conf = parse_conf(op[1], rules, conf)
            assert conf.max_split_size == split, "the real allocator breaks on that"


def test_the_seed_chooses_among_the_themes_of_the_release() -> None:
    names = {generate(seed, "2.9.1", 10).name.rpartition("-")[0] for seed in range(40)}
    assert names == set(themes_of("2.9.1"))


def test_operations_on_what_is_not_there_are_left_out() -> None:
    kept: list[Op] = [["alloc", 1, 100, 0], ["pool_begin", 1], ["pool_end", 1], ["pool_release", 1], ["empty_pool", 1]]
    nonsense: list[Op] = [["free", 2], ["use", 2, 8], ["pool_begin", 1], ["alloc", 1, 5, 0], ["pool_end", 3]]
    assert legal([*kept, *nonsense]) == kept


def test_nested_scopes_select_the_oldest_or_the_newest() -> None:
    pools = Pools()
    assert pools.selected(oldest_first=True) == 0
    for op in (["pool_begin", 1], ["pool_begin", 2]):
        pools.apply(op)
    assert (pools.selected(oldest_first=True), pools.selected(oldest_first=False)) == (1, 2)


@pytest.mark.parametrize("order", [(A, B), (B, A)])
def test_the_model_is_told_of_completions_in_the_order_of_the_binary(order: tuple[int, int]) -> None:
    ids = [{A: 1, B: 2}[addr] for addr in order]
    of, happened = two_frees_that_wait(*order)
    assert noticed(of, happened) == [[], [], [], [], [], [], [], ids]
    completions = Completions(of, happened, scopes_hold=False)
    told = []
    for number, op in enumerate(of.ops):
        told.append(completions.before(number, synchronizes=False))
        completions.after(number, op, served=True, scope_open=False, looked=op[0] == "alloc")
    assert told == [[], [], [], [], [], [], [], ids]


def test_a_free_is_not_told_before_its_streams_are_done() -> None:
    of, happened = two_frees_that_wait()
    completions = Completions(of, happened, scopes_hold=False)
    for number, op in enumerate(of.ops):
        stream_is_done = number > 6
        assert completions.before(number, synchronizes=False) == ([1, 2] if stream_is_done else [])
        completions.after(number, op, served=True, scope_open=False, looked=op[0] == "alloc")


def test_counters_follow_the_changes() -> None:
    counters = Counters()
    counters.apply([0, 3, 1, 3])
    counters.apply([0, -1, sum(COUNTERS.values()) - 1, 5])
    assert counters.by_name["allocation.all"] == (2, 3, 0, 0)
    assert counters.by_name["num_device_free"] == (5,)


def test_a_failing_program_is_shrunk_to_what_fails() -> None:
    made = generate(3, "2.13.0", 200, "default")

    def fails(candidate: Program) -> bool:
        """Two large allocations, the second after a free."""
        freed = False
        large = 0
        for op in candidate.ops:
            freed |= op[0] == "free" and large > 0
            large += op[0] == "alloc" and op[2] > 2**20 and (large == 0 or freed)
        return large > 1

    assert fails(made)
    smallest = shrink(made, fails)
    assert fails(smallest)
    assert [op[0] for op in smallest.ops] == ["alloc", "free", "alloc"]
    assert all(op[2] <= 2 * 2**20 for op in smallest.ops if op[0] == "alloc")
    assert smallest.seed == 0
