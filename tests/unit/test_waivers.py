"""Waivers: what they cover, until when, and what is said of them."""

from __future__ import annotations

import datetime

import msgspec
import pytest
from builders import results_of
from test_lock import MIB, case
from test_lock_check import held, locked

from fragscope.errors import InputFileError
from fragscope.gate import Verdict, decided, evaluate, hold_to_lock, parse_budgets, waive
from fragscope.gate.render import as_text
from fragscope.gate.verdict import CaseName, Change
from fragscope.results import Case

TODAY = datetime.date(2026, 5, 4)
WAIVER = """\
[[waiver]]
case = "moe/*/list"
metrics = ["transient"]
owner = "@jane"
reason = "fixed upstream in 0.21"
expires = 2026-05-04
"""
BUDGET = '[budget."moe/*/*"]\ntransient = "1 MiB"\n'  # the case has 2 MiB


def gate(text: str, *cases: Case, today: datetime.date = TODAY) -> Verdict:
    budgets = parse_budgets(text)
    verdict = evaluate(results_of(list(cases or [case()])), budgets, also_held=not budgets.budgets)
    return waive(verdict, budgets.waivers, "budgets.toml", today)


def states(verdict: Verdict) -> list[tuple[str, int]]:
    return [(use.state, use.findings) for use in verdict.waivers]


def test_a_waived_excess_passes_and_is_shown_with_who_answers_for_it():
    verdict = gate(BUDGET + WAIVER)
    assert (verdict.decision, verdict.exit_code, states(verdict)) == ("pass", 0, [("applied", 1)])
    assert as_text(verdict).splitlines() == [
        "waived  moe/v3/list  transient  budget 1.00 MiB  value 2.00 MiB  excess 1.00 MiB (+100.0 %)  "
        "waived until 2026-05-04 by @jane: fixed upstream in 0.21 (budgets.toml:3)  [budgets.toml:2]",
        "pass: 1 value of 1 case held against 1 budget; 1 waived",
    ]


def test_it_applies_on_its_last_day_and_not_on_the_next():
    assert gate(BUDGET + WAIVER, today=datetime.date(2026, 5, 4)).exit_code == 0
    verdict = gate(BUDGET + WAIVER, today=datetime.date(2026, 5, 5))
    assert (verdict.exit_code, states(verdict)) == (3, [("expired", 1)])
    assert (
        "waiver  moe/*/list transient  expired on 2026-05-04 and no longer applies to 1 finding  owner @jane  "
        "fixed upstream in 0.21  [budgets.toml:3]\n" in as_text(verdict)
    )


def test_an_expired_waiver_that_nothing_needs_is_to_be_removed():
    verdict = gate(BUDGET + WAIVER, case(transient=0), today=datetime.date(2027, 1, 1))
    assert (verdict.exit_code, states(verdict)) == (0, [("expired", 0)])
    assert "no longer applies; remove it" in as_text(verdict)


@pytest.mark.parametrize(("limit", "code", "state"), [("2 MiB", 0, "applied"), ("2097151", 3, "exceeded")])
def test_a_limit_is_the_most_that_is_waived(limit, code, state):
    verdict = gate(f'{BUDGET}{WAIVER}limit = "{limit}"\n')
    assert (verdict.exit_code, states(verdict)) == (code, [(state, 1)])
    if state == "exceeded":
        assert "does not apply: 1 finding above its limit of 2.00 MiB" in as_text(verdict)


@pytest.mark.parametrize(
    "text",
    [
        WAIVER.replace("moe/*/list", "moe/*/stack"),
        WAIVER.replace("transient", "retained"),
        WAIVER + 'card = "a10"\n',
        WAIVER + 'conf = "expandable_segments:True"\n',
        WAIVER + 'torch = "2.1"\n',
        WAIVER + 'device = "cuda"\n',
    ],
)
def test_what_is_not_meant_is_not_waived_and_the_waiver_is_said_to_be_unused(text):
    verdict = gate(BUDGET + text)
    assert (verdict.exit_code, states(verdict)) == (3, [("unused", 0)])
    assert "waives nothing; remove it" in as_text(verdict)


def test_what_it_is_narrowed_to_is_waived():
    assert gate(BUDGET + WAIVER + 'card = "h100-80gb"\ntorch = "2.13"\nconf = ""\ndevice = "virtual"\n').exit_code == 0


def test_the_first_of_two_that_cover_a_finding_covers_it():
    verdict = gate(BUDGET + WAIVER + WAIVER.replace("@jane", "@joe"))
    assert states(verdict) == [("applied", 1), ("unused", 0)]
    expired_first = WAIVER.replace("2026-05-04", "2026-05-03") + WAIVER.replace("@jane", "@joe")
    verdict = gate(BUDGET + expired_first)
    assert (verdict.exit_code, states(verdict)) == (0, [("expired", 1), ("applied", 1)])


def test_outcomes_and_what_was_not_measured_cannot_be_waived():
    assert gate(BUDGET + WAIVER, case(outcome="crash")).exit_code == 4
    assert gate(WAIVER, case(outcome="crash")).exit_code == 3


def test_differences_from_the_lock_are_waived_value_by_value():
    (waiver,) = parse_budgets(WAIVER).waivers
    verdict = waive(held(locked(case()), case(transient=3 * MIB, retained=0)), [waiver], "b.toml", TODAY)
    assert [(d.metric, d.waiver is not None) for d in verdict.lock_differences] == [
        ("transient", True),
        ("retained", False),
    ]
    assert verdict.exit_code == 3
    verdict = waive(held(locked(case()), case(transient=3 * MIB)), [waiver], "b.toml", TODAY)
    assert (verdict.exit_code, states(verdict)) == (0, [("applied", 1)])
    assert "waived, larger than locked  " in as_text(verdict)


def test_an_outcome_that_is_not_as_locked_is_not_waived():
    (waiver,) = parse_budgets(WAIVER).waivers
    verdict = held(locked(case()), case(outcome="oom", expected_outcome="oom"))
    assert waive(verdict, [waiver], "b.toml", TODAY).exit_code == 3


def test_what_a_change_of_the_code_costs_is_waived():
    name = CaseName(
        id="moe/v3/list", name="moe/v3/list", scenario="moe", preset="v3", variant="list", conf="", torch="2.13",
        card="h100-80gb", device="virtual",
    )  # fmt: skip
    change = Change(case=name, metric="transient", before=1, after=3 * MIB, allowed=0, regressed=True)
    verdict = decided(msgspec.structs.replace(gate("", case()), changes=[change]))
    assert verdict.exit_code == 3
    (waiver,) = parse_budgets(WAIVER).waivers
    waived = waive(verdict, [waiver], "b.toml", TODAY)
    assert (waived.exit_code, states(waived)) == (0, [("applied", 1)])
    assert waived.changes[0].waiver is not None
    assert "waived  moe/v3/list  transient  before 1 B  now 3.00 MiB" in as_text(waived)


def test_warn_only_keeps_the_decision_and_ends_with_0():
    verdict = decided(msgspec.structs.replace(gate(BUDGET), warn_only=True))
    assert (verdict.decision, verdict.exit_code) == ("over", 0)
    assert as_text(verdict).splitlines()[-1].startswith("fail, and only a warning: 1 value over budget; ")
    missing = decided(msgspec.structs.replace(gate('[budget."a/b/c"]\ntransient = 1\n'), warn_only=True))
    assert (missing.decision, missing.exit_code) == ("not_measured", 0)


def test_the_lock_options_of_the_file():
    def options(text: str) -> tuple[bool, bool]:
        found = parse_budgets(text).lock
        return found.improvements, found.new

    assert options("") == (False, False)
    assert options('[lock]\nimprovements = "allow"\n') == (True, False)
    assert options('[lock]\nimprovements = "fail"\nnew = "allow"\n') == (False, True)


def without(key: str) -> str:
    return "".join(line for line in WAIVER.splitlines(keepends=True) if not line.startswith(key))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (without("owner"), ["line 1", "the waiver has no owner"]),
        (without("reason"), ["line 1", "the waiver has no reason"]),
        (WAIVER.replace("2026-05-04", "2026-13-45"), ["line ", "expires: 2026-13-45 is no day", "year-month-day"]),
        (WAIVER.replace("2026-05-04", "2026-02-30"), ["line ", "expires: 2026-02-30 is no day"]),
        (WAIVER.replace("2026-05-04", "2026-5-4"), ["line ", "expires: 2026-5-4 is no day"]),
        (WAIVER.replace("2026-05-04", "2026-05-04T10:00:00Z"), ["expires: 2026-05-04T10:00:00+00:00 is not a date"]),
        (without("expires"), ["line 1", "the waiver has no expires", "2027-03-31"]),
        (without("case"), ["line 1", "the waiver has no case", "scenario/preset/variant"]),
        (without("metrics"), ["line 1", "the waiver has no metrics", "transient"]),
        (WAIVER.replace('"@jane"', '"  "'), ["line 4", "owner: '  ' is not a non-empty string"]),
        (WAIVER.replace('"@jane"', "3"), ["line 4", "owner: 3 is not"]),
        (WAIVER.replace("fixed", "f" * 600), ["line 5", "reason: has 617 characters; 500 are the most"]),
        (WAIVER.replace("2026-05-04", '"2026-05-04"'), ["line 6", "'2026-05-04' is not a date", "without quotes"]),
        (WAIVER.replace("2026-05-04", "2026-05-04T00:00:00Z"), ["line 6", "is not a date"]),
        (WAIVER.replace("2026-05-04", "2026-02-30"), ["line 6"]),
        (WAIVER.replace("moe/*/list", "moe"), ["line 2", "fewer than three parts"]),
        (WAIVER.replace('["transient"]', '"transient"'), ["line 3", "'transient' is not a list"]),
        (WAIVER.replace('["transient"]', "[]"), ["line 3", "is not a list"]),
        (WAIVER.replace("transient", "transent"), ["line 3", "'transent'", "did you mean 'transient'?"]),
        (WAIVER.replace('["transient"]', "[3]"), ["line 3", "unknown metric 3"]),
        (WAIVER + 'limit = "much"\n', ["line 7", "limit: 'much' is not a byte count"]),
        (WAIVER + 'until = "later"\n', ["line 7", "unknown key 'until'"]),
        (WAIVER + 'device = "tpu"\n', ["line 7", "unknown device 'tpu'"]),
        (WAIVER.replace("[[waiver]]", "[waiver]"), ["line 1", "in double brackets"]),
        ("waiver = [3]\n", ["line 1", "in double brackets"]),
        ("[[waivers]]\n", ["line 1", "unknown table 'waivers'", "did you mean 'waiver'?"]),
        ('[lock]\nimprovement = "allow"\n', ["line 2", "did you mean 'improvements'?"]),
        ("[lock]\nimprovements = true\n", ["line 2", 'True is neither "allow" nor "fail"']),
        ("lock = 3\n", ["line 1", "lock is not a table"]),
    ],
)
def test_a_waiver_or_option_that_says_too_little_is_refused_with_its_line(text, words):
    with pytest.raises(InputFileError) as caught:
        parse_budgets(text)
    for word in ["budgets.toml: ", *words]:
        assert word in str(caught.value)


def test_a_waiver_holds_for_a_lock_without_budgets():
    budgets = parse_budgets(WAIVER)
    results = results_of([case(transient=3 * MIB)])
    verdict = evaluate(results, budgets, also_held=True)
    verdict = waive(hold_to_lock(verdict, results, locked(case()), budgets.lock), budgets.waivers, "b.toml", TODAY)
    assert verdict.exit_code == 0
