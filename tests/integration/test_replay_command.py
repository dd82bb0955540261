"""``fragscope replay`` as a user calls it."""

from __future__ import annotations

import json
import lzma
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import TRACES
from snapshots import BASE, MIB, entry, segment, small_snapshot, snapshot, write

from fragscope.cli import run
from fragscope.trace import load_trace, write_trace

MOE = str(TRACES / "moe_list_stack-default.pickle.xz")
OOM = str(TRACES / "oom-default.pickle.xz")
NEWEST = str(TRACES / "fp8-dsv3-tp8.newest.default.pickle.xz")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert run(["replay", *arguments, "--format", "json"]) == code
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert run(["replay", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_json_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(capsys, MOE, "--verify")
    assert value["schema_version"] == 1
    assert set(value["trace"]) >= {"path", "source", "events", "device", "torch", "card", "lost"}
    assert value["trace"]["path"] == MOE
    assert value["trace"]["source"] == "snapshot"
    (one,) = value["replays"]
    sizes = {"requested", "allocated", "active", "reserved", "stranded", "inactive_split"}
    assert set(one["peak"]) == set(one["end"]) == sizes
    assert all(isinstance(v, int) for v in one["peak"].values())
    assert set(one) >= {
        "conf", "torch", "card", "capacity", "memory_fraction", "exact", "events", "peak", "end", "segments_peak",
        "driver_calls", "ooms", "retries", "verify", "assumptions",
    }  # fmt: skip
    assert set(one["driver_calls"]) == {"alloc", "free", "sync"}
    assert (one["conf"], one["card"], one["memory_fraction"], one["exact"]) == ("", "h100-80gb", None, True)
    recorded = pickle.loads(lzma.decompress(Path(MOE).read_bytes()))["device_traces"][0]
    asked = sum(e["action"] in ("alloc", "free_requested") for e in recorded)
    assert one["events"] == value["trace"]["events"] == asked
    stats = json.loads((TRACES / "moe_list_stack-default.json").read_text())["memory_stats"]
    assert one["peak"]["reserved"] == stats["reserved_bytes.all.peak"]
    assert one["peak"]["allocated"] == stats["allocated_bytes.all.peak"]
    assert one["verify"]["mismatches"] == 0
    assert one["verify"]["first"] is None


def test_without_verify_there_is_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, MOE)["replays"][0]["verify"] is None


def test_ooms_are_listed_with_their_event(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = answer(capsys, OOM, "--memory-fraction", "0.2", "--verify")["replays"]
    assert one["verify"]["mismatches"] == 0
    assert len(one["ooms"]) == 63
    assert set(one["ooms"][0]) == {"event", "requested", "rounded", "stream"}
    assert one["retries"] == 84
    assert one["memory_fraction"] == 0.2


def test_repeated_options_give_every_combination(capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(
        capsys, NEWEST, "--conf", "", "--conf", "backend:native", "--torch", "2.11.0", "--torch", "2.13.0",
        "--capacity", "10 GiB", "--capacity", "20 GiB",
    )  # fmt: skip
    assert [(r["conf"], r["torch"], r["capacity"]) for r in value["replays"]] == [
        (conf, torch, capacity * 2**30)
        for conf in ("", "backend:native")
        for torch in ("2.11.0", "2.13.0")
        for capacity in (10, 20)
    ]


def test_a_smaller_card_runs_out(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = answer(capsys, MOE, "--capacity", "1 GiB")["replays"]
    assert one["ooms"]
    assert one["peak"]["reserved"] <= 2**30
    assert not one["exact"]
    assert "after_oom" in {a["code"] for a in one["assumptions"]}


def test_text_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", MOE, "--verify"]) == 0
    out, err = capsys.readouterr()
    assert "verified: 996 decisions compared, 0 mismatches" in out
    assert "conf default, torch 2.11, h100-80gb" in out
    assert "reserved" in out
    assert "\nexact\n" in out
    assert "\x1b" not in out
    assert err == "fragscope: the file does not name its card; h100-80gb is assumed (--card)\n"


def test_what_the_file_lacks_is_said_and_json_stays_clean(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_trace(replace(load_trace(NEWEST), torch=None), tmp_path / "t.fscope")
    assert run(["replay", str(tmp_path / "t.fscope"), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["replays"][0]["torch"] == "2.14"
    assert "does not name its torch release; the rules of 2.14 decide" in err


def test_what_the_file_names_is_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = load_trace(OOM)
    settings = replace(trace.settings, memory_fraction=0.2)
    write_trace(replace(trace, torch="2.11.0", card="h100-80gb", settings=settings), tmp_path / "t.fscope")
    assert run(["replay", str(tmp_path / "t.fscope"), "--verify", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["replays"][0]["memory_fraction"] == 0.2


def test_the_capacity_of_the_file_counts_unless_another_card_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = load_trace(NEWEST)
    write_trace(replace(trace, settings=replace(trace.settings, capacity=10 * 2**30)), tmp_path / "t.fscope")
    path = str(tmp_path / "t.fscope")
    assert answer(capsys, path)["replays"][0]["capacity"] == 10 * 2**30
    assert answer(capsys, path, "--card", "h100-80gb")["replays"][0]["capacity"] == 84_465_090_560
    assert answer(capsys, path, "--capacity", "20 GiB")["replays"][0]["capacity"] == 20 * 2**30


def test_a_difference_exits_with_1_and_shows_both_sides(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    value = small_snapshot()
    value["device_traces"][0][2]["addr"] = BASE + 4096
    path = str(write(tmp_path / "wrong.pickle", value))
    assert run(["replay", path, "--verify"]) == 1
    out, err = capsys.readouterr()
    assert "first difference at event 1:" in out
    assert f"recorded: alloc at {BASE + 4096:#x}" in out
    assert f"modelled: alloc of 1024 B at {BASE + 512:#x}" in out
    assert "Traceback" not in err
    assert "model and recording differ in 1 of 1 replays" in err
    (one,) = answer(capsys, path, "--verify", code=1)["replays"]
    assert one["verify"]["mismatches"] >= 1
    assert one["verify"]["first"]["event"] == 1
    assert not one["exact"]


@pytest.mark.parametrize(
    ("name", "key"),
    [("fp8-dsv3-tp8.newest.split20", "max_split_size_mb"), ("fp8-dsv3-tp8.newest.expandable", "expandable_segments")],
)
def test_a_recording_under_an_unmodelled_conf_is_refused_by_key(
    name: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert key in error(capsys, str(TRACES / f"{name}.pickle.xz"))


def test_effective_settings_count_even_where_the_conf_string_is_empty(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for key, value in (("max_split_size", 2**27), ("garbage_collection_threshold", 0.8), ("expandable_segments", True)):
        recorded = small_snapshot()
        recorded["allocator_settings"][key] = value
        assert key in error(capsys, str(write(tmp_path / "s.pickle", recorded)))
    recorded = small_snapshot()
    recorded["allocator_settings"]["roundup_power2_divisions"]["4"] = 8
    assert "roundup_power2_divisions" in error(capsys, str(write(tmp_path / "s.pickle", recorded)))


def test_a_recording_under_another_conf_can_be_replayed_under_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    split = str(TRACES / "fp8-dsv3-tp8.newest.split20.pickle.xz")
    (one,) = answer(capsys, split, "--conf", "")["replays"]
    (default,) = answer(capsys, NEWEST)["replays"]
    assert one["peak"]["requested"] == default["peak"]["requested"], "the same program ran"
    assert one["peak"]["allocated"] == default["peak"]["allocated"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--conf", "max_split_size_mb:64"], "max_split_size_mb"),
        (["--conf", "expandable_segments:True"], "expandable_segments"),
        (["--conf", "garbage_collection_threshold:0.8"], "garbage_collection_threshold"),
        (["--conf", "roundup_power2_divisions:[256:1,512:2]"], "roundup_power2_divisions"),
        (["--conf", "no_such_key:1"], "no_such_key"),
        (["--conf", "nonsense"], "nonsense"),
        (["--torch", "2.5.1"], "2.5.1"),
        (["--torch", "banana"], "banana"),
        (["--card", "h100"], "h100-80gb"),
        (["--capacity", "12 parsecs"], "12 parsecs"),
        (["--memory-fraction", "1.5"], "1.5"),
        (["--memory-fraction", "nan"], "nan"),
        (["--device-index", "4"], "device 4"),
        (["--device-index", "-1"], "-1"),
        (["--format", "yaml"], "yaml"),
        (["--strict", "--torch", "2.99"], "2.99"),
        (["--no-such-option"], "no-such-option"),
        (["--verify", "--conf", "backend:native"], "--verify"),
    ],
)
def test_a_wrong_call_exits_with_2_and_names_what_is_wrong(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in error(capsys, NEWEST, *arguments)


def test_requests_alone_cannot_be_verified(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_trace(replace(load_trace(NEWEST), decisions=None, final=None), tmp_path / "t.fscope")
    assert "requests only" in error(capsys, str(tmp_path / "t.fscope"), "--verify")


def test_a_release_newer_than_the_rules_uses_the_newest_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", NEWEST, "--torch", "2.99.0", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert "2.99.0 is newer than the rules known; those of 2.14 decide" in err
    (one,) = json.loads(out)["replays"]
    assert not one["exact"]
    assert {a["code"] for a in one["assumptions"]} >= {"rules_assumed"}


def test_private_pools_are_refused_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    value = small_snapshot("2.12")
    value["device_traces"][0][1]["pool_id"] = (0, 1)
    assert "private pools" in error(capsys, str(write(tmp_path / "s.pickle", value)))


def test_other_rules_that_free_a_segment_the_recording_reuses_are_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    """Under other rules a segment may still stand where the recording placed the next one."""
    streams = str(TRACES / "streams-default.pickle.xz")
    for release in ("2.12.0", "2.13.0", "2.14.1"):
        (one,) = answer(capsys, streams, "--torch", release)["replays"]
        assert one["peak"]["requested"] == answer(capsys, streams)["replays"][0]["peak"]["requested"]


def test_one_device_of_several(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    e = [entry("segment_alloc", BASE, 20 * MIB), entry("alloc", BASE, 2 * MIB)]
    value = snapshot(
        e, [{**segment(BASE, 20 * MIB, [(2 * MIB, "active_allocated"), (18 * MIB, "inactive")]), "device": 1}]
    )
    value["device_traces"].insert(0, small_snapshot()["device_traces"][0])
    path = str(write(tmp_path / "two.pickle", value))
    assert "choose one with --device-index" in error(capsys, path)
    one = answer(capsys, path, "--device-index", "1", "--verify")
    assert one["trace"]["device"] == 1
    assert one["replays"][0]["peak"]["allocated"] == 2 * MIB


def test_as_a_process_data_goes_to_stdout_and_the_rest_to_stderr(tmp_path: Path) -> None:
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(small_snapshot()))
    done = subprocess.run(
        [sys.executable, "-m", "fragscope", "replay", str(path), "--verify", "--format", "json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert json.loads(done.stdout)["replays"][0]["verify"] == {"compared": 8, "mismatches": 0, "first": None}
    assert done.stderr.count("\n") == 1
