"""Which combinations of conf, release and card a run measures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fragscope.allocator import CARDS
from fragscope.errors import UnmodelledError, UsageError
from fragscope.suite.matrix import MATRICES, cells

LARGE = "large_segment_size_mb:32"  # known from 2.11 on


@pytest.fixture(autouse=True)
def larger_card(monkeypatch: pytest.MonkeyPatch) -> None:
    known = CARDS["h100-80gb"]
    monkeypatch.setitem(CARDS, "larger", replace(known, name="larger", total=2 * known.total, free=2 * known.free))


def named(confs: list[str], releases: list[str], cards: list[str] | None = None) -> list[tuple[str, str, str]]:
    made, _ = cells(confs, releases, cards or ["h100-80gb"], None)
    return [(s.conf, s.rules.torch, s.card) for s in made]


def test_every_combination_is_a_cell() -> None:
    assert named(["", "expandable_segments:True"], ["2.11", "2.13"], ["h100-80gb", "larger"]) == [
        (conf, release, card)
        for release in ("2.11", "2.13")
        for card in ("h100-80gb", "larger")
        for conf in ("", "expandable_segments:True")
    ]


def test_a_conf_that_one_release_refuses_is_left_out_there_and_said() -> None:
    made, left_out = cells(["", LARGE], ["2.10", "2.11"], ["h100-80gb"], None)
    assert [(s.conf, s.rules.torch) for s in made] == [("", "2.10"), ("", "2.11"), (LARGE, "2.11")]
    assert [(n.conf, n.torch) for n in left_out] == [(LARGE, "2.10")]
    assert "large_segment_size_mb" in left_out[0].reason


def test_a_conf_that_every_release_refuses_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="large_segment_size_mb"):
        cells(["", LARGE], ["2.9", "2.10"], ["h100-80gb"], None)
    with pytest.raises(UsageError, match="max_splt"):
        cells(["max_splt_size_mb:20"], ["2.11", "2.13"], ["h100-80gb"], None)


def test_what_the_model_does_not_cover_is_no_matter_of_releases() -> None:
    with pytest.raises(UnmodelledError, match="backend"):
        cells(["backend:cudaMallocAsync"], ["2.11", "2.13"], ["h100-80gb"], None)


def test_an_unknown_release_or_card_is_a_mistake_with_any_conf() -> None:
    with pytest.raises(UsageError, match=r"2\.1 is older"):
        cells([""], ["2.1", "2.13"], ["h100-80gb"], None)
    with pytest.raises(UsageError, match="h10"):
        cells([""], ["2.13"], ["h10"], None)


def test_a_limit_holds_for_every_card_that_has_so_much() -> None:
    made, _ = cells([""], ["2.13"], ["h100-80gb", "larger"], 22 * 2**30)
    assert [s.capacity for s in made] == [22 * 2**30] * 2
    with pytest.raises(UsageError, match=r"--capacity: 100\.00 GiB is more than h100-80gb has"):
        cells([""], ["2.13"], ["larger", "h100-80gb"], 100 * 2**30)


def test_the_nightly_matrix_is_three_confs_under_two_releases() -> None:
    nightly = MATRICES["nightly"]
    assert len(named(list(nightly.confs), list(nightly.releases))) == 6
    assert MATRICES["quick"].confs == ("",)
