"""Why model and recording part: what is shown about the first difference, and the reason that is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from snapshots import BASE, MIB, entry, segment, small_snapshot, snapshot

from fragscope.allocator import CARDS, Difference, ReplaySettings, Verification, replay, rules_for
from fragscope.trace import Loss, Trace
from fragscope.trace.snapshot import snapshot_to_trace

GIB = 2**30
CARD = CARDS["h100-80gb"]
SETTINGS = ReplaySettings(rules_for("2.11"), CARD.name, CARD.total, CARD.free)
HIGH = 2 * BASE


def read(entries: list[dict[str, Any]]) -> Trace:
    """A recording of these entries; what stands at its end is not compared."""
    return replace(snapshot_to_trace(snapshot(entries), Path("s")), final=None)


def verified(trace: Trace, **changed: Any) -> Verification:
    outcome = replay(trace, replace(SETTINGS, **changed), verify=True).verify
    assert outcome is not None
    return outcome


def first(trace: Trace, **changed: Any) -> Difference:
    found = verified(trace, **changed).first
    assert found is not None
    return found


def taken(addr: int, size: int, segment_size: int | None = None, **more: Any) -> list[dict[str, Any]]:
    """A request that took a segment of its own."""
    return [
        entry("segment_alloc", addr, segment_size or size, **more),
        entry("alloc", addr, size, **more),
    ]


def freed(addr: int, size: int) -> list[dict[str, Any]]:
    return [entry("free_requested", addr, size), entry("free_completed", addr, size)]


# --- reasons ------------------------------------------------------------------------------------------------------


def test_a_failure_that_the_model_does_not_have() -> None:
    trace = read([*taken(BASE, 40 * MIB), entry("oom", 60 * GIB, 40 * MIB)])
    found = first(trace)
    assert found.event == 1
    assert found.recorded.startswith("oom of 41943040 B")
    assert "for want of memory that the model has: name the memory fraction (--memory-fraction)" in found.likely
    assert "what the card had free (--capacity)" in found.likely
    assert verified(trace, limit=64 * MIB).mismatches == 0


def test_a_failure_that_the_recording_does_not_have() -> None:
    trace = read(taken(BASE, 40 * MIB))
    found = first(trace, capacity=32 * MIB)
    assert found.modelled.startswith("oom of 41943040 B")
    assert found.likely.startswith("the model ran out of memory that the recording had")
    assert "--card" in found.likely
    assert verified(trace).mismatches == 0


def test_cached_memory_that_went_back_in_the_recording_only() -> None:
    """Of two idle segments one is returned: garbage collection, which the settings given do not have."""
    e = [*taken(BASE, 20 * MIB), *taken(HIGH, 30 * MIB), *freed(BASE, 20 * MIB), *freed(HIGH, 30 * MIB)]
    found = first(read([*e, entry("segment_free", BASE, 20 * MIB), *taken(3 * BASE, 40 * MIB)]))
    assert found.recorded.startswith("segment_free of 20971520 B")
    assert found.modelled.startswith("segment_alloc of 41943040 B")
    assert "a memory fraction or garbage collection was in force" in found.likely
    assert "empty_cache()" in found.likely


def test_cached_memory_that_went_back_in_the_model_only() -> None:
    trace = read([*taken(BASE, 20 * MIB), *freed(BASE, 20 * MIB), *taken(HIGH, 40 * MIB)])
    found = first(trace, limit=50 * MIB)
    assert found.modelled.startswith("segment_free of 20971520 B")
    assert found.likely.startswith("the model returned cached memory that the recording keeps")
    assert verified(trace).mismatches == 0


def test_memory_of_another_kind() -> None:
    trace = read(taken(BASE, 40 * MIB))
    found = first(trace, conf="expandable_segments:True")
    assert found.recorded.startswith("segment_alloc")
    assert found.modelled.startswith("segment_map")
    assert found.likely.startswith("expandable segments were switched on or off")


def test_another_amount_of_memory() -> None:
    trace = read(taken(BASE, 2 * MIB, 64 * MIB))
    found = first(trace)
    assert found.recorded.startswith("segment_alloc of 67108864 B")
    assert found.modelled.startswith("segment_alloc of 20971520 B")
    assert "another amount of memory was taken" in found.likely
    assert "large_segment_size_mb" in found.likely
    assert verified(trace, conf="large_segment_size_mb:64").mismatches == 0


def test_a_cached_block_that_served_on_one_side_only() -> None:
    found = first(read([*taken(BASE, 20 * MIB), *freed(BASE, 20 * MIB), *taken(HIGH, 20 * MIB)]))
    assert found.modelled == f"alloc of 20971520 B at {BASE:#x} for allocation 1 on stream 0x0"
    assert found.likely.startswith("a cached block served here and not there")


def test_blocks_of_one_size_told_apart_differently() -> None:
    """Up to 2.11 the lower address comes first, from 2.12 on what was made first."""
    e = [*taken(HIGH, 20 * MIB), *taken(BASE, 20 * MIB), *freed(HIGH, 20 * MIB), *freed(BASE, 20 * MIB)]
    trace = read([*e, entry("alloc", HIGH, 20 * MIB)])
    found = first(trace)
    assert found.likely.startswith("blocks of one size are told apart differently: another release's rules")
    assert verified(trace, rules=rules_for("2.12")).mismatches == 0


def test_events_that_are_missing_explain_whatever_follows() -> None:
    trace = read([*taken(BASE, 20 * MIB), *freed(BASE, 20 * MIB), *taken(HIGH, 20 * MIB)])
    found = first(replace(trace, lost=(Loss("late_start", "recording began late", 3),)))
    assert found.likely.startswith("events are missing from the recording")


def test_an_address_that_no_rule_explains() -> None:
    value = small_snapshot()
    value["device_traces"][0][2]["addr"] = BASE + 4096
    found = first(replace(snapshot_to_trace(value, Path("s")), final=None))
    assert found.recorded == f"alloc at {BASE + 4096:#x} for allocation 1 on stream 0x0"
    assert found.modelled == f"alloc of 1024 B at {BASE + 512:#x} for allocation 1 on stream 0x0"
    assert found.likely == "settings or a release other than those named, or the model is wrong"


# --- the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "likely"),
    [
        ("active_pending_free", "frees wait for other streams at the end, and when they complete is not recorded"),
        ("inactive", "every decision is the recorded one: something happened after the last event"),
    ],
)
def test_a_difference_at_the_end(state: str, likely: str) -> None:
    trace = snapshot_to_trace(small_snapshot(), Path("s"))
    value = small_snapshot()
    value["segments"][0]["blocks"][1]["state"] = state
    found = first(replace(trace, final=snapshot_to_trace(value, Path("s")).final))
    assert found.event == -1
    assert found.around == ()
    assert found.likely.startswith(likely)


def test_a_recording_without_allocations_says_so() -> None:
    stands = snapshot([], [segment(BASE, 2 * MIB, [(2 * MIB, "inactive")])])
    value = snapshot([entry("oom", 0, 40 * MIB)])
    trace = replace(
        snapshot_to_trace(value, Path("s")),
        final=snapshot_to_trace({**stands, "device_traces": value["device_traces"]}, Path("s")).final,
    )
    found = first(trace, capacity=2 * MIB)
    assert found.likely == "the recording holds no allocation"


# --- what is shown ------------------------------------------------------------------------------------------------


def test_the_request_and_the_state_that_it_met_are_shown() -> None:
    e = [*taken(BASE, 64 * MIB), entry("alloc", HIGH, 400, stream=5)]
    e.insert(2, entry("segment_alloc", HIGH, 2 * MIB, stream=5))
    e += [*freed(BASE, 64 * MIB), *taken(3 * BASE, 12 * MIB)]
    found = first(read(e), limit=4 * GIB, capacity=8 * GIB)
    free = 8 * GIB - 66 * MIB
    assert found.around == (
        "request: alloc 12582912 B on stream 0x0",
        f"before it: {66 * MIB} B reserved, 512 B allocated, 0 B waiting for other streams; "
        f"the driver has {free} B, at most {4 * GIB} B may be reserved",
        f"cached blocks that are large enough, in search order: {64 * MIB} B at {BASE:#x}",
    )


def test_where_nothing_cached_is_large_enough_that_is_said() -> None:
    found = first(read(taken(BASE, 40 * MIB)), capacity=32 * MIB)
    assert found.around[-1] == "cached blocks that are large enough, in search order: none"


def test_of_a_request_other_than_an_allocation_its_kind_is_shown() -> None:
    """The recorded segment goes back although the model still holds its block."""
    e = [*taken(BASE, 20 * MIB), *taken(HIGH, 20 * MIB), *freed(BASE, 20 * MIB), entry("segment_free", HIGH, 20 * MIB)]
    found = first(read(e))
    assert found.around[0] == "request: empty_cache"
    assert len(found.around) == 2


def test_the_pool_is_shown_by_its_id() -> None:
    e = taken(BASE, 400, 2 * MIB, release="2.12", pool_id=(0, 7))
    e.append(entry("alloc", BASE + 4096, 400, release="2.12", pool_id=(0, 7)))
    found = first(read(e), rules=rules_for("2.12"))
    assert found.around[0] == "request: alloc 400 B on stream 0x0 from pool (0, 7)"


def test_every_difference_is_counted_and_the_first_is_shown() -> None:
    e = [*taken(BASE, 20 * MIB), *freed(BASE, 20 * MIB), *taken(HIGH, 20 * MIB), *freed(HIGH, 20 * MIB)]
    outcome = verified(read(e))
    assert outcome.mismatches > 1
    assert outcome.first is not None
    assert outcome.first.event == 2
