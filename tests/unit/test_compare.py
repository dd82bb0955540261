"""Results of two trees against each other: what is more, what is allowed to be, and what cannot be compared."""

from __future__ import annotations

from fractions import Fraction

import pytest

from fragscope.errors import UsageError
from fragscope.gate.compare import Comparison, Tolerance, compare, parse_tolerance
from fragscope.results import AssumptionRecord, Case, EstimatedOp, Peak, Results, Run

MIB = 2**20
GIB = 2**30


def case(name: str = "moe/v3/list", **changes: object) -> Case:
    scenario, preset, variant = name.split("/")
    return Case(
        **{
            "id": f"{name}@default",
            "digest": "d",
            "scenario": scenario,
            "preset": preset,
            "variant": variant,
            "role": "original",
            "torch": "2.13.0",
            "torch_installed": "2.13.0",
            "card": "h100-80gb",
            "device": "virtual",
            "outcome": "ok",
            "exact": True,
            "allocs": 7,
            "base": 1 * GIB,
            "base_requested": 1 * GIB,
            "transient": 1 * GIB,
            "retained": 1 * GIB,
            "peak": Peak(requested=3 * GIB, allocated=3 * GIB, reserved=3 * GIB, hbm=3 * GIB),
            "end": Peak(requested=2 * GIB, allocated=2 * GIB, reserved=3 * GIB, hbm=3 * GIB),
            **changes,
        }
    )


def results(*cases: Case) -> Results:
    return Results(run=Run(started="", seconds=0.0, complete=True, planned=len(cases)), cases=list(cases))


def compared(before: Case, after: Case, tolerance: Tolerance | None = None) -> Comparison:
    return compare(results(before), results(after), tolerance or Tolerance(), "main")


def peak(**changes: int) -> Peak:
    sizes = {"requested": 3 * GIB, "allocated": 3 * GIB, "reserved": 3 * GIB}
    sizes |= {name: sizes.get(name, 0) + more for name, more in changes.items()}
    return Peak(**sizes, hbm=sizes["reserved"])


def judged(found: Comparison) -> dict[str, str]:
    return {c.metric: "regressed" if c.regressed else "improved" if c.improved else "allowed" for c in found.changes}


def test_the_same_figures_are_no_change():
    found = compared(case(), case())
    assert (found.compared, found.changes, found.appeared, found.removed) == (1, [], [], [])


@pytest.mark.parametrize(("more", "word"), [(1, "regressed"), (-1, "improved")])
def test_requested_bytes_are_compared_exactly(more: int, word: str):
    assert judged(compared(case(), case(peak=peak(requested=more)))) == {"peak_requested": word}


@pytest.mark.parametrize(
    ("value", "more", "word"),
    [
        # One per cent of 3 GiB is 30.72 MiB, more than a large segment of 20 MiB.
        (3 * GIB, 3 * GIB // 100, "allowed"),
        (3 * GIB, 3 * GIB // 100 + 1, "regressed"),
        (3 * GIB, -(3 * GIB // 100) - 10**6, "improved"),
        (100 * MIB, 20 * MIB, "allowed"),
        (100 * MIB, 20 * MIB + 1, "regressed"),
        (100 * MIB, -20 * MIB, "allowed"),
    ],
)
@pytest.mark.parametrize("metric", ["allocated", "reserved"])
def test_what_moves_by_itself_has_a_segment_or_a_per_cent(metric: str, value: int, more: int, word: str):
    before, after = (case(peak=Peak(requested=1, **{metric: size})) for size in (value, value + more))
    assert judged(compared(before, after)) == {f"peak_{metric}": word}


def test_peak_hbm_is_said_only_where_memory_was_taken_past_the_allocator():
    more = peak(reserved=GIB)
    assert judged(compared(case(), case(peak=more))) == {"peak_reserved": "regressed"}
    raw = Peak(requested=3 * GIB, allocated=3 * GIB, reserved=3 * GIB, raw=GIB, hbm=4 * GIB)
    assert judged(compared(case(), case(peak=raw))) == {"peak_hbm": "regressed"}


def test_transient_is_exact_as_far_as_requested_bytes_tell():
    """Peak requested and transient both 1 byte more: the program asks for it."""
    after = case(transient=GIB + 1, peak=peak(requested=1))
    assert judged(compared(case(), after)) == {"peak_requested": "regressed", "transient": "regressed"}


@pytest.mark.parametrize(("more", "word"), [(20 * MIB, "allowed"), (21 * MIB, "regressed")])
def test_transient_that_only_blocks_make_larger_has_the_tolerance(more: int, word: str):
    found = compared(case(), case(transient=GIB + more, peak=peak(allocated=more)))
    assert judged(found)["transient"] == word
    (change,) = [c for c in found.changes if c.metric == "transient"]
    assert "requested bytes are no more; blocks are cut otherwise" in change.caveats


def test_what_is_no_longer_kept_may_be_transient():
    """Half of what stayed is freed at the end: the peak is the same, and so is what is beyond the base."""
    end = Peak(requested=2 * GIB - 512 * MIB, allocated=2 * GIB - 512 * MIB, reserved=3 * GIB, hbm=3 * GIB)
    freed = {"retained": 512 * MIB, "end": end}
    found = compared(case(), case(transient=GIB + 512 * MIB, **freed))
    assert judged(found) == {"transient": "allowed", "retained": "improved"}
    # One byte more than what was given up is more.
    found = compared(case(), case(transient=GIB + 512 * MIB + 1, peak=peak(requested=1, allocated=1), **freed))
    assert judged(found)["transient"] == "regressed"


def test_retained_is_exact_as_far_as_requested_bytes_tell():
    end = {"requested": 2 * GIB, "allocated": 2 * GIB + 5 * MIB, "reserved": 3 * GIB, "hbm": 3 * GIB}
    assert judged(compared(case(), case(retained=GIB + 5 * MIB, end=Peak(**end)))) == {"retained": "allowed"}
    end["requested"] += 512
    assert judged(compared(case(), case(retained=GIB + 5 * MIB, end=Peak(**end)))) == {"retained": "regressed"}


def test_regressions_come_first_and_the_largest_of_them():
    after = case(peak=peak(requested=10 * MIB, allocated=1, reserved=GIB), transient=512 * MIB)
    assert [(c.metric, c.regressed) for c in compared(case(), after).changes] == [
        ("peak_reserved", True),
        ("peak_requested", True),
        ("transient", False),
        ("peak_allocated", False),
    ]


# --- outcomes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["oom", "crash", "timeout", "unsupported", "wrong", "hazard", "overflow"])
def test_an_outcome_that_is_not_declared_and_was_not_there_is_a_regression(outcome: str):
    found = compared(case(), case(outcome=outcome, message="why"))
    assert [(o.before, o.after, o.regressed, o.message) for o in found.outcomes] == [("ok", outcome, True, "why")]
    assert found.compared == 1


def test_a_mended_outcome_is_none_and_says_what_it_was():
    found = compared(case(outcome="crash", message="TypeError"), case())
    assert [(o.before, o.after, o.regressed, o.message) for o in found.outcomes] == [
        ("crash", "ok", False, "TypeError")
    ]
    assert (found.compared, found.changes) == (0, [])  # there is nothing to hold its values against


def test_an_outcome_that_is_declared_now_does_not_fail():
    found = compared(case(), case(outcome="oom", expected_outcome="oom"))
    assert [o.regressed for o in found.outcomes] == [False]


def test_cases_that_end_early_alike_are_compared_by_that_alone():
    found = compared(case(outcome="oom"), case(outcome="oom", peak=peak(requested=GIB)))
    assert (found.compared, found.changes, found.outcomes) == (1, [], [])


def test_a_race_does_not_keep_values_from_being_compared():
    found = compared(case(), case(outcome="hazard", peak=peak(requested=1)))
    assert [o.after for o in found.outcomes] == ["hazard"]
    assert judged(found) == {"peak_requested": "regressed"}


# --- what cannot be compared --------------------------------------------------------------------------------------


def test_a_skipped_case_is_not_measured():
    found = compared(case(), case(outcome="skipped", message="needs a package"))
    assert [(n.case and n.case.name, n.reason) for n in found.not_measured] == [
        ("moe/v3/list", "skipped: needs a package")
    ]
    assert found.compared == 0
    assert compared(case(outcome="skipped"), case()).not_measured == []  # that was the other side


def test_a_new_operator_of_unknown_footprint_is_not_measured():
    sort, more = EstimatedOp("aten::sort", 3), EstimatedOp("aten::sort", 4)
    estimated = {"exact": False}
    same = compared(case(estimated_ops=[sort], **estimated), case(estimated_ops=[sort], **estimated))
    assert same.not_measured == []
    for before in ([], [sort]):
        found = compared(case(estimated_ops=before, **estimated), case(estimated_ops=[more], **estimated))
        (entry,) = found.not_measured
        assert "hidden temporaries of aten::sort are unknown" in entry.reason
    assert compared(case(estimated_ops=[more], **estimated), case()).not_measured == []


def test_estimated_values_are_compared_and_marked():
    estimated = {"exact": False, "estimated_ops": [EstimatedOp("aten::sort", 3)]}
    found = compared(case(**estimated), case(peak=peak(requested=1), **estimated))
    (change,) = found.changes
    assert change.regressed
    assert change.caveats == [
        "before: estimated: hidden temporaries of aten::sort are unknown",
        "estimated: hidden temporaries of aten::sort are unknown",
    ]


def test_cases_of_one_side_are_said():
    found = compare(results(case("a/b/c"), case("a/b/d")), results(case("a/b/d"), case("a/b/e")), Tolerance(), "main")
    assert [(o.case.name, o.reason) for o in found.appeared] == [("a/b/e", "main has no such case")]
    assert [(o.case.name, o.reason) for o in found.removed] == [("a/b/c", "only main has it")]
    nothing = compare(None, results(case()), Tolerance(), "main")
    assert (nothing.compared, len(nothing.appeared)) == (0, 1)


def test_a_preset_with_other_values_is_another_case():
    before = case(params={"experts": 64, "layers": 2})
    found = compared(before, case(params={"experts": 128, "layers": 2}, peak=peak(requested=GIB)))
    assert (found.compared, found.changes) == (0, [])
    assert [o.reason for o in found.appeared] == ["its values are others: experts 64 → 128"]
    # A parameter that is new has one value, whatever that is.
    assert compared(before, case(params={"experts": 64, "layers": 2, "mode": "fast"})).compared == 1


# --- tolerances ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [
        ("64 MiB", Tolerance(64 * MIB, Fraction(0))),
        ("0", Tolerance(0, Fraction(0))),
        (" 2.5 % ", Tolerance(0, Fraction(1, 40))),
        ("0%", Tolerance(0, Fraction(0))),
    ],
)
def test_tolerances_are_a_size_or_a_share(text: str, tolerance: Tolerance):
    assert parse_tolerance(text, "--tolerance") == tolerance


@pytest.mark.parametrize("text", ["much", "-1", "101 %", "-1 %", "nan %", "1/0 %", "%", ""])
def test_anything_else_is_refused_with_its_place(text: str):
    with pytest.raises(UsageError, match=r"^--tolerance: "):
        parse_tolerance(text, "--tolerance")


def test_a_size_replaces_the_share_and_the_other_way_round():
    before, after = case(), case(peak=peak(reserved=30 * MIB))
    assert judged(compared(before, after)) == {"peak_reserved": "allowed"}
    assert judged(compared(before, after, parse_tolerance("20 MiB", "x"))) == {"peak_reserved": "regressed"}
    assert judged(compared(before, after, parse_tolerance("0.5 %", "x"))) == {"peak_reserved": "regressed"}


@pytest.mark.parametrize("outcome", ["oom", "unsupported"])
def test_an_early_end_that_is_declared_in_the_same_change_is_no_improvement(outcome: str):
    (change,) = compared(case(), case(outcome=outcome, expected_outcome=outcome)).outcomes
    assert (change.regressed, change.declared, change.word) == (False, True, "declared otherwise")
    (mended,) = compared(case(outcome=outcome, expected_outcome=outcome), case()).outcomes
    assert (mended.declared, mended.word) == (False, "improved")


def test_figures_that_were_exact_and_are_no_more_are_not_measured():
    guess = AssumptionRecord(code="capacity_assumed", effect="unknown", events=1)
    (missing,) = compared(case(), case(exact=False, assumptions=[guess])).not_measured
    assert "were exact and are no more" in missing.reason
    assert "capacity_assumed" in missing.reason
    assert compared(case(exact=False, assumptions=[guess]), case(exact=False, assumptions=[guess])).not_measured == []
