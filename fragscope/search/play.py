"""Replaying traces under many confs: in this process, or in several that each load the traces once.

What comes out does not depend on how many processes there are.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from fragscope.allocator import Assumption, DriverCalls, TieBreak, replay
from fragscope.allocator.engine.compiled import can_compile, compile_now, is_compiled_before
from fragscope.errors import FragscopeError
from fragscope.search.subject import Given, Subject, assumptions_of
from fragscope.search.tune import Outcome, Player

_INTERPRETED, _COMPILED = 20e-6, 1.5e-6  # seconds an event, about; it grows with what is live
_LOADING = 1.0  # seconds until compiled code is there, about
_COMPILING = 60.0
_STARTING = 4.0  # seconds of work from which on more processes are worth their start

Progress = Callable[[str], None]


def play_one(subject: Subject, conf: str | None, *, compiled: bool | None = None) -> Outcome:
    """What a trace does under a conf; None is its recorded one.

    Raises:
        UnmodelledError: the trace or the conf needs something that the model does not cover.
    """
    settings = subject.settings if conf is None else replace(subject.settings, conf=conf)
    replayed = replay(subject.trial, settings, decisions=False, compiled=compiled)
    whole, assumptions = replayed.whole, assumptions_of(replayed, subject.tape.trace)
    return Outcome(
        reserved=whole.peak.reserved,
        stranded=whole.peak.stranded,
        ooms=whole.ooms,
        retries=whole.retries,
        calls=whole.calls,
        exact=replayed.exact and all(a.effect == "none" for a in assumptions),
        assumptions=assumptions,
    )


def play_other_orders(subject: Subject, conf: str | None) -> dict[TieBreak, Outcome]:
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


def worth_compiling(events: int, jobs: int = 1) -> bool:
    """Whether the compiled loop serves so many events sooner, loading or even compiling it included."""
    if not can_compile():
        return False
    gained = events * (_INTERPRETED - _COMPILED) / jobs
    return gained > (_LOADING if is_compiled_before() else _COMPILING)


def compile_with(say: Progress) -> None:
    """Compile the replay loop, or load what was compiled before."""
    if not is_compiled_before():
        say("compiling the replay loop, once for this version")
    compile_now()


@contextmanager
def player(
    subjects: Sequence[Subject], given: Given, *, jobs: int, tries: int, say: Progress = lambda what: None
) -> Iterator[Player]:
    """Whatever replays these traces soonest.

    Args:
        subjects: the traces; where processes are started, they load them by name.
        given: what they were loaded with.
        jobs: processes at most.
        tries: confs expected.
        say: told what takes long.
    """
    events = tries * sum(len(s.tape.kind) for s in subjects)
    compiled = worth_compiling(events, jobs)
    if compiled:
        compile_with(say)
    seconds = events * (_COMPILED if compiled else _INTERPRETED)
    if jobs > 1 and seconds > _STARTING and all(Path(s.name).is_file() for s in subjects):
        with _Workers([s.name for s in subjects], given, compiled=compiled, jobs=jobs) as workers:
            yield workers
    else:
        yield _Here(subjects, compiled=compiled)


@dataclass(frozen=True)
class _Here:
    """Replays in this process."""

    subjects: Sequence[Subject]
    compiled: bool

    def __call__(self, confs: Sequence[str | None]) -> list[tuple[Outcome, ...]]:
        return [tuple(play_one(s, conf, compiled=self.compiled) for s in self.subjects) for conf in confs]


class _Workers:
    """Replays in processes of their own, in sessions of their own: Ctrl-C reaches the parent, which ends them."""

    def __init__(self, names: Sequence[str], given: Given, *, compiled: bool, jobs: int) -> None:
        self._task = {"names": list(names), "given": asdict(given), "compiled": compiled}
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

    def __call__(self, confs: Sequence[str | None]) -> list[tuple[Outcome, ...]]:
        out: list[tuple[Outcome, ...] | None] = [None] * len(confs)
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
        return [outcomes for outcomes in out if outcomes is not None]

    def _give(self, number: int, waiting: Iterator[int], confs: Sequence[str | None], busy: dict[int, int]) -> None:
        at = next(waiting, None)
        if at is not None:
            busy[number] = at
            _send(self._processes[number], confs[at])

    def _receive(self, number: int) -> tuple[Outcome, ...]:
        process = self._processes[number]
        line = _pipe(process.stdout).readline()
        if not line.endswith(b"\n"):
            code = process.wait()
            raise FragscopeError(
                f"a process that replays traces ended unexpectedly (exit code {code}); --jobs 1 needs less memory"
            )
        return tuple(_outcome(value) for value in json.loads(line))

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
    try:
        pipe.write(json.dumps(value).encode() + b"\n")
        pipe.flush()
    except BrokenPipeError:
        code = process.wait()
        raise FragscopeError(f"a process that replays traces ended unexpectedly (exit code {code})") from None


def _outcome(value: dict[str, Any]) -> Outcome:
    calls = DriverCalls(**value.pop("calls"))
    assumptions = tuple(Assumption(**a) for a in value.pop("assumptions"))
    return Outcome(**value, calls=calls, assumptions=assumptions)
