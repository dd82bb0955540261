"""``fragscope fit`` as a user calls it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from builders import TRACES
from commands import error_of, json_of, markdown_of
from requests_of import trace_of

from fragscope.allocator import ReplaySettings, recorded_under, replay
from fragscope.cli import run
from fragscope.trace import load_trace, write_trace

SPLIT = str(TRACES / "fp8-dsv3-tp8.newest.split20.pickle.xz")
MOE = str(TRACES / "moe_list_stack-default.pickle.xz")
OOM = str(TRACES / "oom-default.pickle.xz")
MIB = 2**20


answer, error = partial(json_of, "fit"), partial(error_of, "fit")


def test_json_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(capsys, MOE)
    assert set(value) >= {"schema_version", "trace", "fits"}
    assert set(value["trace"]) >= {"path", "source", "events", "conf", "torch", "card", "total", "lost"}
    assert [f["conf"] for f in value["fits"]] == ["", "expandable_segments:True"]
    for f in value["fits"]:
        assert set(f) >= {
            "conf", "capacity", "lowest", "tested", "failing", "failure", "unlimited", "retries", "driver_calls",
            "cards", "exact", "assumptions",
        }  # fmt: skip
        assert f["capacity"] % (2 * MIB) == 0
        assert f["capacity"] <= f["unlimited"]["reserved"]
        assert f["failure"]["capacity"] == f["capacity"] - 2 * MIB
        assert set(f["failure"]) >= {
            "event", "requested", "stream", "frame", "reserved", "allocated", "stranded", "left", "needed", "idle",
        }  # fmt: skip
        assert f["cards"][0] == "l4", "the smallest first; 4.2 GiB fit on all"
        assert {"a10", "h100-80gb", "b200"} < set(f["cards"])
        assert "observations_unseen" in {a["code"] for a in f["assumptions"]}


@pytest.mark.parametrize("name", ["moe_list_stack-default", "fp8-dsv3-tp8.newest.split20"])
def test_the_answer_runs_and_a_page_less_does_not(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = TRACES / f"{name}.pickle.xz"
    trace = load_trace(path)
    own = ReplaySettings.of(recorded_under(trace))
    for f in answer(capsys, str(path))["fits"]:
        settings = replace(own, conf=f["conf"], capacity=f["capacity"])
        assert replay(trace, settings, compiled=False).whole.ooms == 0
        less = replay(trace, replace(settings, capacity=f["capacity"] - 2 * MIB), compiled=False)
        assert less.ooms[0].event == f["failure"]["event"]
        assert less.ooms[0].requested == f["failure"]["requested"]


def test_text_says_what_fails_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", SPLIT]) == 0
    out, err = capsys.readouterr()
    assert "max_split_size_mb:20 (l4 and 18 larger)" in out
    assert "default (l4 and 18 larger)" in out
    assert "expandable_segments:True (l4 and 18 larger)" in out
    assert " fails, " in out
    assert "are needed" in out
    assert "observations_unseen" in out
    assert "\x1b" not in out
    assert err == "fragscope: the file does not name its card; h100-80gb is assumed (--card)\n"


def test_confs_of_the_users_choice(capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(capsys, MOE, "--conf", "max_split_size_mb:64", "--conf", "", "--conf", "max_split_size_mb:64")
    assert [f["conf"] for f in value["fits"]] == ["max_split_size_mb:64", ""]


def test_a_program_that_learned_about_memory_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    err = error(capsys, OOM)
    assert "caught an OOM at event" in err
    assert "--assume-unchanged" in err
    seen = trace_of(("alloc", 0, 30 * MIB), ("seen", "torch.cuda.mem_get_info"), ("alloc", 1, 4 * MIB))
    write_trace(seen, tmp_path / "t.fscope")
    assert "torch.cuda.mem_get_info at loader.py:7" in error(capsys, str(tmp_path / "t.fscope"))
    value = answer(capsys, str(tmp_path / "t.fscope"), "--assume-unchanged", "--conf", "")
    assert value["fits"][0]["capacity"] == (30 + 20) * MIB


def test_a_device_of_any_total_can_be_asked_about(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_trace(trace_of(("alloc", 0, 300 * MIB)), tmp_path / "t.fscope")
    arguments = (str(tmp_path / "t.fscope"), "--conf", "expandable_segments:True", "--total", "400 MiB")
    value = answer(capsys, *arguments)
    assert value["trace"]["total"] == 400 * MIB
    assert value["fits"][0]["capacity"] == 300 * MIB


def test_requests_that_no_memory_serves_end_with_4(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_trace(trace_of(("alloc", 0, 4 * MIB), ("alloc", 1, 2**55)), tmp_path / "t.fscope")
    path = str(tmp_path / "t.fscope")
    assert run(["fit", path]) == 4
    out, err = capsys.readouterr()
    assert "event 1 fails" in out, "what fails is shown all the same"
    assert err == f"fragscope: {path}: the requests run under none of these confs, however much memory there is\n"
    assert [f["capacity"] for f in answer(capsys, path, code=4)["fits"]] == [None, None]


def test_a_sidecar_says_what_the_snapshot_leaves_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    side = tmp_path / "side.json"
    side.write_text('{"torch": "2.13.0", "card": "24 GB of something", "total_memory": 25769803776}')
    value = answer(capsys, MOE, "--conf", "", "--sidecar", str(side))
    assert (value["trace"]["torch"], value["trace"]["card"]) == ("2.13.0", "24 GB of something")
    assert value["trace"]["total"] == 24 * 2**30
    assert run(["fit", MOE, "--conf", "", "--sidecar", str(side)]) == 0
    assert capsys.readouterr().err == ""
    assert "no such file" in error(capsys, MOE, "--sidecar", str(tmp_path / "none.json"), code=5)


def test_how_memory_was_short_when_recorded_does_not_matter(capsys: pytest.CaptureFixture[str]) -> None:
    """The capacity is what is asked for; a limit that was in force is lifted."""
    (one,) = answer(capsys, OOM, "--assume-unchanged", "--conf", "expandable_segments:True")["fits"]
    codes = {a["code"] for a in one["assumptions"]}
    assert not {"capacity_assumed", "limit_inferred", "after_oom"} & codes
    assert {"ooms_caught", "inferred_releases"} <= codes
    assert not one["exact"], "when cached memory was given back is inferred"


def test_markdown_has_the_table_of_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    lines, cells = markdown_of("fit", capsys, MOE)
    assert lines[0].startswith("### fragscope fit: ")
    assert cells[0] == ["smallest", "no limit", "retries", "alloc", "free", "sync", "tested", "exact",
                        "conf and cards it fits"]  # fmt: skip
    assert cells[1] == ["--:"] * 8 + ["---"]
    fits = answer(capsys, MOE)["fits"]
    assert [float(row[0].replace(",", "")) for row in cells[2:]] == [f["capacity"] / MIB for f in fits]
    assert cells[3][-1] == r"expandable\_segments:True (l4 and 18 larger)"
    assert any(line.startswith("- default, with ") and " fails, " in line for line in lines)
    assert any(line.startswith(r"- observations\_unseen (effect unknown") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "TRACE"),
        ([MOE, "--conf", "nonsense"], "nonsense"),
        ([MOE, "--torch", "banana"], "banana"),
        ([MOE, "--card", "h100"], "h100-80gb"),
        ([MOE, "--total", "many"], "many"),
        ([MOE, "--total", "0"], "--total"),
        ([MOE, "--total", "1 GiB", "--card", "h100-80gb"], "--card"),
        ([MOE, "--device-index", "3"], "device 3"),
    ],
)
def test_a_wrong_call_exits_with_2_and_names_what_is_wrong(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in error(capsys, *arguments)


def test_a_file_that_is_no_trace_exits_with_5(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t.pickle").write_bytes(b"nothing")
    assert "t.pickle" in error(capsys, str(tmp_path / "t.pickle"), code=5)
