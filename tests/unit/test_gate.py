"""Results against budgets: what passes, what does not, and what was never measured."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragscope.errors import InputFileError
from fragscope.gate import Verdict, evaluate, parse_budgets
from fragscope.gate.markdown import as_markdown
from fragscope.gate.render import as_text
from fragscope.results import AssumptionRecord, Case, EstimatedOp, LossRecord, Peak, Results, Run, VerifyRecord

MIB = 2**20

FIGURES = {
    "allocs": 7,
    "peak": Peak(requested=100, allocated=200, active=250, reserved=300, stranded=999),
    "end": Peak(requested=10, allocated=20, reserved=300, stranded=40),
    "transient": 50,
    "retained": -5,
}


def _case(name: str = "moe/v3/list", **changes: object) -> Case:
    scenario, preset, variant = name.split("/")
    return Case(
        **{
            "id": name,
            "digest": "d",
            "scenario": scenario,
            "preset": preset,
            "variant": variant,
            "role": "original",
            "torch": "2.11.0",
            "torch_installed": "2.11.0",
            "card": "h100-80gb",
            "device": "virtual",
            "outcome": "ok",
            "exact": True,
            **FIGURES,
            **changes,
        }
    )


def _results(*cases: Case, complete: bool = True, planned: int | None = None) -> Results:
    planned = len(cases) if planned is None else planned
    return Results(
        run=Run(started="2025-01-01T00:00:00Z", seconds=1.0, complete=complete, planned=planned), cases=list(cases)
    )


def _gate(text: str, *cases: Case, **run: object) -> Verdict:
    return evaluate(_results(*cases, **run), parse_budgets(text))


def _over(verdict: Verdict) -> list[tuple[str, str]]:
    return [(check.case.name, check.metric) for check in verdict.over]


ANY = '[budget."*/*/*"]\nretained = 0\n'


# --- values and limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("peak_requested", 100),
        ("peak_allocated", 200),
        ("peak_reserved", 300),
        ("transient", 50),
        ("stranded", 40),
    ],
)
def test_equal_passes_and_one_byte_more_does_not(metric, value):
    within = _gate(f'[budget."moe/v3/list"]\n{metric} = {value}\n', _case())
    assert (within.decision, within.exit_code, within.over) == ("pass", 0, [])
    over = _gate(f'[budget."moe/v3/list"]\n{metric} = {value - 1}\n', _case())
    assert (over.decision, over.exit_code) == ("over", 3)
    (check,) = over.over
    assert (check.metric, check.value, check.limit, check.excess) == (metric, value, value - 1, 1)
    assert (check.budget.pattern, check.budget.file, check.budget.line) == ("moe/v3/list", "budgets.toml", 2)


def test_a_phase_that_gave_memory_back_is_within_a_retained_limit_of_0():
    assert _gate(ANY, _case(retained=-5)).exit_code == 0
    assert _gate(ANY, _case(retained=0)).exit_code == 0
    assert _gate(ANY, _case(retained=1)).exit_code == 3


def test_the_worst_excess_comes_first_whatever_the_order_of_the_cases():
    cases = [_case(f"moe/v3/{v}", transient=t) for v, t in [("a", 60), ("b", 900), ("c", 70), ("d", 900), ("e", 5)]]
    expected = [
        ("moe/v3/b", "transient"),
        ("moe/v3/d", "transient"),
        ("moe/v3/c", "transient"),
        ("moe/v3/a", "transient"),
    ]
    verdicts = []
    for seed in range(5):
        random.Random(seed).shuffle(cases)
        verdict = _gate('[budget."moe/*/*"]\ntransient = 50\n', *cases)
        assert _over(verdict) == expected
        verdicts.append(msgspec.json.encode(verdict))
    assert len(set(verdicts)) == 1


# --- which budget counts ------------------------------------------------------------------------------------------


def test_each_metric_comes_from_the_most_specific_budget_that_states_it():
    verdict = _gate(
        """\
[budget."moe/v3/list"]
transient = 50
[budget."moe/*/*"]
transient = 1
peak_reserved = 299
[budget."*/*/*"]
peak_reserved = 1
stranded = 39
""",
        _case(),
    )
    assert {c.metric: (c.limit, c.budget.line) for c in verdict.checks} == {
        "transient": (50, 2),
        "peak_reserved": (299, 5),
        "stranded": (39, 8),
    }
    assert _over(verdict) == [("moe/v3/list", "peak_reserved"), ("moe/v3/list", "stranded")]


def test_a_narrowed_budget_holds_only_its_cases_and_beats_the_open_one():
    expandable = "expandable_segments:True"
    verdict = _gate(
        f"""\
[[budget."moe/v3/*"]]
transient = 50
[[budget."moe/v3/*"]]
conf = "{expandable}"
transient = 49
""",
        _case(id="plain"),
        _case(id="expandable", conf=expandable),
    )
    assert [(c.case.id, c.limit) for c in verdict.checks] == [("expandable", 49), ("plain", 50)]
    assert [c.case.id for c in verdict.over] == ["expandable"]


def test_equally_specific_budgets_that_disagree_are_an_error_naming_both():
    text = '[budget."moe/v3/*"]\ntransient = 50\n\n[budget."moe/*/list"]\nretained = 0\ntransient = 51\n'
    # Literal text: "moe/v3/" and "moe//list" differ in length, so the longer one wins and nothing ties.
    assert _gate(text, _case()).checks[0].budget.pattern == "moe/*/list"
    text = text.replace("moe/*/list", "moe/*/ab")
    with pytest.raises(InputFileError) as caught:
        _gate(text, _case("moe/v3/ab"))
    message = str(caught.value)
    for part in ("budgets.toml", "line 6", "line 2", "moe/v3/*", "moe/*/ab", "transient", "50 B", "51 B", "moe/v3/ab"):
        assert part in message
    assert caught.value.exit_code == 5


def test_equally_specific_budgets_may_agree_or_state_different_metrics():
    text = '[budget."moe/v3/*"]\ntransient = 50\nretained = 0\n[budget."moe/*/ab"]\ntransient = 50\nstranded = 40\n'
    verdict = _gate(text, _case("moe/v3/ab"))
    assert verdict.exit_code == 0
    assert {c.metric: c.budget.line for c in verdict.checks} == {"transient": 2, "retained": 3, "stranded": 6}


def test_a_budget_whose_every_metric_is_stated_more_specifically_is_not_missing():
    verdict = _gate('[budget."*/*/*"]\ntransient = 1\n[budget."moe/v3/list"]\ntransient = 50\n', _case())
    assert (verdict.exit_code, verdict.not_measured) == (0, [])


# --- not measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["skipped", "crash", "timeout", "unsupported"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_case_under_a_budget_must_have_been_measured(outcome, declared):
    case = _case(outcome=outcome, expected_outcome=outcome if declared else "ok", message="needs 39,454 MiB")
    verdict = _gate(ANY, case)
    assert (verdict.decision, verdict.exit_code) == ("not_measured", 4)
    (entry,) = verdict.not_measured
    assert entry.case.id == "moe/v3/list"
    assert entry.reason == f"{outcome}: needs 39,454 MiB"
    assert (verdict.checks, verdict.undeclared, verdict.cases_held) == ([], [], 0)


def test_a_case_without_figures_was_not_measured():
    verdict = _gate(ANY, _case(allocs=0, peak=Peak(), end=Peak()))
    assert verdict.exit_code == 4
    assert "no figures" in verdict.not_measured[0].reason


def test_a_budget_that_matches_no_case():
    verdict = _gate('[budget."moe/v3/list"]\nretained = 0\n[budget."mow/*/*"]\nretained = 0\n', _case())
    assert verdict.exit_code == 4
    (entry,) = verdict.not_measured
    assert (entry.case, entry.budget.pattern, entry.budget.line) == (None, "mow/*/*", 3)
    assert entry.reason == "no case matches: none has the scenario mow; did you mean moe?"


def test_a_budget_that_only_its_narrowing_keeps_from_every_case():
    text = '[budget."moe/*/*"]\nretained = 0\ncard = "b200"\ntorch = "2.11"\n'
    verdict = _gate(text, _case(), _case("other/v3/list", card="b200"))
    assert verdict.exit_code == 4
    assert verdict.not_measured[0].reason == "no case matches: those of that name have card h100-80gb, not b200"


@pytest.mark.parametrize(("complete", "planned"), [(False, 5), (True, 5), (False, 2)])
def test_an_incomplete_run_is_not_a_pass(complete, planned):
    verdict = _gate(ANY, _case("a/b/c"), _case("a/b/d"), complete=complete, planned=planned)
    assert verdict.exit_code == 4
    assert f"2 of {planned} planned cases" in verdict.not_measured[0].reason
    assert len(verdict.checks) == 2


def test_nothing_held_against_a_budget_is_not_a_pass():
    verdict = _gate("[budget]\n", _case())
    assert verdict.exit_code == 4
    assert "nothing was held against a budget" in as_text(verdict)
    assert _gate(ANY).exit_code == 4


# --- outcomes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["oom", "overflow", "wrong", "hazard"])
def test_an_undeclared_outcome_fails_although_its_figures_are_within(outcome):
    verdict = _gate(ANY, _case(outcome=outcome, message="why"))
    assert verdict.exit_code == 3
    (entry,) = verdict.undeclared
    assert (entry.case.id, entry.outcome, entry.expected_outcome) == ("moe/v3/list", outcome, "ok")
    assert verdict.cases_held == 1


def test_what_a_recording_refutes_can_be_over_a_limit_but_never_within_it():
    case = _case(exact=False, verify=VerifyRecord(1000, 7, "event 3: recorded a, modelled b"))
    within = _gate(ANY, case)
    assert (within.exit_code, within.checks) == (4, [])
    (line, _) = as_text(within).splitlines()
    assert line.startswith(
        "not measured  moe/v3/list  the model differs from the recording in 7 of 1,000 comparisons: "
    )
    assert "retained may not be what the card had" in line
    assert "7 of 1,000" in as_markdown(within)
    verdict = _gate('[budget."moe/*/*"]\ntransient = 49\n', case)
    assert verdict.exit_code == 3
    assert "the model differs from the recording in 7 decisions" in as_text(verdict).splitlines()[0]
    assert _gate(ANY, _case(verify=VerifyRecord(1000, 0))).exit_code == 0


def test_an_outcome_that_was_declared_and_did_not_happen_is_undeclared():
    assert _gate(ANY, _case(outcome="ok", expected_outcome="oom")).exit_code == 3


def test_what_an_oom_reached_can_be_over_a_limit_but_never_within_it():
    case = _case(outcome="oom", expected_outcome="oom")
    within = _gate(ANY, case)
    assert within.exit_code == 4
    assert "out-of-memory" in within.not_measured[0].reason
    verdict = _gate('[budget."moe/*/*"]\ntransient = 49\n', case)
    assert verdict.exit_code == 3
    assert "lower bound" in as_text(verdict)


@pytest.mark.parametrize("outcome", ["oom", "crash", "timeout", "unsupported", "wrong"])
def test_an_undeclared_outcome_needs_no_budget(outcome):
    for text in ("", '[budget."moe/v3/list"]\nretained = 0\n'):
        verdict = _gate(text, _case(), _case("other/v3/list", outcome=outcome))
        assert verdict.exit_code == 3
        assert [u.case.name for u in verdict.undeclared] == ["other/v3/list"]


def test_a_skipped_case_without_a_budget_is_no_trouble():
    verdict = _gate('[budget."moe/v3/list"]\nretained = 0\n', _case(), _case("other/v3/list", outcome="skipped"))
    assert (verdict.exit_code, verdict.cases_without_budget) == (0, 1)


def test_over_budget_wins_over_not_measured_and_both_are_said():
    text = '[budget."moe/*/*"]\ntransient = 49\n'
    verdict = _gate(text, _case(), _case("moe/v3/stack", outcome="skipped", message="no flashinfer"))
    assert (verdict.decision, verdict.exit_code) == ("over", 3)
    said = as_text(verdict)
    assert "over  moe/v3/list  transient" in said
    assert "not measured  moe/v3/stack  skipped: no flashinfer  [budgets.toml:1]" in said


# --- what it says -------------------------------------------------------------------------------------------------


def test_an_over_budget_line():
    case = _case("moe-fp8-shuffle/deepseek-v3-tp8/list-stack", transient=3636 * MIB)
    verdict = _gate('# limits\n[budget."moe-fp8-shuffle/*/*"]\ntransient = "2300 MiB"\n', case)
    assert as_text(verdict).splitlines() == [
        "over  moe-fp8-shuffle/deepseek-v3-tp8/list-stack  transient  budget 2,300.00 MiB  value 3,636.00 MiB  "
        "excess 1,336.00 MiB (+58.1 %)  [budgets.toml:3]",
        "fail: 1 value over budget; 1 value of 1 case held against 1 budget",
    ]


def test_a_byte_of_excess_is_not_rounded_away():
    verdict = _gate('[budget."moe/*/*"]\ntransient = "2300 MiB"\n', _case(transient=2300 * MIB + 1))
    assert "budget 2,411,724,800 B  value 2,411,724,801 B  excess 1 B (+<0.1 %)" in as_text(verdict)


def test_a_limit_of_0_has_no_percentage():
    assert "budget 0 B  value 50 B  excess 50 B  [" in as_text(_gate('[budget."moe/*/*"]\ntransient = 0\n', _case()))


def test_a_pass_says_how_much_was_compared_and_how_much_was_not():
    text = as_text(_gate('[budget."moe/v3/list"]\nretained = 0\ntransient = 50\n', _case(), _case("a/b/c")))
    assert text == "pass: 2 values of 1 case held against 1 budget; 1 case has no budget\n"


def test_cases_that_share_a_name_are_told_apart_by_id():
    verdict = _gate('[budget."moe/*/*"]\ntransient = 49\n', _case(id="one"), _case(id="two"), _case("moe/v3/x", id="y"))
    assert [name for name, _ in _over(verdict)] == ["moe/v3/x", "one", "two"]


@pytest.mark.parametrize("limit", [49, 50])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"estimated_ops": [EstimatedOp("aten::sort", 3), EstimatedOp("aten::topk", 1)]},
         ["estimated", "aten::sort", "aten::topk"]),
        ({"assumptions": [AssumptionRecord("inferred-pool", "unknown", 2), AssumptionRecord("tie", "none", 1)]},
         ["estimated", "unknown effect: inferred-pool"]),
        ({"assumptions": [AssumptionRecord("free-order", "bounded", 2)]}, ["estimated", "bounded effect: free-order"]),
        ({}, ["estimated"]),
        ({"lost": [LossRecord("ring-overflow", "first 10 events")]}, ["ring-overflow"]),
    ],
)  # fmt: skip
def test_a_value_that_is_not_exact_is_compared_and_called_so(limit, changes, words):
    verdict = _gate(f'[budget."moe/*/*"]\ntransient = {limit}\n', _case(exact=False, **changes))
    assert verdict.exit_code == (3 if limit == 49 else 0)
    line = as_text(verdict).splitlines()[0]
    assert line.startswith("over  moe/v3/list" if limit == 49 else "within  moe/v3/list  transient")
    for word in words:
        assert word in line
        assert word in as_markdown(verdict)
    assert "tie" not in line
    (check,) = verdict.checks
    assert check.exact is False
    assert check.estimated_ops == sorted(op.op for op in changes.get("estimated_ops", []))


def test_markdown_is_a_table_that_hostile_names_cannot_leave():
    case = _case("moe/v|3/`<img>`", id="x", message="@everyone\n# hi")
    verdict = _gate('[budget."moe/*/*"]\ntransient = 49\n', case, _case("a/b/c", outcome="crash", message="@all\n# hi"))
    said = as_markdown(verdict)
    assert "### fragscope gate: failed" in said
    assert (
        r"| over | `` moe/v\x7c3/`<img>` `` | `transient` | 49 B | 50 B | 1 B (+2.0 %) | `budgets.toml:2` |  |" in said
    )
    assert r", `@all\n# hi`" in said


_HOSTILE = st.text(max_size=12)


@given(_HOSTILE, _HOSTILE, _HOSTILE, st.sampled_from(["ok", "oom", "crash"]))
def test_text_is_one_harmless_line_for_each_thing(scenario, identity, message, outcome):
    case = msgspec.structs.replace(_case(), scenario=scenario, id=identity, message=message, outcome=outcome)
    verdict = evaluate(_results(case, case), parse_budgets('[budget."*/*/*"]\ntransient = 49\n'))
    lines = as_text(verdict).split("\n")
    assert all(line.isprintable() for line in lines)
    troubles = len(verdict.over) + len(verdict.undeclared) + len(verdict.not_measured)
    assert len(lines) == troubles + 2  # the summary, and what follows its line end
    assert all(line.isprintable() for line in as_markdown(verdict).split("\n"))


# --- properties ---------------------------------------------------------------------------------------------------

_PART = st.sampled_from(["a", "b", "ab", "*"])
_TABLES = st.dictionaries(
    st.tuples(_PART, _PART, _PART).map("/".join),
    st.dictionaries(st.sampled_from(["transient", "stranded"]), st.integers(0, 3), min_size=1),
    max_size=5,
)
_CASES = st.lists(
    st.builds(
        lambda name, transient, stranded: _case(name, transient=transient, end=Peak(stranded=stranded)),
        st.tuples(*[st.sampled_from(["a", "b", "ab"])] * 3).map("/".join), st.integers(0, 4), st.integers(0, 4),
    ),
    max_size=5,
)  # fmt: skip


@given(_TABLES, _CASES, st.randoms(use_true_random=False))
def test_order_never_matters_and_over_means_above(tables, cases, shuffler):
    cases = [msgspec.structs.replace(case, id=f"{i}") for i, case in enumerate(cases)]
    text = "".join(
        f'[budget."{pattern}"]\n' + "".join(f"{key} = {value}\n" for key, value in limits.items())
        for pattern, limits in tables.items()
    )
    budgets = parse_budgets(text)
    shuffled = list(cases)
    shuffler.shuffle(shuffled)
    other = dataclasses.replace(budgets, budgets=tuple(reversed(budgets.budgets)))
    try:
        verdict = evaluate(_results(*cases), budgets)
    except InputFileError:
        with pytest.raises(InputFileError):
            evaluate(_results(*shuffled), other)
        return
    assert verdict == evaluate(_results(*shuffled), other)
    for check in verdict.checks:
        assert check.over == (check.value > check.limit) == (check.excess > 0)
    assert [c.over for c in verdict.checks] == sorted((c.over for c in verdict.checks), reverse=True)
    assert (verdict.exit_code == 3) == any(c.over for c in verdict.checks)


def test_json_keeps_its_keys():
    verdict = msgspec.to_builtins(_gate('[budget."moe/*/*"]\ntransient = 49\n', _case()))
    assert set(verdict) >= {"schema_version", "decision", "exit_code", "budgets", "cases", "cases_held", "checks",
                            "cases_without_budget", "undeclared", "not_measured"}  # fmt: skip
    assert verdict["schema_version"] == 1
    assert set(verdict["checks"][0]) >= {"case", "metric", "limit", "value", "excess", "over", "budget", "exact",
                                         "estimated_ops", "assumptions", "caveats"}  # fmt: skip
    assert set(verdict["checks"][0]["case"]) >= {"id", "name", "scenario", "preset", "variant", "conf", "torch", "card",
                                                 "device"}  # fmt: skip
    assert set(verdict["checks"][0]["budget"]) >= {"pattern", "file", "line"}


def test_the_gate_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import fragscope.gate.render, fragscope.cli.gate; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n")
