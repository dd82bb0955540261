"""What every worker process does first and last, and where one left its traces of how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any


def report_path(out: Path, key: str) -> Path:
    """Where the worker of a task puts its report."""
    return out / "work" / f"{key}.json"


def log_path(out: Path, key: str) -> Path:
    """Where what the program prints goes."""
    return out / "logs" / f"{key}.log"


def enter(log: Path, timeout: float) -> None:
    """Make this process a worker: in a session of its own, with its output in its log, and never without its parent."""
    os.setsid()  # Ctrl-C in the terminal goes to the parent, and what the program starts can be ended with it
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The program may start processes of its own, which multiprocessing forbids to a daemon.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for given, standard in ((nothing, 0), (handle, 1), (handle, 2)):
        os.dup2(given, standard)
    os.close(nothing)
    os.close(handle)
    faulthandler.enable(2)
    # Says in the log where the program hangs, shortly before the parent stops it.
    faulthandler.dump_traceback_later(max(timeout - 1, timeout * 0.8), file=2)


_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the fork server ends, which ends with the command however that ends.

    The server ends once nobody holds its pipe; a worker is handed a copy, for servers of its own.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    end_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def end_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when the one that forked it ends; elsewhere nothing is asked."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)


def leave() -> None:
    """End at once: threads and processes that the program left running are not waited for."""
    faulthandler.cancel_dump_traceback_later()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(0)


def is_users(file: str) -> bool:
    """Whether a source file is neither torch's, nor Python's, nor ours."""
    return not file.startswith(_NOT_THE_USERS) and "/torch/" not in file


def innermost(places: Iterable[tuple[str, int]], root: Path) -> str:
    """`` (at file:line)`` of the first place that is neither torch's, nor Python's, nor ours."""
    for file, line in places:
        if is_users(file):
            return f" (at {_relative(file, root)}:{line})"
    return ""


def place_in_log(text: str, root: Path) -> str:
    """Where the program was, by the stacks that ``faulthandler`` left at the end of a log."""
    stack: list[tuple[str, int]] = []
    for line in text.splitlines():
        found = _STACK_LINE.match(line)
        if found is not None:
            stack.append((found[1], int(found[2])))
            if found[1].startswith(_SUITE):  # the thread that runs the scenario; others may follow
                break
        elif "most recent call first" in line:
            stack = []
    return innermost(stack, root)


_SUITE = f"{Path(__file__).parent}/"
_NOT_THE_USERS = ("<", f"{Path(__file__).parents[1]}/", f"{Path(os.__file__).parent}/")
_STACK_LINE = re.compile(r'  File "(.+)", line (\d+) in ')


def _relative(file: str, root: Path) -> str:
    return file[len(str(root)) + 1 :] if file.startswith(f"{root}/") else file
