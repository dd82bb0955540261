"""The model against traces recorded on a GPU: every decision, and torch's own statistics beside each recording."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builders import TRACES, replayed, settings, torch_statistics

from fragscope.allocator import Replay, SpanMeter, replay
from fragscope.allocator.caching import CachingAllocator
from fragscope.allocator.driver import Device
from fragscope.trace import DecisionKind, RequestKind, Trace, load_trace, write_trace

FROM_START = ["moe_list_stack-default", "oom-default", "streams-default", "train_vit-default"]
FP8 = ["fp8-dsv3-tp8.fixed.default", "fp8-dsv3-tp8.newest.default", "fp8-dsv3-tp8.orig.default"]
"""Recordings whose peak statistics were reset after the first eight allocations."""
STATISTICS = {
    "allocated": "allocated_bytes.all",
    "active": "active_bytes.all",
    "reserved": "reserved_bytes.all",
    "inactive_split": "inactive_split_bytes.all",
}


def load(name: str) -> Trace:
    return load_trace(TRACES / f"{name}.pickle.xz")


def verified(trace: Trace, name: str) -> Replay:
    return replay(trace, settings(name), verify=True)


@pytest.mark.parametrize("name", FROM_START + FP8)
def test_every_decision_equals_the_recorded_one(name: str) -> None:
    trace = load(name)
    outcome = verified(trace, name).verify
    assert trace.decisions is not None
    assert outcome is not None
    assert outcome.first is None
    assert outcome.mismatches == 0
    assert outcome.compared >= len(trace.decisions)


@pytest.mark.parametrize("name", FROM_START + FP8)
def test_the_end_equals_torchs_statistics(name: str) -> None:
    whole, stats = replayed(name).whole, torch_statistics(name)
    for ours, theirs in STATISTICS.items():
        assert getattr(whole.end, ours) == stats[f"{theirs}.current"], ours
    assert whole.end.stranded == stats["inactive_split_bytes.all.current"]
    if whole.end.active == whole.end.allocated:  # torch takes requested bytes back when a free completes
        assert whole.end.requested == stats["requested_bytes.all.current"]
    assert whole.segments_peak == stats["segment.all.peak"]
    assert whole.calls.alloc == stats["num_device_alloc"]
    assert whole.calls.free == stats["num_device_free"]
    assert whole.calls.sync == stats["num_sync_all_streams"]
    assert whole.retries == stats["num_alloc_retries"]
    assert whole.ooms == stats["num_ooms"] == len(replayed(name).ooms)


@pytest.mark.parametrize("name", FROM_START)
def test_peaks_equal_torchs_statistics(name: str) -> None:
    peak, stats = replayed(name).whole.peak, torch_statistics(name)
    for ours, theirs in STATISTICS.items():
        assert getattr(peak, ours) == stats[f"{theirs}.peak"], ours
    if name != "streams-default":
        assert peak.requested == stats["requested_bytes.all.peak"]


@pytest.mark.parametrize("name", FP8)
def test_peaks_since_the_reset_equal_torchs_statistics(name: str) -> None:
    from builders import replayed_phase

    measured, stats = replayed_phase(name).measured, torch_statistics(name)
    assert measured is not None
    for ours, theirs in STATISTICS.items():
        assert getattr(measured.peak, ours) == stats[f"{theirs}.peak"], ours
    assert measured.peak.requested == stats["requested_bytes.all.peak"]


def test_the_recorded_card_gives_the_recorded_ooms() -> None:
    assert len(replayed("oom-default").ooms) == 63
    without = replay(load("oom-default"), replace(settings("oom-default"), memory_fraction=None), verify=True)
    assert without.ooms == ()
    assert without.verify is not None
    assert without.verify.mismatches > 0, "the fraction is not in the snapshot, and matters"


def tampered(trace: Trace, row: int, column: str, value: Any) -> Trace:
    assert trace.decisions is not None
    changed = np.array(getattr(trace.decisions, column))
    changed[row] = value
    return replace(trace, decisions=replace(trace.decisions, **{column: changed}))


def nth(trace: Trace, kind: DecisionKind, n: int) -> int:
    assert trace.decisions is not None
    return int(np.flatnonzero(trace.decisions.kind == kind)[n])


def test_one_changed_address_is_found_and_both_sides_are_shown() -> None:
    trace = load("streams-default")
    assert trace.decisions is not None
    row = nth(trace, DecisionKind.ALLOC, 1000)
    true = int(trace.decisions.addr[row])
    outcome = verified(tampered(trace, row, "addr", true + 512), "streams-default").verify
    assert outcome is not None
    assert outcome.mismatches == 1
    assert outcome.first is not None
    assert outcome.first.event == int(trace.decisions.request[row])
    assert f"{true + 512:#x}" in outcome.first.recorded
    assert f"{true:#x}" in outcome.first.modelled


@pytest.mark.parametrize("kind", [DecisionKind.SEGMENT_FREE, DecisionKind.FREE_COMPLETED, DecisionKind.FREE_REQUESTED])
def test_a_change_in_any_kind_of_decision_is_found(kind: DecisionKind) -> None:
    trace = load("streams-default")
    assert trace.decisions is not None
    row = nth(trace, kind, 3)
    outcome = verified(tampered(trace, row, "addr", 2**46 + 512), "streams-default").verify
    assert outcome is not None
    assert outcome.mismatches >= 1


@pytest.mark.parametrize("column", ["kind", "request", "id", "stream"])
def test_a_change_in_any_column_is_found(column: str) -> None:
    trace = load("moe_list_stack-default")
    assert trace.decisions is not None
    row = nth(trace, DecisionKind.FREE_COMPLETED, 10)
    value = DecisionKind.ALLOC if column == "kind" else int(getattr(trace.decisions, column)[row]) + 1
    outcome = verified(tampered(trace, row, column, value), "moe_list_stack-default").verify
    assert outcome is not None
    assert outcome.mismatches >= 1


def test_a_missing_decision_is_found() -> None:
    trace = load("moe_list_stack-default")
    assert trace.decisions is not None
    shorter = {name: getattr(trace.decisions, name)[:-1] for name in type(trace.decisions).__dataclass_fields__}
    outcome = verified(replace(trace, decisions=replace(trace.decisions, **shorter)), "moe_list_stack-default").verify
    assert outcome is not None
    assert outcome.first is not None
    assert outcome.first.recorded == "nothing more"


def test_a_changed_end_state_is_found() -> None:
    trace = load("moe_list_stack-default")
    assert trace.final is not None
    last = trace.final[-1]
    addr, size, _ = last.blocks[0]
    wrong = replace(last, blocks=((addr, size, "pending"), *last.blocks[1:]))
    outcome = verified(replace(trace, final=(*trace.final[:-1], wrong)), "moe_list_stack-default").verify
    assert outcome is not None
    assert outcome.mismatches >= 1
    assert outcome.first is not None
    assert outcome.first.event == -1


def test_the_wrong_tie_break_is_found() -> None:
    from fragscope.allocator import rules_for

    name = "streams-default"
    outcome = replay(load(name), replace(settings(name), rules=rules_for("2.13.0")), verify=True)
    assert outcome.verify is not None
    assert outcome.verify.mismatches > 0
    assert not outcome.exact


def test_a_replay_of_a_replay_is_the_same(tmp_path: Any) -> None:
    first = replayed("train_vit-default")
    write_trace(first.trace, tmp_path / "t.fscope")
    again = replay(load_trace(tmp_path / "t.fscope"), settings("train_vit-default"), verify=True)
    assert again.verify is not None
    assert again.verify.mismatches == 0
    assert again.whole == first.whole


def test_requests_alone_give_the_same_figures_where_no_tie_depends_on_the_driver() -> None:
    name = "moe_list_stack-default"
    bare = replay(replace(load(name), decisions=None, final=None), settings(name))
    assert bare.whole.peak == replayed(name).whole.peak
    assert bare.whole.end == replayed(name).whole.end


def test_a_span_counts_only_what_happened_in_it() -> None:
    rules = settings("moe_list_stack-default").rules.rules
    allocator = CachingAllocator(Device(2**30, 2**30), rules)
    before = allocator.malloc(2**20)
    meter = SpanMeter(allocator, "phase")
    allocator.free(allocator.malloc(2**22))
    span = meter.finish(1)
    assert span.base.allocated == span.end.allocated == before.size == 2**20
    assert (span.peak.allocated, span.transient, span.retained) == (2**20 + 2**22, 2**22, 0)
    assert (span.calls.alloc, span.segments_peak) == (1, 2)


def test_the_recordings_hold_what_their_readme_says() -> None:
    assert load("streams-default").count(RequestKind.RECORD_STREAM) > 0
    assert len(set(load("streams-default").requests.stream.tolist())) >= 3
