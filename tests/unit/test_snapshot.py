"""Snapshots as Traces: what each release writes opens, what is missing or inconsistent is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from snapshots import BASE, FRAME, MIB, RELEASES, entry, segment, small_snapshot, snapshot, write

from fragscope.errors import InputFileError, UsageError
from fragscope.trace import UNKNOWN_STREAM, DecisionKind, RequestKind, Trace
from fragscope.trace.snapshot import read_snapshot, snapshot_to_trace

FILE = Path("run.pickle")
K, D = RequestKind, DecisionKind


def read(value: Any, device: int | None = None) -> Trace:
    return snapshot_to_trace(value, FILE, device)


def refusal(value: Any) -> str:
    with pytest.raises(InputFileError) as caught:
        read(value)
    return caught.value.reason


def kinds(trace: Trace) -> list[RequestKind]:
    return [RequestKind(k) for k in trace.requests.kind]


def losses(trace: Trace) -> dict[str, int]:
    return {loss.code: loss.events for loss in trace.lost}


@pytest.mark.parametrize("release", RELEASES)
def test_the_snapshots_of_every_release_open(release: str) -> None:
    trace = read(small_snapshot(release))
    assert kinds(trace) == [K.ALLOC, K.ALLOC, K.FREE]
    assert trace.requests.size.tolist()[:2] == [400, 1000]
    assert trace.pools == ((0, 0),)
    assert trace.final is not None
    assert trace.final[0].blocks[1] == (BASE + 512, 1024, "allocated")


@pytest.mark.parametrize(
    ("release", "named"),
    [("2.9", "2.9"), ("2.10", "2.11"), ("2.11", "2.11"), ("2.12", "2.12"), ("2.13", "2.13"), ("2.14", "2.14")],
)
def test_the_release_is_told_from_the_keys_and_the_guess_is_shown(release: str, named: str) -> None:
    trace = read(small_snapshot(release))
    assert trace.torch == named
    assert "torch_release" in losses(trace)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_gives_the_same_trace(protocol: int, tmp_path: Path) -> None:
    trace = read_snapshot(write(tmp_path / "s.pickle", small_snapshot("2.14"), protocol))
    assert kinds(trace) == [K.ALLOC, K.ALLOC, K.FREE]
    assert [str(f) for f in trace.stacks[0]] == ["model.py:12 (forward)"]


def test_decisions_name_the_request_they_served() -> None:
    decisions = read(small_snapshot()).decisions
    assert decisions is not None
    rows = list(zip(decisions.kind.tolist(), decisions.request.tolist(), decisions.addr.tolist(), strict=True))
    assert rows == [
        (D.SEGMENT_ALLOC, 0, BASE),
        (D.ALLOC, 0, BASE),
        (D.ALLOC, 1, BASE + 512),
        (D.FREE_REQUESTED, 2, BASE),
        (D.FREE_COMPLETED, 2, BASE),
    ]


def test_equal_stacks_are_kept_once() -> None:
    trace = read(small_snapshot())
    assert len(trace.stacks) == 1
    assert trace.requests.stack.tolist() == [0, 0, -1]


def test_a_free_completed_later_means_that_another_stream_used_the_block() -> None:
    e = [
        entry("segment_alloc", BASE, 2 * MIB), entry("alloc", BASE, 400), entry("free_requested", BASE, 400),
        entry("alloc", BASE + 512, 400), entry("free_completed", BASE, 400), entry("alloc", BASE, 400),
    ]  # fmt: skip
    trace = read(snapshot(e))
    assert kinds(trace) == [K.ALLOC, K.RECORD_STREAM, K.FREE, K.ALLOC, K.USES_DONE, K.ALLOC]
    assert trace.requests.stream[1] == UNKNOWN_STREAM
    assert losses(trace)["record_stream"] == 1


def test_segments_released_between_allocations_mean_empty_cache() -> None:
    e = [
        entry("segment_alloc", BASE, 20 * MIB), entry("alloc", BASE, 2 * MIB), entry("free_requested", BASE, 2 * MIB),
        entry("free_completed", BASE, 2 * MIB), entry("segment_free", BASE, 20 * MIB),
        entry("segment_alloc", BASE, 2 * MIB), entry("alloc", BASE, 400), entry("free_requested", BASE, 400),
        entry("free_completed", BASE, 400), entry("segment_free", BASE, 2 * MIB),
    ]  # fmt: skip
    trace = read(snapshot(e))
    # before an allocation that took a segment the reader cannot know whether the program or the allocator released
    assert kinds(trace) == [K.ALLOC, K.FREE, K.RELEASE_SEEN, K.ALLOC, K.FREE, K.EMPTY_CACHE]
    assert losses(trace)["empty_cache"] == 2


def used_elsewhere(size: int = 400) -> list[dict[str, Any]]:
    """An allocation at BASE whose free is requested and waits, with another request in between."""
    return [
        entry("segment_alloc", BASE, 2 * MIB), entry("alloc", BASE, size), entry("free_requested", BASE, size),
        entry("alloc", BASE + MIB, 400),
    ]  # fmt: skip


def test_frees_completed_by_a_retry_are_announced_only_after_the_request() -> None:
    """Announced before it, they would be noticed before the search, and the request might be served from them."""
    e = [
        *used_elsewhere(), entry("free_completed", BASE, 400), entry("segment_free", BASE + 8 * MIB, 2 * MIB),
        entry("segment_alloc", BASE + 16 * MIB, 20 * MIB), entry("alloc", BASE + 16 * MIB, 2 * MIB),
    ]  # fmt: skip
    assert kinds(read(snapshot(e)))[-3:] == [K.RELEASE_SEEN, K.ALLOC, K.USES_DONE]
    e = [*used_elsewhere(), entry("free_completed", BASE, 400), entry("oom", 0, 2 * MIB)]
    assert kinds(read(snapshot(e)))[-2:] == [K.ALLOC, K.USES_DONE]


def test_a_free_completed_after_a_release_belongs_to_the_next_call() -> None:
    e = [
        *used_elsewhere(), entry("segment_free", BASE + 8 * MIB, 2 * MIB), entry("free_completed", BASE, 400),
        entry("alloc", BASE, 400),
    ]  # fmt: skip
    assert kinds(read(snapshot(e)))[-3:] == [K.EMPTY_CACHE, K.USES_DONE, K.ALLOC]


def test_a_free_completed_at_once_was_deferred_if_the_next_request_ran_out_beside_it() -> None:
    """Without the wait for other streams, the freed block would have served the request."""
    start = [
        entry("segment_alloc", BASE, 20 * MIB), entry("alloc", BASE, 9 * MIB), entry("free_requested", BASE, 9 * MIB),
        entry("free_completed", BASE, 9 * MIB),
    ]  # fmt: skip
    deferred = [K.ALLOC, K.RECORD_STREAM, K.FREE, K.ALLOC, K.USES_DONE]
    assert kinds(read(snapshot([*start, entry("oom", 0, 9 * MIB)]))) == deferred
    at_once = [K.ALLOC, K.FREE, K.ALLOC]
    assert kinds(read(snapshot([*start, entry("oom", 0, 30 * MIB)]))) == at_once
    assert kinds(read(snapshot([*start, entry("oom", 0, 9 * MIB, stream=5)]))) == at_once
    assert kinds(read(snapshot([*start, entry("oom", 0, 4096)]))) == at_once, (
        "small requests have segments of their own"
    )
    assert kinds(read(snapshot([*start, entry("alloc", BASE, 9 * MIB)]))) == at_once


def test_an_oom_is_an_allocation_that_failed() -> None:
    trace = read(snapshot([entry("oom", 5 * MIB, 8 * MIB)]))
    assert trace.decisions is not None
    assert kinds(trace) == [K.ALLOC]
    assert trace.decisions.kind.tolist() == [D.OOM]
    assert trace.decisions.addr.tolist() == [5 * MIB]
    assert losses(trace)["oom_size"] == 1


def test_freed_memory_never_seen_allocated_is_a_loss_not_an_error() -> None:
    e = [entry("free_requested", BASE, 400), entry("free_completed", BASE, 400), entry("alloc", BASE, 300)]
    assert losses(read(snapshot(e)))["late_start"] == 1


def test_private_pools_of_releases_without_pool_ids_are_a_loss() -> None:
    value = small_snapshot("2.11")
    value["segments"][0]["segment_pool_id"] = (0, 1)
    trace = read(value)
    assert trace.pools == ((0, 0), (0, 1))
    assert losses(trace)["pool_ids"] == 1


def test_unknown_top_level_keys_are_shown() -> None:
    trace = read({**small_snapshot(), "from_the_future": 1})
    assert "from_the_future" in next(x.detail for x in trace.lost if x.code == "unknown_keys")


def test_missing_settings_are_a_loss() -> None:
    value = small_snapshot()
    del value["allocator_settings"]
    assert "allocator_settings" in losses(read(value))


def test_settings_are_kept_flat_as_text() -> None:
    recorded = read(small_snapshot()).settings.recorded
    assert recorded["max_split_size"] == "-1"
    assert recorded["roundup_power2_divisions.1024"] == "0"


def test_one_of_several_devices_must_be_chosen() -> None:
    value = small_snapshot()
    value["device_traces"].append(value["device_traces"][0])
    with pytest.raises(UsageError, match="devices 0, 1; choose one with --device-index"):
        read(value)
    assert read(value, 1).device == 1
    with pytest.raises(UsageError, match="no events for device 2"):
        read(value, 2)


def test_the_only_device_with_events_needs_no_choice() -> None:
    value = small_snapshot()
    value["device_traces"].insert(0, [])
    assert read(value).device == 1


# --- expandable segments ------------------------------------------------------------------------------------------


def mapped(addr: int, size: int, blocks: list[tuple[int, str]]) -> dict[str, Any]:
    """A contiguous mapped range of an expandable segment at the end of a recording."""
    return {**segment(addr, size, blocks), "is_expandable": True}


def test_mappings_are_decisions_about_the_request_that_needed_them() -> None:
    e = [
        entry("segment_map", BASE, 20 * MIB), entry("alloc", BASE, 20 * MIB),
        entry("segment_map", BASE + 20 * MIB, 20 * MIB), entry("alloc", BASE + 20 * MIB, 20 * MIB),
        entry("free_requested", BASE, 20 * MIB), entry("free_completed", BASE, 20 * MIB),
        entry("segment_unmap", BASE, 20 * MIB),
    ]  # fmt: skip
    trace = read(snapshot(e, [mapped(BASE + 20 * MIB, 20 * MIB, [(20 * MIB, "active_allocated")])]))
    assert kinds(trace) == [K.ALLOC, K.ALLOC, K.FREE, K.EMPTY_CACHE]
    decisions = trace.decisions
    assert decisions is not None
    rows = list(zip(decisions.kind.tolist(), decisions.request.tolist(), decisions.size.tolist(), strict=True))
    assert rows == [
        (D.SEGMENT_MAP, 0, 20 * MIB), (D.ALLOC, 0, -1), (D.SEGMENT_MAP, 1, 20 * MIB), (D.ALLOC, 1, -1),
        (D.FREE_REQUESTED, 2, -1), (D.FREE_COMPLETED, 2, -1), (D.SEGMENT_UNMAP, 3, 20 * MIB),
    ]  # fmt: skip
    assert trace.final is not None
    assert [s.expandable for s in trace.final] == [True]
    assert trace.initial == ()


def test_what_was_unmapped_for_a_request_belongs_to_it() -> None:
    e = [
        entry("segment_map", BASE, 20 * MIB), entry("alloc", BASE, 20 * MIB), entry("free_requested", BASE, 20 * MIB),
        entry("free_completed", BASE, 20 * MIB), entry("segment_unmap", BASE, 20 * MIB),
        entry("segment_map", 2 * BASE, 20 * MIB), entry("alloc", 2 * BASE, 20 * MIB, stream=5),
    ]  # fmt: skip
    assert kinds(read(snapshot(e))) == [K.ALLOC, K.FREE, K.RELEASE_SEEN, K.ALLOC]


@pytest.mark.parametrize("named", ["", "max_split_size_mb:64", "expandable_segments:True"])
def test_memory_of_another_kind_means_that_expandable_segments_were_switched(named: str) -> None:
    e = [
        entry("segment_alloc", BASE, 20 * MIB), entry("alloc", BASE, 20 * MIB),
        entry("segment_map", 2 * BASE, 20 * MIB), entry("alloc", 2 * BASE, 20 * MIB),
        entry("segment_alloc", 3 * BASE, 2 * MIB), entry("alloc", 3 * BASE, 400),
    ]  # fmt: skip
    value = snapshot(
        e,
        [
            segment(BASE, 20 * MIB, [(20 * MIB, "active_allocated")]),
            mapped(2 * BASE, 20 * MIB, [(20 * MIB, "active_allocated")]),
            segment(3 * BASE, 2 * MIB, [(512, "active_allocated"), (2 * MIB - 512, "inactive")]),
        ],
    )
    value["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"] = named
    trace = read(value)
    assert kinds(trace) == [K.ALLOC, K.SETTINGS, K.ALLOC, K.SETTINGS, K.ALLOC]
    assert trace.requests.size[[1, 3]].tolist() == [1, 0]
    rest = "max_split_size_mb:64," if named.startswith("max") else ""
    assert trace.confs == (f"{rest}expandable_segments:False", f"{rest}expandable_segments:True")
    assert trace.settings.conf == trace.confs[0], "as it began, not as it ended"
    assert trace.settings.recorded["expandable_segments"] == "False"
    assert losses(trace)["settings_changes"] == 2


# --- private pools ------------------------------------------------------------------------------------------------


def in_pool(value: dict[str, Any], pool: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """A snapshot whose last segment is of a private pool."""
    value["segments"][-1]["segment_pool_id"] = pool
    return value


def test_a_pool_is_made_with_its_first_allocation() -> None:
    value = small_snapshot("2.12")
    for e in value["device_traces"][0]:
        e["pool_id"] = (0, 1)
    trace = read(in_pool(value))
    assert kinds(trace) == [K.POOL_CREATE, K.ALLOC, K.ALLOC, K.FREE]
    assert trace.requests.pool.tolist() == [1, 1, 1, 1]
    assert losses(trace)["pool_scopes"] == 1
    assert "pool_ids" not in losses(trace)


def test_without_pool_ids_memory_is_of_the_pool_whose_segment_stands_at_its_address() -> None:
    trace = read(in_pool(small_snapshot("2.11")))
    assert kinds(trace) == [K.POOL_CREATE, K.ALLOC, K.ALLOC, K.FREE]
    assert [trace.pools[p] for p in trace.requests.pool] == [(0, 1)] * 4
    assert losses(trace)["pool_ids"] == 1


def test_what_lay_at_that_address_before_the_segment_was_taken_is_of_the_default_pool() -> None:
    earlier = [
        entry("segment_alloc", BASE, 2 * MIB), entry("alloc", BASE, 400), entry("free_requested", BASE, 400),
        entry("free_completed", BASE, 400), entry("segment_free", BASE, 2 * MIB),
    ]  # fmt: skip
    value = in_pool(small_snapshot("2.11"))
    value["device_traces"][0] = earlier + value["device_traces"][0]
    trace = read(value)
    assert sum(kind == K.POOL_CREATE for kind in kinds(trace)) == 1
    allocs = trace.requests.kind == K.ALLOC
    assert trace.requests.pool[allocs].tolist() == [0, 1, 1]


def test_a_pool_was_released_before_its_segments_went_back() -> None:
    value = small_snapshot("2.12")
    value["device_traces"][0] = [
        entry("segment_alloc", BASE, 2 * MIB, release="2.12", pool_id=(0, 1)),
        entry("alloc", BASE, 400, release="2.12", pool_id=(0, 1)),
        entry("free_requested", BASE, 400, release="2.12", pool_id=(0, 1)),
        entry("free_completed", BASE, 400, release="2.12", pool_id=(0, 1)),
        entry("segment_free", BASE, 2 * MIB, release="2.12", pool_id=(0, 1)),
    ]
    value["segments"] = []
    trace = read(value)
    assert kinds(trace) == [K.POOL_CREATE, K.ALLOC, K.FREE, K.POOL_RELEASE, K.EMPTY_CACHE]
    assert trace.requests.pool[-1] == 1


# --- recordings that began late -----------------------------------------------------------------------------------


def test_what_stood_when_recording_began_comes_first() -> None:
    value = small_snapshot()
    value["device_traces"][0] = value["device_traces"][0][3:]  # the free of the first allocation
    trace = read(value)
    assert kinds(trace) == [K.START, K.HELD, K.HELD, K.FREE]
    assert trace.requests.size[1:3].tolist() == [400, 1024]  # of one that lives on, the snapshot says what it asked for
    assert trace.requests.id.tolist() == [-1, 0, 1, 0]
    (stood,) = trace.initial
    assert stood.blocks == (
        (BASE, 512, "allocated"), (BASE + 512, 1024, "allocated"), (BASE + 1536, 2 * MIB - 1536, "free"),
    )  # fmt: skip
    assert losses(trace)["start_state"] == 2
    assert "late_start" not in losses(trace)


def test_a_request_whose_beginning_is_lost_is_part_of_what_stood() -> None:
    value = small_snapshot()
    value["device_traces"][0] = value["device_traces"][0][1:]  # it begins after the segment was taken
    trace = read(value)
    assert kinds(trace) == [K.START, K.HELD, K.ALLOC, K.FREE]


def test_blocks_that_may_have_been_larger_are_said() -> None:
    e = [entry("free_requested", BASE, 12 * MIB), entry("free_completed", BASE, 12 * MIB)]
    (loss,) = (x for x in read(snapshot(e, [segment(BASE, 20 * MIB, [(20 * MIB, "inactive")])])).lost
               if x.code == "start_state")  # fmt: skip
    assert loss.detail.endswith("1 of its blocks may have been up to 1 MiB larger")


def test_blocks_at_the_start_are_rounded_as_the_snapshots_settings_say() -> None:
    e = [entry("free_requested", BASE, MIB + 1), entry("free_completed", BASE, MIB + 1)]
    value = snapshot(e, [segment(BASE, 20 * MIB, [(20 * MIB, "inactive")])])
    value["allocator_settings"]["roundup_power2_divisions"] = {str(2**n): 4 for n in range(16)}
    assert read(value).initial[0].blocks[0] == (BASE, MIB + MIB // 4, "allocated")


@pytest.mark.parametrize(("kind", "page"), [("small", 2 * MIB), ("large", 64 * MIB)])
def test_mapped_ranges_have_the_pages_of_their_kind(kind: str, page: int) -> None:
    e = [entry("free_requested", BASE, 400), entry("free_completed", BASE, 400)]
    value = snapshot(e, [{**mapped(BASE, 64 * MIB, [(64 * MIB, "inactive")]), "segment_type": kind}])
    value["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True,large_segment_size_mb:64"
    trace = read(value)
    assert trace.final is not None
    assert [s.page for s in (*trace.initial, *trace.final)] == [page, page]


def test_a_recording_from_the_first_allocation_on_has_no_start() -> None:
    trace = read(small_snapshot())
    assert trace.initial == ()
    assert K.START not in kinds(trace)
    assert "start_state" not in losses(trace)


def test_events_that_do_not_lead_to_the_end_are_read_without_a_start_and_said_to() -> None:
    e = [entry("free_requested", BASE, 400), entry("free_completed", BASE, 400), entry("alloc", BASE, 300)]
    trace = read(snapshot(e))
    assert trace.initial == ()
    (detail,) = (loss.detail for loss in trace.lost if loss.code == "start_state")
    assert "cannot be found" in detail
    assert "is not live at the end" in detail


# --- what is missing or inconsistent ------------------------------------------------------------------------------


def without(path: tuple[Any, ...]) -> Any:
    """A small snapshot that lacks one thing."""
    value = small_snapshot()
    inner: Any = value
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return value


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("segments",), "'segments'"),
        (("device_traces",), "'device_traces'"),
        (("device_traces", 0, 1, "action"), "event 1: 'action'"),
        (("device_traces", 0, 1, "addr"), "event 1: 'addr'"),
        (("device_traces", 0, 2, "size"), "event 2: 'size'"),
        (("device_traces", 0, 3, "stream"), "event 3: 'stream'"),
        (("segments", 0, "device"), "segment 0: 'device'"),
        (("segments", 0, "address"), "segment 0: 'address'"),
        (("segments", 0, "total_size"), "segment 0: 'total_size'"),
        (("segments", 0, "stream"), "segment 0: 'stream'"),
        (("segments", 0, "blocks"), "segment 0, 'blocks'"),
        (("segments", 0, "blocks", 1, "state"), "segment 0: 'state'"),
        (("segments", 0, "blocks", 1, "size"), "segment 0: 'size'"),
    ],
)
def test_a_missing_key_is_named_with_its_place(path: tuple[Any, ...], place: str) -> None:
    assert place in refusal(without(path))


def changed(path: tuple[Any, ...], new: Any) -> Any:
    value = small_snapshot()
    inner: Any = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = new
    return value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "a dict is expected, not NoneType"),
        ([], "a dict is expected, not list"),
        ({}, "not a PyTorch memory snapshot (no 'segments' in it)"),
        (snapshot([]), "no recorded events for device 0"),
        (changed(("device_traces",), 3), "a list is expected"),
        (changed(("device_traces", 0), "x"), "a list is expected"),
        (changed(("device_traces", 0, 1), []), "event 1: a dict is expected, not list"),
        (changed(("device_traces", 0, 1, "action"), 3), "event 1: 'action' should be text, not int"),
        (changed(("device_traces", 0, 1, "addr"), -4), "event 1: 'addr' is -0x4"),
        (changed(("device_traces", 0, 1, "addr"), 2**70), "event 1: 'addr' is 0x4"),
        (changed(("device_traces", 0, 1, "size"), 2**62), "event 1: 'size' is 0x4"),
        (changed(("device_traces", 0, 1, "size"), "400"), "event 1: 'size' should be an integer, not str"),
        (changed(("device_traces", 0, 1, "size"), True), "event 1: 'size' should be an integer, not bool"),
        (changed(("device_traces", 0, 1, "size"), 4.0), "event 1: 'size' should be an integer, not float"),
        (changed(("device_traces", 0, 1, "pool_id"), (0,)), "event 1: 'pool_id' should be a pair"),
        (changed(("device_traces", 0, 1, "pool_id"), (0, 2**100)), "event 1: 'pool_id' should be a pair"),
        (changed(("device_traces", 0, 1, "frames"), 7), "event 1: a list is expected"),
        (changed(("device_traces", 0, 1, "frames"), [7]), "event 1: a dict is expected"),
        (changed(("device_traces", 0, 2, "addr"), BASE), f"event 2: allocates {BASE:#x}, which is still allocated"),
        (changed(("device_traces", 0, 4, "addr"), BASE + 512), "event 4: completes the free of"),
        (changed(("segments", 0, "blocks", 1, "state"), "asleep"), "segment 0: unknown block state 'asleep'"),
        (changed(("segments", 0, "blocks", 1, "size"), 512), "segment 0: its blocks cover 2096640 of 2097152 bytes"),
        (changed(("segments", 0, "address"), 2**63 - 1), "segment 0: ends outside"),
        (changed(("allocator_settings",), 1), "allocator_settings: a dict is expected"),
        (changed(("allocator_settings", "PYTORCH_CUDA_ALLOC_CONF"), 1), "'PYTORCH_CUDA_ALLOC_CONF' should be text"),
    ],
)
def test_what_is_inconsistent_is_refused_with_place_and_reason(value: Any, why: str) -> None:
    assert why in refusal(value)


def test_a_segment_released_after_one_was_taken_is_refused() -> None:
    e = [entry("segment_alloc", BASE, 2 * MIB), entry("segment_free", BASE + 4 * MIB, 2 * MIB)]
    assert "a segment is released after one was taken" in refusal(snapshot(e))


def doubled(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "path",
    [
        ("allocator_settings", "max_split_size"),
        ("allocator_settings", "roundup_power2_divisions", "1"),
        ("device_traces", 0, 1, "frames", 0, "filename"),
        ("device_traces", 0, 1, "frames", 0, "name"),
        ("device_traces", 0, 1, "user_metadata"),
        ("external_annotations",),
    ],
)
def test_values_that_would_double_at_each_level_when_written_out_are_not_written_out(path: tuple[Any, ...]) -> None:
    assert len(read(changed(path, doubled(200))).requests) == 3


def test_one_long_list_of_frames_referred_to_from_every_event_is_read_once() -> None:
    frames = [FRAME] * 50_000
    e = [entry("segment_alloc", BASE, 200 * MIB)]
    e += [entry("alloc", BASE + 512 * n, 400, frames=frames) for n in range(20_000)]
    trace = read(snapshot(e))
    assert len(trace.stacks) == 1
    assert len(trace.requests) == 20_000


def test_one_list_of_blocks_in_several_segments_is_refused() -> None:
    first = segment(BASE, 2 * MIB, [(2 * MIB, "inactive")])
    value = small_snapshot()
    value["segments"] = [first, {**first, "address": BASE + 2 * MIB}]
    assert "shares its list of blocks" in refusal(value)


def test_many_segments_released_at_once_take_linear_time() -> None:
    e = [entry("segment_free", BASE + n * 2 * MIB, 2 * MIB) for n in range(30_000)] + [entry("alloc", BASE, 1)]
    assert kinds(read(snapshot(e))) == [K.EMPTY_CACHE, K.ALLOC]
