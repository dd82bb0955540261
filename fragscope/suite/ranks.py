"""A function in several real processes, as the ranks of one job: who hangs and where, or who failed and how.

    def work(rank: fragscope.Rank) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=rank.rendezvous, rank=rank.number, world_size=rank.ranks
        )
        ...

    fragscope.run_ranks(work, 4)

Ranks are forked from the calling process, so that they start in milliseconds and the function need not be found again
by name. They see no virtual card, and must not use CUDA. Whatever happens, none of them outlives the call, nor
does what they started, unless that left for a process group of its own.

A rank computes with one thread. The threads with which the caller computed do not survive the fork, and OpenMP would
wait for them for ever; so a rank must not ask for more by ``torch.set_num_threads``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fragscope.errors import UsageError, printable
from fragscope.suite.process import end_with_parent, is_users
from fragscope.suite.scenario import EndCase
from fragscope.suite.stillness import StillnessWatch, family

MOST_RANKS = 64
_LOOK_EVERY = 0.05  # seconds
_START_WITHIN = 60.0  # seconds until all ranks stand at their start
_DUMP_WITHIN = 5.0  # seconds for a rank to say where it is
_STACKS = signal.SIGUSR1
_FAILED = 1


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a job, as its function sees it.

    Attributes:
        number: its rank, from 0 on.
        ranks: how many there are.
        rendezvous: ``init_method`` for ``torch.distributed.init_process_group``; a file, so that no port is taken.
    """

    number: int
    ranks: int
    rendezvous: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """Where a rank waits: the innermost line of the user's code, and its function; ``""`` where it is in none."""

    rank: int
    place: str
    function: str


class RanksHungError(EndCase):
    """The ranks wait for each other. Ends a case as ``timeout``.

    Attributes:
        waiting: those that had not ended.
    """

    def __init__(self, message: str, waiting: tuple[Waiting, ...]) -> None:
        super().__init__("timeout", message)
        self.waiting = waiting


class RankFailedError(EndCase):
    """A rank raised an error or was killed. Ends a case as ``crash``.

    Attributes:
        rank: the first that failed.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__("crash", message)
        self.rank = rank


def run_ranks(work: Callable[[Rank], None], ranks: int, *, quiet: float = 3.0, timeout: float = 120.0) -> None:
    """Run a function in that many processes, and wait for all of them.

    Args:
        work: what each rank does; it gets its ``Rank``.
        ranks: how many.
        quiet: a hang is told once every rank that has not ended sleeps, with the processes it started, and none was
            woken for so many seconds. That does not depend on how loaded the machine is. What makes all of them sleep
            for longer without being a hang needs more: a ``sleep``, their own or of a process they started, and waits
            for other machines, such as downloads. A process they started that keeps waking up keeps a hang from being
            told before ``timeout``. Where there is no ``/proc`` (macOS) ``timeout`` alone tells.
        timeout: seconds, from when all ranks stand at their start, after which ranks that still run count as hanging.

    Raises:
        RanksHungError: ranks wait for each other; the message names them and where each waits.
        RankFailedError: one failed; the message has its error or signal, its last words and the place. Of several it
            names the first, for those that lose a peer fail, too. ``sys.exit()`` with nothing or 0 is no failure.
        UsageError: the numbers are none that can be.
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise UsageError(f"run_ranks: {ranks} ranks; 1 to {MOST_RANKS} can be run")
    if not quiet > 0 or not timeout > 0:
        raise UsageError(f"run_ranks: quiet is {quiet:g} s and timeout {timeout:g} s; both are more than 0")
    with tempfile.TemporaryDirectory(prefix="fragscope-ranks-") as folder:
        job = _Job(Path(folder), ranks)
        try:
            job.start(work)
            job.watch(quiet, timeout)
        finally:
            job.end()


class _Job:
    """The processes of one call.

    Attributes:
        ended: exit code of each rank that has ended, negative for a signal, in the order in which that was seen.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder = folder
        self._ranks = ranks
        self._pids: dict[int, int] = {}  # rank -> process, of those that have not ended
        self._keeper: int | None = None  # a process that leads the group of all ranks and what they start
        self.ended: dict[int, int] = {}

    # --- running ------------------------------------------------------------------------------------------------------

    def start(self, work: Callable[[Rank], None]) -> None:
        """Fork all ranks, and let them go once all stand at their start."""
        caller = os.getpid()
        self._keeper = _fork()
        if self._keeper == 0:
            _be_keeper(caller)
        os.setpgid(self._keeper, self._keeper)
        ready, is_ready = os.pipe()
        go, says_go = os.pipe()
        try:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()  # else every rank would say it again
            for number in range(self._ranks):
                pid = _fork()
                if pid == 0:
                    for end in (ready, says_go):
                        os.close(end)
                    _be_rank(
                        work, Rank(number, self._ranks, f"file://{self._folder}/store"), self._folder, is_ready, go
                    )
                self._pids[number] = pid
                os.setpgid(pid, self._keeper)  # what it starts will be in it, too; it starts nothing before all stand
            self._await_start(ready)
        finally:
            for end in (ready, is_ready, go, says_go):
                os.close(end)

    def _await_start(self, ready: int) -> None:
        os.set_blocking(ready, False)
        deadline = time.monotonic() + _START_WITHIN
        standing = 0
        while standing < self._ranks:
            with contextlib.suppress(BlockingIOError):
                standing += len(os.read(ready, self._ranks))
            self._collect()
            self._refuse_failures()
            if time.monotonic() > deadline:
                raise RanksHungError(f"only {standing} of {self._ranks} ranks started within {_START_WITHIN:g} s", ())
            time.sleep(0.001)

    def watch(self, quiet: float, timeout: float) -> None:
        """Until all have ended, one has failed, or those that are left hang."""
        began = time.monotonic()
        rest = StillnessWatch(quiet)
        while True:
            self._collect()
            self._refuse_failures()
            if not self._pids:
                return
            now = time.monotonic()
            if rest.look(now, [member for pid in self._pids.values() for member in family(pid)]):
                self._hung("hang")
            if now - began > timeout:
                self._hung(f"had not ended after {timeout:g} s")
            time.sleep(_LOOK_EVERY)

    def _collect(self) -> None:
        for number, pid in tuple(self._pids.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._pids[number]
                self.ended[number] = os.waitstatus_to_exitcode(status)

    def end(self) -> None:
        """Kill what is left, and leave no zombie."""
        if self._keeper is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._keeper, signal.SIGKILL)  # while the keeper is not waited for, this number is nobody else's
        own = (*self._pids.values(), self._keeper)
        for pid in own:  # one may not have come to be in the group yet
            os.kill(pid, signal.SIGKILL)
        for pid in own:
            os.waitpid(pid, 0)
        self._pids.clear()
        self._keeper = None

    # --- telling ------------------------------------------------------------------------------------------------------

    def _refuse_failures(self) -> None:
        failed = {number: code for number, code in self.ended.items() if code}
        if not failed:
            return
        # Those that lose a peer fail, too, by an error or a signal.
        first = min(failed, key=lambda number: (_failed_at(self._folder, number), failed[number] < 0, number))
        code = failed[first]
        how = f"was ended by {_signal(code)}" if code < 0 else f"ended with code {code}"
        words = _error_of(self._folder, first) or _last_words(self._folder, first)
        told = f"rank {first} of {self._ranks} {how}" + (f": {words}" if words else "")
        raise RankFailedError(told, first)

    def _hung(self, what: str) -> NoReturn:
        waiting = tuple(self._where(number, pid) for number, pid in self._pids.items())
        places: dict[str, list[int]] = defaultdict(list)
        for w in waiting:
            function = f" in {w.function}" if w.function else ""
            places[f"{w.place}{function}" if w.place else "outside any code of theirs"].append(w.rank)
        told = "; ".join(f"{_listed(numbers)} at {place}" for place, numbers in places.items())
        others = f"; {_listed(list(self.ended))} ended" if self.ended else ""
        raise RanksHungError(f"{len(waiting)} of {self._ranks} ranks {what}: {told}{others}", waiting)

    def _where(self, number: int, pid: int) -> Waiting:
        """Ask a rank for its stacks, which it writes whatever it is doing."""
        file = self._folder / f"stacks-{number}"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, _STACKS)
        deadline, text = time.monotonic() + _DUMP_WITHIN, ""
        while time.monotonic() < deadline:
            time.sleep(0.02)
            again = file.read_text(errors="replace")
            if again and again == text:
                break
            text = again
        place, function = _innermost(text)
        return Waiting(number, place, function)


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)))
    return f"rank{'s' * (len(numbers) > 1)} {shown}"


def _signal(code: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


_STACK_LINE = re.compile(r'  File "(.+)", line (\d+) in (.+)')


def _innermost(text: str) -> tuple[str, str]:
    """``file:line`` and function of the innermost of the user's frames in what ``faulthandler`` wrote."""
    frames: list[tuple[str, str]] = []
    for line in text.splitlines():
        found = _STACK_LINE.fullmatch(line)
        if found is None:
            frames = []  # of another thread
        elif found[1] == __file__:  # this thread called the function
            return frames[0] if frames else ("", "")
        elif is_users(found[1]):
            frames.append((f"{_shown(found[1])}:{found[2]}", found[3]))
    return "", ""


def _shown(file: str) -> str:
    with contextlib.suppress(ValueError, OSError):
        return str(Path(file).relative_to(Path.cwd()))
    return file


# --- in processes of the job ------------------------------------------------------------------------------------------


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of threads, which ranks leave alone
        return os.fork()


def _be_keeper(caller: int) -> NoReturn:
    """Hold the process group, and end it should the caller be killed: ranks would end, what they started would not."""
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        os.setpgid(0, 0)  # as the caller does, whoever comes first
        end_with_parent(signal.SIGTERM)
        if os.getppid() == caller:
            signal.sigwait({signal.SIGTERM})
        os.killpg(0, signal.SIGKILL)
    finally:
        os._exit(_FAILED)


def _be_rank(work: Callable[[Rank], None], rank: Rank, folder: Path, is_ready: int, go: int) -> NoReturn:
    """All that a forked process does."""
    code = _FAILED
    try:
        _settle(rank, folder)
        os.write(is_ready, b".")
        os.close(is_ready)
        os.read(go, 1)  # returns when the parent closes its end
        work(rank)
        code = 0
    except BaseException as e:
        code = _exit_code(e)
        if code:
            _note_error(folder, rank.number, e)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)  # nothing of the parent's is torn down here


def _exit_code(error: BaseException) -> int:
    """With what a process ends by an error; an integer of which nothing is left in eight bits is still a failure."""
    if not isinstance(error, SystemExit):
        return _FAILED
    if error.code is None:
        return 0
    if not isinstance(error.code, int):
        return _FAILED
    return (error.code & 0xFF or _FAILED) if error.code else 0


def _settle(rank: Rank, folder: Path) -> None:
    """Be a plain process: no virtual card, output to a file, stacks on request, gone with the parent."""
    import torch  # noqa: PLC0415 - takes seconds

    from fragscope.record.virtual.device import VirtualDevice  # noqa: PLC0415 - imports torch

    parent = os.getppid()
    end_with_parent()
    if os.getppid() != parent:
        os._exit(_FAILED)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(folder / f"log-{rank.number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for given, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(given, standard)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
    fault, stacks = ((folder / f"{what}-{rank.number}").open("w") for what in ("fault", "stacks"))
    faulthandler.enable(fault)
    faulthandler.register(_STACKS, file=stacks, all_threads=True)
    _kept.extend((fault, stacks))
    torch.set_num_threads(1)  # of libgomp's pool only the memory was forked
    VirtualDevice.leave_active()
    gc.enable()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks for the address of the host's name


_kept: list[object] = []
"""What has to stay open in a rank."""


def _note_error(folder: Path, number: int, error: BaseException) -> None:
    with contextlib.suppress(Exception):
        traceback.print_exception(error)
        frames = reversed(traceback.extract_tb(error.__traceback__))
        place = next((f" (at {_shown(f.filename)}:{f.lineno}, {f.name})" for f in frames if is_users(f.filename)), "")
        text = printable(f"{type(error).__name__}: {error}".removesuffix(": "), 400) + place
        (folder / f"error-{number}").write_text(text)


def _error_of(folder: Path, number: int) -> str:
    """With what error a rank failed; ``""`` where it did not say."""
    with contextlib.suppress(OSError):
        return (folder / f"error-{number}").read_text()
    return ""


def _failed_at(folder: Path, number: int) -> int:
    """When a rank failed, in ns: when it had written its error, or the stacks at which it aborted or faulted.

    Both are times of files, of one clock. What leaves neither was ended from outside (``SIGKILL``) or left at once
    (``os._exit``), which losing a peer does not do: it counts as the first.
    """
    for name in (f"error-{number}", f"fault-{number}"):
        with contextlib.suppress(OSError):
            written = (folder / name).stat()
            if written.st_size:
                return written.st_mtime_ns
    return 0


def _last_words(folder: Path, number: int) -> str:
    with contextlib.suppress(OSError):
        log = (folder / f"log-{number}").read_text(errors="replace")
        said = [line for line in _FAULT.split(log)[0].splitlines() if line.strip()]
        return printable(said[-1].strip(), 200) if said else ""
    return ""


_FAULT = re.compile(r"^Fatal Python error: ", re.MULTILINE)
