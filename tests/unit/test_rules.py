"""What differs between releases, and which release's rules are chosen for a name."""

from __future__ import annotations

import pytest

from fragscope.allocator import NEWEST, RULES, CachingAllocator, TieBreak, rules_for
from fragscope.errors import UsageError


@pytest.mark.parametrize(
    ("release", "tie_break"),
    [("2.9", TieBreak.ADDRESS), ("2.10", TieBreak.ADDRESS), ("2.11", TieBreak.ADDRESS), ("2.12", TieBreak.BLOCK_ORDER),
     ("2.13", TieBreak.SEGMENT_ORDER), ("2.14", TieBreak.SEGMENT_ORDER)],
)  # fmt: skip
def test_the_tie_break_changed_twice(release: str, tie_break: TieBreak) -> None:
    assert rules_for(release).rules.tie_break is tie_break


@pytest.mark.parametrize(
    ("named", "row"),
    [("2.11", "2.11"), ("2.11.0", "2.11"), ("2.11.0+cu130", "2.11"), ("2.12.1", "2.12"), ("2.14.0a0", "2.14"),
     ("2.14.0a0+git1234", "2.14"), ("2.13.0.dev20260101+cu130", "2.13"), ("2.9.1+cpu", "2.9"), ("2.13.0rc2", "2.13")],
)  # fmt: skip
def test_a_release_is_known_by_major_and_minor(named: str, row: str) -> None:
    chosen = rules_for(named)
    assert (chosen.torch, chosen.rules.release, chosen.assumed) == (named, row, False)


def test_a_newer_release_gets_the_newest_rules_and_says_so() -> None:
    for newer in ("2.15.0", "2.99", "3.0"):
        chosen = rules_for(newer)
        assert chosen.rules is NEWEST
        assert chosen.assumed


@pytest.mark.parametrize("older", ["2.8.0", "2.4.1", "1.13"])
def test_an_older_release_is_refused_with_the_known_ones(older: str) -> None:
    with pytest.raises(UsageError, match=r"older than the oldest rules known \(2\.9\)"):
        rules_for(older)


@pytest.mark.parametrize(
    "name", ["", "2", "two", "2.x", "v2.11", "2.11 ", "2.11.0; rm", "2.11\n", "-1.2", "\uff12.\uff11\uff11"]
)
def test_what_is_no_release_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not a torch release"):
        rules_for(name)


def test_rules_are_listed_oldest_first() -> None:
    versions = [tuple(int(p) for p in r.release.split(".")) for r in RULES]
    assert versions == sorted(set(versions))


TOTAL = 85_017_493_504  # an H100's; 0.2 of it is 17,003,498,700.8


@pytest.mark.parametrize(
    ("release", "limit"),
    [("2.11", 17_003_498_700), ("2.12", 17_003_498_700), ("2.13", 17_003_498_701), ("2.14", 17_003_498_701)],
)
def test_a_memory_fraction_is_truncated_up_to_2_12_and_rounded_from_2_13(release: str, limit: int) -> None:
    assert CachingAllocator(TOTAL, TOTAL, rules_for(release).rules, memory_fraction=0.2).limit == limit


@pytest.mark.parametrize(("release", "limit"), [("2.9", TOTAL), ("2.10", None), ("2.11", None), ("2.14", None)])
def test_a_memory_fraction_of_one_is_a_limit_only_up_to_2_9(release: str, limit: int | None) -> None:
    assert CachingAllocator(TOTAL, TOTAL, rules_for(release).rules, memory_fraction=1.0).limit == limit


@pytest.mark.parametrize(
    ("key", "since"),
    [("graph_capture_record_stream_reuse", "2.9"), ("per_process_memory_fraction", "2.10"),
     ("large_segment_size_mb", "2.11"), ("throw_on_cudamalloc_oom", "2.12"),
     ("pinned_max_round_threshold_mb", "2.13")],
)  # fmt: skip
def test_keys_by_release(key: str, since: str) -> None:
    having = [r.release for r in RULES if key in r.conf_keys]
    assert having[0] == since
    assert having == [r.release for r in RULES][-len(having) :]


def test_the_general_variable_is_read_from_2_10() -> None:
    assert rules_for("2.9").rules.conf_variables == ("PYTORCH_CUDA_ALLOC_CONF",)
    assert rules_for("2.10").rules.conf_variables == ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


# --- equal sizes --------------------------------------------------------------------------------------------------

MIB = 2**20
LOW = 0x7000_0000_0000
HIGH = LOW + 64 * MIB


def allocator(release: str) -> CachingAllocator:
    """The driver puts its first segment above its second."""
    return CachingAllocator(TOTAL, TOTAL, rules_for(release).rules)


@pytest.mark.parametrize(
    ("release", "place"),
    [("2.9", LOW), ("2.10", LOW), ("2.11", LOW), ("2.12", HIGH), ("2.13", HIGH), ("2.14", HIGH)],
)
def test_of_two_equal_segments_the_lower_is_taken_up_to_2_11_and_the_older_from_2_12(release: str, place: int) -> None:
    a = allocator(release)
    a.give_addresses([(HIGH, 14 * MIB), (LOW, 14 * MIB)])
    for n in range(2):
        a.malloc(n, 14 * MIB)
    for n in range(2):
        a.free(n)
    assert a.malloc(2, 14 * MIB) == place
    assert a.address_ties == 0, "whole idle segments of one size are interchangeable"


@pytest.mark.parametrize(
    ("release", "place", "ties"), [("2.11", LOW, 1), ("2.12", HIGH, 0), ("2.13", HIGH, 0), ("2.14", HIGH, 0)]
)
def test_a_choice_between_parts_of_different_segments_is_counted_where_addresses_decide(
    release: str, place: int, ties: int
) -> None:
    a = allocator(release)
    a.give_addresses([(HIGH, 20 * MIB), (LOW, 20 * MIB)])
    for n in range(4):
        a.malloc(n, 9 * MIB)  # two to a segment
    a.free(2)
    a.free(0)
    assert a.malloc(4, 9 * MIB) == place
    assert a.address_ties == ties


def test_ties_inside_one_segment_do_not_depend_on_the_driver() -> None:
    a = allocator("2.11")
    for n in range(4):
        a.malloc(n, 512)
    a.free(0)
    a.free(2)
    a.malloc(4, 512)
    assert a.address_ties == 0


@pytest.mark.parametrize(("release", "taken"), [("2.11", "front"), ("2.12", "middle"), ("2.13", "front")])
def test_in_2_12_the_block_object_made_first_is_taken(release: str, taken: str) -> None:
    """A split makes a new object for the front and keeps the old one for the rest: a front can be the younger one."""
    a = allocator(release)
    a.malloc(0, 8 * MIB)
    places = {"middle": a.malloc(1, 4 * MIB)}
    a.malloc(2, 8 * MIB)  # the 20 MiB segment is full
    a.free(0)
    places["front"] = a.malloc(3, 4 * MIB)  # splits the first 8 MiB: a new object, younger than the middle one
    a.malloc(4, 4 * MIB)
    a.free(3)
    a.free(1)
    assert a.malloc(5, 4 * MIB) == places[taken]


@pytest.mark.parametrize(
    ("release", "freed_last", "taken"),
    [("2.11", "front", 0), ("2.12", "front", 3), ("2.12", "rest", 0), ("2.13", "front", 0)],
)
def test_in_2_12_a_merged_block_is_as_old_as_the_one_that_was_freed_last(
    release: str, freed_last: str, taken: int
) -> None:
    a = allocator(release)
    places = [a.malloc(n, 2 * MIB) for n in range(10)]  # fills the segment
    a.free(0)
    a.free(1)
    a.malloc(10, 2 * MIB)  # the front of the two: a new object, younger than all others
    a.malloc(11, 2 * MIB)  # the rest: the object that allocation 1 had
    a.free(3)
    a.free(4)  # a block of 4 MiB, in age between the two
    for n in (11, 10) if freed_last == "front" else (10, 11):
        a.free(n)
    assert a.malloc(12, 4 * MIB) == places[taken]


@pytest.mark.parametrize("release", ["2.11", "2.13", "2.14"])
def test_ties_inside_one_segment_go_to_the_lower_address_except_in_2_12(release: str) -> None:
    a = allocator(release)
    places = [a.malloc(n, 512) for n in range(5)]
    a.free(3)
    a.free(1)
    assert a.malloc(5, 512) == places[1]


# --- open scopes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("release", "defers"), [("2.9", True), ("2.12", True), ("2.13", False), ("2.14", False)])
def test_an_open_scope_keeps_finished_frees_waiting_up_to_2_12(release: str, defers: bool) -> None:
    a = allocator(release)
    a.malloc(0, 512)
    a.record_stream(0, 0x5100)
    a.free(0)
    a.uses_done(0)
    a.open_scope(1)
    a.malloc(1, 512, pool=1)
    assert a.now.active == (1024 if defers else 512)
    a.close_scope()
    a.malloc(2, 512, pool=1)
    assert a.now.active == 1024
