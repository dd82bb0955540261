"""What a sweep found out, and the file that holds it: sweep.json."""

from __future__ import annotations

import msgspec

from fragscope.results.model import CAME_TO_ITS_END, Outcome


class Point(msgspec.Struct, frozen=True):
    """One size and what it gave; bytes.

    Attributes:
        too_large: it ran out of something for its size, or was not run because the card has less than it needs.
        over: why it is over a budget, ``""`` where it is not.
    """

    size: int
    outcome: Outcome
    peak_allocated: int
    peak_reserved: int
    transient: int
    exact: bool
    too_large: bool = False
    over: str = ""

    @property
    def reached(self) -> bool:
        """Whether the program came to its end, so that there are figures."""
        return self.outcome in CAME_TO_ITS_END

    @property
    def fits(self) -> bool:
        """Whether the program came to its end within budget; a race between its streams is another matter."""
        return self.reached and not self.over


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep found out about one case; bytes.

    Attributes:
        name: ``scenario/preset/variant``.
        conf, torch, card: what it was decided under.
        capacity: bytes that segments could take together.
        largest: the largest size that fits; None where not even the smallest does, or it could not be told.
        limited_by: why the next size does not fit; ``""`` where the largest size asked for does.
        problem: why there is no answer; ``""`` where there is.
        declared: the scenario declares that outcome, which has nothing to do with size.
        refuted: where a recording showed that the allocator model is wrong, ``""`` where none did.
        untried_above: no size above this one was tried, since it or a smaller one does not fit; None where the largest
            that was asked for was tried.
        points: by size.
    """

    name: str
    conf: str
    torch: str
    card: str
    capacity: int
    largest: int | None
    limited_by: str
    problem: str
    declared: bool = False
    refuted: str = ""
    untried_above: int | None = None
    points: list[Point]


class SweepResults(msgspec.Struct, frozen=True, kw_only=True):
    """The content of sweep.json.

    Attributes:
        parameter, low, high, step: what was swept.
        command: the command line as it was given.
        complete: every case has its answer, or the reason why there is none.
    """

    schema_version: int = 1
    parameter: str
    low: int
    high: int
    step: int
    command: list[str] = []
    complete: bool
    curves: list[Curve]
