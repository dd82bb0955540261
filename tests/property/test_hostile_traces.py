"""Files of our own format with numbers changed by chance: computed with, or refused in one line."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eventful import members, pack

from fragscope.allocator import ReplaySettings, recorded_under, replay
from fragscope.errors import FragscopeError
from fragscope.measure import lifetimes, timeline
from fragscope.search import bound, fit, play_one, subject_of
from fragscope.trace import load_trace
from fragscope.trace.events import DECISION_DTYPES, REQUEST_DTYPES

NUMBERS = (
    0, 1, 2, 3, -1, -2, 255, 512, 2**20, 2**31 - 1, 2**31, -(2**31), 2**40, 2**44, 2**44 + 1, 2**46, 2**57, 2**60,
    2**61, 2**62 - 1, 2**62, 2**63 - 512, 2**63 - 1, -(2**63),
)  # fmt: skip
ODD = (*NUMBERS, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.25, 1e308, -1e308, None, "", "x", "9" * 5000, True, [], {})


def change_a_column(chance: random.Random, changed: dict[str, bytes]) -> None:
    member = chance.choice(sorted(set(changed) - {"manifest.json"}))
    table, name = member.split("/")
    dtype = (REQUEST_DTYPES if table == "requests" else DECISION_DTYPES)[name]
    column = np.frombuffer(changed[member], dtype=dtype).copy()
    bounds = np.iinfo(column.dtype)
    fitting = [n for n in NUMBERS if bounds.min <= n <= bounds.max]
    new = chance.choice([*range(20), *column.tolist()]) if chance.random() < 0.5 else chance.choice(fitting)
    if chance.random() < 0.1:
        column[:] = new
    else:
        column[chance.randrange(len(column))] = new
    changed[member] = column.tobytes()


def change_the_manifest(chance: random.Random, changed: dict[str, bytes]) -> None:
    manifest = json.loads(changed["manifest.json"])
    inner: Any = manifest
    while True:
        key = chance.choice(sorted(inner) if isinstance(inner, dict) else range(len(inner)))
        if isinstance(inner[key], dict | list) and inner[key] and chance.random() < 0.9:
            inner = inner[key]
            continue
        if isinstance(inner, list) and chance.random() < 0.2:
            inner.insert(key, copy.deepcopy(inner[chance.randrange(len(inner))]))
        elif isinstance(inner, list) and chance.random() < 0.1:
            del inner[key]
        else:
            inner[key] = chance.choice(ODD)
        break
    changed["manifest.json"] = json.dumps(manifest).encode()


def compute(path: Path) -> None:
    """All that commands do with a file."""
    trace = load_trace(path)
    asked: list[Callable[[], object]] = [
        lambda: replay(trace, ReplaySettings.of(recorded_under(trace)), verify=trace.decisions is not None),
        lambda: timeline(trace, lifetimes(trace)),
        lambda: play_one(subject_of(trace, str(path)), "expandable_segments:True"),
        lambda: fit(subject_of(trace, str(path)), "", assume_unchanged=True),
        lambda: bound(subject_of(trace, str(path)).tape, 0.0),
    ]
    for ask in asked:
        try:
            ask()
        except FragscopeError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize("seed", range(5))
def test_changed_numbers_are_computed_with_or_refused(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    path = tmp_path / "t.fscope"
    opened = 0
    for _ in range(40):
        changed = dict(members(has_decisions=chance.random() < 0.8))
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            chance.choice((change_a_column, change_a_column, change_the_manifest))(chance, changed)
        pack(path, changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                compute(path)
        except FragscopeError as e:
            assert "\n" not in str(e)
        else:
            opened += 1
    assert opened, "else nothing was computed with"


def test_the_unchanged_program_is_computed_with(tmp_path: Path) -> None:
    compute(pack(tmp_path / "t.fscope", members()))
