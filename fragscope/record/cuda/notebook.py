"""What the recorder notes between the allocator's events, and the texts that notes refer to."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec

from fragscope.record.cuda.edge import Tracker

ANY_DEVICE = 255  # a note that concerns whichever device is looked at


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
                self._file.write(msgspec.json.encode(text) + b"\n")
                known = self._numbers[text] = len(self._numbers)
            return known

    def close(self) -> None:
        """No more texts."""
        self._file.close()


class Notebook:
    """Notes, written into the chunks by whoever writes those.

    A full disk or a closed file never reaches the program that is recorded: what cannot be noted is counted.
    """

    def __init__(self, tracker: Tracker, texts: Texts) -> None:
        self._tracker = tracker
        self._texts = texts
        self.missed = 0

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
        try:
            number = -1 if text is None else self._texts.number(text)
            self._tracker.note(kind, ANY_DEVICE if device < 0 else device, addr, size, stream, pool, number)
        except (OSError, ValueError):
            self.missed += 1
