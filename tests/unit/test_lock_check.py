"""Results against a lock: every difference is a finding, savings included."""

from __future__ import annotations

import msgspec
import pytest
from builders import results_of
from test_lock import ID, MIB, case

from fragscope.gate import Budgets, Verdict, evaluate, hold_to_lock, lock_of, lock_text, parse_budgets, parse_lock
from fragscope.gate.lock import Lock, LockOptions
from fragscope.gate.render import as_text
from fragscope.results import Case, Peak, Results

STRICT = LockOptions()


def locked(*cases: Case, **run: object) -> Lock:
    return parse_lock(lock_text(lock_of(results_of(list(cases), **run), "fragscope.lock")[0]))


def held(lock: Lock, *cases: Case, options: LockOptions = STRICT, **run: object) -> Verdict:
    results: Results = results_of(list(cases), **run)
    return hold_to_lock(evaluate(results, Budgets("", ()), also_held=True), results, lock, options)


def kinds(verdict: Verdict) -> list[tuple[str, str, object, object]]:
    return [(d.kind, d.metric, d.locked, d.value) for d in verdict.lock_differences]


def test_what_is_as_locked_passes():
    verdict = held(locked(case(), case("b")), case("b"), case())
    assert (verdict.decision, verdict.exit_code, kinds(verdict)) == ("pass", 0, [])
    assert verdict.lock is not None
    assert (verdict.lock.file, verdict.lock.cases, verdict.lock.held, verdict.lock.note) == ("fragscope.lock", 2, 2, "")
    assert as_text(verdict) == "pass: 2 locked cases compared\n"


@pytest.mark.parametrize(("by", "kind"), [(1, "larger"), (-1, "smaller")])
@pytest.mark.parametrize(
    "metric", ["peak_requested", "peak_allocated", "peak_reserved", "peak_hbm", "transient", "retained", "stranded"]
)
def test_one_byte_is_a_difference(metric, by, kind):
    def with_one_more(by: int) -> Case:
        if metric in ("transient", "retained"):
            return case(**{metric: getattr(case(), metric) + by})
        which, name = ("end", "stranded") if metric == "stranded" else ("peak", metric.removeprefix("peak_"))
        counters = getattr(case(), which)
        return case(**{which: msgspec.structs.replace(counters, **{name: getattr(counters, name) + by})})

    verdict = held(locked(case()), with_one_more(by))
    assert verdict.exit_code == 3
    (difference,) = verdict.lock_differences
    assert (difference.kind, difference.metric, difference.value - difference.locked) == (kind, metric, by)


def test_a_value_that_follows_from_another_is_not_said_twice():
    peak = Peak(requested=3 * MIB, allocated=4 * MIB, reserved=8 * MIB, hbm=8 * MIB)
    assert [d.metric for d in held(locked(case()), case(peak=peak)).lock_differences] == ["peak_reserved"]


def test_the_line_is_that_of_the_value():
    lock = locked(case())
    (difference,) = held(lock, case(transient=0)).lock_differences
    text = lock_text(lock).split("\n")
    assert text[difference.lock.line - 1].startswith("transient = ")
    assert difference.lock.place == f"fragscope.lock:{difference.lock.line}"


def test_larger_values_come_first_and_the_largest_of_them_at_the_top():
    lock = locked(*(case(name) for name in "abcd"))
    verdict = held(lock, case("a", transient=0), case("b", transient=5 * MIB), case("c", transient=9 * MIB), case("d"))
    assert [d.case.id for d in verdict.lock_differences] == ["c", "b", "a"]


def test_text_says_what_and_where_and_what_to_do():
    verdict = held(locked(case(), case("b")), case(transient=3 * MIB), case("b", retained=-2048))
    assert as_text(verdict).splitlines() == [
        f"larger than locked  {ID}  transient  locked 2.00 MiB  value 3.00 MiB  difference 1.00 MiB (+50.0 %)  "
        "[fragscope.lock:20]",
        "smaller than locked  b  retained  locked -1.50 KiB  value -2.00 KiB  difference -512 B  "
        "lock it with 'fragscope lock --update'  [fragscope.lock:13]",
        "fail: 1 value larger than locked, 1 value smaller than locked; 2 locked cases compared",
    ]


def test_savings_fail_unless_the_repository_allows_them():
    lock = locked(case())
    assert held(lock, case(transient=0)).exit_code == 3
    verdict = held(lock, case(transient=0), options=LockOptions(improvements=True))
    assert (verdict.exit_code, kinds(verdict)) == (0, [("smaller", "transient", 2 * MIB, 0)])
    assert "allowed by [lock]" in as_text(verdict)
    assert held(lock, case(transient=3 * MIB), options=LockOptions(improvements=True)).exit_code == 3


def test_a_new_case_fails_unless_the_repository_allows_it():
    lock = locked(case())
    verdict = held(lock, case(), case("new"))
    assert (verdict.exit_code, kinds(verdict)) == (3, [("unlocked", "", None, None)])
    assert "not locked  new  lock it with" in as_text(verdict)
    assert held(lock, case(), case("new"), options=LockOptions(new=True)).exit_code == 0


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"outcome": "skipped"}])
def test_what_cannot_be_locked_needs_no_lock(changes):
    assert held(locked(case()), case(), case("other", **changes)).exit_code == 0


def test_a_locked_case_that_was_not_run_is_not_measured():
    verdict = held(locked(case(), case("gone")), case())
    assert (verdict.decision, verdict.exit_code) == ("not_measured", 4)
    (entry,) = verdict.not_measured
    assert entry.reason == "gone is locked, and was not run"
    assert entry.lock is not None
    assert entry.lock.line == 8
    assert "not measured  gone is locked, and was not run  [fragscope.lock:8]\n" in as_text(verdict)


def test_a_locked_case_that_was_skipped_is_not_measured():
    verdict = held(locked(case()), case(outcome="skipped", message="needs 9 GiB"))
    assert verdict.exit_code == 4
    assert verdict.not_measured[0].reason == "is locked, and was skipped: needs 9 GiB"


def test_an_incomplete_run_is_not_a_pass():
    verdict = held(locked(case()), case(), complete=False)
    assert verdict.exit_code == 4
    assert "incomplete" in verdict.not_measured[0].reason


def test_another_outcome_is_one_difference_and_no_figures_are_compared():
    declared = {"outcome": "oom", "expected_outcome": "oom"}
    assert kinds(held(locked(case()), case(**declared))) == [("changed", "outcome", "ok", "oom")]
    verdict = held(locked(case(**declared)), case(expected_outcome="ok"))
    assert kinds(verdict) == [("changed", "outcome", "oom", "ok")]
    assert "not as locked" in as_text(verdict)
    assert "outcome ok, locked oom" in as_text(verdict)


def test_figures_that_are_no_longer_exact_are_a_difference_though_equal():
    verdict = held(locked(case()), case(exact=False))
    assert (verdict.exit_code, kinds(verdict)) == (3, [("changed", "exactness", "exact", "estimated")])
    assert held(locked(case(exact=False)), case(exact=False)).exit_code == 0


def test_cases_of_other_rules_are_named_once_and_with_both_releases():
    other = ID.replace("torch-2.13", "torch-2.14")
    verdict = held(locked(case()), case(other))
    assert kinds(verdict) == [("unlocked", "", None, None)]
    assert verdict.not_measured == []
    assert "it is locked under the rules of torch 2.13, not of 2.14" in as_text(verdict)
    assert held(locked(case()), case(other), options=LockOptions(new=True)).exit_code == 3  # it is no new case


def test_what_measured_the_lock_is_said_where_it_is_something_else():
    lock = locked(case(), versions={"fragscope": "0.1.0", "torch": "2.12.1"})
    verdict = held(lock, case())
    assert verdict.exit_code == 0
    assert verdict.lock is not None
    assert verdict.lock.note == "the lock was made with torch 2.12.1, not 2.13.0"
    assert "lock  the lock was made with torch 2.12.1, not 2.13.0\n" in as_text(verdict)


def test_budgets_hold_beside_the_lock():
    results = results_of([case()])
    verdict = evaluate(results, parse_budgets('[budget."*/*/*"]\ntransient = 1\n'), also_held=True)
    verdict = hold_to_lock(verdict, results, locked(case()), LockOptions())
    assert verdict.exit_code == 3
    assert as_text(verdict).splitlines()[-1] == (
        "fail: 1 value over budget; 1 value of 1 case held against 1 budget; 1 locked case compared"
    )
