"""Where each key of a TOML document stands: the line numbers that ``tomllib`` does not give.

A scanner walks over the declarations of a document (headers, keys, inline tables, arrays) and skips the values. It
knows just enough TOML for that and judges nothing: where the text stops being TOML it stops too, since ``tomllib``
names that place itself. On every document that ``tomllib`` accepts it finds every key, which a property test holds.

It also runs *before* ``tomllib`` on files of strangers: nesting and key length are bounded here, because
``tomllib`` needs memory that grows with the square of a dotted key's length and recursion as deep as the nesting.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from dataclasses import dataclass, field

KeyPath = tuple[str | int, ...]
"""Keys from the top, with an index for an element of an array: ``("budget", "a/b/c", 0, "transient")``."""

MAX_DEPTH = 32
"""Deepest nesting and longest dotted key accepted; a budget needs four."""

# Possessive quantifiers, so that no text makes the expressions backtrack.
_BLANK = re.compile(r"[ \t]*+")
_FILLER = re.compile(r"(?:[ \t\n]++|#[^\n]*+)*+")
_BARE = re.compile(r"[A-Za-z0-9_-]++")
_BASIC = re.compile(r'"(?:[^"\\\n]++|\\[^\n])*+"')
_LITERAL = re.compile(r"'[^'\n]*+'")
# Up to two quotes may stand directly before the closing three and belong to the string.
_LONG_BASIC = re.compile(r'"""(?:[^"\\]++|\\[\s\S]|"(?!""))*+"""(?:"{0,2}+)')
_LONG_LITERAL = re.compile(r"'''(?:[^']++|'(?!''))*+'''(?:'{0,2}+)")
_SCALAR = re.compile(r"[^,\]}#\n\"'\[{=]++")


@dataclass(frozen=True, slots=True)
class KeyLines:
    """Lines, counted from 1, of a document's keys.

    Attributes:
        lines: the line of each key, table and array element; for a table that is only implied, that of its first key.
        twice: for a table or key that stands twice, the line of the later one to the line of the first.
        stopped: where the declaration begins that is not TOML; None where there is none.
    """

    lines: dict[KeyPath, int] = field(default_factory=dict)
    twice: dict[int, int] = field(default_factory=dict)
    stopped: int | None = None

    def of(self, *path: str | int) -> int:
        """The line of a key, or of the nearest thing around it that has one; 1 at worst."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return 1


class TooNestedError(Exception):
    """A document with nesting or a dotted key beyond ``MAX_DEPTH``.

    Attributes:
        line: where, counted from 1.
    """

    def __init__(self, line: int) -> None:
        super().__init__(f"line {line}: more than {MAX_DEPTH} levels")
        self.line = line


def find_lines(text: str) -> KeyLines:
    r"""The line of every key in a TOML document, as far as it is TOML.

    Args:
        text: the document; ``\r\n`` counts as one line end.

    Raises:
        TooNestedError: nesting or a dotted key beyond ``MAX_DEPTH``.
    """
    scanner = _Scanner(text.replace("\r\n", "\n"))
    try:
        scanner.document()
    except _NotTomlError:  # tomllib says why
        return KeyLines(scanner.lines, scanner.twice, scanner.declaration)
    return KeyLines(scanner.lines, scanner.twice)


class _NotTomlError(Exception):
    """The text is not TOML from here on."""


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line_starts = [0, *(m.end() for m in re.finditer("\n", text))]
        self._elements: dict[KeyPath, int] = {}  # how many elements an array of tables has so far
        self._explicit: dict[KeyPath, int] = {}
        self.lines: dict[KeyPath, int] = {}
        self.twice: dict[int, int] = {}
        self.declaration = 1  # line where the one at hand begins

    def document(self) -> None:
        table: KeyPath = ()
        while True:
            self._skip(_FILLER)
            if self._at == len(self._text):
                return
            self.declaration = self._line()
            if self._take("[["):
                table = self._header(closing="]]")
            elif self._take("["):
                table = self._header(closing="]")
            else:
                self._key_and_value(table, 1)
            self._skip(_BLANK)
            if self._peek() not in ("\n", "#", ""):
                raise _NotTomlError

    def _header(self, closing: str) -> KeyPath:
        line = self._line()
        self._skip(_BLANK)
        keys = self._dotted_key(0)
        if not self._take(closing):
            raise _NotTomlError
        path: KeyPath = ()
        for key in keys[:-1]:
            path = self._latest_element((*path, key))
            self.lines.setdefault(path, line)
        path = (*path, keys[-1])
        if closing == "]]":
            count = self._elements[path] = self._elements.get(path, 0) + 1
            self.lines.setdefault(path, line)
            path = (*path, count - 1)
        else:
            path = self._latest_element(path)
        self._declare(path, line)
        return path

    def _latest_element(self, path: KeyPath) -> KeyPath:
        # A header below an array of tables speaks of the array's last element.
        return (*path, self._elements[path] - 1) if path in self._elements else path

    def _key_and_value(self, table: KeyPath, depth: int) -> None:
        line = self._line()
        keys = self._dotted_key(depth)
        if not self._take("="):
            raise _NotTomlError
        path = table
        for key in keys[:-1]:
            path = (*path, key)
            self.lines.setdefault(path, line)
        path = (*path, keys[-1])
        self._declare(path, line)
        self._skip(_BLANK)
        self._value(path, depth + len(keys))

    def _declare(self, path: KeyPath, line: int) -> None:
        first = self._explicit.setdefault(path, line)
        if first != line:
            self.twice.setdefault(line, first)
        self.lines[path] = first

    def _dotted_key(self, depth: int) -> list[str]:
        keys = [self._simple_key()]
        self._skip(_BLANK)
        while self._take("."):
            self._skip(_BLANK)
            keys.append(self._simple_key())
            self._skip(_BLANK)
            if depth + len(keys) > MAX_DEPTH:
                raise TooNestedError(self._line())
        return keys

    def _simple_key(self) -> str:
        for pattern in (_BARE, _LITERAL, _BASIC):
            if match := pattern.match(self._text, self._at):
                self._at = match.end()
                return match[0] if pattern is _BARE else _unquoted(match[0])
        raise _NotTomlError

    def _value(self, path: KeyPath, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TooNestedError(self._line())
        if self._take("["):
            self._array(path, depth)
        elif self._take("{"):
            self._inline_table(path, depth)
        elif self._starts('"""'):
            self._skip_over(_LONG_BASIC)
        elif self._starts("'''"):
            self._skip_over(_LONG_LITERAL)
        elif self._starts('"'):
            self._skip_over(_BASIC)
        elif self._starts("'"):
            self._skip_over(_LITERAL)
        else:
            self._skip_over(_SCALAR)

    def _array(self, path: KeyPath, depth: int) -> None:
        index = 0
        while True:
            self._skip(_FILLER)
            if self._take("]"):
                return
            self.lines[(*path, index)] = self._line()
            self._value((*path, index), depth + 1)
            index += 1
            self._skip(_FILLER)
            if not self._take(",") and self._peek() != "]":
                raise _NotTomlError

    def _inline_table(self, path: KeyPath, depth: int) -> None:
        # TOML 1.1 allows line ends and a last comma here; where a tomllib does not, it says so itself.
        while True:
            self._skip(_FILLER)
            if self._take("}"):
                return
            self._key_and_value(path, depth)
            self._skip(_FILLER)
            if not self._take(",") and self._peek() != "}":
                raise _NotTomlError

    def _line(self) -> int:
        return bisect_right(self._line_starts, self._at)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _starts(self, literal: str) -> bool:
        return self._text.startswith(literal, self._at)

    def _take(self, literal: str) -> bool:
        if not self._starts(literal):
            return False
        self._at += len(literal)
        return True

    def _skip(self, pattern: re.Pattern[str]) -> None:
        if match := pattern.match(self._text, self._at):
            self._at = match.end()

    def _skip_over(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise _NotTomlError
        self._at = match.end()


def _unquoted(literal: str) -> str:
    # tomllib knows the escapes of the release it belongs to; a second list of them here could differ.
    try:
        value = tomllib.loads(f"key = {literal}")["key"]
    except ValueError:
        raise _NotTomlError from None
    return str(value)
