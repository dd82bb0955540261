"""A recorded command from its first to its last moment: told, run, collected, packed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fragscope.errors import InputFileError, UsageError, printable
from fragscope.record.launch.command import CommandError, RunningCommand
from fragscope.record.launch.packing import pack
from fragscope.record.launch.process import reason
from fragscope.record.launch.redact import redact
from fragscope.record.launch.session_folder import VARIABLE, Plan, Status, statuses, was_loaded, write_plan
from fragscope.trace.rank_set import Member, members, process_of

RECORDER = "fragscope.record.cuda"
_BOOTSTRAP = Path(__file__).parent / "bootstrap"
_PATIENCE = 10.0  # seconds for recorded processes that outlive the command, to end and pack what they have
_LOOK_EVERY = 0.05


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How a command's processes are recorded.

    Attributes:
        out: folder for recordings, made when the first process uses CUDA.
        stacks: ``none``, ``python`` or ``all``.
        strip_stacks: leave call stacks out of what is kept.
        non_torch: seconds between samples of device memory outside the caching allocator; None: not sampled.
        max_entries: entries of PyTorch's history; None: the recorder's default.
        overwrite: whether recordings that are in the folder already may go.
        recorder: module with ``Recorder``, ``RecorderOptions`` and ``Stacks``.
    """

    out: Path
    stacks: str = "none"
    strip_stacks: bool = False
    non_torch: float | None = None
    max_entries: int | None = None
    overwrite: bool = False
    recorder: str = RECORDER


@dataclass(frozen=True, slots=True)
class RecordedProcess:
    """A recording that the command left.

    Attributes:
        name: ``rank3`` or ``pid1234``.
        path: its file, or its folder of chunks where it could not be packed.
        pid: the process, None where it could not say.
        complete: whether the process itself ended its recording; it did not where it was killed.
    """

    name: str
    path: Path
    pid: int | None
    complete: bool


@dataclass(frozen=True, slots=True)
class Launched:
    """What came of a command.

    Attributes:
        exit_code: the command's own; 128 + n where signal n ended it, 127 and 126 where it could not be started.
        processes: its recordings, ranks first.
        notes: what could not be recorded or kept, one line each.
    """

    exit_code: int
    processes: tuple[RecordedProcess, ...]
    notes: tuple[str, ...]


def launch(command: Sequence[str], options: LaunchOptions) -> Launched:
    """Run a command and record every process of it that uses CUDA.

    Args:
        command: program and arguments.
        options: how to record.

    Raises:
        UsageError: the folder holds recordings already; nothing was run.
    """
    earlier = _earlier(options.out)
    if earlier and not options.overwrite:
        raise UsageError(
            f"--out {options.out}: holds a recording already ({earlier[0].name}"
            f"{f' and {len(earlier) - 1} more' if earlier[1:] else ''}); "
            "name another folder, or replace what is there with --overwrite"
        )
    with _session() as (session, no_session):
        environment, trouble = dict(os.environ), no_session
        environment.pop(VARIABLE, None)  # a command that is recorded may itself record
        if session is not None:
            plan = Plan(
                out=str(options.out.absolute()),
                recorder=options.recorder,
                stacks=options.stacks,
                strip_stacks=options.strip_stacks,
                non_torch=options.non_torch,
                max_entries=options.max_entries,
                command=redact(command),
            )
            trouble = _offer(session, plan, environment)
        try:
            running = RunningCommand(tuple(command), environment)
        except CommandError as e:
            return Launched(e.exit_code, (), (str(e),))
        # Only now, since the command does run; before any process of it can have come as far as recording.
        notes = [trouble] if trouble else _removed(earlier)
        exit_code = running.wait()
        if session is None or trouble:
            return Launched(exit_code, (), tuple(notes))
        return _collected(session, options, exit_code, notes)


def _earlier(out: Path) -> tuple[Member, ...]:
    try:
        return members(out)
    except InputFileError:  # not there yet, or not to be used: the processes will say what is wrong
        return ()


def _removed(earlier: Sequence[Member]) -> list[str]:
    """Remove earlier recordings; what cannot be removed stays, since new ones take other names."""
    notes = []
    for member in earlier:
        try:
            shutil.rmtree(member.path) if member.path.is_dir() else member.path.unlink()
        except OSError as e:
            notes.append(f"{member.name} of an earlier command stays: {reason(e)}")
    return notes


@contextlib.contextmanager
def _session() -> Iterator[tuple[Path | None, str]]:
    """A temporary folder for what the processes say, or None and why there is none."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="fragscope-"))
    except OSError as e:
        yield None, f"nothing was recorded: no temporary folder: {reason(e)}"
        return
    try:
        yield folder, ""
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _offer(session: Path, plan: Plan, environment: dict[str, str]) -> str:
    """Make the command's processes find the plan; returns what prevented that, or nothing."""
    try:
        write_plan(session, plan)
    except OSError as e:
        return f"nothing was recorded: {reason(e)}"
    environment[VARIABLE] = str(session)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{_BOOTSTRAP}{os.pathsep}{inherited}" if inherited else str(_BOOTSTRAP)
    return ""


def _collected(session: Path, options: LaunchOptions, exit_code: int, notes: list[str]) -> Launched:
    """What the processes said and left."""
    try:
        said = _ended(session)
        found = _recordings(options, said, notes)
    except KeyboardInterrupt:
        notes.append(f"interrupted while packing; what was recorded is in {options.out}")
        said, found = statuses(session), ()
    for status in said:
        if status.state == "failed":
            kept = [str(p.path) for p in found if process_of(p.name) == status.name]
            notes.append(
                f"recording of pid {status.pid} stopped: {printable(status.reason)}"
                + (f"; what there is until then is in {printable(', '.join(kept))}" if kept else "")
            )
    if not was_loaded(session):
        notes.append(
            "no process of it loaded the recorder: its Python was started with -I, -E or -S or with another "
            "PYTHONPATH, or it is no Python program"
        )
    elif all(s.state == "unused" for s in said):
        notes.append("no process of it allocated CUDA memory through torch; nothing was recorded")
    return Launched(exit_code, found, tuple(notes))


def _ended(session: Path) -> list[Status]:
    """What the processes said, once those that outlive the command a little have ended too."""
    until = time.monotonic() + _PATIENCE
    while True:
        said = statuses(session)
        if time.monotonic() > until or not any(s.state == "recording" and _is_alive(s.pid) for s in said):
            return said
        time.sleep(_LOOK_EVERY)


def _is_alive(pid: int) -> bool:
    """Whether the process runs; what has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in (b"Z", b"X")


def _recordings(options: LaunchOptions, said: Sequence[Status], notes: list[str]) -> tuple[RecordedProcess, ...]:
    """All recordings of the command; those that killed processes left are packed."""
    by_name = {s.name: s for s in said if s.name}
    for member in _earlier(options.out):
        status = by_name.get(member.name)
        if not member.path.is_dir():
            continue
        if status is not None and status.state == "recording" and _is_alive(status.pid):
            notes.append(f"{member.name}: pid {status.pid} still runs, and goes on recording")
            continue
        try:
            pack(member.path, strip_stacks=options.strip_stacks, provenance={} if status is None else status.provenance)
        except Exception as e:  # whatever it is, the command's exit code is not ours to change
            if status is None or status.state != "failed":  # its own reason is likely the same
                notes.append(f"{member.name} stays a folder of chunks: {printable(reason(e))}")
    out = []
    for member in _earlier(options.out):
        status = by_name.get(process_of(member.name))
        if status is None or status.state != "recording" or not _is_alive(status.pid):
            complete = status is not None and status.state == "done"
            out.append(RecordedProcess(member.name, member.path, None if status is None else status.pid, complete))
    return tuple(out)
