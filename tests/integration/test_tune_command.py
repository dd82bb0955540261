"""``fragscope tune`` as a user calls it."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders import TRACES, torch_statistics
from commands import error_of, json_of, markdown_of
from requests_of import trace_of

from fragscope.cli import run
from fragscope.search import Given, load_subject, play, player, tune
from fragscope.trace import write_trace

SPLIT = str(TRACES / "fp8-dsv3-tp8.newest.split20.pickle.xz")
DEFAULT = str(TRACES / "fp8-dsv3-tp8.newest.default.pickle.xz")
OOM = str(TRACES / "oom-default.pickle.xz")
MIB = 2**20


answer, error = partial(json_of, "tune"), partial(error_of, "tune")


def reserved(name: str) -> int:
    """As torch reported on the card."""
    return torch_statistics(name)["reserved_bytes.all.peak"]


def test_the_cure_of_a_recorded_program_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", SPLIT]) == 0
    out, err = capsys.readouterr()
    last = out.splitlines()[-1]
    words = shlex.split(last, comments=True)
    assert words[0] == "export"
    variable, _, conf = words[1].partition("=")
    assert variable == "PYTORCH_ALLOC_CONF"
    assert "saves" in last
    value = answer(capsys, SPLIT, "--all")
    assert value["export"] == {"variable": variable, "conf": conf}
    assert value["current"]["outcomes"][0]["peak"]["reserved"] == reserved("fp8-dsv3-tp8.newest.split20")
    by_conf = {t["conf"]: t for t in value["ranked"]}
    assert by_conf[""]["outcomes"][0]["peak"]["reserved"] == reserved("fp8-dsv3-tp8.newest.default")
    assert by_conf["expandable_segments:True"]["outcomes"][0]["peak"]["reserved"] == reserved(
        "fp8-dsv3-tp8.newest.expandable"
    )
    assert value["best"]["saved"] >= reserved("fp8-dsv3-tp8.newest.split20") - reserved("fp8-dsv3-tp8.newest.default")
    assert err == "fragscope: the file does not name its card; h100-80gb is assumed (--card)\n"


def test_the_cure_of_a_fragmented_load_is_found() -> None:
    """A program that a split limit cost 4 GiB; the card's peaks under these three confs are known from recordings."""
    subject = load_subject(str(TRACES / "fp8-dsv3-tp8.orig.default.pickle.xz"), Given())
    subject = replace(subject, settings=replace(subject.settings, conf="max_split_size_mb:20"))
    with player([subject], jobs=1, tries=2) as here:
        t = tune([subject], here, most=2)
    assert t.current.reserved == 13426 * MIB
    assert {x.conf: x.reserved for x in t.ranked} == {"": 9038 * MIB, "expandable_segments:True": 8982 * MIB}
    assert t.best is not None
    assert t.best.conf == "expandable_segments:True"


def test_json_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    value = answer(capsys, SPLIT, DEFAULT, "--bound")
    assert set(value) >= {
        "schema_version", "goal", "traces", "tried", "current", "best", "calmer", "simpler", "surer", "export",
        "ranked", "other_orders", "bounds",
    }  # fmt: skip
    assert (value["schema_version"], value["goal"]) == (1, "reserved")
    assert [t["path"] for t in value["traces"]] == [SPLIT, DEFAULT]
    assert [t["conf"] for t in value["traces"]] == ["max_split_size_mb:20", ""]
    assert value["tried"] > 20
    assert len(value["ranked"]) == 10
    assert value["current"]["conf"] is None
    for trial in (value["current"], *value["ranked"]):
        assert set(trial) >= {"conf", "saved", "ooms", "retries", "driver_calls", "exact", "assumptions", "outcomes"}
        assert len(trial["outcomes"]) == 2
        assert set(trial["driver_calls"]) == {"alloc", "free", "sync"}
        assert all(set(o["peak"]) == {"reserved", "stranded"} for o in trial["outcomes"])
    for b in value["bounds"]:
        assert b["lower"] <= b["packed"] == b["lower"] + b["gap"]
        assert b["lower"] <= min(t["outcomes"][0]["peak"]["reserved"] for t in value["ranked"])


def test_of_several_cards_the_worst_decides(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "t.fscope")
    # 12 blocks of 1.5 GiB that leave holes of 500 MiB: 18 GiB, then 4 GiB more than an L4 has beside the holes.
    requests = [("alloc", i, (500 if i % 2 else 1536) * MIB) for i in range(24)]
    requests += [("free", i) for i in range(1, 24, 2)]
    write_trace(trace_of(*requests, ("alloc", 24, 2560 * MIB), card="h200"), Path(path))
    value = answer(capsys, path, "--card", "l4", "--card", "h200", "--bound")
    assert [(t["path"], t["card"]) for t in value["traces"]] == [(path, "l4"), (path, "h200")]
    assert len(value["bounds"]) == 1
    for i, card in enumerate(("l4", "h200")):
        alone = answer(capsys, path, "--card", card)["current"]
        assert value["current"]["outcomes"][i] == alone["outcomes"][0]
    assert value["current"]["ooms"] == sum(o["ooms"] for o in value["current"]["outcomes"])
    text = run(["tune", path, "--card", "l4", "--card", "h200"])
    assert (text, "l4" in capsys.readouterr().out) == (0, True)


def test_no_line_to_export_where_nothing_is_better(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_trace(trace_of(("alloc", 0, 30 * MIB)), tmp_path / "t.fscope")
    assert run(["tune", str(tmp_path / "t.fscope")]) == 0
    out, _ = capsys.readouterr()
    assert "\nexport " not in out
    assert "keep the recorded conf" in out.splitlines()[-1]
    assert answer(capsys, str(tmp_path / "t.fscope"))["export"] is None


def test_the_cure_of_an_oom_is_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # Two blocks of 8 MiB in each segment of 20 MiB: of the four that are freed only two are neighbours in a segment,
    # so that 20 of the 100 MiB come back, and 30 are wanted. In one expandable segment all four are neighbours.
    requests = [("alloc", i, 8 * MIB) for i in range(10)] + [("free", i) for i in (3, 4, 5, 6)]
    # The virtual device has what it says; on a card, what failed may tell of less memory than there was at the start.
    trace = trace_of(*requests, ("alloc", 10, 30 * MIB), failed=[14], source="virtual")
    write_trace(replace(trace, settings=replace(trace.settings, capacity=100 * MIB)), tmp_path / "t.fscope")
    value = answer(capsys, str(tmp_path / "t.fscope"), "--all")
    assert value["traces"][0]["capacity"] == 100 * MIB
    assert value["current"]["ooms"] == 1
    by_conf = {t["conf"]: t for t in value["ranked"]}
    assert by_conf["expandable_segments:True"]["ooms"] == 0
    assert by_conf[""]["ooms"] == 1
    assert value["best"]["ooms"] == 0
    assert run(["tune", str(tmp_path / "t.fscope")]) == 0
    assert "0 OOMs instead of 1" in capsys.readouterr().out.splitlines()[-1]


def test_what_may_hang_on_the_order_of_equal_blocks_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Two equal holes in different segments: which of them serves the next request, addresses decide up to 2.11.
    requests = [("alloc", 0, 60 * MIB), ("free", 0), *(("alloc", i, 14 * MIB) for i in range(1, 9))]
    ties = [("free", 1), ("free", 5), ("alloc", 9, 14 * MIB), ("alloc", 10, 14 * MIB)]
    write_trace(trace_of(*requests, *ties, conf="max_split_size_mb:20"), tmp_path / "t.fscope")
    arguments = [str(tmp_path / "t.fscope"), "--keep", "expandable_segments:False"]
    value = answer(capsys, *arguments)
    assert value["best"]["conf"] == "", "it may split the 60 MiB block for four of the eight"
    assert "tie_by_modelled_address" in {a["code"] for a in value["best"]["assumptions"]}
    assert [o["order"] for o in value["other_orders"]] == ["block order", "segment order"]
    assert run(["tune", *arguments]) == 0
    assert "it would reserve 116.00 MiB by block order and 116.00 MiB by segment order" in capsys.readouterr().out


def test_other_orders_stand_in_the_order_of_the_traces(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Only where addresses decide is there another order; a trace of a release that goes by none keeps its figures."""
    requests = [("alloc", 0, 60 * MIB), ("free", 0), *(("alloc", i, 14 * MIB) for i in range(1, 9))]
    ties = [("free", 1), ("free", 5), ("alloc", 9, 14 * MIB), ("alloc", 10, 14 * MIB)]
    for name, torch, tail in (("new", "2.13.0", 200), ("old", "2.11.0", 0)):
        trace = trace_of(*requests, *ties, ("alloc", 11, (tail + 40) * MIB), conf="max_split_size_mb:20", torch=torch)
        write_trace(trace, tmp_path / f"{name}.fscope")
    files = [str(tmp_path / "new.fscope"), str(tmp_path / "old.fscope")]
    value = answer(capsys, *files, "--keep", "expandable_segments:False")
    assert [t["torch"] for t in value["traces"]] == ["2.13.0", "2.11.0"]
    assert [o["order"] for o in value["other_orders"]] == ["block order", "segment order"]
    for order in value["other_orders"]:
        assert [o["peak"]["reserved"] for o in order["outcomes"]] == [356 * MIB, 156 * MIB]


def test_sidecars_say_what_the_snapshots_leave_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, capacity in (("a", 20), ("b", 30)):
        (tmp_path / f"{name}.json").write_text(f'{{"capacity": {capacity * 2**30}, "card": "h100-80gb"}}')
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    both = answer(capsys, SPLIT, DEFAULT, "--sidecar", a, "--sidecar", b)
    assert [t["capacity"] for t in both["traces"]] == [20 * 2**30, 30 * 2**30]
    monkeypatch.setattr(play, "_STARTING", 0.0)
    in_processes = answer(capsys, SPLIT, DEFAULT, "--sidecar", a, "--sidecar", b, "--jobs", "2")
    assert in_processes == both, "processes of their own read them too"
    one = answer(capsys, SPLIT, DEFAULT, "--sidecar", a)
    assert [t["capacity"] for t in one["traces"]] == [20 * 2**30, 20 * 2**30]
    assert "one for each of the 2" in error(capsys, SPLIT, DEFAULT, *(w for _ in range(3) for w in ("--sidecar", a)))


def test_markdown_has_the_table_of_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    lines, cells = markdown_of("tune", capsys, SPLIT)
    assert cells[0] == ["reserved", "saved", "stranded", "OOMs", "retries", "alloc", "free", "sync", "more", "exact",
                        "conf"]  # fmt: skip
    assert cells[1] == ["--:"] * 10 + ["---"]
    assert cells[2][-1] == r"as recorded (max\_split\_size\_mb:20)"
    assert cells[2][0] == f"{reserved('fp8-dsv3-tp8.newest.split20') / MIB:,.2f}"
    export = lines[lines.index("```sh") + 1]
    assert lines[-1] == "```"
    assert run(["tune", SPLIT]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == export


def test_a_list_is_quoted_for_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", SPLIT, "--keep", "roundup_power2_divisions:[64:0,>:8]"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    done = subprocess.run(
        ["sh", "-c", f"{last}\nprintenv PYTORCH_ALLOC_CONF"], capture_output=True, text=True, check=True
    )
    assert "roundup_power2_divisions:[64:0,>:8]" in done.stdout
    assert list(Path().glob(":8*")) == [], "and redirects nothing"


def test_a_release_that_refuses_the_recorded_conf_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch 2.9 wants more than large_segment_size" in error(capsys, SPLIT, "--torch", "2.9.1")


@pytest.mark.parametrize(("release", "name"), [("2.9.1", "PYTORCH_CUDA_ALLOC_CONF"), ("2.10.0", "PYTORCH_ALLOC_CONF")])
def test_the_line_names_the_variable_that_the_release_reads(
    release: str, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The 60 MiB block serves no smaller request with a split limit of 21 MiB, and all four without one.
    requests = [("alloc", 0, 60 * MIB), ("free", 0), *(("alloc", i, 14 * MIB) for i in range(1, 5))]
    write_trace(trace_of(*requests, conf="max_split_size_mb:21", torch=release), tmp_path / "t.fscope")
    assert run(["tune", str(tmp_path / "t.fscope")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"export {name}=''  # saves 56.00 MiB of peak reserved"


def test_tables_show_the_recorded_and_the_default_conf(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", SPLIT, "--bound"]) == 0
    out, _ = capsys.readouterr()
    (recorded,) = [line for line in out.splitlines() if "as recorded (max_split_size_mb:20)" in line]
    assert f"{reserved('fp8-dsv3-tp8.newest.split20') / MIB:,.2f}" in recorded
    assert any(line.endswith("  default") or line.endswith("default (best)") for line in out.splitlines())
    assert "no allocator needs less than" in out
    assert "\x1b" not in out


def test_as_many_processes_as_wanted_give_the_same_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = answer(capsys, SPLIT, DEFAULT, "--all", "--jobs", "1")
    started: list[Any] = []
    start = subprocess.Popen

    def starting(*arguments: Any, **options: Any) -> Any:
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(play, "_STARTING", 0.0)
    monkeypatch.setattr(subprocess, "Popen", starting)
    assert answer(capsys, SPLIT, DEFAULT, "--all", "--jobs", "3") == alone
    assert len(started) == 3
    assert all(process.poll() is not None for process in started), "none outlives the command"


def test_a_process_that_dies_is_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play, "_STARTING", 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "ended unexpectedly" in error(capsys, SPLIT, "--jobs", "2", code=1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "TRACE"),
        ([DEFAULT, DEFAULT], "twice"),
        ([DEFAULT, "--goal", "speed"], "speed"),
        ([DEFAULT, "--keep", "expandable:True"], "expandable_segments"),
        ([DEFAULT, "--torch", "2.5.1"], "2.5.1"),
        ([DEFAULT, "--card", "h100"], "h100-80gb"),
        ([DEFAULT, "--capacity", "12 parsecs"], "12 parsecs"),
        ([DEFAULT, "--memory-fraction", "1.5"], "1.5"),
        ([DEFAULT, "--memory-fraction", "nan"], "nan"),
        ([DEFAULT, "--jobs", "0"], "jobs"),
        ([DEFAULT, "--device-index", "4"], "device 4"),
        ([DEFAULT, "--bound-seconds", "-1"], "-1"),
    ],
)
def test_a_wrong_call_exits_with_2_and_names_what_is_wrong(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in error(capsys, *arguments)


def test_a_file_that_is_no_trace_exits_with_5(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t.pickle").write_bytes(b"nothing")
    assert "t.pickle" in error(capsys, DEFAULT, str(tmp_path / "t.pickle"), code=5)
    assert "missing" in error(capsys, str(tmp_path / "missing.fscope"), code=5)


WAITING = """
import sys
sys.modules["numba"] = None  # interpreted, so that it takes a while
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, tests ignore it
from fragscope.cli import main
from fragscope.search import play
replays = play._Workers.__call__
def told(workers, confs):
    print(*(process.pid for process in workers._processes), file=sys.stderr, flush=True)
    return replays(workers, confs)
play._Workers.__call__ = told
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_ends_all_processes_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "tune", OOM, "--jobs", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    workers = process.stderr.readline().split()
    assert len(workers) == 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "fragscope: interrupted")
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
