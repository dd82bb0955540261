"""What docs and reports say of the runs on a card: tables as their commands print them, and every count."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_commands import assert_page_holds

from fragscope.results import Case, load_results
from fragscope.units import MIB

ROOT = Path(__file__).parents[2]
FOLDER = "reports/h100-80gb-torch-2.11.0"
PAGE = (ROOT / "docs" / "on-a-card.md").read_text()
PROSE = " ".join(PAGE.split())
WHOLE, CONFS = (load_results(ROOT / FOLDER / f"{name}.json").cases for name in ("results", "confs"))


def names_of(cases: list[Case]) -> set[str]:
    return {f"{c.scenario}/{c.preset}/{c.variant}" for c in cases}


@pytest.mark.parametrize(
    ("script", "file"),
    [
        ("prediction_table", "results"),
        ("prediction_table", "confs"),
        pytest.param("variant_times", "times", marks=pytest.mark.torch),
    ],
)
def test_tables_are_what_their_commands_print(script: str, file: str) -> None:
    command = f"python tests/gpu/{script}.py {FOLDER}/{file}.json"
    assert_page_holds(PAGE, command)


def test_counts_are_those_of_the_runs() -> None:
    assert all(c.as_expected for c in [*WHOLE, *CONFS])
    assert f"All {len(WHOLE)} outcomes are the declared ones." in PROSE
    for cases, held in ((WHOLE, "{:,} decisions and statistics in {} cases none"), (CONFS, "of {:,} in the {} under")):
        verified = [c.verify for c in cases if c.verify is not None]
        assert sum(v.mismatches for v in verified) == 0
        assert held.format(sum(v.compared for v in verified), len(verified)) in PROSE
    said = {id(cases): [c for c in cases if c.predicted is not None] for cases in (WHOLE, CONFS)}
    same = {which: sum(not c.surprises for c in predicted) for which, predicted in said.items()}
    whole, confs = id(WHOLE), id(CONFS)
    assert f"{same[whole]} of {len(said[whole])} predicted cases without a conf" in PROSE
    assert f"{same[confs]} of {len(said[confs])} under `max_split_size_mb:20`" in PROSE
    tied = [c for c in said[whole] if c.predicted is not None and not c.predicted.exact]
    assert f"{len(tied)} cases have them" in PROSE
    exactness = " ".join((ROOT / "docs" / "exactness.md").read_text().split())
    assert f"{len(tied)} of the {len(WHOLE)} shipped cases have such ties" in exactness


def test_every_difference_is_explained_and_was_marked() -> None:
    """All are in what was stranded at the peak, of cases that the page speaks of and that are said not to be exact."""
    differing = [c for c in [*WHOLE, *CONFS] if c.surprises]
    assert len(differing) == 6
    for case in differing:
        assert set(case.surprises) == {"peak stranded", "peak inactive_split"}
        assert 2 * MIB <= abs(case.surprises["peak stranded"]) <= 20 * MIB
        assert case.predicted is not None
        assert not case.predicted.exact
    section = PAGE[PAGE.index("## What differs") : PAGE.index("## Every case")]
    explained = re.findall(r"^- `([a-z0-9*/-]+)`", section, re.MULTILINE)
    patterns = [re.compile(re.escape(e).replace(r"\*", "[^/]+")) for e in explained]
    assert all(any(p.fullmatch(name) for p in patterns) for name in names_of(differing))


def test_nothing_was_said_only_of_what_is_declared_to_run_out_of_memory_or_to_hang() -> None:
    assert [c.outcome for c in WHOLE if c.predicted is None] == ["timeout", "oom", "oom", "oom"]
    assert all(c.predicted is not None for c in CONFS)
