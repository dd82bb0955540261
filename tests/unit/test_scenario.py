"""How a scenario is defined, and what is refused while it is."""

from __future__ import annotations

import gc

import pytest

import fragscope
from fragscope.errors import UsageError
from fragscope.suite.scenario import Case, EndCase, Scenario


class Phases:
    """A recorder that notes what it is told, and whether garbage was being collected."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def begin_phase(self, name: str) -> None:
        self.seen.append((f"begin {name}", gc.isenabled()))

    def end_phase(self) -> None:
        self.seen.append(("end", gc.isenabled()))

    def kernel(self, what: str, reads: object, writes: object, stream: object) -> None:
        self.seen.append((f"kernel {what}: {reads}, {writes}, {stream}", gc.isenabled()))


def body(case: Case) -> None:
    """The first line.

    More.
    """


def define(**changes: object) -> Scenario:
    arguments = {"presets": {"one": {"n": 1}}, **changes}
    return fragscope.scenario("sizes", **arguments)(body)  # type: ignore[arg-type]


def case(recorder: Phases) -> Case:
    return Case("sizes", "one", "original", {"n": 3}, recorder)


def test_name_comes_from_the_function_unless_given() -> None:
    def load_experts(case: Case) -> None: ...

    assert fragscope.scenario(presets={"p": {}})(load_experts).name == "load-experts"
    assert define().name == "sizes"


def test_variants_keep_their_order_roles_and_declared_outcomes() -> None:
    made = define(variant="before", expect="oom")
    made.variant("after", role="fixed")(body)
    assert [
        (v.name, v.role, v.expected("one", "", "2.13", "a-card", "virtual", {})) for v in made.variants.values()
    ] == [
        ("before", "original", "oom"),
        ("after", "fixed", "ok"),
    ]
    assert made.variants["after"].doc.startswith("The first line.")


@pytest.mark.parametrize("name", ["", "Upper", "with space", "a/b", "-first", "ü", "a" * 81, "a\n", "*"])
def test_names_that_could_not_stand_in_a_case_id_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="lower-case letters"):
        fragscope.scenario(name or "/", presets={"p": {}})(body)
    with pytest.raises(UsageError, match="preset name"):
        define(presets={name: {}})
    with pytest.raises(UsageError, match="variant name"):
        define().variant(name, role="fixed")(body)


def test_a_variant_is_defined_once_with_a_known_role_and_outcome() -> None:
    made = define()
    with pytest.raises(UsageError, match="'original' is defined twice"):
        made.variant("original", role="fixed")(body)
    with pytest.raises(UsageError, match="role 'faster' is none of original, fixed, newest, proposed"):
        made.variant("other", role="faster")(body)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="outcome 'fine' is none of ok, oom"):
        made.variant("other", role="fixed", expect="fine")(body)  # type: ignore[arg-type]


def test_a_scenario_has_a_preset() -> None:
    with pytest.raises(UsageError, match="has no preset"):
        define(presets={})


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ((1, 2), "is of type tuple"),
        (None, "is of type NoneType"),
        (2**63, "64 bits does not fit 64"),
        (float("nan"), "not a finite number"),
        ("two\nlines", "printable"),
        ("x" * 201, "at most 200"),
        ("\udcff", "printable"),
    ],
)
def test_values_are_what_ids_and_results_can_hold(value: object, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        define(presets={"p": {"n": value}})
    with pytest.raises(UsageError, match=why):
        define(params={"n": (1, value)})


@pytest.mark.parametrize("name", ["device", "measure", "values", "preset", "_private", "two words", "1st"])
def test_values_do_not_hide_what_a_case_has(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a value"):
        define(presets={"p": {name: 1}})


def test_a_parameter_without_choices_is_refused() -> None:
    with pytest.raises(UsageError, match="mode has no choices"):
        define(params={"mode": ()})


def test_presets_win_over_parameter_defaults_and_overrides_over_both() -> None:
    made = define(presets={"p": {"n": 5}, "q": {}}, params={"n": 1, "mode": ("fast", "slow")})
    assert made.values_for("p", {}) == {"n": 5, "mode": "fast"}
    assert made.values_for("q", {}) == {"n": 1, "mode": "fast"}
    assert made.values_for("p", {"n": 7, "mode": "slow", "unknown": 1}) == {"n": 7, "mode": "slow"}


def test_overrides_take_the_type_of_the_parameter() -> None:
    made = define(params={"mode": ("fast", "slow"), "depth": (1, 2), "on": False, "ratio": 0.5, "text": "a"})
    assert made.parse_override("n", "12") == 12
    assert made.parse_override("mode", "slow") == "slow"
    assert made.parse_override("depth", "2") == 2
    assert made.parse_override("on", "True") is True
    assert made.parse_override("ratio", "0.25") == 0.25
    assert made.parse_override("text", "ü") == "ü"
    assert made.parse_override("unknown", "1") is None


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("n", "many", "takes a int"),
        ("n", "9" * 30, "does not fit 64"),
        ("n", "9" * 5000, "takes a int"),
        ("mode", "slower", "takes one of fast, slow"),
        ("on", "perhaps", "takes a bool"),
        ("ratio", "inf", "not a finite number"),
        ("text", "\x1b[31m", "printable"),
        ("text", "\udcff", "printable"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(name: str, text: str, why: str) -> None:
    made = define(params={"mode": ("fast", "slow"), "on": False, "ratio": 0.5, "text": "a"})
    with pytest.raises(UsageError, match=why):
        made.parse_override(name, text)


def test_the_phase_is_marked_and_garbage_left_alone_inside() -> None:
    phases = Phases()
    assert gc.isenabled()
    with case(phases).measure():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert phases.seen == [("begin measure", False), ("end", False)]


def test_collection_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with case(Phases()).measure():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_inside_ends_the_phase_and_restores_collection() -> None:
    phases = Phases()
    with pytest.raises(ValueError, match="inside"), case(phases).measure():
        raise ValueError("inside")
    assert phases.seen[-1][0] == "end"
    assert gc.isenabled()


def test_a_kernel_is_passed_on_with_what_it_touches() -> None:
    phases = Phases()
    made = case(phases)
    made.kernel("encode", reads=["a"], writes=["b"])  # type: ignore[list-item]
    made.kernel("pack", stream="own")
    assert [what for what, _ in phases.seen] == ["kernel encode: ['a'], ['b'], None", "kernel pack: (), (), own"]


def test_a_case_has_one_phase() -> None:
    made = case(Phases())
    with made.measure():
        pass
    with pytest.raises(UsageError, match="entered twice"), made.measure():
        pass


def test_values_are_attributes_and_unknown_ones_say_what_there_is() -> None:
    made = case(Phases())
    assert made.n == 3
    with pytest.raises(AttributeError, match="no value 'm'; preset and parameters give: n"):
        _ = made.m


def test_skip_carries_its_reason() -> None:
    with pytest.raises(EndCase, match="needs two cards"):
        case(Phases()).skip("needs two cards")
