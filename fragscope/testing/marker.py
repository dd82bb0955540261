"""``@pytest.mark.gpu_memory_budget(peak_allocated="2 GiB", ...)``: what a test may need, from its markers and defaults.

Metrics and values are those of budgets.toml. The nearest statement about a metric decides it: that of the function's
marker, the class's, the module's, then the repository's default. ``None`` lifts a limit that stands further away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fragscope.errors import UsageError
from fragscope.gate.budgets import METRICS, parse_limit
from fragscope.testing import MARKER
from fragscope.toml import nearest, quoted

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and named arguments of a marker."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A limit on one metric of a test.

    Attributes:
        bytes: the largest value that is within.
        place: where it is stated, for people.
    """

    bytes: int
    place: str


@dataclass(frozen=True, slots=True)
class Budget:
    """What one test is held to.

    Attributes:
        bounds: by metric, in the order of ``METRICS``.
        card: name of the virtual card that its markers ask for; None where they do not.
    """

    bounds: dict[str, Bound]
    card: str | None = None


def read_budget(markers: Iterable[Arguments], place: str, defaults: Mapping[str, Bound]) -> Budget:
    """The budget that a test's markers and the defaults state.

    Args:
        markers: the nearest first.
        place: ``file:line`` of the test.
        defaults: what holds where no marker says otherwise.

    Raises:
        UsageError: an unknown metric (with the nearest known one), a value that is no byte count, or markers that limit
            nothing; one line that names place and marker.
    """
    where = f"{place}: @pytest.mark.{MARKER}"
    stated: dict[str, Bound | None] = {}
    card: str | None = None
    is_marked = False
    for positional, named in markers:
        is_marked = True
        if positional:
            raise UsageError(f'{where}: {quoted(positional[0])} has no name; write such as peak_allocated="2 GiB"')
        values = dict(named)
        nearer = values.pop("card", None)
        if not isinstance(nearer, str | None):
            raise UsageError(f"{where}: card: {quoted(nearer)} is not the name of a card")
        card = card or nearer
        for metric, bound in read_bounds(values, where, place, ("card",)).items():
            stated.setdefault(metric, bound)
    lifted = any(bound is None for bound in stated.values())
    merged = {**defaults, **stated}
    bounds = {metric: bound for metric in METRICS if (bound := merged.get(metric)) is not None}
    if is_marked and not bounds and not lifted:
        raise UsageError(
            f"{where}: states no limit, and there is no default; give at least one of {', '.join(METRICS)}"
        )
    return Budget(bounds, card)


def read_bounds(
    stated: Mapping[str, Any], where: str, place: str, others: tuple[str, ...] = ()
) -> dict[str, Bound | None]:
    """Limits by metric; None where one is lifted.

    Args:
        stated: metric to value, as written.
        where: what begins an error's message.
        place: where the limits are stated, for people.
        others: names that may stand beside metrics.

    Raises:
        UsageError: an unknown metric, or a value that is no byte count.
    """
    out: dict[str, Bound | None] = {}
    for metric, value in stated.items():
        if metric not in METRICS:
            raise UsageError(f"{where}: unknown metric {quoted(metric)}; {nearest(metric, (*METRICS, *others))}")
        try:
            out[metric] = None if value is None else Bound(parse_limit(metric, value), place)
        except UsageError as e:
            raise UsageError(f"{where}: {e}") from None
    return out
