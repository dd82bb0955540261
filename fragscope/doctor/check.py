"""What doctor says: a value that text and JSON share."""

from __future__ import annotations

from typing import Literal

import msgspec

from fragscope.errors import EXIT_INTERNAL, EXIT_PASS

SCHEMA_VERSION = 1

Status = Literal["ok", "warn", "fail", "absent"]


class Check(msgspec.Struct, frozen=True):
    """The answer to one question about the machine.

    Attributes:
        name: the question.
        status: ``ok``; ``warn``: it works, with a limit; ``fail``: it is there or set, and broken; ``absent``: it is
            not there, and what needs it is not available.
        detail: what was found, one line.
        advice: what to do about it, one line; empty where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """All checks of a machine.

    Attributes:
        fragscope: the release that looked; None where it runs from its sources without being installed.
        exit_code: what the command ends with: 1 where a check fails, else 0.
        checks: in the order in which they are shown.
    """

    schema_version: int = SCHEMA_VERSION
    fragscope: str | None
    exit_code: int
    checks: list[Check]

    @classmethod
    def of(cls, fragscope: str | None, checks: list[Check]) -> Diagnosis:
        """With the exit code that the checks give."""
        failed = any(check.status == "fail" for check in checks)
        return cls(fragscope=fragscope, exit_code=EXIT_INTERNAL if failed else EXIT_PASS, checks=checks)
