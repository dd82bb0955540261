"""What the recorder notes between the allocator's events, and the texts that notes refer to."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from fragscope.record.cuda.edge import Tracker
from fragscope.trace.chunks import ANY_DEVICE


class Texts:
    """Strings that notes refer to by number: one JSON string a line, on disk before the note is."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()

    def number(self, text: str) -> int:
        """The number of a text."""
        with self._lock:
            known = self._numbers.get(text)
            if known is None:
                line = msgspec.json.encode(text) + b"\n"
                if self._file.write(line) != len(line):  # a full disk takes what it can, and a torn line ends the file
                    self._file.close()
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                known = self._numbers[text] = len(self._numbers)
            return known

    def close(self) -> None:
        """No more texts."""
        self._file.close()


class Notebook:
    """Notes, written into the chunks by whoever writes those.

    Whatever goes wrong never reaches the program that is recorded: what cannot be noted is counted. Programs may hold
    on to hooks, or call them in signal handlers and forked children. So a note is taken only while its recording goes
    on, in its process, and not inside another.

    Args:
        tracker: writes them.
        texts: what they refer to.
        history_wanted: called when the program is about to record PyTorch's history itself.

    Attributes:
        missed: notes that could not be taken.
    """

    def __init__(self, tracker: Tracker, texts: Texts, history_wanted: Callable[[], None]) -> None:
        self._tracker = tracker
        self._texts = texts
        self._history_wanted = history_wanted
        self._pid = os.getpid()
        self._inside = threading.local()
        self._closed = False
        self.missed = 0

    def close(self) -> None:
        """Nothing is noted from now on, whoever still calls."""
        self._closed = True

    def history_wanted(self) -> None:
        """The program is about to record PyTorch's history itself."""
        if not self._closed and os.getpid() == self._pid:
            self._history_wanted()

    def note(
        self,
        kind: int,
        *,
        device: int = -1,
        addr: int = 0,
        size: int = 0,
        stream: int = 0,
        pool: tuple[int, int] = (0, 0),
        text: str | None = None,
    ) -> None:
        """Note something at this point; see ``edge.Notes``."""
        if self._closed or os.getpid() != self._pid:
            return
        if getattr(self._inside, "on", False):
            self.missed += 1
            return
        self._inside.on = True
        try:
            number = -1 if text is None else self._texts.number(text)
            self._tracker.note(kind, ANY_DEVICE if device < 0 else device, addr, size, stream, pool, number)
        except Exception:
            self.missed += 1
        finally:
            self._inside.on = False
