"""Which line of one tree is which line of the other.

Files are matched by name, or by content where one was renamed; lines by the longest common run of both files, and
within what was rewritten by their text. Nothing is parsed for that, so that a file in any state can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

_FILE_LIMIT = 4 * 2**20  # bytes; larger ones are no source files
_SAME_FILE = 0.6  # share of common lines from which on a file of another name is the same one
_SAME_LINE = 0.6  # share of common characters from which on a line was edited and not replaced


class Sources:
    """The text of a tree's files; empty for what is not there.

    Args:
        top: the tree.
    """

    def __init__(self, top: Path) -> None:
        self._top = top
        self._texts: dict[str, str] = {}
        self._lines: dict[str, list[str]] = {}

    def text(self, file: str) -> str:
        """The text of a file, given relative to the tree."""
        if file not in self._texts:
            try:
                with (self._top / file).open("rb") as f:
                    self._texts[file] = f.read(_FILE_LIMIT).decode("utf-8", errors="replace")
            except (OSError, ValueError):
                self._texts[file] = ""
        return self._texts[file]

    def lines(self, file: str) -> list[str]:
        """The lines of a file, without the blanks around them."""
        if file not in self._lines:
            self._lines[file] = [line.strip() for line in self.text(file).split("\n")]
        return self._lines[file]

    def line(self, file: str, number: int) -> str:
        """The text of a line, counted from 1; ``""`` where there is none."""
        lines = self.lines(file)
        return lines[number - 1] if 0 < number <= len(lines) else ""


@dataclass(frozen=True, slots=True)
class Moved:
    """Where a line went.

    Attributes:
        file, line: in the other tree.
    """

    file: str
    line: int


class Alignment:
    """Says where lines of the tree before are in the tree after.

    Args:
        before, after: the trees' text.
        files_before, files_after: files that matter, relative to their trees.
    """

    def __init__(
        self, before: Sources, after: Sources, files_before: Iterable[str], files_after: Iterable[str]
    ) -> None:
        self._before, self._after = before, after
        self._renamed = _renamed(before, after, set(files_before), set(files_after))
        self._was_called = {new: old for old, new in self._renamed.items()}
        self._maps: dict[str, dict[int, int]] = {}

    def moved(self, file: str, line: int) -> Moved | None:
        """Where a line of the tree before is now; None where it is not there any more."""
        found = self._map(file).get(line)
        return None if found is None else Moved(self._renamed.get(file, file), found)

    def was_called(self, file: str) -> str:
        """The name before of a file of the tree after."""
        return self._was_called.get(file, file)

    def unchanged(self, file: str) -> set[int]:
        """The lines of a file of the tree after, by that name, which were there before with the same text."""
        old = self.was_called(file)
        before, after = self._before, self._after
        return {new for was, new in self._map(old).items() if before.line(old, was) == after.line(file, new)}

    def _map(self, file: str) -> dict[int, int]:
        if file not in self._maps:
            target = self._renamed.get(file, file)
            self._maps[file] = _line_map(self._before.lines(file), self._after.lines(target))
        return self._maps[file]


def _renamed(before: Sources, after: Sources, files_before: set[str], files_after: set[str]) -> dict[str, str]:
    gone = sorted(f for f in files_before if not any(after.lines(f)))
    new = sorted(f for f in files_after if not any(before.lines(f)))
    likeness = sorted(
        (
            (SequenceMatcher(None, before.lines(a), after.lines(b), autojunk=False).ratio(), a, b)
            for a in gone
            for b in new
        ),
        key=lambda found: (-found[0], found[1], found[2]),
    )
    out: dict[str, str] = {}
    for ratio, a, b in likeness:
        if ratio >= _SAME_FILE and a not in out and b not in out.values():
            out[a] = b
    return out


def _line_map(before: list[str], after: list[str]) -> dict[int, int]:
    """Line numbers, counted from 1, of lines that both have; edited ones among them."""
    if before == after:
        return {number: number for number in range(1, len(before) + 1)}
    out: dict[int, int] = {}
    # Empty lines are everywhere, and none of them is a place to begin at.
    for tag, a, a_end, b, b_end in SequenceMatcher(lambda x: not x, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            out.update((a + i + 1, b + i + 1) for i in range(a_end - a))
        elif tag == "replace":
            out.update(_edited(before, after, range(a, a_end), range(b, b_end)))
    return out


def _edited(before: list[str], after: list[str], old: range, new: range) -> Iterable[tuple[int, int]]:
    """Pairs of lines within a rewritten stretch that are alike, in order."""
    start = new.start
    for i in old:
        best = max(
            ((SequenceMatcher(None, before[i], after[j]).ratio(), -j) for j in range(start, new.stop)), default=(0.0, 0)
        )
        if before[i] and best[0] >= _SAME_LINE:
            start = 1 - best[1]
            yield i + 1, 1 - best[1]
