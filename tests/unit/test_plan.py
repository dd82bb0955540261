"""Cases have readable ids, and digests that change with everything that decides a result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import fragscope
from fragscope.allocator import CARDS, DEFAULT_CARD, ReplaySettings, rules_for
from fragscope.suite import plan as plan_module
from fragscope.suite.discover import Selection
from fragscope.suite.plan import plan
from fragscope.suite.sources import installed_fingerprint

CARD = CARDS[DEFAULT_CARD]
SETTINGS = ReplaySettings(rules_for("2.11.0"), CARD.name, CARD.total, CARD.free)


def selection(preset: str = "one") -> Selection:
    made = fragscope.scenario("sizes", presets={"one": {"n": 1}, "two": {"n": 2}}, params={"mode": ("a", "b")})(print)
    return Selection(made, preset, "original")


def digest(**overrides: str) -> str:
    (case,) = plan([selection()], overrides, [SETTINGS], "virtual")
    return case.digest


def test_an_id_says_what_runs_under_what() -> None:
    (case,) = plan([selection()], {}, [SETTINGS], "virtual")
    assert case.id == "sizes/one/original@default,torch-2.11.0,h100-80gb,virtual"
    (case,) = plan([selection()], {}, [replace(SETTINGS, conf="expandable_segments:True")], "cuda")
    assert case.id == "sizes/one/original@expandable_segments:True,torch-2.11.0,h100-80gb,cuda"


def test_an_id_shows_only_parameters_that_were_changed() -> None:
    (case,) = plan([selection()], {"n": "7", "mode": "a"}, [SETTINGS], "virtual")
    assert case.id.startswith("sizes/one/original[n=7]@")
    assert dict(case.values) == {"n": 7, "mode": "a"}


def test_every_selection_under_every_setting_once() -> None:
    newer = replace(SETTINGS, rules=rules_for("2.13.0"))
    cases = plan([selection(), selection("two")], {}, [SETTINGS, newer, SETTINGS], "virtual")
    assert [(c.selection.preset, c.settings.rules.torch) for c in cases] == [
        ("one", "2.11.0"), ("one", "2.13.0"), ("two", "2.11.0"), ("two", "2.13.0"),
    ]  # fmt: skip
    assert len({c.id for c in cases}) == len({c.digest for c in cases}) == 4


def test_cases_that_differ_in_settings_only_share_a_recording() -> None:
    one, other, preset = plan(
        [selection()], {}, [SETTINGS, replace(SETTINGS, conf="expandable_segments:True")], "virtual"
    ) + plan([selection("two")], {}, [SETTINGS], "virtual")
    assert one.recording == other.recording != preset.recording


def test_on_a_card_each_conf_is_recorded_and_rules_share() -> None:
    settings = [SETTINGS, replace(SETTINGS, rules=rules_for("2.13.0")), replace(SETTINGS, conf="max_split_size_mb:64")]
    one, newer, conf = plan([selection()], {}, settings, "cuda")
    assert one.recording == newer.recording != conf.recording


def test_a_digest_is_stable() -> None:
    assert digest() == digest()
    assert digest(n="1") == digest()  # the preset's own value


@pytest.mark.parametrize("changed", [{"n": "2"}, {"mode": "b"}])
def test_a_digest_changes_with_parameters(changed: dict[str, str]) -> None:
    assert digest(**changed) != digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"conf": "max_split_size_mb:64"},
        {"capacity": CARD.free - 1},
        {"total": CARD.total + 1},
        {"memory_fraction": 0.5},
        {"rules": rules_for("2.12.0")},
    ],
)
def test_a_digest_changes_with_settings(changes: dict[str, object]) -> None:
    (case,) = plan([selection()], {}, [replace(SETTINGS, **changes)], "virtual")  # type: ignore[arg-type]
    assert case.digest != digest()


def test_a_digest_changes_with_the_device() -> None:
    (case,) = plan([selection()], {}, [SETTINGS], "cuda")
    assert case.digest != digest()


@pytest.mark.parametrize("what", ["own_fingerprint", "_installed", "versions"])
def test_a_digest_changes_with_fragscope_and_installed_packages(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    monkeypatch.setattr(plan_module, what, lambda: {"python": "other"})
    assert digest() != before


def test_an_upgraded_package_changes_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "vllm-0.19.0.dist-info"
    package.mkdir()
    before = installed_fingerprint()
    package.rename(tmp_path / "vllm-0.20.0.dist-info")
    assert installed_fingerprint() != before
