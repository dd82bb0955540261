"""Threads that the program starts while a virtual device is active see the card, too.

Torch keeps modes by thread, so each new thread enters its own. Threads of executors started earlier enter them for each
piece of work.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import thread as executor
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock


class PlainThread(threading.Thread):
    """A thread of our own, which does not see the card."""


@contextlib.contextmanager
def patched_threads(modes: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Let threads that begin to run, and work handed to executors, enter the device's modes, until the end."""
    # Every thread passes here, whatever its class overrides.
    begin = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]
    work = executor._WorkItem.run

    def bootstrap(thread: threading.Thread) -> None:
        if isinstance(thread, PlainThread):
            begin(thread)
            return
        with modes():
            begin(thread)

    def run(item: Any, *args: Any) -> Any:
        with modes():
            return work(item, *args)

    with (
        mock.patch.object(threading.Thread, "_bootstrap_inner", bootstrap),
        mock.patch.object(executor._WorkItem, "run", run),
    ):
        yield
