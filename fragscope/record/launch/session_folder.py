"""What the processes of a recorded command are told, and what they say became of them: small files in one folder.

The folder is a temporary one, apart from the recordings: it has to work where those cannot be written. A process looks
it up by an environment variable; once the folder is gone, the command is over and nothing is recorded any more.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

import msgspec

VARIABLE = "FRAGSCOPE_RECORD_SESSION"
_PLAN, _LOADED = "plan.json", "loaded"


class Plan(msgspec.Struct, frozen=True):
    """What a process needs to know to record itself.

    Attributes:
        out: absolute folder for recordings.
        recorder: module with ``Recorder``, ``RecorderOptions`` and ``Stacks``.
        stacks: value of ``Stacks``.
        strip_stacks: whether stacks are left out of what is kept.
        non_torch: seconds between samples of memory outside the caching allocator, None for none.
        max_entries: entries of PyTorch's history, None for the recorder's default.
        command: the whole command, redacted.
    """

    out: str
    recorder: str
    stacks: str
    strip_stacks: bool
    non_torch: float | None
    max_entries: int | None
    command: str


class Status(msgspec.Struct):
    """What became of the recording of one process.

    Attributes:
        pid: the process.
        state: ``recording`` until it is over, then ``done``, ``failed``, or ``unused`` where nothing was allocated.
        name: of the recording in the plan's folder, ``""`` where none was begun.
        rank: rank in its job, None where the environment names none.
        reason: why it failed.
        provenance: what the recording is to carry.
    """

    pid: int
    state: str = "recording"
    name: str = ""
    rank: int | None = None
    reason: str = ""
    provenance: dict[str, str] = {}


def write_plan(session: Path, plan: Plan) -> None:
    """Put the plan where processes look for it."""
    (session / _PLAN).write_bytes(msgspec.json.encode(plan))


def read_plan(session: Path) -> Plan | None:
    """The plan, or None where the command is over."""
    try:
        return msgspec.json.decode((session / _PLAN).read_bytes(), type=Plan)
    except FileNotFoundError:
        return None


def new_status_file(session: Path) -> Path:
    """Where this process may say what becomes of it; one that replaced itself by another program has a new file."""
    for number in itertools.count():
        file = session / f"{os.getpid()}-{number}.json"
        if not file.exists():
            return file
    raise AssertionError


def write_status(file: Path, status: Status) -> None:
    """Say it; where even that cannot be written, the parent finds the recording by itself."""
    with contextlib.suppress(OSError):
        temporary = file.with_suffix(".part")
        temporary.write_bytes(msgspec.json.encode(status))
        temporary.replace(file)


def statuses(session: Path) -> list[Status]:
    """What all processes said, by process number."""
    out = []
    for file in session.glob("*-*.json"):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            out.append(msgspec.json.decode(file.read_bytes(), type=Status))
    return sorted(out, key=lambda s: (s.pid, s.name))


def was_loaded(session: Path) -> bool:
    """Whether any process loaded the bootstrap."""
    return (session / _LOADED).exists()
