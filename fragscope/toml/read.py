"""Reading a TOML file of strangers, and the words in which a complaint names what stands in it."""

from __future__ import annotations

import datetime
import difflib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fragscope.errors import InputFileError, printable
from fragscope.toml.lines import KeyLines, TooNestedError, find_lines
from fragscope.units import MIB, format_bytes

_FILE_LIMIT = MIB
_ABSURD = re.compile(r"(?<![0-9_])[0-9][0-9_]{4299,}")  # more digits than Python converts by itself
_DATE = re.compile(r"(?P<key>[\w-]{1,80})\s*=\s*(?P<date>[0-9]{4}-[0-9]{1,2}-[0-9]{1,2})(?![0-9-])", re.ASCII)
_SYNTAX_LINE = re.compile(r" ?\(at (?:line (\d+), column \d+|end of document)\)")


@dataclass(frozen=True, slots=True)
class TomlFile:
    """A file's tables and where they stand.

    Attributes:
        file: the path as it is shown to people.
        content: the decoded document.
        lines: the line of every key.
    """

    file: str
    content: dict[str, Any]
    lines: KeyLines

    def error(self, path: tuple[str | int, ...], reason: str) -> InputFileError:
        """A complaint about the key at a path."""
        return InputFileError(self.file, f"line {self.lines.of(*path)}: {reason}")


def read_toml(path: Path, shown: str, what: str, most: int = _FILE_LIMIT) -> TomlFile:
    """Read a TOML file.

    Args:
        path: the file.
        shown: what to call it in messages.
        what: what it should be, in the plural without an article: ``"budgets"``.
        most: bytes that it may hold.

    Raises:
        InputFileError: unreadable, larger than ``most``, not UTF-8, not TOML, or nested deeply; names the line.
    """
    try:
        with path.open("rb") as f:
            raw = f.read(most + 1)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else None
        raise InputFileError(shown, (reason or type(e).__name__).lower()) from None
    if len(raw) > most:
        raise InputFileError(shown, f"holds more than {format_bytes(most)}; that is not a {what} file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise InputFileError(shown, f"line {line}: is not UTF-8 text") from None
    return parse_toml(text, shown, what)


def parse_toml(text: str, shown: str, what: str) -> TomlFile:
    """The tables of a TOML text.

    Raises:
        InputFileError: as ``read_toml``.
    """
    try:
        lines = find_lines(text)
    except TooNestedError as e:
        raise InputFileError(shown, f"line {e.line}: is nested deeper than any {what.removesuffix('s')}") from None
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # ValueError: also an integer of absurd length
        raise InputFileError(shown, _syntax_error(str(e), text, lines)) from None
    return TomlFile(shown, content, lines)


def _syntax_error(message: str, text: str, lines: KeyLines) -> str:
    found = _SYNTAX_LINE.search(message)
    if found is None:
        number = _ABSURD.search(text)
        if number is None:
            return f"is not TOML: {message}"
        return f"line {text.count(chr(10), 0, number.start()) + 1}: holds a number of {len(number[0]):,} digits"
    # What is missing at the end of the file belongs to the declaration that was never closed.
    line = int(found[1]) if found[1] else lines.stopped or text.count("\n") + 1
    reason = _SYNTAX_LINE.sub("", message)
    date = _DATE.search(text.split("\n")[line - 1])
    if date is not None and not _is_date(date["date"]):
        key, said = printable(date["key"], 80), date["date"]
        reason = f"{key}: {said} is no day of any calendar; write year-month-day, such as 2027-03-31"
    if re.match("<{7} |={7}$|>{7} ", text.split("\n")[line - 1]):
        reason = f"holds a merge conflict ({reason})"
    if line in lines.twice:
        reason = f"stands twice, first in line {lines.twice[line]} ({reason})"
    return f"line {line}: {reason}"


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def nearest(name: str, known: tuple[str, ...]) -> str:
    """What to write instead of an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def quoted(value: object) -> str:
    """A value from a file as one harmless word."""
    try:
        return printable(value.isoformat() if isinstance(value, datetime.date | datetime.time) else repr(value), 120)
    except ValueError:  # an integer with more digits than Python converts
        return "an absurdly long number"
