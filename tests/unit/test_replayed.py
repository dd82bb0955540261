"""What is installed beside what variants replay."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fragscope
from fragscope import Installed, Replays
from fragscope.errors import UsageError
from fragscope.suite.discover import Selection
from fragscope.suite.installed import applicable
from fragscope.suite.replayed import replayed
from fragscope.suite.scenario import Case, Scenario
from fragscope.suite.upstream import Source

FUNCTION = "theirs.weights:shuffle"


def body(case: Case) -> None: ...


def define(*releases: tuple[str, str], function: str = FUNCTION) -> Scenario:
    made = fragscope.scenario("shuffles", presets={"small": {}, "large": {}})(body)
    for version, digest in releases:
        made.variant(f"of-{version}", role="fixed", replays=Replays("theirs", version, function, digest))(body)
    return made


@pytest.mark.parametrize(
    ("source", "state", "same", "stale"),
    [
        (None, "not installed", [], False),
        (Source("2.0", None, None), "gone", [], True),
        (Source("2.0", None, None, "line 1: invalid syntax"), "cannot be read", [], False),
        (Source("2.0", None, "ccc"), "changed", [], True),
        (Source("1.5", None, "bbb"), "same", ["of-1.1"], False),
        (Source("1.0", None, "aaa"), "same", ["of-1.0"], False),
    ],
)
def test_one_variant_that_is_up_to_date_is_enough(
    source: Source | None, state: str, same: list[str], stale: bool
) -> None:
    """A scenario keeps what came before; nothing is stale while one of its variants is what is installed."""
    (found,) = replayed([define(("1.0", "aaa"), ("1.1", "bbb"))], lambda package, function: source)
    assert (found.state, found.same, found.stale) == (state, same, stale)
    assert [(v.variant, v.version, v.digest) for v in found.variants] == [
        ("of-1.0", "1.0", "aaa"), ("of-1.1", "1.1", "bbb"),
    ]  # fmt: skip


def test_without_a_digest_nothing_can_be_compared() -> None:
    (found,) = replayed([define(("1.0", ""))], lambda package, function: Source("1.0", None, "aaa"))
    assert (found.state, found.same, found.stale) == ("no digest", [], False)


def test_each_function_of_each_scenario_is_asked_for_once() -> None:
    asked = []

    def source_of(package: str, function: str) -> None:
        asked.append((package, function))

    made = define(("1.0", "aaa"), ("1.1", "bbb"))
    made.variant("another", role="newest", replays=Replays("others", "3", FUNCTION))(body)
    assert [f.package for f in replayed([made, define()], source_of)] == ["theirs", "others"]
    assert asked == [("theirs", FUNCTION), ("others", FUNCTION)]


def test_a_variant_whose_package_is_missing_is_left_out_with_all_its_presets() -> None:
    made = define(("1.0", "aaa"))
    made.installed("theirs", Installed("theirs-loaders", "no_such_package_here.weights:shuffle"))(body)
    made.installed("json", Installed("json", "json:dumps"))(body)
    selections = [Selection(made, preset, variant) for preset in made.presets for variant in made.variants]
    kept, absent = applicable(selections)
    assert [s.name for s in selections if s not in kept] == ["shuffles/small/theirs", "shuffles/large/theirs"]
    assert [(a.variant, a.reason) for a in absent] == [("shuffles/theirs", "theirs-loaders is not installed")]


def test_installed_code_is_the_packages_own() -> None:
    import json

    assert Installed("json", "json:dumps").load() is json.dumps
    assert Installed("json", "json.decoder:JSONDecoder.decode").load() is json.JSONDecoder.decode
    with pytest.raises(ImportError, match="json has no nothing"):
        Installed("json", "json:nothing").load()


def test_modules_that_must_come_first_are_imported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules that import each other, which works from one side only."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "circle_a.py").write_text("from circle_b import base\n")
    (tmp_path / "circle_b.py").write_text("import circle_a\nbase = 1\n")
    with pytest.raises(ImportError, match="partially initialized"):
        Installed("circle", "circle_b:base").load()
    assert Installed("circle", "circle_b:base", first=("circle_a",)).load() == 1
    for name in ("circle_a", "circle_b"):
        monkeypatch.delitem(sys.modules, name)


def test_installed_code_and_its_role_belong_together() -> None:
    made = define()
    with pytest.raises(UsageError, match=r"variant 'x': add installed code with \.installed"):
        made.variant("x", role="installed")(body)
    made.installed("own", Installed("json", "json:dumps"), expect="oom")(body)
    variant = made.variants["own"]
    assert (variant.role, variant.expected("small", "", "2.13", "h100-80gb", "virtual", {})) == ("installed", "oom")
    for function in ("json dumps", "json:", ":dumps", "json:dumps()"):
        with pytest.raises(UsageError, match="write module:function"):
            Installed("json", function)
    with pytest.raises(UsageError, match="package 'two words' is not one word"):
        Installed("two words", "json:dumps")
