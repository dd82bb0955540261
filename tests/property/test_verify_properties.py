"""Comparing decisions, column by column in the package, against the same comparison written row by row."""

from __future__ import annotations

from itertools import groupby, zip_longest
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fragscope.allocator import CachingAllocator, rules_for, verify
from fragscope.trace import DECISION_DTYPES, UNKNOWN_SIZE, DecisionKind, Decisions, RequestLog, Trace

COMPLETED = DecisionKind.FREE_COMPLETED
Row = dict[str, int]
UNUSED = CachingAllocator(1, 1, rules_for("2.11").rules)

row = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([*map(int, DecisionKind), COMPLETED, COMPLETED, COMPLETED]),
        "id": st.integers(-1, 3),
        "addr": st.integers(0, 2),
        "size": st.sampled_from([UNKNOWN_SIZE, 512, 1024]),
        "stream": st.integers(0, 1),
        "pool": st.integers(0, 1),
    }
)


@st.composite
def decisions(draw: st.DrawFn) -> list[Row]:
    """Rows in the order of their requests, several about most."""
    rows = draw(st.lists(row, max_size=12))
    requests = sorted(draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))))
    return [{**r, "request": request} for r, request in zip(rows, requests, strict=True)]


def as_columns(rows: list[Row]) -> Decisions:
    return Decisions(**{name: np.array([r[name] for r in rows], dtype) for name, dtype in DECISION_DTYPES.items()})


def one_by_one(recorded: list[Row], modelled: list[Row]) -> tuple[int, int | None]:
    """How many rows differ, and the request of the first that does."""

    def ordered(rows: list[Row]) -> list[Row]:
        out = []
        for (kind, _), run in groupby(rows, lambda r: (r["kind"], r["request"])):
            together = list(run)
            if kind == COMPLETED:
                together.sort(key=lambda r: [r[n] for n in ("id", "addr", "size", "stream")])
            out += together
        return out

    wrong = []
    for a, b in zip_longest(ordered(recorded), ordered(modelled)):
        compared: list[Any] = ["kind", "request", "id", "stream"]
        if a is not None and a["size"] != UNKNOWN_SIZE:
            compared.append("size")
        if a is not None and a["kind"] != DecisionKind.OOM:
            compared.append("addr")
        if a is None or b is None or any(a[n] != b[n] for n in compared):
            wrong.append((a or b)["request"])
    return len(wrong), wrong[0] if wrong else None


@given(decisions(), decisions(), st.integers(0, 12), st.randoms(use_true_random=False), st.integers(1, 5))
def test_a_comparison_finds_what_differs_row_by_row(
    recorded: list[Row], others: list[Row], same: int, random: Any, at_once: int
) -> None:
    """What is modelled begins as what is recorded does, with frees in another order and a field changed at times."""
    modelled = []
    for (kind, _), run in groupby(recorded[:same], lambda r: (r["kind"], r["request"])):
        rows = list(run)
        if kind == COMPLETED:
            random.shuffle(rows)
        for r in rows:
            changes = kind == DecisionKind.OOM or random.random() < 0.3
            modelled.append({**r, random.choice(("addr", "size", "id")): 512} if changes else r)
    last = modelled[-1]["request"] if modelled else 0
    modelled += [r for r in others if r["request"] >= last]
    trace = Trace(RequestLog().finish(), as_columns(recorded))
    with mock.patch.object(verify, "_AT_ONCE", at_once):
        found = verify.compare(trace, as_columns(modelled), UNUSED)
    count, first = one_by_one(recorded, modelled)
    assert found.mismatches == count
    assert found.compared == max(len(recorded), len(modelled))
    assert (found.first and found.first.event) == first
