"""Snapshots whose recording skipped actions, or has some that nobody knows: read as far as possible, and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import TRACES, own_settings, pickled
from snapshots import BASE, MIB, entry, segment, small_snapshot, snapshot

from fragscope.allocator import replay
from fragscope.errors import InputFileError
from fragscope.trace import RequestKind, Trace, with_sidecar
from fragscope.trace.events import REQUEST_DTYPES
from fragscope.trace.snapshot import snapshot_to_trace

K = RequestKind


def read(value: Any) -> Trace:
    return snapshot_to_trace(value, Path("run.pickle"))


def recorded(name: str, keep: Callable[[dict[str, Any]], bool] = lambda entry: True) -> Trace:
    """A recording in tests/data without some of its entries."""
    value = pickled(name)
    value["device_traces"] = [[e for e in entries if keep(e)] for entries in value["device_traces"]]
    return with_sidecar(snapshot_to_trace(value, TRACES / f"{name}.pickle.xz"), TRACES / f"{name}.json")


def without(*actions: str) -> Callable[[dict[str, Any]], bool]:
    return lambda entry: entry["action"] not in actions


def kinds(trace: Trace) -> list[RequestKind]:
    return [RequestKind(k) for k in trace.requests.kind]


def losses(trace: Trace) -> dict[str, int]:
    return {loss.code: loss.events for loss in trace.lost}


@pytest.mark.parametrize("action", ["free_requested", "free_completed"])
@pytest.mark.parametrize("name", ["train_vit-default", "train_vit-expandable", "moe_list_stack-default"])
def test_where_no_free_was_deferred_either_half_of_it_tells_the_same(name: str, action: str) -> None:
    """These recordings have no deferred frees, so nothing but the free's call stack is lost."""
    whole, part = recorded(name), recorded(name, without(action))
    assert K.RECORD_STREAM not in kinds(whole)
    for column in REQUEST_DTYPES:
        if column != "stack":
            assert np.array_equal(getattr(part.requests, column), getattr(whole.requests, column)), column
    frees = kinds(whole).count(K.FREE)
    assert losses(part) == losses(whole) | {action: frees}
    replayed = replay(part, own_settings(part), verify=True, compiled=False)
    assert replayed.verify is not None
    assert replayed.verify.mismatches == 0
    assert {a.code: a.events for a in replayed.assumptions}[action] == frees
    assert not replayed.exact


@pytest.mark.parametrize("action", ["free_requested", "free_completed"])
def test_deferred_frees_are_read_as_frees_and_the_peaks_stay(action: str) -> None:
    whole, part = recorded("streams-default"), recorded("streams-default", without(action))
    assert K.RECORD_STREAM in kinds(whole)
    assert not {K.RECORD_STREAM, K.USES_DONE} & set(kinds(part))
    assert kinds(part).count(K.ALLOC) == kinds(whole).count(K.ALLOC)
    a, b = (replay(t, own_settings(t), compiled=False).whole.peak.reserved for t in (whole, part))
    assert a == b


def test_a_recording_without_requested_frees_may_have_begun_late() -> None:
    value = small_snapshot()
    value["device_traces"][0] = [e for e in value["device_traces"][0][3:] if e["action"] != "free_requested"]
    trace = read(value)
    assert kinds(trace) == [K.START, K.HELD, K.HELD, K.FREE]
    assert [state for _, _, state in trace.initial[0].blocks] == ["allocated", "allocated", "free"]
    assert losses(trace)["free_requested"] == 1


def test_a_free_that_still_waits_at_the_end_is_no_skipped_completion() -> None:
    entries = [
        entry("segment_alloc", BASE, 2 * MIB), entry("alloc", BASE, 512), entry("free_requested", BASE, 512),
        entry("alloc", BASE + 512, 512),
    ]  # fmt: skip
    blocks = [(512, "active_pending_free"), (512, "active_allocated"), (2 * MIB - 1024, "inactive")]
    trace = read(snapshot(entries, [segment(BASE, 2 * MIB, blocks)]))
    assert kinds(trace) == [K.ALLOC, K.RECORD_STREAM, K.FREE, K.ALLOC]
    assert "free_completed" not in losses(trace)


@pytest.mark.parametrize(
    ("skipped", "why"),
    [
        (("alloc",), "was recorded without 'alloc' entries (skip_actions); what its frees are about cannot be known"),
        (("free_requested", "free_completed"), "which is still allocated (frees are not recorded: skip_actions?)"),
    ],
)
@pytest.mark.parametrize("name", ["train_vit-default", "oom-default"])
def test_what_cannot_be_done_without_is_named(name: str, skipped: tuple[str, ...], why: str) -> None:
    with pytest.raises(InputFileError) as caught:
        recorded(name, without(*skipped))
    assert why in str(caught.value)


def test_segments_that_nobody_took_are_said_to_be_doubtful() -> None:
    trace = recorded("train_vit-default", without("segment_alloc", "segment_free"))
    assert "segments_taken" in losses(trace)
    assert not replay(trace, own_settings(trace), compiled=False).exact
    value = small_snapshot()
    value["device_traces"][0] = value["device_traces"][0][3:]  # it began late, and two blocks were live
    assert "segments_taken" not in losses(read(value))


def test_failed_requests_may_be_missing() -> None:
    whole, part = recorded("oom-default"), recorded("oom-default", without("oom"))
    failed = losses(whole)["oom_size"]
    assert kinds(part).count(K.ALLOC) == kinds(whole).count(K.ALLOC) - failed
    assert "oom_size" not in losses(part)


def test_unknown_actions_are_left_out_and_counted() -> None:
    plain = small_snapshot()
    value = small_snapshot()
    entries = value["device_traces"][0]
    # between the two halves of a free, within a request, first and last; with nothing but an action
    for at, action in ((5, "sing"), (4, "dance\x1b"), (1, "sing"), (0, "hum")):
        entries.insert(at, {"action": action})
    trace = read(value)
    for column in REQUEST_DTYPES:
        assert np.array_equal(getattr(trace.requests, column), getattr(read(plain).requests, column)), column
    (loss,) = (x for x in trace.lost if x.code == "unknown_actions")
    assert loss.events == 4
    assert loss.detail.endswith("left out: dance\\x1b, hum, sing")


def test_unknown_actions_do_not_hide_what_stood_at_the_start() -> None:
    value = small_snapshot()
    value["device_traces"][0] = [{"action": "hum"}, *value["device_traces"][0][1:]]
    trace = read(value)
    assert kinds(trace) == [K.START, K.HELD, K.ALLOC, K.FREE]


def test_many_unknown_actions_are_not_all_named() -> None:
    value = small_snapshot()
    value["device_traces"][0] += [{"action": f"a{n}"} for n in range(1000)]
    (loss,) = (x for x in read(value).lost if x.code == "unknown_actions")
    assert loss.events == 1000
    assert loss.detail.endswith("left out: a0, a1, a10, a100, a101, ...")
