"""Recording a command, seen from the process that records."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from requests_of import trace_of
from stand_ins import STAND_IN, stand_in_readers

from fragscope.cli import run
from fragscope.cli.record import _figures, _table, told
from fragscope.errors import UsageError
from fragscope.record.launch import Launched, LaunchOptions, RecordedProcess, launch
from fragscope.record.launch.process import claim, reason
from fragscope.record.launch.session import RECORDER
from fragscope.record.launch.session_folder import (
    Plan,
    Status,
    new_status_file,
    read_plan,
    statuses,
    write_plan,
    write_status,
)
from fragscope.trace import DecisionKind, DecisionLog, Loss, RequestKind, RequestLog, Trace, load_trace, write_trace
from fragscope.units import MIB

__all__ = ["stand_in_readers"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def options(tmp_path, monkeypatch, stand_in_readers):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{STAND_IN}")
    monkeypatch.delenv("RANK", raising=False)
    return LaunchOptions(out=tmp_path / "out", recorder=stand_in_readers.__name__)


def program(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_what_a_program_leaves_is_collected(options):
    done = launch(program("import torch; torch.empty(5)"), options)
    (process,) = done.processes
    assert (done.exit_code, done.notes, process.complete) == (0, (), True)
    assert process.name == f"pid{process.pid}"
    assert list(load_trace(process.path).requests.size) == [5]


def test_what_a_killed_program_leaves_is_packed(options):
    done = launch(program("import os, torch; torch.empty(5); os.kill(os.getpid(), 9)"), options)
    (process,) = done.processes
    assert (done.exit_code, process.complete, process.path.suffix) == (137, False, ".fscope")
    assert not process.path.with_suffix("").exists()


def test_chunks_that_cannot_be_read_stay_and_are_named(options):
    code = "import os, torch; torch.empty(5); [tell('torn', 5) for tell in torch.cuda._listeners]; os._exit(3)"
    done = launch(program(code), options)
    assert done.exit_code == 3
    (process,) = done.processes
    assert process.path.is_dir()
    (note,) = done.notes
    assert note.startswith(f"{process.name} stays a folder of chunks: ")


def test_a_process_that_goes_on_is_left_alone(options, monkeypatch):
    monkeypatch.setattr("fragscope.record.launch.session._PATIENCE", 0.0)
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    os.set_inheritable(writer, True)
    code = f"""
import os, sys
told, tell = os.pipe()
if os.fork() == 0:
    import torch
    torch.empty(5)
    os.close({writer})
    os.write(tell, b"x")
    os.read({reader}, 1)  # returns when the test closes its end
    os._exit(0)
os.close({writer})
os.read(told, 1)
"""
    done = launch(program(code), options)
    (note,) = done.notes
    assert "still runs, and goes on recording" in note
    assert done.processes == ()
    assert next((options.out).iterdir()).is_dir()
    os.close(writer)
    os.close(reader)


def test_the_folder_and_the_signals_are_as_before(options):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert launch(("false",), options).exit_code == 1
    assert launch(("no-such-command",), options).exit_code == 127
    assert launch(("a\0b",), options).exit_code == 126
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert not options.out.exists()


def test_an_earlier_recording_is_kept_unless_told_otherwise(options):
    options.out.mkdir()
    (options.out / "rank0.fscope").write_text("earlier")
    (options.out / "rank1.fscope").write_text("earlier")
    with pytest.raises(UsageError, match=r"holds a recording already \(rank0 and 1 more\).*--overwrite"):
        launch(("true",), options)
    assert len(list(options.out.iterdir())) == 2


def test_the_command_line_says_what_became_of_it(tmp_path, capfd, monkeypatch, stand_in_readers):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    summary = tmp_path / "summary.json"
    assert (
        run(["record", "--out", str(tmp_path / "out"), "--summary", str(summary), "--", "sh", "-c", "echo x; exit 4"])
        == 4
    )
    out, err = capfd.readouterr()
    assert out == "x\n"
    assert err.startswith("fragscope: no process of it loaded the recorder: ")
    assert json.loads(summary.read_text())["exit_code"] == 4
    del stand_in_readers


def test_a_name_is_claimed_once(tmp_path):
    assert claim(tmp_path / "new", "rank0") == tmp_path / "new" / "rank0"
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0-2.fscope").write_text("")
    (tmp_path / "rank0-3-cuda1.fscope").write_text("")
    assert claim(tmp_path, "rank0") == tmp_path / "rank0-4"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["new", "rank0", "rank0-4"]


def test_processes_and_the_command_understand_each_other(tmp_path):
    plan = Plan("/out", "module", "none", False, 0.5, None, "true")
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    assert read_plan(tmp_path / "gone") is None
    first = new_status_file(tmp_path)
    write_status(first, Status(7, name="rank0", rank=0))
    assert new_status_file(tmp_path) != first
    write_status(tmp_path / "gone" / "1-0.json", Status(1))  # nowhere to say it, and nothing happens
    (tmp_path / "8-0.json").write_text('{"pid": 8')  # a process was killed while it said it
    assert statuses(tmp_path) == [Status(7, name="rank0", rank=0)]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/x"), "No space left on device (/x)"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (UsageError("plain"), "plain"),
        (ValueError("odd"), "ValueError: odd"),
        (KeyError(), "KeyError"),
        (RuntimeError("CUDA error: misaligned\nFor debugging ..."), "RuntimeError: CUDA error: misaligned"),
    ],
)
def test_errors_become_one_line(error, line):
    assert reason(error) == line


def test_a_recording_that_cannot_be_read_is_said_and_changes_no_exit_code(tmp_path, capsys):
    (tmp_path / "rank0.fscope").write_bytes(b"PK\x03\x04 torn")
    launched = Launched(9, (RecordedProcess("rank0", tmp_path / "rank0.fscope", 12, True),), ("first",))
    assert told(launched, tmp_path, None) == 9
    head, _, row, *notes = capsys.readouterr().err.splitlines()
    assert head == "fragscope: recorded, in MiB"
    assert row.split()[:7] == ["rank0", "12", "-", "-", "-", "-", "0"]
    assert notes[0] == "fragscope: first"
    assert "rank0.fscope: is not a readable .fscope file" in notes[1]


def test_losses_are_told(tmp_path, capsys):
    trace = trace_of(("alloc", 1, 3 << 20), lost=(Loss("not_written", "recording stopped: no space left", 4),))
    write_trace(replace(trace, provenance={"rank": "3"}), tmp_path / "rank3.fscope")
    told(Launched(0, (RecordedProcess("rank3", tmp_path / "rank3.fscope", 12, False),), ()), tmp_path, None)
    _, _, row, note = capsys.readouterr().err.splitlines()
    assert row.split() == ["rank3", "12", "3", "1", "3.00", "-", "1", "no", str(tmp_path / "rank3.fscope")]
    assert note == "fragscope: rank3: recording stopped: no space left (4)"


def test_the_recorder_that_ships_is_what_processes_ask_for(tmp_path):
    module = importlib.import_module(RECORDER)
    options = module.RecorderOptions(
        keep=tmp_path, gives_way=True, stacks=module.Stacks("python"), device=0, sample_non_torch=0.5, max_entries=7
    )
    assert module.Recorder(options).options == options


def test_sampled_memory_has_columns_where_it_was_sampled(tmp_path, capfd, monkeypatch):
    def recorded(name: str, *sampled: int) -> RecordedProcess:
        requests, decisions = RequestLog(), DecisionLog()
        decisions.request = requests.append(RequestKind.ALLOC, id=0, size=20 * MIB)
        decisions.append(DecisionKind.SEGMENT_ALLOC, -1, 0x7F00_0000_0000, 20 * MIB, 0, 0)
        decisions.append(DecisionKind.ALLOC, 0, 0x7F00_0000_0000, 20 * MIB, 0, 0)
        for size in sampled:
            requests.append(RequestKind.NON_TORCH, size=size)
        path = tmp_path / f"{name}.fscope"
        write_trace(Trace(requests=requests.finish(), decisions=decisions.finish(), torch="2.11.0"), path)
        return RecordedProcess(name=name, pid=1, path=path, complete=True)

    rows = [_figures(recorded("a", 520 * MIB, 1032 * MIB), []), _figures(recorded("b"), [])]
    assert [row["peak"]["non_torch"] for row in rows] == [1012 * MIB, None]
    header, first, second = (line.split() for line in _table(rows)[1:4])
    assert "non_torch at least hbm at least" in " ".join(header)
    assert first[6:8] == ["1,012.00", "1,032.00"]
    assert second[6:8] == ["-", "-"]
    assert "non_torch" not in _table(rows[1:])[1]
