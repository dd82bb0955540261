"""What commands that run scenarios share: how they are interrupted, and how they show where they are."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from fragscope.results import Case


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does; after the first, none interrupts the saving of what is finished."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that the caller chose to ignore (nohup, a shell's background job) stays ignored.
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {s: handler for s in wanted if (handler := signal.getsignal(s)) is not signal.SIG_IGN}

    def stop(number: int, frame: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class RichProgress:
    """A progress bar on stderr where that is a terminal; silent elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task: Any = None
        self._total = 0

    def __enter__(self) -> RichProgress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def planned(self, cases: int, resumed: int) -> None:
        """Show how much there is to do."""
        self._total = cases
        self._task = self._bar.add_task("starting workers", total=cases, completed=resumed)
        if resumed:
            click.echo(f"fragscope: {resumed} of {cases} cases are kept from the earlier run", err=True)

    def planned_more(self, cases: int) -> None:
        """Show that there is more to do."""
        self._total += cases
        self._bar.update(self._task, total=self._total)

    def started(self, what: str) -> None:
        """Show what runs."""
        self._bar.update(self._task, description=what[:60])

    def finished(self, case: Case) -> None:
        """Count a result."""
        self.advance()

    def advance(self) -> None:
        """One more is done."""
        self._bar.advance(self._task)
