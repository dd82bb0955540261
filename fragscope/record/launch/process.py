"""The recording of one process of a command, from the moment it initialised CUDA until it ends.

Whatever goes wrong here becomes a status for the command that records; the program notices nothing.
"""

from __future__ import annotations

import atexit
import importlib
import itertools
import multiprocessing.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from fragscope.errors import FragscopeError
from fragscope.record.launch.packing import pack, recorded_devices
from fragscope.record.launch.redact import redact
from fragscope.record.launch.session_folder import Plan, Status, new_status_file, read_plan, write_status
from fragscope.trace.rank_set import SUFFIX, of_device

_AFTER_ALL_OTHERS = -1_000_000  # of multiprocessing's finalizers; negative ones run after children are joined


def begin(session: Path | str) -> None:
    """Record this process from now on; at its end the recording is packed to one file.

    Args:
        session: the folder that the command's processes share.
    """
    recording = None
    file = None
    status = Status(os.getpid(), rank=_rank())
    try:
        plan = read_plan(Path(session))
        if plan is None:
            return
        file = new_status_file(Path(session))
        recording = _Recording(plan, status, file)
    except Exception as e:
        status.state, status.reason = "failed", reason(e)
    if file is not None:
        write_status(file, status)
    if recording is not None:
        atexit.register(recording.finish)
        # Processes that multiprocessing forked end without atexit.
        multiprocessing.util.Finalize(None, recording.finish, exitpriority=_AFTER_ALL_OTHERS)


def reason(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    if isinstance(error, FragscopeError):
        return str(error)
    first_line = next(iter(str(error).splitlines()), "")  # CUDA's errors go on with advice
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


class _Recording:
    """A recorder at work, and where its recording goes."""

    def __init__(self, plan: Plan, status: Status, file: Path) -> None:
        self._pid = os.getpid()
        self._plan, self._status, self._file = plan, status, file
        self._over = False
        module: Any = importlib.import_module(plan.recorder)
        self._device = int(sys.modules["torch.cuda"].current_device())
        options: dict[str, Any] = {
            "stacks": module.Stacks(plan.stacks), "device": self._device, "sample_non_torch": plan.non_torch,
        }  # fmt: skip
        if plan.max_entries is not None:
            options["max_entries"] = plan.max_entries
        self._folder = claim(Path(plan.out), f"pid{self._pid}" if status.rank is None else f"rank{status.rank}")
        status.name = self._folder.name
        status.provenance = _provenance(plan, status)
        try:
            self._recorder = module.Recorder(module.RecorderOptions(keep=self._folder, gives_way=True, **options))
            self._recorder.start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)  # nothing was recorded
            status.name = ""
            raise

    def finish(self) -> None:
        """Stop, and pack; not in a process forked from the recorded one, which inherits everything but its memory."""
        if self._over or os.getpid() != self._pid:
            return
        self._over = True
        try:
            self._status.state = "done" if self._pack() else "unused"
        except Exception as e:
            self._status.state, self._status.reason = "failed", reason(e)
        except BaseException:  # another Ctrl-C: what is on disk is packed by the command
            return
        write_status(self._file, self._status)

    def _pack(self) -> bool:
        """End the recording; returns whether there is anything in it."""
        trace, problem = None, None
        try:
            trace = self._recorder.stop(self._status.provenance)
        except FragscopeError as e:  # also where the device that was current at the start was never used
            problem = e
        found = recorded_devices(self._folder)
        # Asked only now: while a recorder is at work, reading statistics counts as the program's doing.
        if problem is not None and (self._device in found or _devices_used().difference(found)):
            raise problem
        if not found:
            shutil.rmtree(self._folder, ignore_errors=True)
            return False
        pack(self._folder, strip_stacks=self._plan.strip_stacks, provenance=self._status.provenance, opened=trace)
        return True


def _devices_used() -> set[int]:
    """Devices on which this process allocated anything."""
    cuda: Any = sys.modules["torch.cuda"]
    return {i for i in range(cuda.device_count()) if cuda.memory_stats(i).get("allocated_bytes.all.peak", 0)}


def claim(out: Path, name: str) -> Path:
    """A new folder for a recording; a name that is taken, by a restart of the same rank say, gets a number.

    Raises:
        OSError: the folder cannot be made.
    """
    out.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = out / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        # Looked for after the folder is ours: whoever had the name before wrote its files before the folder went away.
        if not folder.with_name(f"{folder.name}{SUFFIX}").exists() and not any(
            out.glob(f"{of_device(folder.name, '*')}{SUFFIX}")
        ):
            return folder
        folder.rmdir()
    raise AssertionError


def _rank() -> int | None:
    """Rank of this process in its job, as torchrun and others name it."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isascii() and rank.isdigit() else None


def _provenance(plan: Plan, status: Status) -> dict[str, str]:
    out = {"command": plan.command, "process": redact(sys.orig_argv), "pid": str(status.pid)}
    if status.rank is not None:
        out["rank"] = str(status.rank)
        out["world_size"] = os.environ.get("WORLD_SIZE", "")
    return out
