"""Worker processes forked from a server that has torch loaded, so that each recording starts in milliseconds.

A recording needs a process of its own: allocator state, imported modules and crashes stay with it. Importing torch
takes longer than most recordings; the fork server imports it, and the scenario files, once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

from fragscope.errors import FragscopeError, UsageError

PRELOAD_VARIABLE = "FRAGSCOPE_PRELOAD"
PATH_VARIABLE = "FRAGSCOPE_IMPORT_PATH"
"""The import path of the process that starts the server, which Python does not hand on to it."""

_LONGEST_FOLDER = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes of a temporary folder's path in which multiprocessing's sockets fit: ``sun_path`` of unix(7) holds 107."""
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - a folder of one's own is made in the first that works


class Job:
    """One worker process.

    Attributes:
        key: what the runner knows it by.
        timed_out: it was stopped for taking too long.
        code: exit code once it has ended, negative for a signal.
    """

    def __init__(self, key: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.key = key
        self.target = target
        self.args = args
        self.process: ForkServerProcess | None = None
        self.deadline = 0.0
        self.timed_out = False
        self.code: int | None = None

    def stop(self) -> None:
        """Kill the process and what it started, and wait for its end."""
        assert self.process is not None
        _kill_session(self.process.pid)
        self.process.kill()
        self.process.join()


class WorkerServer:
    """Runs jobs, several at a time, each in a fresh process.

    Args:
        preload: scenario files to import in the server.
        jobs: how many processes at once.
        timeout: seconds a process may take.
    """

    def __init__(self, preload: Iterable[Path], jobs: int, timeout: float) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._preload = os.pathsep.join(str(p) for p in preload)
        self._jobs = jobs
        self._timeout = timeout

    @contextlib.contextmanager
    def running(self) -> Iterator[WorkerServer]:
        """Start from a fresh server, and leave none behind."""
        # One that is left from an earlier run in this process holds that run's scenario files.
        _end_server()
        with _room_for_sockets():
            self._context.set_forkserver_preload(["fragscope.suite.preload"])
            os.environ[PRELOAD_VARIABLE] = self._preload
            os.environ[PATH_VARIABLE] = os.pathsep.join(sys.path)
            try:
                yield self
            finally:
                del os.environ[PRELOAD_VARIABLE], os.environ[PATH_VARIABLE]
                self._context.set_forkserver_preload([])
                _end_server()

    def run(
        self, jobs: Sequence[Job], finished: Callable[[Job], Iterable[Job]], started: Callable[[Job], None]
    ) -> None:
        """Run all jobs, and those that ``finished`` adds, until none is left.

        What is added comes first: an interrupted run then has whole results instead of many beginnings.

        On any exception (an interrupt above all) running processes are stopped before it goes on.
        """
        waiting = list(jobs)
        running: dict[int, Job] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._jobs:
                    job = waiting.pop(0)
                    running[self._start(job)] = job
                    started(job)
                soonest = min(job.deadline for job in running.values())
                ended = wait(list(running), timeout=max(0.0, soonest - monotonic()))
                for sentinel in ended:
                    assert isinstance(sentinel, int)
                    waiting[:0] = _end(running.pop(sentinel), finished)
                for sentinel, job in list(running.items()):
                    if monotonic() >= job.deadline:
                        job.timed_out = True
                        del running[sentinel]
                        waiting[:0] = _end(job, finished)
        finally:
            for job in running.values():
                job.stop()

    def _start(self, job: Job) -> int:
        process = self._context.Process(target=job.target, args=job.args, daemon=True)
        # Every worker would import the program that started us, and run it again where it has no guard.
        ours, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            process.start()
        except (EOFError, OSError) as e:
            why = str(e) or "it ended while it imported torch and the scenario files"
            raise FragscopeError(f"cannot start a worker process: {why}") from e
        finally:
            sys.modules["__main__"] = ours
        job.process = process
        job.deadline = monotonic() + self._timeout
        return process.sentinel


@contextlib.contextmanager
def _room_for_sockets() -> Iterator[None]:
    """A temporary folder of multiprocessing's whose path is short enough for its sockets, whatever ``TMPDIR`` is.

    Raises:
        UsageError: there is none.
    """
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    usual = config.get("tempdir") or tempfile.gettempdir()
    if len(os.fsencode(usual)) <= _LONGEST_FOLDER:
        yield
        return
    for folder in _SHORT_FOLDERS:
        try:
            made = tempfile.mkdtemp(prefix="fragscope-", dir=folder)
        except OSError:
            continue
        break
    else:
        raise UsageError(
            f"the temporary folder is too long for sockets ({len(os.fsencode(usual))} bytes; {_LONGEST_FOLDER} fit), "
            f"and nothing can be written to {', '.join(_SHORT_FOLDERS)}: set TMPDIR to a folder with a shorter path"
        )
    before = config.get("tempdir")
    config["tempdir"] = made
    try:
        yield
    finally:
        config["tempdir"] = before
        shutil.rmtree(made, ignore_errors=True)


def _end(job: Job, finished: Callable[[Job], Iterable[Job]]) -> Iterable[Job]:
    assert job.process is not None
    # Also where it ended by itself: a process it started may still run, and may hold what the next one needs.
    job.stop()
    job.code = job.process.exitcode
    job.process.close()
    return finished(job)


def _kill_session(leader: int | None) -> None:
    """Kill a worker's process group; every worker leads one of its own."""
    if leader is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def _end_server() -> None:
    # Python offers no public way to end a fork server before the interpreter ends. By itself it ends only once it has
    # imported torch and the scenario files, which somebody who pressed Ctrl-C would wait for.
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGKILL)
    server._stop()
