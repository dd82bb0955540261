"""Replaying traces under many confs: in this process, or in several that each load the traces once.

What comes out does not depend on how many processes there are.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from fragscope.allocator import Assumption, DriverCalls, TieBreak, replay, worth_compiling
from fragscope.allocator.cards import defined
from fragscope.allocator.compiling import COMPILED, INTERPRETED
from fragscope.allocator.engine.compiled import compile_now, is_compiled_before
from fragscope.errors import FragscopeError, from_plain
from fragscope.search.subject import Subject
from fragscope.search.tune import Figures, Player

_STARTING = 4.0  # seconds of work from which on more processes are worth their start

Progress = Callable[[str], None]


def play_one(subject: Subject, conf: str | None, *, compiled: bool | None = None) -> Figures:
    """What a trace does under a conf; None is its recorded one.

    Raises:
        UnmodelledError: the trace or the conf needs something that the model does not cover.
    """
    settings = subject.settings if conf is None else subject.settings.with_conf(conf)
    replayed = replay(subject.trial, settings, decisions=False, compiled=compiled)
    whole = replayed.whole
    return Figures(
        reserved=whole.peak.reserved,
        stranded=whole.peak.stranded,
        ooms=whole.ooms,
        retries=whole.retries,
        calls=whole.calls,
        exact=replayed.exact,
        assumptions=replayed.assumptions,
    )


def play_other_orders(subject: Subject, conf: str | None) -> dict[TieBreak, Figures]:
    """What a trace does under a conf if equal blocks are told apart in the ways of other releases.

    Where the answer depends on addresses that only a driver knows, this shows how much may hang on them. It is no
    bound: there are more orders than these.
    """
    settings = subject.settings
    chosen = settings.rules
    out = {}
    for order in TieBreak:
        if order != chosen.rules.tie_break:
            rules = replace(chosen, rules=replace(chosen.rules, tie_break=order))
            other = replace(subject, settings=replace(settings, rules=rules))
            out[order] = play_one(other, conf, compiled=worth_compiling(len(subject.tape.kind)))
    return out


def compile_with(say: Progress) -> None:
    """Compile the replay loop, or load what was compiled before."""
    if not is_compiled_before():
        say("compiling the replay loop, once for this version")
    compile_now()


@contextmanager
def player(
    subjects: Sequence[Subject], *, jobs: int, tries: int, say: Progress = lambda what: None
) -> Iterator[Player]:
    """Whatever replays these traces soonest.

    Args:
        subjects: the traces; where processes are started, they load them by name.
        jobs: processes at most.
        tries: confs expected.
        say: told what takes long.
    """
    events = tries * sum(len(s.tape.kind) for s in subjects)
    compiled = worth_compiling(events, jobs)
    if compiled:
        compile_with(say)
    seconds = events * (COMPILED if compiled else INTERPRETED)
    if jobs > 1 and seconds > _STARTING and all(Path(s.name).is_file() for s in subjects):
        with _Workers(subjects, compiled=compiled, jobs=jobs) as workers:
            yield workers
    else:
        yield _Here(subjects, compiled=compiled)


@dataclass(frozen=True)
class _Here:
    """Replays in this process."""

    subjects: Sequence[Subject]
    compiled: bool

    def __call__(self, confs: Sequence[str | None]) -> list[tuple[Figures, ...]]:
        return [tuple(play_one(s, conf, compiled=self.compiled) for s in self.subjects) for conf in confs]


class _Workers:
    """Replays in processes of their own, in sessions of their own: Ctrl-C reaches the parent, which ends them."""

    def __init__(self, subjects: Sequence[Subject], *, compiled: bool, jobs: int) -> None:
        self._task = {
            "cards": [asdict(card) for card in defined()],
            "subjects": [[s.name, asdict(s.given)] for s in subjects],
            "compiled": compiled,
        }
        self._jobs = jobs
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> _Workers:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            for _ in range(self._jobs):
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "fragscope.search.worker"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                    env={**os.environ, "PYTHONPATH": path},
                )  # fmt: skip
                self._processes.append(process)
                _send(process, self._task)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, confs: Sequence[str | None]) -> list[tuple[Figures, ...]]:
        out: list[tuple[Figures, ...] | None] = [None] * len(confs)
        waiting = iter(range(len(confs)))
        busy: dict[int, int] = {}  # process -> conf
        with selectors.DefaultSelector() as selector:
            for number, process in enumerate(self._processes):
                selector.register(_pipe(process.stdout), selectors.EVENT_READ, number)
                self._give(number, waiting, confs, busy)
            while busy:
                for key, _ in selector.select():
                    number = key.data
                    out[busy.pop(number)] = self._receive(number)
                    self._give(number, waiting, confs, busy)
        return [figures for figures in out if figures is not None]

    def _give(self, number: int, waiting: Iterator[int], confs: Sequence[str | None], busy: dict[int, int]) -> None:
        at = next(waiting, None)
        if at is not None:
            busy[number] = at
            _send(self._processes[number], confs[at])

    def _receive(self, number: int) -> tuple[Figures, ...]:
        process = self._processes[number]
        line = _pipe(process.stdout).readline()
        if not line.endswith(b"\n"):
            raise FragscopeError(
                f"a process that replays traces {_end_of(process.wait())}; if memory was short, --jobs 1 needs less"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise from_plain(answer["error"])
        return tuple(_figures(value) for value in answer["figures"])

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
            process.wait()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _send(process: subprocess.Popen[bytes], value: Any) -> None:
    pipe = _pipe(process.stdin)
    with suppress(BrokenPipeError):  # it has ended; what it said last, or nothing, is what will be received
        pipe.write(json.dumps(value).encode() + b"\n")
        pipe.flush()


def _end_of(code: int) -> str:
    """How a process ended, by its return code: negative where a signal ended it."""
    if code >= 0:
        return f"ended unexpectedly (exit code {code})"
    known = {int(s): s.name for s in signal.Signals}
    return f"was ended by {known.get(-code, f'signal {-code}')}"


def _figures(value: dict[str, Any]) -> Figures:
    calls = DriverCalls(**value.pop("calls"))
    assumptions = tuple(Assumption(**a) for a in value.pop("assumptions"))
    return Figures(**value, calls=calls, assumptions=assumptions)
