"""``fragscope record`` as a user calls it, on real processes; torch, CUDA and the recorder are stand-ins.

What they stand in for is in tests/data/stand_in. Each process of a command allocates a number of bytes of its own, so
that a recording says whose it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fragscope.trace import RequestKind, Trace, load_trace

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "data" / "stand_in"
RECORD = (sys.executable, str(STAND_IN / "record.py"), "record")


def environment(**more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return {**own, "PYTHONPATH": f"{ROOT}{os.pathsep}{STAND_IN}", **more}


def record(
    folder: Path, *arguments: str, given: str = "", options: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Record a command, with the recordings in ``folder/out``."""
    command = (*RECORD, "--out", str(folder / "out"), *options, "--", *arguments)
    return subprocess.run(
        command, cwd=folder, env=environment(**variables), input=given, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip


def python(folder: Path, code: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Record a script; multiprocessing's children need one that they can import."""
    script = folder / "program.py"
    script.write_text(code)
    return record(folder, sys.executable, str(script), **more)


def recordings(folder: Path) -> dict[str, Trace]:
    out = folder / "out"
    assert not out.exists() or all(path.suffix == ".fscope" for path in out.iterdir())
    return {path.stem: load_trace(path) for path in sorted(out.glob("*"))}


def sizes(trace: Trace) -> list[int]:
    return [int(size) for size in trace.requests.size[trace.requests.kind == RequestKind.ALLOC]]


def all_sizes(folder: Path) -> list[list[int]]:
    return sorted(sizes(trace) for trace in recordings(folder).values())


def test_a_program_is_recorded_and_told_about(tmp_path):
    done = record(
        tmp_path, sys.executable, "-c", "import torch; torch.empty(5 << 20); torch.empty(3 << 20); print('out')"
    )
    assert (done.returncode, done.stdout) == (0, "out\n")
    ((name, trace),) = recordings(tmp_path).items()
    assert sizes(trace) == [5 << 20, 3 << 20]
    assert name == f"pid{trace.provenance['pid']}"
    head, columns, row = done.stderr.splitlines()
    assert head == "fragscope: recorded, in MiB"
    assert columns.split()[:4] == ["process", "pid", "rank", "events"]
    assert row.split() == [
        name, trace.provenance["pid"], "-", "2", "8.00", "-", "0", "yes", str(tmp_path / "out" / f"{name}.fscope"),
    ]  # fmt: skip


PROGRAM = "import sys, torch\ntorch.empty(7)\nprint(sys.argv[1:])\n"


@pytest.mark.parametrize("kind", ["script", "module", "console", "options"])
def test_programs_are_started_in_every_way(tmp_path, kind):
    (tmp_path / "program.py").write_text(PROGRAM)
    console = tmp_path / "console"
    console.write_text(f"#!{sys.executable}\n{PROGRAM}")
    console.chmod(0o755)
    command = {
        "script": (sys.executable, "program.py"),
        "module": (sys.executable, "-m", "program"),
        "console": (str(console),),
        "options": (sys.executable, "-u", "-P", "program.py"),
    }[kind]
    done = record(tmp_path, *command, "--out", "x", "-h")
    assert (done.returncode, done.stdout) == (0, "['--out', 'x', '-h']\n")
    assert all_sizes(tmp_path) == [[7]]


def test_streams_and_exit_code_are_the_programs(tmp_path):
    code = "import sys; print(sys.stdin.read().upper(), end=''); print('err', file=sys.stderr); sys.exit(9)"
    done = record(tmp_path, sys.executable, "-c", code, given="given\n")
    assert (done.returncode, done.stdout) == (9, "GIVEN\n")
    assert done.stderr.startswith("err\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 137), (signal.SIGTERM, 143), (signal.SIGSEGV, 139)])
def test_what_a_killed_program_left_is_packed(tmp_path, number, code):
    done = python(tmp_path, f"import os, torch\ntorch.empty(5)\ntorch.empty(6)\nos.kill(os.getpid(), {int(number)})")
    assert done.returncode == code
    ((_, trace),) = recordings(tmp_path).items()
    assert sizes(trace) == [5, 6]
    assert trace.provenance["process"].endswith("program.py")
    assert done.stderr.splitlines()[-1].split()[-2] == "no"


def test_leaving_without_exit_handlers_loses_nothing(tmp_path):
    done = python(tmp_path, "import os, torch\ntorch.empty(5)\nos._exit(3)")
    assert done.returncode == 3
    assert all_sizes(tmp_path) == [[5]]


def test_an_exception_ends_the_recording_as_it_ends_the_program(tmp_path):
    done = python(tmp_path, "import torch\ntorch.empty(5)\nraise ValueError('of the program')")
    assert done.returncode == 1
    assert "ValueError: of the program" in done.stderr
    assert all_sizes(tmp_path) == [[5]]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_are_recorded_each(tmp_path, method):
    done = python(
        tmp_path,
        f"""
import multiprocessing, torch

def work(size):
    torch.empty(size)
    torch.empty(size)

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    workers = [context.Process(target=work, args=(size,)) for size in (11, 12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print([worker.exitcode for worker in workers])
""",
    )
    assert (done.returncode, done.stdout) == (0, "[0, 0]\n")
    assert all_sizes(tmp_path) == [[11, 11], [12, 12]]
    assert all(line.split()[-2] == "yes" for line in done.stderr.splitlines()[2:])


def test_processes_started_by_processes_are_recorded(tmp_path):
    code = (
        "import subprocess, sys, torch; torch.empty(1); subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    record(tmp_path, "sh", "-c", 'exec "$@"', "sh", sys.executable, "-c", code, "import torch; torch.empty(2)")
    assert all_sizes(tmp_path) == [[1], [2]]


def test_a_program_that_becomes_another_keeps_both_recordings(tmp_path):
    code = """
import os, sys, torch
torch.empty(1 if len(sys.argv) == 1 else 2)
if len(sys.argv) == 1:
    os.execv(sys.executable, [sys.executable, __file__, "again"])
"""
    done = python(tmp_path, code)
    assert done.returncode == 0
    found = recordings(tmp_path)
    first = min(found, key=len)
    assert {name: sizes(trace) for name, trace in found.items()} == {first: [1], f"{first}-2": [2]}


def test_a_child_forked_after_cuda_leaves_its_parents_recording_alone(tmp_path):
    code = """
import os, sys, torch
torch.empty(1)
child = os.fork()
if child == 0:
    try:
        torch.empty(99)
    except RuntimeError as e:
        print(e, flush=True)
    sys.exit(4)  # runs the exit handlers it inherited
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
torch.empty(2)
"""
    done = python(tmp_path, code)
    assert done.stdout == "Cannot re-initialize CUDA in forked subprocess.\n4\n"
    assert all_sizes(tmp_path) == [[1, 2]]
    assert "stopped" not in done.stderr


def test_ranks_name_their_recordings_and_restarts_get_a_number(tmp_path):
    code = """
import os, subprocess, sys
for rank, size in (10, 1), (2, 2), (10, 3):
    subprocess.run([sys.executable, "-c", f"import torch; torch.empty({size})"], env={**os.environ, "RANK": str(rank)})
"""
    done = python(tmp_path, code)
    assert {name: sizes(t) for name, t in recordings(tmp_path).items()} == {
        "rank10": [1],
        "rank2": [2],
        "rank10-2": [3],
    }
    assert [line.split()[0] for line in done.stderr.splitlines()[2:]] == ["rank2", "rank10", "rank10-2"]
    assert [line.split()[2] for line in done.stderr.splitlines()[2:]] == ["2", "10", "10"]


def test_who_does_not_use_cuda_leaves_no_trace(tmp_path):
    done = python(tmp_path, "import torch\nprint(torch.cuda.is_available())")
    assert done.stdout == "True\n"
    assert not (tmp_path / "out").exists()
    assert done.stderr == ("fragscope: no process of it allocated CUDA memory through torch; nothing was recorded\n")


def test_who_only_initialises_cuda_leaves_no_recording(tmp_path):
    done = python(tmp_path, "import torch\ntorch.cuda.init()")
    assert recordings(tmp_path) == {}
    assert "stopped" not in done.stderr


@pytest.mark.parametrize(
    ("first_use", "device"),
    [
        ("torch.cuda.init()", 0),
        ("torch.cuda.set_device(2)", 2),
        ("torch.accelerator.set_device_index(3)", 3),
        ("torch.cuda.device(1).__enter__()", 1),
        ("from torch.cuda.memory import mem_get_info; mem_get_info()", 0),
        ("from torch.cuda import set_device; set_device(2)", 2),
    ],
)
def test_the_device_that_the_first_use_chooses_is_recorded_from_the_first_byte(tmp_path, first_use, device):
    python(
        tmp_path, f"import torch\n{first_use}\ntorch.empty(5)\nassert not hasattr(torch.cuda._lazy_init, '__wrapped__')"
    )
    ((_, trace),) = recordings(tmp_path).items()
    assert (trace.device, sizes(trace)) == (device, [5])


def test_every_device_of_a_process_has_a_recording(tmp_path):
    python(tmp_path, "import torch\ntorch.empty(5)\ntorch.empty(6, 'cuda:3')", RANK="0")
    assert {name: (t.device, sizes(t)) for name, t in recordings(tmp_path).items()} == {
        "rank0-cuda0": (0, [5]),
        "rank0-cuda3": (3, [6]),
    }


def test_a_device_that_nobody_chose_is_recorded_too(tmp_path):
    done = python(tmp_path, "import torch\ntorch.empty(6, 'cuda:3')", RANK="0")
    assert {name: (t.device, sizes(t)) for name, t in recordings(tmp_path).items()} == {"rank0": (3, [6])}
    assert done.stderr.splitlines()[-1].split()[-2] == "yes"


def test_recording_itself_does_not_count_as_the_program_looking_at_memory(tmp_path):
    python(tmp_path, "import torch\ntorch.empty(6, 'cuda:3')\ntorch.empty(5)")
    assert [t.count(RequestKind.OBSERVATION) for t in recordings(tmp_path).values()] == [0, 0]


def test_options_reach_the_recorder(tmp_path):
    options = ("--stacks", "python", "--max-entries", "77", "--non-torch", "0.5")
    record(tmp_path, sys.executable, "-c", "import torch; torch.empty(5)", options=options)
    ((_, trace),) = recordings(tmp_path).items()
    assert json.loads(trace.provenance["options"]) == {
        "device": 0, "stacks": "python", "max_entries": 77, "sample_non_torch": 0.5,
    }  # fmt: skip
    assert len(trace.stacks) == 1


@pytest.mark.parametrize("end", ["", "; import os; os._exit(0)"])
def test_stacks_can_be_left_out(tmp_path, end):
    options = ("--stacks", "python", "--strip-stacks")
    record(tmp_path, sys.executable, "-c", f"import torch; torch.empty(5){end}", options=options)
    ((_, trace),) = recordings(tmp_path).items()
    assert not any(trace.stacks)
    assert set(trace.requests.stack) == {-1}


def test_the_command_line_is_kept_without_secrets(tmp_path):
    record(tmp_path, sys.executable, "-c", "import torch; torch.empty(5)", "--token", "hunter2", "--lr", "0.1")
    ((_, trace),) = recordings(tmp_path).items()
    assert trace.provenance["command"].endswith("--token *** --lr 0.1")
    assert "hunter2" not in "".join(trace.provenance.values())


def test_the_users_own_sitecustomize_runs(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("print('own'); here = __file__")
    code = "import sitecustomize, sys; print(sitecustomize.here); print([p for p in sys.path if 'bootstrap' in p])"
    path = os.pathsep.join((str(ROOT), str(tmp_path / "own")))
    done = record(tmp_path, sys.executable, "-c", code, PYTHONPATH=f"{path}{os.pathsep}{STAND_IN}")
    # The first line is from the process that records, which has the same PYTHONPATH.
    assert done.stdout.splitlines() == ["own", "own", str(tmp_path / "own" / "sitecustomize.py"), "[]"]


def test_an_interpreter_without_fragscope_runs_undisturbed(tmp_path):
    code = """
import os, subprocess, sys
path = [p for p in os.environ["PYTHONPATH"].split(os.pathsep) if p != sys.argv[1]]
done = subprocess.run(
    [sys._base_executable, "-c", "import torch; torch.empty(5); print('ran')"],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True)
print(done.stdout, done.stderr, done.returncode)
"""
    done = record(tmp_path, sys.executable, "-c", code, str(ROOT))
    assert done.stdout.split() == ["ran", "0"]
    (line,) = done.stderr.splitlines()
    assert line.startswith("fragscope: recording of pid ")
    assert "stopped: fragscope is not installed for /" in line


@pytest.mark.parametrize("option", ["-I", "-E", "-S"])
def test_where_python_is_told_not_to_load_it_that_is_said(tmp_path, option):
    done = record(tmp_path, sys.executable, option, "-c", "print('ran')")
    assert (done.returncode, done.stdout) == (0, "ran\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("fragscope: no process of it loaded the recorder: ")


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("start:the driver is too old", "the driver is too old"),
        ("full", "No space left on device ({out}/pid"),
    ],
)
def test_a_recorder_that_fails_changes_nothing_and_says_one_line(tmp_path, mode, said):
    done = python(tmp_path, "import sys, torch\ntorch.empty(5)\nprint('ran')\nsys.exit(6)", STAND_IN_RECORDER=mode)
    assert (done.returncode, done.stdout) == (6, "ran\n")
    lines = [line for line in done.stderr.splitlines() if line.startswith("fragscope: recording of pid ")]
    (line,) = lines
    assert said.format(out=tmp_path / "out") in line
    assert "Traceback" not in done.stderr


def test_what_is_on_disk_when_a_recorder_fails_is_kept(tmp_path):
    done = python(tmp_path, "import torch\ntorch.empty(5)", STAND_IN_RECORDER="full")
    ((name, trace),) = recordings(tmp_path).items()
    assert sizes(trace) == [5]
    assert done.stderr.splitlines()[-1].endswith(f"what there is until then is in {tmp_path / 'out' / name}.fscope")


def test_a_folder_that_cannot_be_made_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    options = ("--out", str(tmp_path / "file" / "out"))
    done = record(tmp_path, sys.executable, "-c", "import sys, torch; torch.empty(5); sys.exit(6)", options=options)
    assert done.returncode == 6
    (line,) = done.stderr.splitlines()
    assert "stopped: Not a directory" in line


def test_without_room_for_temporary_files_the_program_runs(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    program = (sys.executable, "-c", "print('ran'); raise SystemExit(6)")
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        f"import sys, tempfile\ntempfile.tempdir = {nowhere!r}\nsys.path.insert(0, {str(STAND_IN)!r})\nimport record\n"
    )
    done = subprocess.run(
        (sys.executable, str(launcher), "record", "--out", "out", "--", *program),
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (6, "ran\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("fragscope: nothing was recorded: no temporary folder: ")


def test_an_earlier_recording_is_not_lost(tmp_path):
    program = (sys.executable, "-c", "import torch; torch.empty(5); print('ran')")
    record(tmp_path, *program, RANK="0")
    before = (tmp_path / "out" / "rank0.fscope").read_bytes()
    refused = record(tmp_path, *program, RANK="1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "rank0" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert (tmp_path / "out" / "rank0.fscope").read_bytes() == before
    missing = record(tmp_path, "no-such-command", options=("--overwrite",))
    assert missing.returncode == 127
    assert (tmp_path / "out" / "rank0.fscope").read_bytes() == before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert record(tmp_path, *program, options=("--overwrite",), RANK="1").returncode == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["notes.txt", "rank1.fscope"]


def test_what_cannot_be_started_has_a_shells_exit_code(tmp_path):
    done = record(tmp_path, "no-such-command")
    assert (done.returncode, done.stderr) == (127, "fragscope: no-such-command: no such command\n")
    (tmp_path / "data").write_text("")
    done = record(tmp_path, str(tmp_path / "data"))
    assert (done.returncode, done.stderr) == (126, f"fragscope: {tmp_path / 'data'}: permission denied\n")
    assert record(tmp_path).returncode == 2


def test_the_summary_is_json(tmp_path):
    file = tmp_path / "summary.json"
    done = record(
        tmp_path, sys.executable, "-c", "import torch; torch.empty(5); raise SystemExit(3)",
        options=("--summary", str(file)), RANK="4",
    )  # fmt: skip
    assert done.stdout == ""
    value = json.loads(file.read_text())
    (process,) = value["processes"]
    assert (value["schema_version"], value["exit_code"]) == (1, 3)
    assert (process["name"], process["rank"], process["events"], process["complete"]) == ("rank4", 4, 1, True)
    assert process["peak"] == {"requested": 5, "reserved": None, "non_torch": None, "hbm": None}
    assert process["path"] == str(tmp_path / "out" / "rank4.fscope")


def test_a_summary_that_cannot_be_written_is_said_before_or_after(tmp_path):
    done = record(tmp_path, "true", options=("--summary", str(tmp_path / "no" / "file")))
    assert (done.returncode, "the folder is not there" in done.stderr) == (2, True)
    done = record(tmp_path, "sh", "-c", "exit 5", options=("--summary", "/dev/full"))
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1] == "fragscope: --summary /dev/full: no space left on device"


def test_a_worker_that_outlives_the_command_a_little_is_waited_for(tmp_path):
    code = """
import os, torch
told, tell = os.pipe()
reader, writer = os.pipe()
if os.fork() == 0:
    torch.empty(6)
    os.close(writer)
    os.write(tell, b"x")
    os.read(reader, 1)  # returns when the parent has ended
    torch.empty(7)
    raise SystemExit
os.read(told, 1)
"""
    done = python(tmp_path, code)
    assert all_sizes(tmp_path) == [[6, 7]]
    assert done.stderr.splitlines()[-1].split()[-2] == "yes"


def running(folder: Path, code: str, **more: Any) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(code)
    command = (*RECORD, "--out", str(folder / "out"), "--", sys.executable, "-u", str(folder / "program.py"))
    return subprocess.Popen(command, cwd=folder, env=environment(), text=True, **more)


COUNTING = """
import os, signal, sys, torch
torch.empty(5)
counts = {}
def handle(number, frame):
    counts[number] = counts.get(number, 0) + 1
    print("got", number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, handle)
print("ready")
while signal.SIGTERM not in counts:
    signal.pause()
print(sorted(counts.items()))
sys.exit(21)
"""


def test_signals_for_the_command_reach_it_once(tmp_path):
    process = running(tmp_path, COUNTING, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        assert process.stdout.readline() == f"got {int(number)}\n"
    assert process.stdout.read() == f"{[(1, 1), (2, 1), (10, 1), (15, 1)]}\n"
    process.communicate(timeout=60)
    assert process.returncode == 21
    assert all_sizes(tmp_path) == [[5]]


def test_a_signal_that_ends_the_program_ends_the_command_with_its_code(tmp_path):
    code = "import torch\ntorch.empty(5)\nprint('ready')\nimport signal\nsignal.pause()"
    process = running(tmp_path, code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert all_sizes(tmp_path) == [[5]]


def test_ctrl_c_in_a_terminal_reaches_the_program_once(tmp_path):
    parent, terminal = os.openpty()
    (tmp_path / "program.py").write_text(COUNTING)
    program = (*RECORD, "--out", str(tmp_path / "out"), "--", sys.executable, "-u", str(tmp_path / "program.py"))
    in_terminal = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        (sys.executable, "-c", in_terminal, *program),
        stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True,
    )  # fmt: skip
    os.close(terminal)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.write(parent, b"\x03")
    assert process.stdout.readline() == f"got {int(signal.SIGINT)}\n"
    process.terminate()  # passed on after a second SIGINT would have been
    assert process.stdout.read() == f"got {int(signal.SIGTERM)}\n{[(2, 1), (15, 1)]}\n"
    process.communicate(timeout=60)
    os.close(parent)
    assert process.returncode == 21
    assert all_sizes(tmp_path) == [[5]]


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    code = "from signal import *; print(getsignal(SIGINT) == SIG_IGN, getsignal(SIGTERM) == SIG_DFL)"
    command = (*RECORD, "--out", str(tmp_path / "out"), "--", sys.executable, "-c", code)
    done = subprocess.run(
        ("sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command),
        env=environment(), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "True True\n"


@pytest.mark.torch
def test_real_torch_under_real_torchrun_is_recorded_by_rank(tmp_path):
    """The hook on the installed torch: its own initialisation runs, with a driver that says it has two devices."""
    code = """
import os, torch

calls = {"_cuda_getDeviceCount": lambda: 2, "_cuda_init": lambda: None, "_cuda_getDevice": lambda: 1}
for name, call in calls.items():
    setattr(torch._C, name, call)
torch.cuda._cudart = object()
torch.cuda._queued_calls.clear()  # they ask for what devices can do
torch.cuda._listeners = []
torch.cuda.device_count, torch.cuda.memory_stats = (lambda: 2), (lambda i: {"allocated_bytes.all.peak": i})
torch.distributed.init_process_group("gloo")
assert hasattr(torch.cuda._lazy_init, "__wrapped__")
torch.cuda.init()
assert torch.cuda.is_initialized()
assert not hasattr(torch.cuda._lazy_init, "__wrapped__")
total = torch.tensor([int(os.environ["RANK"]) + 1])
torch.distributed.all_reduce(total)
for listener in torch.cuda._listeners:
    listener(1, 100 + int(os.environ["RANK"]) + int(total))
torch.distributed.destroy_process_group()
"""
    (tmp_path / "program.py").write_text(code)
    # The recorder and the reader stand in, torch does not.
    only = tmp_path / "only"
    only.mkdir()
    for name in ("stand_in_recorder.py", "record.py"):
        (only / name).write_bytes((STAND_IN / name).read_bytes())
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py")
    done = record(tmp_path, *torchrun, PYTHONPATH=f"{ROOT}{os.pathsep}{only}")
    assert done.returncode == 0, done.stderr
    assert {name: sizes(trace) for name, trace in recordings(tmp_path).items()} == {"rank0": [103], "rank1": [104]}
    assert {trace.provenance["world_size"] for trace in recordings(tmp_path).values()} == {"2"}
