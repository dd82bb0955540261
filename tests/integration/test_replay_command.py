"""``fragscope replay`` as a user calls it."""

from __future__ import annotations

import json
import lzma
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders import TRACES
from commands import error_of, json_of, markdown_of
from snapshots import BASE, MIB, entry, segment, small_snapshot, snapshot, write

from fragscope.allocator import RULES
from fragscope.cli import run
from fragscope.trace import Loss, load_trace, write_trace

MOE = str(TRACES / "moe_list_stack-default.pickle.xz")
OOM = str(TRACES / "oom-default.pickle.xz")
NEWEST = str(TRACES / "fp8-dsv3-tp8.newest.default.pickle.xz")
TOGGLE = str(TRACES / "confs" / "toggle.pickle.xz")
ORIGINAL = str(TRACES / "fp8-dsv3-tp8.orig.default.pickle.xz")


def sidecar_of(path: str) -> str:
    """The JSON beside a recording."""
    return path.replace(".pickle.xz", ".json")


answer, error = partial(json_of, "replay"), partial(error_of, "replay")


def test_json_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(capsys, MOE, "--verify")
    assert value["schema_version"] == 1
    assert set(value["trace"]) >= {"path", "source", "events", "device", "torch", "card", "lost"}
    assert value["trace"]["path"] == MOE
    assert value["trace"]["source"] == "snapshot"
    (one,) = value["replays"]
    sizes = {"requested", "allocated", "active", "reserved", "stranded", "inactive_split", "pool_idle", "raw", "hbm"}
    assert set(one["peak"]) == set(one["end"]) == sizes
    assert all(isinstance(v, int) for v in one["peak"].values())
    assert set(one) >= {
        "conf", "torch", "card", "capacity", "memory_fraction", "exact", "events", "peak", "end", "segments_peak",
        "driver_calls", "ooms", "retries", "verify", "assumptions", "rules", "total", "limit", "allocs",
        "reserved_after_empty_cache",
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


def test_the_capacity_of_the_file_counts_unless_another_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = load_trace(NEWEST)
    write_trace(replace(trace, settings=replace(trace.settings, capacity=10 * 2**30)), tmp_path / "t.fscope")
    path = str(tmp_path / "t.fscope")
    assert answer(capsys, path)["replays"][0]["capacity"] == 10 * 2**30
    assert answer(capsys, path, "--capacity", "20 GiB")["replays"][0]["capacity"] == 20 * 2**30


def test_another_card_than_the_recorded_one_has_memory_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = load_trace(NEWEST)
    settings = replace(trace.settings, capacity=21 * 2**30)
    write_trace(replace(trace, card="other", device_total=24 * 2**30, settings=settings), tmp_path / "t.fscope")
    path = str(tmp_path / "t.fscope")
    (own,) = answer(capsys, path)["replays"]
    assert (own["card"], own["total"], own["capacity"]) == ("other", 24 * 2**30, 21 * 2**30)
    (other,) = answer(capsys, path, "--card", "h100-80gb")["replays"]
    assert (other["card"], other["total"], other["capacity"]) == ("h100-80gb", 85_017_493_504, 84_465_090_560)


# --- what the snapshot leaves out ---------------------------------------------------------------------------------


def test_a_sidecar_says_what_the_snapshot_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", OOM, "--sidecar", sidecar_of(OOM), "--verify"]) == 0
    out, err = capsys.readouterr()
    assert "conf default, torch 2.11.0+cu130, h100-80gb with 78.66 GiB, memory fraction 0.2" in out
    assert "verified: 75,128 decisions compared, 0 mismatches" in out
    assert err == ""


def test_a_limit_that_recorded_failures_show_is_used_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", OOM, "--verify", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    (one,) = json.loads(out)["replays"]
    assert one["verify"]["mismatches"] == 0
    assert one["memory_fraction"] is None
    assert one["limit"] == 16_995_319_808 <= 0.2 * 85_017_493_504 < 17_083_400_192
    assert "a limit of 16,995,319,808 to 17,083,400,191 reserved bytes was in force (--memory-fraction)" in err


def test_an_inferred_limit_is_an_assumption_of_every_other_replay(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = answer(capsys, OOM, "--conf", "max_split_size_mb:64")["replays"]
    assert {"limit_inferred", "after_oom"} & {a["code"] for a in one["assumptions"]}
    assert not one["exact"]


def test_with_another_fraction_than_the_recorded_one_model_and_recording_differ(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["replay", OOM, "--verify", "--memory-fraction", "0.5"]) == 1
    out, err = capsys.readouterr()
    assert "first difference at event" in out
    assert "before it:" in out
    assert "likely reason: the recorded request failed for want of memory that the model has" in out
    assert "--memory-fraction" in out
    assert "model and recording differ in 1 of 1 replays" in err


def test_the_state_and_the_likely_reason_are_shown_with_the_first_difference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["replay", NEWEST, "--verify", "--torch", "2.13.0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("first difference at event 18:")
    assert lines[at + 1].startswith("  recorded: alloc at 0x")
    assert lines[at + 2].startswith("  modelled: alloc of 939524096 B at 0x")
    assert lines[at + 3] == "  request: alloc 939524096 B on stream 0x0"
    assert lines[at + 4] == (
        "  before it: 7988051968 B reserved, 5637144576 B allocated, 0 B waiting for other streams; "
        "the driver has 76477038592 B, no memory limit"
    )
    assert lines[at + 5].startswith("  cached blocks that are large enough, in search order: 939524096 B at 0x")
    assert lines[at + 6].startswith("  likely reason: blocks of one size are told apart differently")


def test_switches_that_the_snapshot_does_not_hold_are_named_as_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", TOGGLE, "--sidecar", sidecar_of(TOGGLE), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "not in the file: expandable segments were switched on or off" in out


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a sidecar"),
        ("not json", "is not a sidecar: JSON is malformed"),
        ("[1]", "is not a sidecar: Expected `object`, got `array`"),
        ('{"conf": 3}', "is not a sidecar: Expected `str | null`, got `int` - at `$.conf`"),
        ('{"memory_fraction": 1.5}', "'memory_fraction' is 1.5, not between 0 and 1"),
        ('{"capacity": -1}', "'capacity' is -1, which is no device's memory in bytes"),
    ],
)
def test_a_bad_sidecar_is_a_bad_file(text: str, why: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "side.json"
    path.write_text(text)
    message = error(capsys, NEWEST, "--sidecar", str(path), code=5)
    assert str(path) in message
    assert why in message


def test_a_missing_sidecar_is_a_bad_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    assert error(capsys, NEWEST, "--sidecar", str(path), code=5) == f"fragscope: {path}: no such file or directory\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"conf": "no_such_key:1"}', "no_such_key"),
        ('{"torch": "banana"}', "banana"),
        ('{"torch": "1.13"}', "1.13"),
        ('{"card": "unheard-of"}', "unheard-of"),
    ],
)
def test_a_sidecar_that_names_what_is_unknown_is_a_wrong_call(
    text: str, why: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "side.json"
    path.write_text(text)
    assert why in error(capsys, NEWEST, "--sidecar", str(path))


# --- differences --------------------------------------------------------------------------------------------------


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


# --- confs, releases and cards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "conf"),
    [
        ("fp8-dsv3-tp8.newest.split20", "max_split_size_mb:20"),
        ("fp8-dsv3-tp8.newest.expandable", "expandable_segments:True"),
        ("confs/oom-roundlist", "roundup_power2_divisions:[64:8,256:4,1024:2,>:1]"),
        ("confs/oom-gcsplit", "garbage_collection_threshold:0.5,max_split_size_mb:128"),
    ],
)
def test_a_recording_is_verified_under_the_conf_that_it_names(
    name: str, conf: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(TRACES / f"{name}.pickle.xz")
    (one,) = answer(capsys, path, "--sidecar", sidecar_of(path), "--verify")["replays"]
    assert one["conf"] == conf
    assert one["verify"]["mismatches"] == 0
    assert one["exact"]


@pytest.mark.parametrize(
    ("key", "value", "conf"),
    [
        ("max_split_size", 2**27, "max_split_size_mb:128"),
        ("garbage_collection_threshold", 0.8, "garbage_collection_threshold:0.8"),
        ("expandable_segments", True, "expandable_segments:True"),
    ],
)
def test_effective_settings_count_even_where_the_conf_string_is_empty(
    key: str, value: Any, conf: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recorded = small_snapshot()
    recorded["allocator_settings"][key] = value
    (one,) = answer(capsys, str(write(tmp_path / "s.pickle", recorded)))["replays"]
    assert one["conf"] == conf


def test_effective_divisions_count_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recorded = small_snapshot()
    recorded["allocator_settings"]["roundup_power2_divisions"] = {str(2**n): 4 for n in range(16)}
    (one,) = answer(capsys, str(write(tmp_path / "s.pickle", recorded)))["replays"]
    assert one["conf"] == "roundup_power2_divisions:4"


def test_one_recording_answers_for_several_confs_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    confs = {"": "default", "max_split_size_mb:20": "split20", "expandable_segments:True": "expandable"}
    replays = answer(capsys, ORIGINAL, *(word for conf in confs for word in ("--conf", conf)))["replays"]
    assert [r["conf"] for r in replays] == list(confs)
    for one, short in zip(replays, confs.values(), strict=True):
        stats = json.loads((TRACES / f"fp8-dsv3-tp8.orig.{short}.json").read_text())["memory_stats"]
        assert one["peak"]["reserved"] == stats["reserved_bytes.all.peak"]
        assert one["peak"]["allocated"] == stats["allocated_bytes.all.peak"]
        assert one["driver_calls"]["alloc"] == stats["num_device_alloc"]


def test_torch_all_replays_under_every_known_release(capsys: pytest.CaptureFixture[str]) -> None:
    replays = answer(capsys, NEWEST, "--torch", "all")["replays"]
    releases = ["2.9", "2.10", "2.11", "2.12", "2.13", "2.14"]
    assert [r["rules"] for r in replays] == [r.release for r in RULES] == releases
    assert len({r["peak"]["requested"] for r in replays}) == 1


def test_a_recording_under_another_conf_can_be_replayed_under_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    split = str(TRACES / "fp8-dsv3-tp8.newest.split20.pickle.xz")
    (one,) = answer(capsys, split, "--conf", "")["replays"]
    (default,) = answer(capsys, NEWEST)["replays"]
    assert one["peak"]["requested"] == default["peak"]["requested"], "the same program ran"
    assert one["peak"]["allocated"] == default["peak"]["allocated"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--conf", "max_split_size_mb:banana"], "banana, but that is not a whole number"),
        (["--conf", "max_split_size_mb:5"], "max_split_size_mb is 5, but torch 2.11 wants at least"),
        (["--conf", "expandable_segments:maybe"], "maybe, but torch wants True or False"),
        (["--conf", "garbage_collection_threshold:7"], "7, but torch wants a number between 0 and 1"),
        (["--conf", "roundup_power2_divisions:3"], "3, but torch wants a power of two"),
        (["--conf", "backend:cudaMallocAsync"], "covers backend:native, not cudaMallocAsync"),
        (["--conf", "large_segment_size_mb:20", "--torch", "2.9.0"], "a key of torch 2.11 and newer, not of 2.9"),
        (["--conf", "no_such_key:1"], "'no_such_key' is not a key of torch 2.11; known are backend,"),
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
        (["--verify", "--conf", "max_split_size_mb:64"], "the decisions were recorded under conf ''"),
    ],
)
def test_a_wrong_call_exits_with_2_and_names_what_is_wrong(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in error(capsys, NEWEST, *arguments)


def test_another_spelling_of_the_recorded_conf_can_be_verified(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = answer(capsys, NEWEST, "--verify", "--conf", "backend:native,expandable_segments:False")["replays"]
    assert one["verify"]["mismatches"] == 0


def test_another_capacity_than_the_files_cannot_be_verified(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = load_trace(NEWEST)
    write_trace(replace(trace, settings=replace(trace.settings, capacity=10 * 2**30)), tmp_path / "t.fscope")
    path = str(tmp_path / "t.fscope")
    assert "with another --capacity" in error(capsys, path, "--verify", "--capacity", "20 GiB")
    assert answer(capsys, path, "--verify", "--capacity", "10 GiB")["replays"][0]["verify"]["mismatches"] == 0


def named(tmp_path: Path, **fields: Any) -> str:
    """A recording as a file that says more than a snapshot does."""
    trace = load_trace(NEWEST)
    settings = replace(trace.settings, memory_fraction=0.9, capacity=70 * 2**30)
    values = {"torch": "2.11.0+cu130", "card": "NVIDIA H100 80GB HBM3", "settings": settings, "lost": (), **fields}
    write_trace(replace(trace, **values), tmp_path / "named.fscope")
    return str(tmp_path / "named.fscope")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--torch", "2.13.0"], "made with 2.11.0+cu130; with another --torch they"),
        (["--torch", "all"], "made with 2.11.0+cu130; with another --torch they"),
        (["--memory-fraction", "0.5"], "made with 0.9; with another --memory-fraction they"),
        (["--capacity", "60 GiB"], "made with 75161927680 bytes; with another --capacity they"),
    ],
)
def test_what_the_file_names_cannot_be_verified_as_something_else(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert said in error(capsys, named(tmp_path), "--verify", *arguments)


def test_another_card_than_the_files_cannot_be_verified(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = named(tmp_path, card="other", device_total=24 * 2**30)
    assert "made with other; with another --card they" in error(capsys, path, "--verify", "--card", "h100-80gb")


def test_what_the_file_names_can_be_named_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--torch", "2.11.1", "--card", "h100-80gb", "--memory-fraction", "0.9", "--capacity", "70 GiB"]
    (one,) = answer(capsys, named(tmp_path), "--verify", *arguments)["replays"]
    assert one["verify"]["mismatches"] == 0
    assert one["exact"]


def test_what_the_file_leaves_out_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--torch", "2.11.0", "--card", "h100-80gb", "--memory-fraction", "0.9", "--capacity", "70 GiB"]
    (one,) = answer(capsys, NEWEST, "--verify", *arguments)["replays"]
    assert one["verify"]["mismatches"] == 0
    assert one["assumptions"] == []


def test_a_virtual_recording_that_set_no_fraction_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = named(tmp_path, source="virtual", settings=replace(load_trace(NEWEST).settings, memory_fraction=None))
    assert "made with no memory fraction" in error(capsys, path, "--verify", "--memory-fraction", "0.5")


# --- what is taken for granted ------------------------------------------------------------------------------------


def test_text_names_the_event_that_fails_first_and_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", MOE, "--capacity", "1 GiB"]) == 0
    text = capsys.readouterr().out
    (first,) = {o["event"] for o in answer(capsys, MOE, "--capacity", "1 GiB")["replays"][0]["ooms"][:1]}
    assert f"(the first at event {first:,})" in text
    assert f"event {first:,} fails, which did not fail when recorded" in text
    assert "card_assumed" not in text, "no memory fraction is in force"


def test_a_replay_says_what_tune_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same requests under the same settings; ``tune`` alone gives back what failed when recorded."""
    streams = str(TRACES / "streams-default.pickle.xz")
    (one,) = answer(capsys, streams, "--conf", "expandable_segments:True")["replays"]
    tuned = json_of("tune", capsys, streams, "--keep", "expandable_segments:True", "--all", "--jobs", "1")
    (same,) = (t for t in tuned["ranked"] if t["conf"] == "expandable_segments:True")
    assert same["assumptions"] == one["assumptions"]
    assert {a["code"] for a in one["assumptions"] if a["effect"] != "none"} == {"deferred_frees", "inferred_releases"}
    assert same["exact"] is one["exact"] is False


def test_what_a_strange_file_says_of_itself_cannot_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = named(tmp_path, lost=(Loss("strange\x1b[2J", "and \x1b[31mred", 1),))
    assert run(["replay", path]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "strange\\x1b[2J (effect unknown, 1 events): and \\x1b[31mred" in out


def test_markdown_has_the_table_of_the_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a|b<c>`d`@e.fscope"
    Path(named(tmp_path)).rename(path)
    lines, cells = markdown_of("replay", capsys, str(path), "--verify")
    assert lines[0].startswith("### fragscope replay: ")
    assert "a\\|b&lt;c&gt;\\`d\\`@&#8203;e.fscope" in lines[0]
    assert cells[:2] == [["MiB", "peak", "end"], ["---", "--:", "--:"]]
    (one,) = answer(capsys, str(path))["replays"]
    assert [float(row[1].replace(",", "")) for row in cells if row[0] == "reserved"] == [one["peak"]["reserved"] / MIB]
    assert "- exact" in lines
    assert any(line.startswith("- verified: ") and line.endswith("0 mismatches") for line in lines)


def test_requests_alone_cannot_be_verified(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_trace(replace(load_trace(NEWEST), decisions=None, final=None), tmp_path / "t.fscope")
    assert "requests only" in error(capsys, str(tmp_path / "t.fscope"), "--verify")


def test_a_release_newer_than_the_rules_uses_the_newest_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", NEWEST, "--torch", "2.99.0"]) == 0
    assert "torch 2.99.0 is newer than the newest rules; those of 2.14 stand in" in capsys.readouterr().out
    (one,) = answer(capsys, NEWEST, "--torch", "2.99.0")["replays"]
    assert not one["exact"]
    assert (one["torch"], one["rules"]) == ("2.99.0", "2.14")
    assert {a["code"] for a in one["assumptions"]} >= {"rules_assumed"}


def test_a_file_of_a_release_newer_than_the_rules_is_read_and_said_to_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_trace(replace(load_trace(NEWEST), torch="2.99.0"), tmp_path / "t.fscope")
    path = str(tmp_path / "t.fscope")
    assert run(["replay", path]) == 0
    assert "torch 2.99.0 is newer than the rules known; those of 2.14 decide" in capsys.readouterr().err
    assert "2.99.0" in error(capsys, path, "--strict")


def test_what_private_pools_keep_idle_has_a_row_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    value = small_snapshot("2.12")
    value["device_traces"][0][0]["pool_id"] = value["device_traces"][0][1]["pool_id"] = (0, 1)
    value["device_traces"][0] = value["device_traces"][0][:2]
    value["segments"] = [segment(BASE, 2 * MIB, [(512, "active_allocated"), (2 * MIB - 512, "inactive")])]
    value["segments"][0]["segment_pool_id"] = (0, 1)
    path = str(write(tmp_path / "s.pickle", value))
    (one,) = answer(capsys, path, "--verify")["replays"]
    assert one["verify"]["mismatches"] == 0
    assert one["end"]["pool_idle"] == 2 * MIB - 512
    assert run(["replay", path]) == 0
    assert "pool_idle" in capsys.readouterr().out
    assert run(["replay", NEWEST]) == 0
    assert "pool_idle" not in capsys.readouterr().out


def test_other_rules_that_free_a_segment_the_recording_reuses_are_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    """Under other rules a segment may still stand where the recording placed the next one."""
    streams = str(TRACES / "streams-default.pickle.xz")
    recorded = answer(capsys, streams)["replays"][0]["peak"]["requested"]
    for release in ("2.12.0", "2.13.0", "2.14.1"):
        (one,) = answer(capsys, streams, "--torch", release)["replays"]
        assert one["peak"]["requested"] == recorded


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
