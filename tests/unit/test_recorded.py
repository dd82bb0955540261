"""What a Trace was recorded under: what it says, and what its failures tell where it says nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import CONFS, bare_recording, recording

from fragscope.allocator import CARDS, ReplaySettings, card_named, card_of, parse_conf, recorded_under, rules_for
from fragscope.allocator.recorded import Limits, limits_from_failures
from fragscope.errors import UsageError
from fragscope.trace import DecisionKind, DecisionLog, RequestKind, RequestLog, Settings, Trace

MIB = 2**20
GIB = 2**30
CARD = CARDS["h100-80gb"]
RULES = rules_for("2.11.0").rules
DEFAULT = parse_conf("", RULES)
ALLOC, FREE, MAP, UNMAP = (
    DecisionKind.SEGMENT_ALLOC, DecisionKind.SEGMENT_FREE, DecisionKind.SEGMENT_MAP, DecisionKind.SEGMENT_UNMAP,
)  # fmt: skip
Failure = tuple[int, int]  # rounded bytes of the request, bytes the driver had


def recorded(*steps: tuple[DecisionKind, int] | Failure) -> Trace:
    """A recording in which segments came and went, and requests failed; only sizes matter here."""
    log, decided = RequestLog(), DecisionLog()
    for step in steps:
        decided.request = log.append(RequestKind.ALLOC, id=len(log), size=1)
        if isinstance(step[0], DecisionKind):
            decided.append(step[0], -1, 2**46, step[1], 0, 0)
        else:
            rounded, free = step
            decided.append(DecisionKind.OOM, 0, free, rounded, 0, 0)
    return Trace(log.finish(), decided.finish(), torch="2.11", card="h100-80gb", source="snapshot")


def limits(*steps: tuple[DecisionKind, int] | Failure, conf: str = "") -> Limits:
    return limits_from_failures(recorded(*steps), parse_conf(conf, RULES))


# --- limits from failures -----------------------------------------------------------------------------------------


def test_without_failures_nothing_is_told() -> None:
    assert limits((ALLOC, 20 * MIB)) == Limits()
    assert limits_from_failures(replace(recorded((ALLOC, 20 * MIB)), decisions=None), DEFAULT) == Limits()


def test_a_failure_although_the_driver_had_enough_means_a_limit() -> None:
    """At least what was reserved at most; less than what the failed request would have made of it."""
    told = limits((ALLOC, 20 * MIB), (ALLOC, 100 * MIB), (FREE, 100 * MIB), (110 * MIB, 50 * GIB))
    assert told == Limits(limit=120 * MIB, limit_below=130 * MIB)


def test_the_tightest_failure_counts() -> None:
    told = limits((ALLOC, 100 * MIB), (60 * MIB, GIB), (40 * MIB, GIB), (50 * MIB, GIB))
    assert told == Limits(limit=100 * MIB, limit_below=140 * MIB)


def test_a_failure_for_want_of_memory_tells_how_much_there_was() -> None:
    assert limits((ALLOC, 100 * MIB), (60 * MIB, 30 * MIB)) == Limits(capacity=130 * MIB)


def test_the_most_that_was_there_counts() -> None:
    told = limits((ALLOC, 100 * MIB), (60 * MIB, 30 * MIB), (60 * MIB, 50 * MIB), (60 * MIB, 10 * MIB))
    assert told.capacity == 150 * MIB, "another process may have held memory the other times"


def test_failures_of_both_kinds_tell_both() -> None:
    told = limits((ALLOC, 100 * MIB), (60 * MIB, 30 * MIB), (20 * MIB, 30 * MIB))
    assert told == Limits(limit=100 * MIB, limit_below=120 * MIB, capacity=130 * MIB)


def test_failures_that_no_single_limit_explains_tell_none() -> None:
    """The limit was changed between them: 60 MiB were refused where 100 MiB had been allowed."""
    assert limits((ALLOC, 100 * MIB), (FREE, 100 * MIB), (60 * MIB, GIB)) == Limits()


def test_mapped_memory_counts_as_segments_do() -> None:
    told = limits((MAP, 20 * MIB), (MAP, 20 * MIB), (UNMAP, 20 * MIB), (30 * MIB, GIB))
    assert told == Limits(limit=40 * MIB, limit_below=50 * MIB)


@pytest.mark.parametrize(
    ("rounded", "conf", "needed"),
    [
        (512, "", 2 * MIB),
        (MIB, "", 2 * MIB),
        (MIB + 512, "", 20 * MIB),
        (10 * MIB - 512, "", 20 * MIB),
        (10 * MIB, "", 10 * MIB),
        (10 * MIB + 512, "", 12 * MIB),
        (MIB + 512, "large_segment_size_mb:64", 64 * MIB),
    ],
)
def test_what_fails_is_the_segment_that_the_request_needs(rounded: int, conf: str, needed: int) -> None:
    assert limits((ALLOC, 100 * MIB), (rounded, needed), conf=conf).limit_below == 100 * MIB + needed
    assert limits((ALLOC, 100 * MIB), (rounded, needed - 1), conf=conf).capacity == 100 * MIB + needed - 1


@pytest.mark.parametrize("name", [name for name in ("oom-default", *CONFS) if "oom" in name])
def test_the_recorded_fractions_lie_within_what_the_failures_tell(name: str) -> None:
    bare, full = recorded_under(bare_recording(name)), recorded_under(recording(name))
    fraction = full.memory_fraction
    if fraction is None:
        fraction = full.conf.per_process_memory_fraction
    assert bare.limits.limit is not None
    assert bare.limits.limit_below is not None
    assert bare.limits.limit <= int(fraction * CARD.total) < bare.limits.limit_below


@pytest.mark.parametrize("name", [name for name in CONFS if "fill" in name])
def test_on_a_full_card_the_failures_tell_what_was_free_at_the_start(name: str) -> None:
    assert recorded_under(recording(name)).capacity == 84_465_090_560
    assert recorded_under(bare_recording(name)).limits == Limits(capacity=84_465_090_560)


# --- what is in force ---------------------------------------------------------------------------------------------


def test_what_the_trace_names_is_in_force() -> None:
    settings = Settings(conf="max_split_size_mb:64", memory_fraction=0.5, capacity=10 * GIB)
    told = recorded_under(replace(recorded((ALLOC, 20 * MIB)), settings=settings))
    assert ReplaySettings.of(told) == ReplaySettings(
        rules_for("2.11"), "h100-80gb", CARD.total, 10 * GIB, "max_split_size_mb:64", 0.5, None
    )
    assert told.notes == ()


def test_a_fraction_that_is_known_needs_no_inference() -> None:
    trace = recorded((ALLOC, 20 * MIB), (20 * MIB, GIB))
    assert recorded_under(trace).limits.limit == 20 * MIB
    known = recorded_under(replace(trace, settings=Settings(memory_fraction=0.5)))
    assert known.limits == Limits()
    assert known.memory_fraction == 0.5


def test_what_is_inferred_is_noted() -> None:
    (note,) = recorded_under(recorded((ALLOC, 20 * MIB), (20 * MIB, GIB))).notes
    assert note == (
        "requests failed although the driver had memory: a limit of 20,971,520 to 41,943,039 reserved bytes was in "
        "force (--memory-fraction)"
    )
    told = recorded_under(recorded((ALLOC, 20 * MIB), (20 * MIB, MIB)))
    assert told.capacity == 21 * MIB
    assert told.notes == ("requests failed with 22,020,096 bytes for segments in all: that was there (--capacity)",)


def test_a_named_capacity_comes_before_an_inferred_one() -> None:
    trace = replace(recorded((ALLOC, 20 * MIB), (20 * MIB, MIB)), settings=Settings(capacity=GIB))
    assert recorded_under(trace).capacity == GIB


def test_on_a_card_less_may_be_there_than_when_recording_began() -> None:
    def told(free_at_start: int) -> tuple[int, tuple[str, ...]]:
        settings = Settings(capacity=free_at_start)
        failed = replace(recorded((ALLOC, 20 * MIB), (20 * MIB, MIB)), settings=settings, source="cuda")
        found = recorded_under(failed)
        return found.capacity, found.notes

    assert told(21 * MIB) == (21 * MIB, ())
    capacity, (note,) = told(30 * MIB)
    assert capacity == 21 * MIB
    assert note.startswith(
        "requests failed with 22,020,096 bytes for segments in all, 9,437,184 less than at the start"
    )
    assert told(20 * MIB) == (20 * MIB, ()), "what another process gave back is not counted on"
    # Others may take memory after a peak that was served.
    held = recorded((ALLOC, 90 * MIB), (DecisionKind.SEGMENT_FREE, 90 * MIB), (61 * MIB, 60 * MIB))
    assert recorded_under(replace(held, settings=Settings(capacity=100 * MIB), source="cuda")).capacity == 90 * MIB


def test_what_the_user_says_comes_before_what_the_trace_names() -> None:
    trace = recorded((ALLOC, 20 * MIB))
    told = recorded_under(trace, rules_for("2.13.0"), card_named("h100-80gb"))
    assert told.rules.rules.release == "2.13"
    assert told.notes == ()


def test_what_nobody_says_is_assumed_and_noted() -> None:
    told = recorded_under(replace(recorded((ALLOC, 20 * MIB)), torch=None, card=None))
    assert (told.rules.rules.release, told.card.name) == ("2.14", "h100-80gb")
    assert told.notes == (
        "the file does not name its torch release; the rules of 2.14 decide (--torch)",
        "the file does not name its card; h100-80gb is assumed (--card)",
    )


# --- cards --------------------------------------------------------------------------------------------------------


def test_a_card_is_known_by_the_name_that_cuda_reports() -> None:
    trace = replace(recorded(), card="NVIDIA H100 80GB HBM3")
    assert card_of(trace) == CARD
    assert card_of(replace(trace, device_total=CARD.total)) == CARD


def test_a_card_of_that_name_with_other_memory_is_another() -> None:
    card = card_of(replace(recorded(), card="NVIDIA H100 80GB HBM3", device_total=64 * GIB))
    assert (card.total, card.free) == (64 * GIB, 64 * GIB)


def test_a_card_without_a_profile_serves_if_its_memory_is_told() -> None:
    trace = replace(recorded(), card="a card", device_total=24 * GIB, settings=Settings(capacity=23 * GIB))
    assert (card_of(trace).name, card_of(trace).total, card_of(trace).free) == ("a card", 24 * GIB, 23 * GIB)


def test_a_card_without_a_profile_whose_memory_is_not_told_must_be_named() -> None:
    with pytest.raises(UsageError, match="names the card 'a card', which has no profile, and not its memory"):
        card_of(replace(recorded(), card="a card"))
