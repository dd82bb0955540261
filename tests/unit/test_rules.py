"""What differs between releases, and which release's rules are chosen for a name."""

from __future__ import annotations

import pytest

from fragscope.allocator import NEWEST, RULES, CachingAllocator, Device, TieBreak, rules_for
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
    assert CachingAllocator(Device(TOTAL, TOTAL), rules_for(release).rules, memory_fraction=0.2).limit == limit


@pytest.mark.parametrize(("release", "limit"), [("2.9", TOTAL), ("2.10", None), ("2.11", None), ("2.14", None)])
def test_a_memory_fraction_of_one_is_a_limit_only_up_to_2_9(release: str, limit: int | None) -> None:
    assert CachingAllocator(Device(TOTAL, TOTAL), rules_for(release).rules, memory_fraction=1.0).limit == limit


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
