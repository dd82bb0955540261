"""Worker processes forked from a server that has torch loaded, so that each recording starts in milliseconds.

A recording needs a process of its own: allocator state, imported modules and crashes stay with it. Importing torch takes
longer than most recordings; the fork server imports it, and the scenario files, once.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from time import monotonic
from typing import Any

PRELOAD_VARIABLE = "FRAGSCOPE_PRELOAD"


class Job:
    """One worker process.

    Attributes:
        key: what the runner knows it by.
        code: exit code once it has ended, negative for a signal; None where it was stopped for taking too long.
    """

    def __init__(self, key: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.key = key
        self.target = target
        self.args = args
        self.process: ForkServerProcess | None = None
        self.deadline = 0.0
        self.timed_out = False
        self.code: int | None = None


class WorkerServer:
    """Runs jobs, several at a time, each in a fresh process.

    Args:
        preload: scenario files to import in the server.
        jobs: how many processes at once.
        timeout: seconds a process may take.
    """

    def __init__(self, preload: Iterable[Path], jobs: int, timeout: float) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["fragscope.suite.preload"])
        os.environ[PRELOAD_VARIABLE] = os.pathsep.join(str(p) for p in preload)
        self._jobs = jobs
        self._timeout = timeout

    def run(self, jobs: Sequence[Job], finished: Callable[[Job], Iterable[Job]], started: Callable[[Job], None]) -> None:
        """Run all jobs, and those that ``finished`` adds, until none is left.

        On any exception (an interrupt above all) running processes are stopped before it goes on.
        """
        waiting = list(jobs)
        running: dict[int, Job] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._jobs:
                    job = waiting.pop(0)
                    process = self._context.Process(target=job.target, args=job.args, daemon=True)
                    process.start()
                    job.process = process
                    job.deadline = monotonic() + self._timeout
                    running[process.sentinel] = job
                    started(job)
                soonest = min(job.deadline for job in running.values())
                ended = wait(list(running), timeout=max(0.0, soonest - monotonic()))
                for sentinel in ended:
                    assert isinstance(sentinel, int)
                    waiting.extend(self._end(running.pop(sentinel), finished))
                for sentinel, job in list(running.items()):
                    if monotonic() >= job.deadline:
                        job.timed_out = True
                        assert job.process is not None
                        job.process.kill()
                        del running[sentinel]
                        waiting.extend(self._end(job, finished))
        finally:
            for job in running.values():
                assert job.process is not None
                job.process.kill()
                job.process.join()

    def _end(self, job: Job, finished: Callable[[Job], Iterable[Job]]) -> Iterable[Job]:
        assert job.process is not None
        job.process.join()
        job.code = job.process.exitcode
        job.process.close()
        return finished(job)
