"""What the two processes of a comparison and their parent say to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from fragscope.against.imports import Foreign, Own
from fragscope.allocator import Card


class SideRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to run.

    Attributes:
        own: the tree, and what is the repository's.
        root: the project's folder in it, which is the working directory.
        files: scenario files of the tree.
        borrowed: scenario files of the other tree, put into this one. What they define counts where the tree's own
            do not define it, and one that cannot be imported is left out.
        lenient: own scenario files that cannot be imported are left out too, and names that match nothing are none.
        only: names of cases as arguments of ``fragscope run``; all where empty.
        confs, releases, cards: what the cases are run under.
        own_cards: those that the working tree defines, for both sides: a card of one name is one card.
        out: folder for results.
        jobs, timeout: as options of ``fragscope run``.
    """

    own: Own
    root: str
    files: list[str]
    borrowed: list[str]
    lenient: bool
    only: list[str]
    confs: list[str]
    releases: list[str]
    cards: list[str]
    own_cards: list[Card]
    out: str
    jobs: int
    timeout: float


class LeftOut(msgspec.Struct, frozen=True):
    """A scenario file that could not be imported.

    Attributes:
        file: relative to the tree.
        reason: one line.
        borrowed: it is one of the other tree.
    """

    file: str
    reason: str
    borrowed: bool


class SideAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How it went; results are in the request's folder.

    Attributes:
        ran: there are results; False where the tree has no case to run.
        left_out: scenario files that could not be imported.
        scenarios: the file, relative to the tree, of each scenario that was run.
        foreign: modules that are not of this tree although they should be.
        error: what ended it, as ``to_plain`` makes it.
    """

    ran: bool = False
    left_out: list[LeftOut] = []
    scenarios: dict[str, str] = {}
    foreign: list[Foreign] = []
    error: dict[str, Any] | None = None


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of progress: so many cases more are planned, or one is finished."""

    planned: int = 0
    finished: str = ""


def answer_path(request: Path) -> Path:
    """Where the answer to a request goes."""
    return request.with_suffix(".answer.json")
