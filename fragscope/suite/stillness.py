"""Whether processes have come to rest: their main threads asleep, for a while, without ever being woken.

A deadlock is told from a slow run without a clock for the run itself. On a loaded machine a thread that has work to do
is ready to run, though it may wait long for a processor; one that waits for another process sleeps until that has done
its part. So where the main thread of every process of a job sleeps, none is woken for some seconds, and no other thread
works meanwhile, nothing will wake them. Other threads may look around now and then, as gloo's do a hundred times a
second: that takes next to no processor time, and they are never ready to run for long.

What a process waits for may be another one that it started: a compiler, the workers of a data loader. Those count like
itself. Two waits look like a deadlock and are none: for a time to pass, and for another machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ASLEEP = "S"  # interruptible sleep; R is ready to run, D the disk: Documentation/filesystems/proc.rst
_ENDED = "Z"  # and not asked about yet by the one that started it
_IDLE_SHARE = 0.02  # of a processor, for looking around
_IDLE_TICKS = 2  # what is measured is rounded
_WORKS_AFTER = 0.25  # seconds of being ready to run without a break


@dataclass(frozen=True, slots=True)
class Activity:
    """What a process is doing.

    Attributes:
        turns: how often its main thread was given a processor and gave it up again; None while it is not asleep.
        busy: its other threads that are not asleep.
        ticks: processor time of all its threads so far, in clock ticks.
    """

    turns: int | None
    busy: frozenset[int]
    ticks: int


def activity(pid: int, proc: Path = Path("/proc")) -> Activity | None:
    """What a process is doing; None where the system does not tell, or it has ended."""
    tasks = proc / str(pid) / "task"
    try:
        threads = {int(thread.name): _stat(thread / "stat") for thread in tasks.iterdir()}
        status = (tasks / str(pid) / "status").read_text()
        turns = [int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line]
        main, _ = threads[pid]
    except (OSError, ValueError, IndexError, KeyError):
        return None
    return Activity(
        turns=sum(turns) if main == _ASLEEP and len(turns) == 2 else None,
        busy=frozenset(t for t, (state, _) in threads.items() if t != pid and state != _ASLEEP),
        ticks=sum(ticks for _, ticks in threads.values()),
    )


def family(pid: int, proc: Path = Path("/proc")) -> list[tuple[int, Activity | None]]:
    """What a process and those that it started, and those started, are doing; without those that have ended.

    The list of children needs ``CONFIG_PROC_CHILDREN``, which distributions set; without it there are none.
    """
    found = [(pid, activity(pid, proc))]
    for children in sorted((proc / str(pid) / "task").glob("*/children")):
        with contextlib.suppress(OSError):
            started = [int(child) for child in children.read_text().split()]
            found += [member for child in started if not _has_ended(child, proc) for member in family(child, proc)]
    return found


def _has_ended(pid: int, proc: Path) -> bool:
    try:
        state, _ = _stat(proc / str(pid) / "stat")
    except (OSError, IndexError):
        return True
    return state == _ENDED


def _stat(path: Path) -> tuple[str, int]:
    """State and processor time of one thread; its name, in parentheses, may hold anything."""
    fields = path.read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])


class StillnessWatch:
    """Tells when processes came to rest.

    Args:
        quiet: seconds of rest that count.
    """

    def __init__(self, quiet: float) -> None:
        self._quiet = quiet
        self._since = 0.0
        self._turns: list[tuple[int, int | None]] = []
        self._ticks = 0
        self._busy: dict[tuple[int, int], float] = {}  # process and thread -> since when
        self._per_second = os.sysconf("SC_CLK_TCK")

    def look(self, now: float, seen: Sequence[tuple[int, Activity | None]]) -> bool:
        """Whether processes have been at rest for long enough; to be asked often.

        Args:
            now: seconds on a clock that only goes forward.
            seen: what each that has not ended is doing.
        """
        known = [(pid, a) for pid, a in seen if a is not None]
        busy = {(pid, thread) for pid, a in known for thread in a.busy}
        self._busy = {key: self._busy.get(key, now) for key in busy}
        turns = [(pid, a.turns) for pid, a in known]
        ticks = sum(a.ticks for _, a in known)
        idle = _IDLE_TICKS + _IDLE_SHARE * self._per_second * (now - self._since)
        works = any(now - since >= _WORKS_AFTER for since in self._busy.values())
        works = works or ticks - self._ticks > idle * len(known)
        asleep = len(known) == len(seen) and bool(known) and all(n is not None for _, n in turns)
        if works or not asleep or turns != self._turns:
            self._turns = turns if asleep else []
            self._since, self._ticks = now, ticks
        return asleep and now - self._since >= self._quiet
