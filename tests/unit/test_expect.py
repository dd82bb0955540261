"""What a variant declares: outcomes by cell, and whose code it replays."""

from __future__ import annotations

import pytest

import fragscope
from fragscope import Expect, Replays
from fragscope.errors import UsageError
from fragscope.suite.scenario import Case, EndCase, Scenario


def body(case: Case) -> None: ...


def define(**changes: object) -> Scenario:
    return fragscope.scenario("sizes", presets={"small": {}, "large": {}}, **changes)(body)  # type: ignore[arg-type]


def expected(made: Scenario, tokens: int = 1, **cell: str) -> str:
    named = {"preset": "small", "conf": "", "torch": "2.13.0", "card": "h100-80gb", "device": "virtual", **cell}
    return made.variants["original"].expected(**named, values={"tokens": tokens})


def test_one_outcome_holds_in_every_cell() -> None:
    made = define(expect="oom")
    assert expected(made) == "oom"
    assert expected(made, preset="large", conf="max_split_size_mb:20", device="cuda") == "oom"


def test_an_outcome_can_be_declared_for_some_cells_only() -> None:
    made = define(expect=Expect("oom", preset="large", conf="max_split*", torch="2.11*", card="h100*", device="cuda"))
    cell = {"preset": "large", "conf": "max_split_size_mb:20", "torch": "2.11.0", "card": "h100-80gb", "device": "cuda"}
    assert expected(made, **cell) == "oom"
    other = {"preset": "small", "conf": "", "torch": "2.13.0", "card": "b200", "device": "virtual"}
    for word, value in other.items():
        assert expected(made, **{**cell, word: value}) == "ok", word


def test_the_first_rule_that_applies_counts_and_the_rest_is_ok() -> None:
    made = define(expect=[Expect("ok", conf=""), Expect("oom", preset="large"), Expect("hazard", conf="expandable*")])
    assert expected(made, preset="large") == "ok"
    assert expected(made, preset="large", conf="expandable_segments:True") == "oom"
    assert expected(made, conf="expandable_segments:True") == "hazard"
    assert expected(made, conf="max_split_size_mb:20") == "ok"


def test_an_outcome_can_depend_on_the_cases_values() -> None:
    made = define(expect=Expect("overflow", preset="large", when=lambda values: values["tokens"] > 100))
    assert [expected(made, tokens, preset="large") for tokens in (100, 101)] == ["ok", "overflow"]
    assert expected(made, 101, preset="small") == "ok"


def test_a_conf_with_brackets_means_itself() -> None:
    conf = "roundup_power2_divisions:[256:1,512:2]"
    assert expected(define(expect=Expect("oom", conf=conf)), conf=conf) == "oom"


def test_a_condition_that_fails_is_the_scenarios_mistake() -> None:
    made = define(expect=Expect("oom", when=lambda values: values["rows"] > 1))
    with pytest.raises(UsageError, match="when fails for preset 'small': KeyError: 'rows'"):
        expected(made)


@pytest.mark.parametrize("missing", [0, -1, 1.5, "4", None, 2**63])
def test_an_overflow_lacks_a_number_of_bytes(missing: object) -> None:
    with pytest.raises(UsageError, match=r"case\.overflow: .* is no number of bytes"):
        case().overflow(missing, "too small")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expect", "problem"),
    [
        ("fine", "outcome 'fine' is none of ok, oom"),
        ([Expect("fine")], "outcome 'fine' is none of ok, oom"),  # type: ignore[arg-type]
        (["oom"], "expect holds a str; write an outcome, or fragscope.Expect"),
        (3, "expect holds a int"),
    ],
)
def test_what_is_no_declaration_is_refused(expect: object, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        define(expect=expect)


def test_what_a_variant_replays_reads_as_package_release_and_function() -> None:
    assert str(Replays("vllm", "0.20.0", "vllm.a.b:load")) == "vllm 0.20.0 vllm.a.b:load"


@pytest.mark.parametrize(
    ("package", "version", "function", "word"),
    [
        ("", "1", "m:f", "package"),
        ("v llm", "1", "m:f", "package"),
        ("vllm", "", "m:f", "version"),
        ("vllm", "1", "m:", "function"),
        ("vllm", "1", "m/x.py", "function"),
    ],
)
def test_names_that_could_not_be_looked_up_are_refused(package: str, version: str, function: str, word: str) -> None:
    with pytest.raises(UsageError, match=f"Replays: {word}"):
        Replays(package, version, function)


class Nothing:
    def begin_phase(self, name: str) -> None: ...

    def end_phase(self) -> None: ...


def case() -> Case:
    return Case("sizes", "small", "original", {}, Nothing())


def test_a_case_that_overflows_says_by_how_much() -> None:
    with pytest.raises(EndCase, match="a workspace of 3 MiB") as raised:
        case().overflow(4096, "a workspace of 3 MiB")
    assert (raised.value.outcome, raised.value.missing) == ("overflow", 4096)


def test_a_case_ends_with_a_known_outcome_that_is_not_ok() -> None:
    with pytest.raises(EndCase, match="ranks 1, 2 wait") as raised:
        case().end("timeout", "ranks 1, 2 wait")
    assert (raised.value.outcome, raised.value.missing) == ("timeout", None)
    for outcome in ("ok", "late"):
        with pytest.raises(UsageError, match=f"outcome '{outcome}' is none of oom, overflow"):
            case().end(outcome, "so it is")  # type: ignore[arg-type]
