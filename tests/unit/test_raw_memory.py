"""Device memory that a program takes past the allocator: it leaves less for segments, wherever that is looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from requests_of import MIB, trace_of
from snapshots import small_snapshot

from fragscope import Recorder, load_trace
from fragscope.allocator import ReplaySettings, card_named, recorded_under, replay, rules_for, tape_of
from fragscope.errors import InputFileError, UsageError
from fragscope.measure import timeline
from fragscope.record.cuda.fake import FakeCuda
from fragscope.record.device_memory import DeviceMemory, check_request
from fragscope.search import failure_of, fit, subject_of
from fragscope.trace import DecisionKind, RequestKind, Settings, Trace, own_requests, write_trace
from fragscope.trace.plausible import check_plausible

CARD = card_named("h100-80gb")


def settings(capacity: int, conf: str = "", torch: str = "2.11.0") -> ReplaySettings:
    return ReplaySettings(rules_for(torch), CARD.name, CARD.total, capacity * MIB, conf)


def failed(trace: Trace, where: ReplaySettings, *, compiled: bool = False) -> list[int]:
    return [oom.event for oom in replay(trace, where, compiled=compiled).ooms]


# --- what it leaves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
def test_what_is_taken_past_the_allocator_is_missing_for_segments(conf):
    """Of 100 MiB, 40 are taken: 60 are left for segments, and 80 once they are given back."""
    with_it = trace_of(("raw", 0, 40 * MIB), ("alloc", 1, 60 * MIB), ("alloc", 2, 20 * MIB))
    assert failed(with_it, settings(100, conf)) == [2]
    before = trace_of(("raw", 0, 40 * MIB), ("alloc", 1, 60 * MIB), ("raw free", 0, 40 * MIB), ("alloc", 2, 20 * MIB))
    assert failed(before, settings(100, conf)) == []


def test_pages_are_whole():
    """A driver's page has 2 MiB: 2 MiB and a byte take two of them."""
    trace = trace_of(("raw", 0, 2 * MIB + 1), ("alloc", 1, 20 * MIB))
    assert failed(trace, settings(24)) == []
    assert failed(trace, settings(23)) == [1]
    assert replay(trace, settings(24)).whole.peak.raw == 4 * MIB


def test_the_driver_asks_nobody_to_give_back_what_is_cached():
    """20 MiB lie idle in the allocator; its own next request may use them, one past it may not."""
    idle = (("alloc", 0, 20 * MIB), ("free", 0))
    assert failed(trace_of(*idle, ("raw", 1, 12 * MIB)), settings(30)) == [2]
    assert failed(trace_of(*idle, ("empty",), ("raw", 1, 12 * MIB)), settings(30)) == []
    assert failed(trace_of(*idle, ("alloc", 1, 12 * MIB)), settings(30)) == []


def test_what_was_asked_for_in_vain_is_given_back_for_nothing():
    trace = trace_of(("raw", 0, 80 * MIB), ("raw free", 0, 80 * MIB), ("alloc", 1, 60 * MIB), ("alloc", 2, 20 * MIB))
    done = replay(trace, settings(60))
    assert [(o.event, o.requested, o.rounded) for o in done.ooms] == [(0, 80 * MIB, 80 * MIB), (3, 20 * MIB, 20 * MIB)]
    d = done.trace.decisions
    assert d is not None
    row = d.kind.tolist().index(DecisionKind.OOM)
    assert (int(d.request[row]), int(d.size[row]), int(d.addr[row])) == (0, 80 * MIB, 60 * MIB)
    assert done.whole.peak.raw == 0


def test_a_memory_fraction_does_not_hold_it():
    """The limit is on what the allocator reserves: 1 % of the card, 810 MiB, which 900 MiB past it do not touch."""
    trace = trace_of(("fraction", 0.01), ("raw", 0, 900 * MIB), ("alloc", 1, 700 * MIB))
    assert failed(trace, settings(2000)) == []


def test_the_sum_peaks_where_both_are_high():
    trace = trace_of(
        ("alloc", 0, 20 * MIB), ("raw", 1, 10 * MIB), ("raw free", 1, 10 * MIB), ("alloc", 2, 40 * MIB),
        ("raw", 3, 4 * MIB), ("empty",),
    )  # fmt: skip
    done = replay(trace, settings(1000))
    peak = done.whole.peak
    assert (peak.reserved, peak.raw, peak.hbm) == (60 * MIB, 10 * MIB, 64 * MIB)
    line = timeline(done.trace)
    assert [n // MIB for n in line.raw.tolist()] == [0, 10, 0, 0, 4, 4]
    assert [n // MIB for n in line.hbm.tolist()] == [20, 30, 20, 60, 64, 64]


@pytest.mark.parametrize("release", ["2.9.1", "2.12.0", "2.14.1"])
def test_every_releases_rules_know_it(release):
    trace = trace_of(("raw", 0, 40 * MIB), ("alloc", 1, 60 * MIB), ("alloc", 2, 20 * MIB))
    assert failed(trace, settings(100, torch=release)) == [2]


def test_more_held_than_the_recording_shows_makes_a_guessed_capacity_matter():
    """A snapshot does not tell what was free. Whoever maps pages of 20 MiB where 14 were reserved may need more."""
    trace = replay(trace_of(("alloc", 0, 14 * MIB), ("raw", 1, 100 * MIB)), settings(1000)).trace
    unknown = replace(trace, settings=Settings(conf=""))
    under = ReplaySettings.of(recorded_under(unknown))

    def effect(asked: ReplaySettings) -> str:
        return next(a.effect for a in replay(unknown, asked).assumptions if a.code == "capacity_assumed")

    assert effect(under) == "none"
    assert effect(under.with_conf("expandable_segments:True")) == "unknown"


def test_requests_that_might_share_a_page_count_where_memory_is_short():
    small = [("raw", 0, MIB), ("raw", 1, MIB), ("alloc", 2, 20 * MIB)]

    def judged(requests: list[tuple[Any, ...]], capacity: int) -> tuple[bool, list[tuple[str, str, int]]]:
        done = replay(trace_of(*requests), settings(capacity))
        return done.exact, [(a.code, a.effect, a.events) for a in done.assumptions if a.code == "raw_pages"]

    assert judged(small, 100) == (True, [("raw_pages", "none", 2)])
    assert judged(small, 23) == (False, [("raw_pages", "bounded", 2)])  # in one page, they would leave enough
    assert judged([("raw", 0, 2 * MIB), ("alloc", 1, 20 * MIB)], 100) == (True, [])


# --- where a trace goes -----------------------------------------------------------------------------------------------


def test_it_survives_its_file(tmp_path):
    trace = replay(trace_of(("raw", 0, 3 * MIB), ("alloc", 1, MIB), ("raw free", 0, 3 * MIB)), settings(100)).trace
    write_trace(trace, tmp_path / "raw.fscope")
    read = load_trace(tmp_path / "raw.fscope")
    assert read.requests.kind.tolist() == [RequestKind.RAW_ALLOC, RequestKind.ALLOC, RequestKind.RAW_FREE]
    assert replay(read, settings(100)).whole.peak.raw == 4 * MIB


@pytest.mark.parametrize(
    "requests",
    [
        [("raw free", 0, MIB)],
        [("raw free", 0, MIB), ("raw", 0, MIB)],
        [("raw", 0, MIB), ("raw free", 0, 2 * MIB)],
        [("raw", 0, MIB), ("raw free", 0, MIB), ("raw free", 0, MIB)],
        [("raw", 0, MIB), ("raw", 1, MIB), ("raw free", 1, MIB), ("raw free", 2, MIB)],
        [("alloc", 0, MIB), ("raw free", 0, MIB)],
    ],
    ids=["never taken", "taken later", "another size", "twice", "unknown among known", "an allocation"],
)
def test_files_that_give_back_what_was_not_taken_are_refused(tmp_path, requests):
    write_trace(trace_of(*requests), tmp_path / "bad.fscope")
    with pytest.raises(InputFileError, match=r"request \d: RAW_FREE of what was not taken"):
        load_trace(tmp_path / "bad.fscope")


def test_a_lifetime_has_one_beginning(tmp_path):
    write_trace(trace_of(("raw", 0, MIB), ("alloc", 0, MIB)), tmp_path / "bad.fscope")
    with pytest.raises(InputFileError, match="two allocations have the same id"):
        load_trace(tmp_path / "bad.fscope")


def test_a_stretch_keeps_its_own():
    trace = trace_of(
        ("raw", 0, MIB), ("raw", 1, 2 * MIB), ("raw free", 0, MIB), ("raw free", 1, 2 * MIB), ("raw", 2, 3 * MIB)
    )
    own = own_requests(trace, 1)
    assert own.trace.requests.size.tolist() == [2 * MIB, 2 * MIB, 3 * MIB]
    assert own.trace.requests.id.tolist() == [0, 0, 1]
    assert own.foreign == 1


def test_a_search_for_the_smallest_memory_counts_it():
    trace = trace_of(("raw", 0, 40 * MIB), ("alloc", 1, 60 * MIB), ("free", 1), ("raw", 2, 10 * MIB), card=None)
    found = fit(subject_of(trace, "trace"), "")
    assert found.capacity == 110 * MIB
    assert found.failure is not None
    assert (found.failure.event, found.failure.needed, found.failure.left) == (3, 10 * MIB, 8 * MIB)


def test_a_failure_past_the_allocator_is_explained_without_its_idle_blocks():
    trace = trace_of(("alloc", 0, 20 * MIB), ("free", 0), ("raw", 1, 12 * MIB))
    failure = failure_of(tape_of(trace), settings(30))
    assert failure is not None
    assert (failure.requested, failure.needed, failure.left, failure.idle) == (12 * MIB, 12 * MIB, 10 * MIB, ())


def test_failures_of_a_recording_tell_what_was_there():
    """A recording that failed with 10 MiB left of the 20 + 30 that it held: 60 were there."""
    trace = replay(trace_of(("alloc", 0, 20 * MIB), ("raw", 1, 30 * MIB), ("raw", 2, 12 * MIB)), settings(60)).trace
    assert recorded_under(trace).limits.capacity == 60 * MIB
    assert tape_of(trace).failed.tolist() == [2]


# --- recorded on a GPU ------------------------------------------------------------------------------------------------


def test_a_recorder_notes_what_is_taken_and_given_back():
    cuda = FakeCuda(small_snapshot(), total=2 << 30)
    recorder = Recorder(edge=cuda)
    recorder.start()
    block = recorder.take_device_memory(5 * MIB + 1, "cuMemCreate")
    cuda.play()
    exact = recorder.take_device_memory(5 * MIB + 1, "cudaMalloc")
    block.free()
    with pytest.raises(MemoryError, match=r"cudaMalloc: 1,024\.00 MiB asked for, 1,018\.00 MiB free"):
        recorder.take_device_memory(1 << 30, "cudaMalloc")
    trace = recorder.stop()
    assert (block.size, exact.size) == (6 * MIB, 5 * MIB + 1)
    r = trace.requests
    assert [(RequestKind(k).name, s) for k, s in zip(r.kind.tolist(), r.size.tolist(), strict=True)] == [
        ("RAW_ALLOC", 6 * MIB), ("ALLOC", 400), ("ALLOC", 1000), ("FREE", 0), ("RAW_ALLOC", 5 * MIB + 1),
        ("RAW_FREE", 6 * MIB), ("RAW_ALLOC", 1 << 30),
    ]  # fmt: skip
    own = ReplaySettings.of(recorded_under(trace))
    verify = replay(trace, own, verify=True).verify
    assert verify is not None
    assert (verify.mismatches, own.capacity) == (0, 1 << 30)


# --- as scenarios ask for it ------------------------------------------------------------------------------------------


def test_a_block_is_given_back_once():
    given: list[str] = []
    block = DeviceMemory(7, "cudaMalloc", lambda: given.append("back"))
    block.free()
    with pytest.raises(UsageError, match=r"7 bytes \(cudaMalloc\) is freed twice"):
        block.free()
    assert given == ["back"]


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2 MiB", None])
def test_only_bytes_can_be_asked_for(size):
    with pytest.raises(UsageError, match="a positive whole number is needed"):
        check_request(size, "cudaMalloc")


def test_only_known_givers_can_be_asked():
    with pytest.raises(UsageError, match="'malloc': it is one of cuMemCreate, cudaMalloc"):
        check_request(1, "malloc")


@pytest.mark.parametrize("sizes", [[2**62 - 1], [2**44 + 1]])
def test_what_no_device_has_was_not_served(sizes: list[int]) -> None:
    """Sums of such sizes would not fit the integers that hold them."""
    served = replay(trace_of(("alloc", 0, 2 * MIB), ("raw", 1, 2 * MIB)), settings(100)).trace
    requests = served.requests
    requests.size[requests.kind == RequestKind.RAW_ALLOC] = sizes[0]
    with pytest.raises(InputFileError, match="size past the allocator"):
        check_plausible(served, Path("file"))


def test_bare_requests_may_ask_for_much_and_not_for_more_than_can_be_counted() -> None:
    bare = trace_of(("raw", 0, 2**44 + 1))
    check_plausible(bare, Path("file"))
    many = trace_of(*[("raw", n, 2**62 - 1) for n in range(3)])
    with pytest.raises(InputFileError, match="more bytes past the allocator than any program can have moved"):
        check_plausible(many, Path("file"))
