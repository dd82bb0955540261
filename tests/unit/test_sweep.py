"""Which sizes a sweep tries, and what it concludes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from builders import bare_case

import fragscope
from fragscope.allocator import DEFAULT_CARD
from fragscope.errors import UsageError
from fragscope.results import Case, Curve, Outcome, PrecheckRecord, VerifyRecord
from fragscope.suite.discover import select
from fragscope.suite.matrix import cells
from fragscope.suite.plan import PlannedCase, plan
from fragscope.suite.scenario import Case as ScenarioCase
from fragscope.suite.scenario import Scenario
from fragscope.suite.sweep import Range, Sweep, parse_range, sweepable


@pytest.mark.parametrize(
    ("text", "name", "low", "high", "step"),
    [
        ("tokens=1k:1M", "tokens", 1000, 1_000_000, 1),
        ("tokens=1Ki:2Mi:64", "tokens", 1024, 2 * 2**20, 64),
        ("n=7:7", "n", 7, 7, 1),
        ("n=1:3G:1k", "n", 1, 3 * 10**9, 1000),
    ],
)
def test_a_range_is_read_with_its_units(text: str, name: str, low: int, high: int, step: int) -> None:
    assert parse_range(text) == Range(name, low, high, step)


@pytest.mark.parametrize(
    "text", ["tokens", "tokens=1", "=1:2", "n=1:2K", "n=1:2:3:4", "n=-1:2", "n=1.5:2", "n=\u0661:2"]
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write NAME=LOW:HIGH"):
        parse_range(text)


@pytest.mark.parametrize("text", ["n=0:4", "n=5:4", "n=1:4:0", "n=1:99999999999999999999"])
def test_an_empty_or_endless_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="sizes go up from at least 1, in steps of at least 1"):
        parse_range(text)


def test_the_grid_doubles_and_has_both_ends() -> None:
    assert Range("n", 1000, 9000).grid == [1000, 2000, 4000, 8000, 9000]
    assert Range("n", 3, 3).grid == [3]
    assert Range("n", 100, 1000, 64).grid == [100, 164, 292, 548, 996]


@pytest.mark.parametrize(
    ("low", "high", "step"), [(64, 4096, 128), (1, 3 * 10**9, 1000), (5, 6, 100), (1, 10, 3), (7, 8, 1)]
)
def test_the_grid_rises_and_ends_whatever_the_step(low: int, high: int, step: int) -> None:
    grid = Range("n", low, high, step).grid
    assert grid[0] == low
    assert grid == sorted(set(grid))
    assert all((size - low) % step == 0 and size <= high for size in grid)
    assert high - grid[-1] < step


def scenario(tmp_path: Path) -> Scenario:
    def body(case: ScenarioCase) -> None: ...

    made = fragscope.scenario(
        "grows", presets={"one": {"tokens": 5}}, params={"mode": ("a", "b"), "width": (1, 2), "on": True}
    )(body)
    made.variant("other", role="fixed")(body)
    return made


def swept(
    made: Scenario, sizes: Range, answer: Callable[[PlannedCase, int], Case], over: Callable[[Case], str] = lambda _: ""
) -> tuple[list[Curve], list[int]]:
    """Play a sweep against a function that says how each size ends; the sizes it tried for the first variant."""
    selections = select([made], [], [], [])
    settings, _ = cells([""], ["2.13"], [DEFAULT_CARD], None)
    sweep = Sweep(sizes, lambda size: plan(selections, {sizes.name: str(size)}, settings, "virtual"), over)
    waiting, tried = list(sweep.first()), []
    while waiting:
        planned = waiting.pop(0)
        size = dict(planned.values)[sizes.name]
        assert isinstance(size, int)
        if planned.selection.variant == "original":
            tried.append(size)
        waiting += sweep.after(answer(planned, size))
    return sweep.results([], complete=True).curves, tried


def ends(planned: PlannedCase, outcome: Outcome) -> Case:
    return bare_case(digest=planned.digest, outcome=outcome, message=f"{outcome} of {planned.values}")


@pytest.mark.parametrize("limit", [1, 2, 3, 999, 1000, 1023, 1024, 1025, 77_777, 99_999])
def test_the_largest_size_that_fits_is_found_to_the_unit(tmp_path: Path, limit: int) -> None:
    answer = lambda planned, size: ends(planned, "ok" if size <= limit else "oom")  # noqa: E731
    curves, tried = swept(scenario(tmp_path), Range("tokens", 1, 100_000), answer)
    assert [(c.largest, c.problem) for c in curves] == [(limit, "")] * 2
    assert curves[0].limited_by.startswith(f"at {limit + 1:,}: oom")
    assert len(tried) == len(set(tried)) <= 18 + 16  # doublings up to 100,000, and halvings of the widest gap


def test_only_sizes_a_step_apart_are_tried(tmp_path: Path) -> None:
    answer = lambda planned, size: ends(planned, "ok" if size <= 700 else "overflow")  # noqa: E731
    curves, tried = swept(scenario(tmp_path), Range("tokens", 64, 1000, 64), answer)
    assert all(size % 64 == 0 for size in tried)
    assert curves[0].largest == 640
    assert curves[0].limited_by.startswith("at 704: overflow")


def test_all_and_none_may_fit(tmp_path: Path) -> None:
    curves, tried = swept(scenario(tmp_path), Range("tokens", 10, 100), lambda planned, _: ends(planned, "ok"))
    assert (curves[0].largest, curves[0].limited_by, tried) == (100, "", [10, 20, 40, 80, 100])
    curves, tried = swept(scenario(tmp_path), Range("tokens", 10, 100), lambda planned, _: ends(planned, "oom"))
    assert (curves[0].largest, curves[0].limited_by[:12], len(tried)) == (None, "at 10: oom: ", 1)


def test_a_budget_limits_too(tmp_path: Path) -> None:
    made = scenario(tmp_path)

    def answer(planned: PlannedCase, size: int) -> Case:
        return bare_case(digest=planned.digest, transient=size)

    curves, _ = swept(made, Range("tokens", 1, 1000), answer, lambda case: "too much" if case.transient > 300 else "")
    assert (curves[0].largest, curves[0].limited_by) == (300, "at 301: too much")


def test_nothing_above_the_first_size_that_fails_is_tried_and_that_is_said(tmp_path: Path) -> None:
    """Also where a larger one would fit: what a size that is too large takes grows with it, time above all."""
    fails = {20, 100}
    answer = lambda planned, size: ends(planned, "oom" if size in fails else "ok")  # noqa: E731
    curves, tried = swept(scenario(tmp_path), Range("tokens", 10, 100), answer)
    assert (curves[0].largest, curves[0].untried_above) == (19, 20)
    assert tried == [10, 20, 15, 17, 18, 19]
    answer = lambda planned, size: ends(planned, "ok" if size <= 5 else "oom")  # noqa: E731
    curves, tried = swept(scenario(tmp_path), Range("tokens", 1, 10**9), answer)
    assert (curves[0].largest, curves[0].untried_above, tried) == (5, 8, [1, 2, 4, 8, 6, 5])
    for last, untried in ((8, None), (9, 8)):
        curves, _ = swept(scenario(tmp_path), Range("tokens", 1, last), answer)
        assert curves[0].untried_above == untried


def test_what_has_nothing_to_do_with_size_leaves_no_answer(tmp_path: Path) -> None:
    def answer(planned: PlannedCase, size: int) -> Case:
        wrong = planned.selection.variant == "other" and size > 30
        return ends(planned, "crash" if wrong else "ok" if size < 50 else "oom")

    curves, _ = swept(scenario(tmp_path), Range("tokens", 10, 100), answer)
    assert (curves[0].largest, curves[0].problem) == (49, "")
    assert (curves[1].largest, curves[1].problem[:11]) == (None, "crash at 40")


def test_a_declared_problem_is_told_from_a_surprise(tmp_path: Path) -> None:
    def wrong(expected: Outcome) -> list[Curve]:
        def answer(planned: PlannedCase, size: int) -> Case:
            return bare_case(digest=planned.digest, outcome="wrong", expected_outcome=expected, message=f"at {size}")

        return swept(scenario(tmp_path), Range("tokens", 10, 100), answer)[0]

    assert [(c.problem, c.declared) for c in wrong("wrong")] == [("wrong at 10: at 10", True)] * 2
    assert [(c.problem, c.declared) for c in wrong("ok")] == [("wrong at 10: at 10", False)] * 2


def test_what_a_card_has_no_room_for_is_too_large_and_what_was_skipped_otherwise_is_not(tmp_path: Path) -> None:
    def answer(needs: int | None) -> Callable[[PlannedCase, int], Case]:
        def answered(planned: PlannedCase, size: int) -> Case:
            if size <= 300:
                return ends(planned, "ok")
            known = None if needs is None else PrecheckRecord(needs, 1000, exact=True)
            return bare_case(digest=planned.digest, outcome="skipped", message="needs more", precheck=known)

        return answered

    curves, _ = swept(scenario(tmp_path), Range("tokens", 1, 1000), answer(1001))
    assert (curves[0].largest, curves[0].problem, curves[0].limited_by) == (300, "", "at 301: skipped: needs more")
    for needs in (None, 900):
        curves, _ = swept(scenario(tmp_path), Range("tokens", 1, 1000), answer(needs))
        assert curves[0].problem.startswith("skipped at 512")


def test_a_race_has_nothing_to_do_with_size(tmp_path: Path) -> None:
    answer = lambda planned, size: ends(planned, "hazard" if size <= 300 else "oom")  # noqa: E731
    curves, _ = swept(scenario(tmp_path), Range("tokens", 1, 1000), answer)
    assert (curves[0].largest, curves[0].problem) == (300, "")


def test_a_model_that_a_recording_refutes_is_said(tmp_path: Path) -> None:
    def answer(planned: PlannedCase, size: int) -> Case:
        return bare_case(digest=planned.digest, verify=VerifyRecord(10, int(size > 300)))

    curves, _ = swept(scenario(tmp_path), Range("tokens", 1, 1000), answer)
    assert curves[0].refuted == "at 512 the allocator model differs from what was recorded"


def test_only_integers_without_choices_are_sizes(tmp_path: Path) -> None:
    selections = select([scenario(tmp_path)], [], [], [])
    assert sweepable(selections, "tokens") == (selections, [])
    for name in ("mode", "width", "on", "tokns"):
        with pytest.raises(UsageError, match=f"--sweep {name}: no selected scenario .* sizes there are: tokens"):
            sweepable(selections, name)
