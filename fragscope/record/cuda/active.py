"""Which recorder is active in this process, and the phases that a program marks on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fragscope.errors import UsageError

if TYPE_CHECKING:
    from fragscope.record.cuda.recorder import Recorder

# The recorder, and the process it belongs to: a forked child has none.
_active: dict[str, tuple[int, Recorder]] = {}


def recorder() -> Recorder | None:
    """The recorder that is recording in this process, if any."""
    pid, found = _active.get("now", (0, None))
    return found if pid == os.getpid() else None


def enter(entered: Recorder) -> None:
    """A recorder begins; one that gives way ends.

    Raises:
        UsageError: another one is recording.
    """
    present = recorder()
    if present is not None and present.options.gives_way:
        present.give_way()
        present = None
    if present is not None:
        raise UsageError("another recorder is recording in this process; one at a time sees everything")
    _active["now"] = (os.getpid(), entered)


def leave(left: Recorder) -> None:
    """A recorder is done."""
    if recorder() is left:
        del _active["now"]


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark a phase of the program: figures are given for it, and for the whole.

    Does nothing where nothing is being recorded, so that it can stay in a program.

    Args:
        name: what the phase is called in reports.
    """
    now = recorder()
    if now is None:
        yield
        return
    now.mark_phase(name)
    try:
        yield
    finally:
        if recorder() is now:
            now.mark_phase(None)
