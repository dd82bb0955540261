"""What a release's binary answers to a program, operation by operation."""

from __future__ import annotations

import mmap
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from tempfile import TemporaryFile
from typing import IO, Any

from binary import COUNTERS, Binary, BinaryError, Libraries
from model import Entry, SegmentView
from programs import Op, Program


class CrashError(Exception):
    """The binary did not get through the program."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the binary did, in a form that can be kept as JSON.

    Attributes:
        entries: for each operation, the trace entries it caused.
        changes: for each operation, the counter values that changed as ``[index, increase, index, increase, ...]``;
            indices count the values of ``COUNTERS`` one after the other, and all begin at 0.
        layouts: segments after an operation, by its number; at least after the last one.
    """

    entries: list[list[Entry]]
    changes: list[list[int]]
    layouts: dict[int, list[SegmentView]]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "entries": self.entries,
            "changes": self.changes,
            "layouts": {str(number): layout for number, layout in self.layouts.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Answers:
        """From plain data."""
        return cls(
            [[Entry(*entry) for entry in entries] for entries in data["entries"]],
            data["changes"],
            {int(number): [_view(view) for view in layout] for number, layout in data["layouts"].items()},
        )


def _view(data: list[Any]) -> SegmentView:
    *head, blocks = data
    return SegmentView(*head, tuple((addr, size, state) for addr, size, state in blocks))


class Counters:
    """Counter values by name, kept up to date with the changes of each operation."""

    def __init__(self) -> None:
        self._values = [0] * sum(COUNTERS.values())
        starts = [sum(list(COUNTERS.values())[:n]) for n in range(len(COUNTERS))]
        self._range = {name: (start, start + COUNTERS[name]) for name, start in zip(COUNTERS, starts, strict=True)}
        self._owner = list(chain.from_iterable([name] * count for name, count in COUNTERS.items()))
        self.by_name: dict[str, tuple[int, ...]] = {name: (0,) * count for name, count in COUNTERS.items()}

    def apply(self, changes: list[int]) -> None:
        """The changes of one operation."""
        touched = set()
        for index, increase in zip(changes[::2], changes[1::2], strict=True):
            self._values[index] += increase
            touched.add(self._owner[index])
        for name in touched:
            start, end = self._range[name]
            self.by_name[name] = tuple(self._values[start:end])


def run(libraries: Libraries, program: Program, every: int, at: Callable[[int], None]) -> Answers:
    """Run a program on the binary in this process, which can be done once.

    Args:
        libraries: of the release.
        program: what to run.
        every: layouts are asked for after so many operations; 0: only at the end.
        at: told the number of each operation before it runs.

    Raises:
        BinaryError: it raised something other than out-of-memory.
    """
    binary = Binary(libraries, program.total, program.capacity, program.seed, program.conf)
    answers = Answers([], [], {})
    before = (0,) * sum(COUNTERS.values())
    for number, op in enumerate(program.ops):
        at(number)
        _perform(binary, op)
        answers.entries.append(binary.take_entries())
        after = binary.counters()
        changes = ((index, new - old) for index, (old, new) in enumerate(zip(before, after, strict=True)) if new != old)
        answers.changes.append(list(chain.from_iterable(changes)))
        before = after
        if number + 1 == len(program.ops) or (every and number % every == every - 1):
            answers.layouts[number] = binary.segments()
    return answers


def _perform(binary: Binary, op: Op) -> None:
    match op:
        case ["alloc", id_, size, stream]:
            binary.malloc(id_, size, stream)
        case ["free", id_]:
            if binary.is_live(id_):
                binary.free(id_)
        case ["use", id_, stream]:
            if binary.is_live(id_):
                binary.record_stream(id_, stream)
        case ["done", stream]:
            binary.finish_stream(stream)
        case ["empty"]:
            binary.empty_cache()
        case ["fraction", fraction]:
            binary.set_memory_fraction(fraction)
        case ["conf", text]:
            binary.set_conf(text)
        case ["pool_create", pool, use_on_oom, no_split]:
            binary.create_pool(pool, use_on_oom, no_split)
        case ["pool_begin", pool]:
            binary.begin_pool(pool)
        case ["pool_end", pool]:
            binary.end_pool(pool)
        case ["pool_release", pool]:
            binary.release_pool(pool)
        case ["empty_pool", pool]:
            binary.empty_cache(pool)
        case _:
            raise ValueError(f"unknown operation {op}")


def ask(libraries: Libraries, program: Program, every: int = 0) -> Answers:
    """Run a program on a fresh allocator in a child process; see ``run``.

    Raises:
        CrashError: the binary raised something other than out-of-memory, or the child died; says at which operation.
    """
    with TemporaryFile() as result, TemporaryFile() as errors, mmap.mmap(-1, 8) as progress:

        def at(number: int) -> None:
            progress[:] = number.to_bytes(8, "little")

        child = os.fork()
        if child == 0:
            _answer_and_exit(lambda: run(libraries, program, every, at), result, errors)
        _, status = os.waitpid(child, 0)
        number = int.from_bytes(progress[:], "little")
        where = f"at operation {number} {program.ops[number]}" if program.ops else "at the start"
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            raise CrashError(f"{where}: the binary died of {name}{': ' + said[-1] if said else ''}")
        if os.WEXITSTATUS(status):
            raise CrashError(f"{where}: {said[-1] if said else f'exit code {os.WEXITSTATUS(status)}'}")
        result.seek(0)
        answers: Answers = pickle.load(result)
        return answers


def _answer_and_exit(answer: Callable[[], Answers], result: IO[bytes], errors: IO[bytes]) -> None:
    """The child: never returns, so that nothing of the parent's runs twice."""
    os.dup2(errors.fileno(), 2)
    code = 1
    try:
        pickle.dump(answer(), result)
        result.flush()
        code = 0
    except BinaryError as error:
        errors.write(str(error).encode())
    except BaseException as error:  # whatever it is, it must not unwind into the parent's code
        errors.write(f"{type(error).__name__}: {error}".encode())
    finally:
        errors.flush()
        os._exit(code)
