"""Every error fragscope raises on purpose, and the exit code each one ends a command with.

    FragscopeError              1   our bug, or an error without a better home
    ├── UsageError              2   the call is wrong: an unknown name, a malformed option
    │   └── UnmodelledError     2   a setting that the allocator model does not cover; names the key
    ├── NotMeasuredError        4   nothing, or not everything that was asked for, could be measured
    ├── InputFileError          5   a file is foreign, truncated, inconsistent, hostile or too large
    └── UnsupportedError        -   code on the virtual device needs data that nobody has; a case's outcome, not an exit

Only ``fragscope.cli.main`` prints them. Each message is one line: what happened, where, and what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXIT_PASS = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_OVER_BUDGET = 3
EXIT_NOT_MEASURED = 4
EXIT_BAD_INPUT = 5
EXIT_INTERRUPTED = 130


class FragscopeError(Exception):
    """Base of all errors raised on purpose; the message is one line that a user can act on."""

    exit_code = EXIT_INTERNAL


class UsageError(FragscopeError):
    """The request itself is wrong: an unknown name, a malformed value, options that exclude each other."""

    exit_code = EXIT_USAGE


class UnmodelledError(UsageError):
    """A setting that the allocator model does not cover.

    Attributes:
        key: the setting's name as the user or the recording spelled it.
    """

    def __init__(self, key: str, detail: str) -> None:
        super().__init__(f"{key}: {detail}")
        self.key = key


class NotMeasuredError(FragscopeError):
    """Nothing, or not everything that was asked for, was measured."""

    exit_code = EXIT_NOT_MEASURED


class InputFileError(FragscopeError):
    """A file that cannot be used.

    Attributes:
        path: the file as the user named it.
        reason: why, in a few words.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{printable(str(path))}: {printable(reason)}")
        self.path = str(path)
        self.reason = reason


class UnsupportedError(FragscopeError):
    """Code asked the virtual device for something that cannot be known without data.

    Attributes:
        location: ``file:line`` of the innermost frame of the user's code.
    """

    def __init__(self, what: str, location: str | None = None) -> None:
        super().__init__(f"{what} (at {location})" if location else what)
        self.what = what
        self.location = location


_BY_NAME = {
    c.__name__: c
    for c in (FragscopeError, UsageError, UnmodelledError, NotMeasuredError, InputFileError, UnsupportedError)
}


def to_plain(error: FragscopeError) -> dict[str, Any]:
    """An error of this tree as JSON carries it to another process: class, message and attributes, all text."""
    return {"class": type(error).__name__, "text": str(error), "attributes": vars(error)}


def from_plain(plain: Mapping[str, Any]) -> FragscopeError:
    """The error that ``to_plain`` made this of; one of a class that is not of this tree is a ``FragscopeError``."""
    kind = _BY_NAME.get(plain["class"], FragscopeError)
    error = kind.__new__(kind, plain["text"])  # the message is whole, and must not be composed again
    vars(error).update(plain["attributes"])
    return error


def printable(text: str, limit: int = 400) -> str:
    """Text from a hostile source as one harmless line: control characters escaped, length bounded.

    ``##[`` anywhere in a line of a GitHub job's log may begin a command to the runner (its ``ActionCommand.cs``).
    """
    clean = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("##[", "##\\x5b")
    return clean if len(clean) <= limit else f"{clean[:limit]}… ({len(clean)} characters)"
