"""A test being recorded, on a GPU or on the virtual card."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from fragscope.errors import UsageError
from fragscope.trace import Trace


class Source(Protocol):
    """What requests come from while a test runs."""

    def begin_phase(self, name: str) -> None:
        """A phase begins."""

    def end_phase(self) -> None:
        """It is over."""

    def stop(self) -> Trace:
        """Everything since the start; nothing is recorded any more."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A test that was recorded.

    Attributes:
        trace: everything from the start on.
        where: what it was recorded on, for people.
        estimated: operators whose hidden temporaries are unknown.
    """

    trace: Trace
    where: str
    estimated: tuple[str, ...] = ()


class Recording:
    """A test being recorded; what the fixtures ``fragscope_recorder`` and ``fragscope_device`` give.

    Cyclic garbage is collected when it begins and left alone until it is over: when the collector runs depends on all
    that a process did before, and would free a test's memory now at one moment and now at another.

    Attributes:
        where: what it is recorded on, for people.
        trace: everything from the start on, once it is stopped.
    """

    def __init__(self, source: Source, where: str, estimated: Callable[[], Iterable[str]] = tuple) -> None:
        self.where = where
        self.trace: Trace | None = None
        self._source = source
        self._estimated = estimated
        self._in_phase = False
        self._collects = gc.isenabled()
        gc.disable()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Budgets are held against what is measured inside; with several phases, against each.

        Raises:
            UsageError: a phase is open already, or the recording is over.
        """
        if self._in_phase:
            raise UsageError(f"phase {name!r} begins inside another; a phase cannot be part of another")
        if self.trace is not None:
            raise UsageError(f"phase {name!r} begins when the recording is over")
        self._source.begin_phase(name)
        self._in_phase = True
        try:
            yield
        finally:
            self._in_phase = False
            if self.trace is None:
                self._source.end_phase()

    def stop(self) -> Trace:
        """End the recording and return its Trace; what comes after is not measured."""
        if self.trace is None:
            try:
                self.trace = self._source.stop()
            finally:
                if self._collects:
                    gc.enable()
        return self.trace

    def finished(self) -> Finished:
        """What was recorded."""
        return Finished(self.stop(), self.where, tuple(self._estimated()))
