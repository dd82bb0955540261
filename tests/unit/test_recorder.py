"""The recorder, on a CUDA that plays real recordings: what it stores is what happened, whatever goes wrong."""

from __future__ import annotations

import json
import lzma
import os
import pickle
import tempfile
import threading
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from snapshots import entry, segment
from snapshots import snapshot as written

from fragscope import InputFileError, NotMeasuredError, Recorder, RecorderOptions, Stacks, UsageError, load_trace, phase
from fragscope.allocator import ReplaySettings, recorded_under, replay, settle, tape_of
from fragscope.record.cuda import running
from fragscope.record.cuda.fake import FakeCuda
from fragscope.record.cuda.non_torch import Chosen, FakeDeviceMemory
from fragscope.trace import RequestKind, Trace
from fragscope.trace.chunks import RECORD, note
from fragscope.trace.snapshot import snapshot_to_trace

TRACES = Path(__file__).parents[1] / "data" / "traces"
PLAYED = ["train_vit-default", "train_vit-expandable", "streams-default", "fp8-dsv3-tp8.newest.split20"]
NO_COMPILER = "no C++ compiler is on PATH"


@cache
def snapshot(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = pickle.loads(lzma.decompress((TRACES / f"{name}.pickle.xz").read_bytes()))
    return loaded


def recorded(cuda: FakeCuda, *, at_first: int = 0, **options: Any) -> Trace:
    """All that happens after the first so many events, recorded."""
    cuda.play(at_first)
    with Recorder(RecorderOptions(**options), edge=cuda) as recorder:
        cuda.play()
    assert recorder.trace is not None
    return recorder.trace


def verified(trace: Trace) -> tuple[int, int]:
    settings = ReplaySettings.of(recorded_under(trace))
    verify = replay(settle(tape_of(trace), settings), settings, verify=True).verify
    assert verify is not None
    return verify.compared, verify.mismatches


def same_columns(ours: Any, theirs: Any) -> None:
    for field in fields(ours):
        if field.name not in ("stack", "thread"):
            assert np.array_equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name


def test_requests_name_the_thread_that_made_them():
    cuda = FakeCuda(snapshot("train_vit-default"))
    with Recorder(edge=cuda) as recorder:
        cuda.play(500)
        other = threading.Thread(target=cuda.play, args=(500,))
        other.start()
        other.join()
        cuda.play(500)
    assert recorder.trace is not None
    requests = recorder.trace.requests
    turns = np.flatnonzero(np.diff(requests.thread)) + 1
    assert requests.thread[[0, *turns]].tolist() == [0, 1, 0]
    # By then the allocations of the first 500 and of the first 1,000 events had been made.
    made = [sum(e["action"] == "alloc" for e in cuda._entries[:n]) for n in (500, 1000)]
    counted = np.cumsum(requests.kind == RequestKind.ALLOC)[turns - 1].tolist()
    assert counted == made


def test_stacks_that_the_history_lost_are_said(tmp_path):
    cuda = FakeCuda(snapshot("train_vit-default"))
    options = RecorderOptions(stacks=Stacks.PYTHON, keep=tmp_path / "kept")
    with Recorder(options, edge=cuda) as recorder:
        cuda.play(300)
    assert recorder.trace is not None
    assert "stacks" not in {x.code for x in recorder.trace.lost}
    file = tmp_path / "kept" / "stacks-0.json"
    stored = json.loads(file.read_bytes())
    stored["parted"], stored["of"] = 100, stored["of"][100:]
    file.write_text(json.dumps(stored))
    assert [(x.code, x.events) for x in load_trace(tmp_path / "kept").lost] == [("stacks", 100)]


@pytest.mark.parametrize("name", PLAYED)
def test_a_recording_from_the_start_is_what_the_snapshot_says(name):
    trace = recorded(FakeCuda(snapshot(name)))
    theirs = snapshot_to_trace(snapshot(name), Path(name), 0)
    same_columns(trace.requests, theirs.requests)
    same_columns(trace.decisions, theirs.decisions)
    assert trace.final == theirs.final
    assert trace.initial == ()


@pytest.mark.parametrize("name", PLAYED)
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_recording_that_begins_late_knows_what_stood_then(name, share):
    cuda = FakeCuda(snapshot(name))
    entries = snapshot(name)["device_traces"][0]
    # A snapshot is never taken in the middle of what one request causes.
    first = next(i for i in range(int(share * len(entries)), len(entries)) if entries[i - 1]["action"] == "alloc")
    trace = recorded(cuda, at_first=first)
    assert trace.initial
    compared, mismatches = verified(trace)
    assert mismatches == 0
    assert compared > 20


def test_without_the_tracker_the_history_gives_the_same():
    name = "train_vit-default"
    tracked = recorded(FakeCuda(snapshot(name)))
    from_history = recorded(FakeCuda(snapshot(name), no_tracker=NO_COMPILER))
    same_columns(from_history.requests, tracked.requests)
    same_columns(from_history.decisions, tracked.decisions)
    assert [x.code for x in from_history.lost if x.code not in {t.code for t in tracked.lost}] == [
        "no_tracker",
        "pool_ids",
    ]


def test_what_a_short_history_loses_is_counted_exactly():
    name = "fp8-dsv3-tp8.newest.split20"
    entries = snapshot(name)["device_traces"][0]
    trace = recorded(FakeCuda(snapshot(name), no_tracker=NO_COMPILER), max_entries=40)
    (gap,) = [x for x in trace.lost if x.code == "gap"]
    # The ring holds the last 40 entries, one of which is the snapshot that was taken when recording ended.
    assert gap.events == len(entries) - 39


@pytest.mark.parametrize("no_tracker", [None, NO_COMPILER], ids=["tracker", "history"])
def test_stacks_are_those_of_the_events(no_tracker):
    name = "train_vit-default"
    trace = recorded(FakeCuda(snapshot(name), no_tracker=no_tracker), stacks=Stacks.PYTHON)
    theirs = snapshot_to_trace(snapshot(name), Path(name), 0)
    ours = [trace.stacks[i] for i in trace.requests.stack.tolist()]
    assert ours == [theirs.stacks[i] for i in theirs.requests.stack.tolist()]
    assert any(ours)


def test_stacks_are_given_up_where_the_program_changed_the_history():
    cuda = FakeCuda(snapshot("train_vit-default"))
    with Recorder(RecorderOptions(stacks=Stacks.PYTHON), edge=cuda) as recorder:
        cuda.play(500)
        cuda.start_history("python", 1000)  # the program begins a history of its own
        cuda.play(100)
    trace = recorder.trace
    assert trace is not None
    with_stack = np.flatnonzero(trace.requests.stack >= 0)
    assert len(with_stack)
    before = trace.decisions.request[400]
    assert with_stack.min() > before


@pytest.mark.parametrize("no_tracker", [None, NO_COMPILER], ids=["tracker", "history"])
def test_phases_stand_between_the_right_events(no_tracker):
    cuda = FakeCuda(snapshot("train_vit-default"), no_tracker=no_tracker)
    with Recorder(edge=cuda) as recorder:
        cuda.play(101)
        with phase("load"):
            cuda.play(57)
        cuda.play(300)
    trace = recorder.trace
    assert trace is not None
    assert trace.phases == ("", "load")
    marks = {int(k): i for i, k in enumerate(trace.requests.kind) if k in (8, 9)}
    entries = snapshot("train_vit-default")["device_traces"][0]
    allocs = [e["action"] == "alloc" for e in entries]
    ours = trace.requests.kind == RequestKind.ALLOC
    assert np.count_nonzero(ours[: marks[8]]) == sum(allocs[:101])
    assert np.count_nonzero(ours[marks[8] : marks[9]]) == sum(allocs[101:158])


def test_a_phase_without_a_recorder_does_nothing():
    with phase("nobody listens"):
        pass


def test_noted_releases_are_the_programs_and_not_inferred():
    name = "streams-default"
    entries = snapshot(name)["device_traces"][0]
    first = next(i for i, e in enumerate(entries) if e["action"] == "segment_free")
    last = first
    while entries[last]["action"] == "segment_free":
        last += 1
    while entries[first - 1]["action"] == "free_completed" and entries[first - 2]["action"] != "free_requested":
        first -= 1
    cuda = FakeCuda(snapshot(name))
    with Recorder(edge=cuda) as recorder:
        cuda.play(first)
        cuda.empty_cache(last - first)
    trace = recorder.trace
    assert trace is not None
    assert trace.count(RequestKind.EMPTY_CACHE) == 1
    assert trace.count(RequestKind.RELEASE_SEEN) == 0
    assert not [x for x in trace.lost if x.code == "empty_cache"]
    assert verified(trace)[1] == 0


def test_observations_are_kept_with_their_place():
    cuda = FakeCuda(snapshot("train_vit-default"))
    with Recorder(edge=cuda) as recorder:
        cuda.play(50)
        cuda.observe("torch.cuda.mem_get_info", "loader.py:12")
    assert recorder.trace is not None
    (seen,) = recorder.trace.observations
    assert (seen.what, seen.where) == ("torch.cuda.mem_get_info", "loader.py:12")


def test_memory_is_sampled_once_more_when_the_recording_ends(monkeypatch):
    memory = FakeDeviceMemory([500 << 20])
    monkeypatch.setattr(running, "device_memory", lambda device: Chosen(memory, ()))
    cuda = FakeCuda(snapshot("train_vit-default"))
    with Recorder(RecorderOptions(sample_non_torch=1000.0), edge=cuda) as recorder:
        cuda.play(200)
    trace = recorder.trace
    assert trace is not None
    assert trace.requests.kind[-1] == RequestKind.NON_TORCH  # after all events; the first one may come at any time
    assert trace.requests.size[-1] == 500 << 20


def test_what_was_written_opens_when_the_program_was_killed(tmp_path):
    folder = tmp_path / "rank0"
    cuda = FakeCuda(snapshot("train_vit-default"))
    recorder = Recorder(RecorderOptions(keep=folder), edge=cuda)
    recorder.start()
    cuda.play(1000)
    trace = load_trace(folder)  # as it stands, with nothing stopped
    recorder.stop()
    assert trace.final is None
    assert "torn" in {x.code for x in trace.lost}
    allocs = sum(e["action"] == "alloc" for e in snapshot("train_vit-default")["device_traces"][0][:1000])
    assert trace.count(RequestKind.ALLOC) == allocs


def test_a_kept_recording_opens_again_as_it_was(tmp_path):
    folder = tmp_path / "recording"
    cuda = FakeCuda(snapshot("train_vit-default"))
    trace = recorded(cuda, keep=folder, stacks=Stacks.PYTHON)
    again = load_trace(folder)
    same_columns(again.requests, trace.requests)
    assert again.provenance == trace.provenance
    assert again.lost == trace.lost


def test_a_full_disk_ends_the_recording_and_not_the_program():
    cuda = FakeCuda(snapshot("train_vit-default"))
    cuda.tracker().room = 700  # type: ignore[attr-defined]
    trace = recorded(cuda)
    (loss,) = [x for x in trace.lost if x.code == "not_written"]
    assert "no space left on device" in loss.detail
    assert "700 events" in loss.detail
    assert loss.events > 1000


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(NotMeasuredError, match=r"cannot be written|permission denied"):
        Recorder(RecorderOptions(keep=folder / "x"), edge=FakeCuda(snapshot("train_vit-default"))).start()


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NotMeasuredError, match="needs an empty folder"):
        Recorder(RecorderOptions(keep=tmp_path), edge=FakeCuda(snapshot("train_vit-default"))).start()
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_no_card_is_one_line():
    cuda = FakeCuda(snapshot("train_vit-default"), unavailable="no CUDA device is available to this process")
    with pytest.raises(NotMeasuredError, match="nothing can be recorded: no CUDA device"):
        Recorder(edge=cuda).start()
    Recorder(edge=FakeCuda(snapshot("train_vit-default"))).start  # noqa: B018 - the next one is not blocked


def test_one_recorder_at_a_time():
    first = Recorder(edge=FakeCuda(snapshot("train_vit-default")))
    first.start()
    try:
        with pytest.raises(UsageError, match="another recorder"):
            Recorder(edge=FakeCuda(snapshot("train_vit-default"))).start()
        with pytest.raises(UsageError, match="recording already"):
            first.start()
    finally:
        first.stop()


def test_a_recorder_that_gives_way_keeps_what_it_has(tmp_path):
    outer_cuda, inner_cuda = FakeCuda(snapshot("train_vit-default")), FakeCuda(snapshot("train_vit-default"))
    outer = Recorder(RecorderOptions(keep=tmp_path / "outer", gives_way=True), edge=outer_cuda)
    outer.start()
    outer_cuda.play(300)
    with Recorder(edge=inner_cuda) as inner:
        inner_cuda.play(50)
    assert inner.trace is not None
    trace = outer.stop()
    assert "gave_way" in {x.code for x in trace.lost}
    allocs = sum(e["action"] == "alloc" for e in snapshot("train_vit-default")["device_traces"][0][:300])
    assert trace.count(RequestKind.ALLOC) == allocs
    assert load_trace(tmp_path / "outer").count(RequestKind.ALLOC) == allocs


def test_a_program_that_allocates_nothing_has_a_recording_without_allocations():
    with Recorder(edge=FakeCuda(snapshot("train_vit-default"))) as recorder:
        recorder.begin_phase("measure")
        recorder.end_phase()
    trace = recorder.trace
    assert trace is not None
    kinds = [RequestKind(k) for k in trace.requests.kind]
    assert kinds == [RequestKind.PHASE_BEGIN, RequestKind.PHASE_END]
    assert (trace.decisions is not None, len(trace.decisions or ())) == (True, 0)
    assert verified(trace)[1] == 0


def test_the_programs_own_error_comes_through():
    cuda = FakeCuda(snapshot("train_vit-default"))
    recorder = Recorder(edge=cuda)
    with pytest.raises(ZeroDivisionError), recorder:
        cuda.play(100)
        1 / 0  # noqa: B018
    assert recorder.trace is not None


def test_what_is_discarded_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cuda = FakeCuda(snapshot("train_vit-default"))
    recorder = Recorder(RecorderOptions(stacks=Stacks.PYTHON), edge=cuda)
    recorder.start()
    cuda.play(10)
    assert list(tmp_path.iterdir())
    recorder.discard()
    assert not list(tmp_path.iterdir())
    assert not cuda.is_history_on()
    recorder.start()  # and the next one may begin
    recorder.discard()


def test_as_a_decorator_each_call_is_recorded():
    cuda = FakeCuda(snapshot("train_vit-default"))
    recorder = Recorder(edge=cuda)

    @recorder
    def step(events: int) -> str:
        cuda.play(events)
        return "done"

    assert step(100) == "done"
    first = recorder.trace
    assert step(200) == "done"
    assert first is not None
    assert recorder.trace is not None
    assert len(recorder.trace.requests) != len(first.requests)


def test_a_record_is_64_bytes():
    assert RECORD.itemsize == 64  # tracker.cpp asserts the same


def test_the_programs_error_is_seen_when_cuda_is_beyond_help():
    class Broken(FakeCuda):
        def snapshot(self) -> dict[str, Any]:
            if self.played:
                raise RuntimeError("an illegal memory access was encountered")
            return super().snapshot()

    cuda = Broken(snapshot("train_vit-default"))
    with pytest.raises(ZeroDivisionError), Recorder(edge=cuda) as recorder:
        cuda.play(100)
        1 / 0  # noqa: B018
    assert recorder.trace is not None
    assert "torn" in {x.code for x in recorder.trace.lost}
    with Recorder(edge=FakeCuda(snapshot("train_vit-default"))) as after:  # and nothing is left behind
        after._running.edge.play(10)  # type: ignore[union-attr]


def test_the_programs_error_is_seen_when_nothing_was_allocated():
    with pytest.raises(ZeroDivisionError), Recorder(edge=FakeCuda(snapshot("train_vit-default"))):
        1 / 0  # noqa: B018


def test_a_history_of_the_programs_own_takes_the_place_of_ours():
    cuda = FakeCuda(snapshot("train_vit-default"))
    with Recorder(RecorderOptions(stacks=Stacks.PYTHON, max_entries=50), edge=cuda) as recorder:
        cuda.play(200)
        recorder._running.notes.history_wanted()  # type: ignore[union-attr]  # what the hook says
        assert not cuda.is_history_on()
        cuda.start_history("python", 10)
        cuda.play(100)
    assert cuda.is_history_on()  # it is the program's, and stays
    assert recorder.trace is not None


def test_notes_end_with_their_recording(tmp_path):
    cuda = FakeCuda(snapshot("train_vit-default"))
    recorder = Recorder(RecorderOptions(keep=tmp_path / "a"), edge=cuda)
    recorder.start()
    notes = recorder._running.notes  # type: ignore[union-attr]  # a hook that somebody wrapped still has it
    cuda.play(50)
    recorder.stop()
    before = (tmp_path / "a" / "texts.jsonl").read_bytes()
    notes.note(note(RequestKind.OBSERVATION), text="too late")
    assert (tmp_path / "a" / "texts.jsonl").read_bytes() == before
    assert notes.missed == 0


def test_a_note_inside_a_note_is_counted_and_not_waited_for(tmp_path):
    cuda = FakeCuda(snapshot("train_vit-default"))
    with Recorder(edge=cuda) as recorder:
        notes = recorder._running.notes  # type: ignore[union-attr]
        cuda.play(50)
        number = notes._texts.number

        def interrupted(text: str) -> int:  # as by a signal handler that reads memory state
            notes.note(note(RequestKind.OBSERVATION), text="handler")
            return number(text)

        notes._texts.number = interrupted
        notes.note(note(RequestKind.OBSERVATION), text="program")
    assert recorder.trace is not None
    assert [o.what for o in recorder.trace.observations] == ["program"]
    assert [(x.code, x.events) for x in recorder.trace.lost if x.code == "notes"] == [("notes", 1)]


def test_a_forked_child_notes_nothing(tmp_path):
    cuda = FakeCuda(snapshot("train_vit-default"))
    recorder = Recorder(RecorderOptions(keep=tmp_path / "a"), edge=cuda)
    recorder.start()
    cuda.play(50)
    notes = recorder._running.notes  # type: ignore[union-attr]
    child = os.fork()
    if child == 0:
        notes.note(note(RequestKind.SETTINGS), text="max_split_size_mb:100")
        os._exit(0)
    os.waitpid(child, 0)
    recorder.mark_phase("after")
    trace = recorder.stop()
    assert trace.phases == ("", "after")


def test_threads_that_go_on_during_the_last_snapshot_cost_no_stacks():
    name = "train_vit-default"

    class Late(FakeCuda):
        def snapshot(self) -> dict[str, Any]:
            made = super().snapshot()
            if self.played:
                self.play(2)  # another thread, while the snapshot is made into Python objects
            return made

    cuda = Late(snapshot(name))
    with Recorder(RecorderOptions(stacks=Stacks.PYTHON), edge=cuda) as recorder:
        cuda.play(500)
    trace = recorder.trace
    assert trace is not None
    frames = [bool(e.get("frames")) for e in snapshot(name)["device_traces"][0][:500] if e["action"] == "alloc"]
    allocs = trace.requests.kind == RequestKind.ALLOC
    assert [i >= 0 for i in trace.requests.stack[allocs].tolist()] == frames


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_texts_that_are_no_file_are_refused(tmp_path, make):
    folder = tmp_path / "recording"
    recorded(FakeCuda(snapshot("fp8-dsv3-tp8.newest.split20")), keep=folder)
    (folder / "texts.jsonl").unlink()
    make(folder / "texts.jsonl")
    with pytest.raises(InputFileError, match="not a regular file"):
        load_trace(folder)


def test_another_threads_work_during_empty_cache_is_not_the_cause_of_what_it_returned():
    base, size = 0x7F00_0000_0000, 20 << 20
    made = [
        entry("segment_alloc", base, size), entry("alloc", base, size),
        entry("free_requested", base, size), entry("free_completed", base, size),
        entry("segment_free", base, size),  # by empty_cache(), during which another thread asks for memory
        entry("segment_alloc", base + (1 << 30), size), entry("alloc", base + (1 << 30), size),
    ]  # fmt: skip
    cuda = FakeCuda(written([*made], [segment(base + (1 << 30), size, [(size, "active_allocated")])]))
    with Recorder(edge=cuda) as recorder:
        cuda.play(4)
        cuda.empty_cache(3)
    trace = recorder.trace
    assert trace is not None
    kinds = [RequestKind(k) for k in trace.requests.kind.tolist()]
    assert kinds == [RequestKind.ALLOC, RequestKind.FREE, RequestKind.EMPTY_CACHE, RequestKind.ALLOC]


def test_statistics_that_the_program_resets_are_a_gap_and_no_surprise():
    class Reset(FakeCuda):
        since = 0

        def events(self, device: int) -> int:
            return super().events(device) - self.since

    cuda = Reset(snapshot("train_vit-default"), no_tracker=NO_COMPILER)
    with Recorder(edge=cuda) as recorder:
        cuda.play(300)
        recorder._running._history.drain()  # type: ignore[union-attr]
        cuda.since = 250
        cuda.play(20)
    trace = recorder.trace
    assert trace is not None
    assert "gap" in {x.code for x in trace.lost}
