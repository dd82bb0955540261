"""``fragscope run --device cuda``, on a stand-in for the card: what is run on it, what is not, and what is checked."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scenario_files import cases_in, results_in, write_scenarios

from fragscope.allocator import CARDS, DEFAULT_CARD, Card, ReplaySettings, rules_for
from fragscope.cli import run
from fragscope.cli.running import RichProgress
from fragscope.errors import NotMeasuredError
from fragscope.report.summary import summarize
from fragscope.results import Case, load_results
from fragscope.trace import load_trace

pytest.importorskip("torch")
import torch
from stand_in_card import FREE, NAME, TOTAL, ForkedWorkers, StandInCard, install

from fragscope.suite import card_here
from fragscope.suite.card_here import ask_card
from fragscope.suite.discover import Selection, load_scenarios
from fragscope.suite.plan import plan
from fragscope.suite.runner import RunOptions, run_plan

pytestmark = pytest.mark.torch

NEEDS = """
    import os
    from pathlib import Path

    ONE = {"one": {}}
    MIB = 2**20

    @fragscope.scenario("fits", presets=ONE)
    def _(case):
        base = on_card(40 * MIB)
        with case.measure():
            kept = on_card(60 * MIB)

    @fragscope.scenario("too-large", presets=ONE)
    def _(case):
        with case.measure():
            kept = [on_card(60 * MIB) for _ in range(3)]

    @fragscope.scenario("past-the-allocator", presets={"fits": {"mib": 30}, "too-large": {"mib": 50}})
    def _(case):
        with case.measure():
            held = case.device_memory(case.mib * MIB)
            case.device_memory(2 * MIB, how="cudaMalloc").free()
            kept = on_card(60 * MIB)

    @fragscope.scenario("too-large-before", presets=ONE)
    def _(case):
        base = on_card(10 * 2**40)
        with case.measure():
            pass

    @fragscope.scenario("fits-once-cached-memory-is-returned", presets=ONE)
    def _(case):
        with case.measure():
            on_card(60 * MIB)
            kept = on_card(80 * MIB)

    @fragscope.scenario("declared", presets=ONE, expect="oom")
    def _(case):
        with case.measure():
            on_card(200 * MIB)

    @fragscope.scenario("caught", presets=ONE)
    def _(case):
        with case.measure():
            try:
                on_card(200 * MIB)
            except torch.OutOfMemoryError:
                kept = on_card(2 * MIB)

    @fragscope.scenario("looks", presets=ONE)
    def _(case):
        with case.measure():
            kept = on_card(2 * torch.cuda.mem_get_info()[0])

    @fragscope.scenario("limits-itself", presets=ONE)
    def _(case):
        torch.cuda.set_per_process_memory_fraction(0.1)
        with case.measure():
            kept = on_card(60 * MIB)

    @fragscope.scenario("unsupported", presets=ONE, expect="unsupported")
    def _(case):
        with case.measure():
            on_card(512)[0].item()

    @fragscope.scenario("stops-after-too-much", presets=ONE)
    def _(case):
        with case.measure():
            kept = on_card(300 * MIB)
            kept[0].item()

    @fragscope.scenario("dies-the-first-time", presets=ONE)
    def _(case):
        marker = Path(__file__).with_name("died")
        if not marker.exists():
            marker.touch()
            os.abort()
        with case.measure():
            kept = on_card(2 * MIB)

    def after_its_mode(size):
        small = on_card(512).mode()
        kept = on_card(size)

    @fragscope.scenario("estimated", presets={"small": {"size": 20 * MIB}, "near": {"size": 150 * MIB},
                                              "far": {"size": 300 * MIB}})
    def _(case):
        with case.measure():
            after_its_mode(case.size)
"""


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInCard]:
    """The card, with the test in a user's folder."""
    monkeypatch.chdir(tmp_path)
    modules, path = set(sys.modules), list(sys.path)
    yield install(monkeypatch, tmp_path)
    CARDS.pop(NAME, None)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("fragscope_scenarios."):
            del sys.modules[name]


def runs(*arguments: str, code: int = 0) -> None:
    assert run(["run", ".", "--device", "cuda", "--out", "out", "--no-report", *arguments]) == code


def only_case() -> dict[str, Any]:
    (case,) = cases_in(Path()).values()
    return case


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too-large", "needs 180 MiB, card has 100"),  # three segments of 60
        ("too-large-before", "needs 10,485,760 MiB, card has 100"),
        ("past-the-allocator/too-large", "needs 110 MiB, card has 100"),
        ("looks", "needs more than 100 MiB, card has 100"),
        ("stops-after-too-much", "needs at least 300 MiB, card has 100"),
        # the values, the indices and the input share a segment of 2 MiB
        ("estimated/far", "needs at least 302 MiB by estimate, card has 100 (not known in full: aten::mode"),
    ],
)
def test_what_cannot_fit_is_skipped_and_never_touches_the_card(
    card: StandInCard, capfd: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    runs(name, code=4)
    case = only_case()
    assert (case["outcome"], case["trace"]) == ("skipped", None)
    assert case["message"].startswith(message)
    assert case["precheck"]["free"] == FREE < case["precheck"]["needs"]
    assert card.used("recorded") == []
    out, err = capfd.readouterr()
    assert message in re.sub(r"\s+", " ", out)
    assert f"fragscope: skipped: {case['id']}: {message}" in err
    Path("budgets.toml").write_text('[budget."*/*/*"]\nretained = "1 GiB"\n')
    assert run(["gate", "out"]) == 4
    assert f"skipped: {message}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "outcome", "note"),
    [
        ("fits", "ok", ""),
        ("fits-once-cached-memory-is-returned", "ok", ""),
        ("caught", "ok", ""),
        ("limits-itself", "oom", "it was run although it ends in an OOM, by a limit of its own and not the card's"),
        ("unsupported", "unsupported", "it was run without knowing what it needs: unsupported on the virtual device: "),
        (
            "dies-the-first-time",
            "ok",
            "it was run without knowing what it needs: crash on the virtual device: the process was ended by SIGABRT",
        ),
        ("estimated/small", "ok", "it was run on an estimate of 22 MiB (not known in full: aten::mode"),
        (
            "estimated/near",
            "oom",
            "it was run although an estimate says it needs at least 152 MiB and the card has 100",
        ),
    ],
)
def test_what_may_fit_is_run_and_what_was_not_known_is_said(
    card: StandInCard, capfd: pytest.CaptureFixture[str], name: str, outcome: str, note: str
) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    runs(name, code={"ok": 0, "unsupported": 4, "oom": 3}[outcome])
    case = only_case()
    assert (case["outcome"], case["device"]) == (outcome, "cuda")
    assert len(card.used("recorded")) == 1
    assert case["precheck"]["note"].startswith(note)
    assert bool(case["precheck"]["note"]) == bool(note)
    assert (note in re.sub(r"\s+", " ", capfd.readouterr().out)) or not note


def test_the_need_of_what_fits_is_kept(card: StandInCard) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    runs("fits")
    assert only_case()["precheck"] == {"needs": 100 * 2**20, "free": FREE, "exact": True, "note": ""}
    assert len(card.used("recorded")) == 1


def test_what_is_taken_past_the_allocator_is_verified_with_the_rest(card: StandInCard) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    runs("past-the-allocator/fits")
    case = only_case()
    assert (case["outcome"], case["verify"]["mismatches"], case["exact"]) == ("ok", 0, True)
    peaks = [case["peak"][name] // 2**20 for name in ("raw", "reserved", "hbm")]
    assert peaks == [32, 60, 90]
    assert case["precheck"]["needs"] == 90 * 2**20


def test_a_declared_oom_is_had_on_the_card(card: StandInCard) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    runs("declared")
    assert (only_case()["outcome"], only_case()["precheck"]) == ("oom", None)
    assert len(card.used("recorded")) == 1


def test_the_card_is_asked_once_and_never_by_the_command_itself(card: StandInCard) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    runs("fits", "caught")
    ((asked, _),) = card.used("asked")
    processes = {asked, os.getpid(), *(pid for pid, _ in card.used("recorded"))}
    assert len(processes) == 4


def test_a_card_that_cannot_be_used_ends_the_run_in_one_line(
    card: StandInCard, capfd: pytest.CaptureFixture[str]
) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    card.broken = True
    runs("fits", code=4)
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "the card cannot be used now: RuntimeError: CUDA error: all CUDA-capable devices are busy" in err
    assert not Path("out").exists()


class Silent:
    def planned(self, cases: int, resumed: int) -> None: ...

    def planned_more(self, cases: int) -> None: ...
    def started(self, what: str) -> None: ...
    def finished(self, case: Case) -> None: ...


def test_the_workers_of_a_run_know_the_card(tmp_path: Path) -> None:
    """With the real server of workers, which has nothing of this process but what it is handed."""
    (scenario,) = (s for s in load_scenarios(write_scenarios(tmp_path, "needs", NEEDS)) if s.name == "too-large")
    here = Card("some-card", "Some Card", 500 * 2**20, FREE, (9, 0), 4, 2**20, "test")
    profile = CARDS[DEFAULT_CARD]
    settings = ReplaySettings(rules_for("2.11"), profile.name, profile.total, profile.free)
    planned = plan([Selection(scenario, "one", "original")], {}, [settings], "cuda")
    options = RunOptions(tmp_path / "out", tmp_path, jobs=1, timeout=100, resume=False, card=here)
    (case,) = run_plan(planned, options, Silent()).cases
    assert (case.outcome, case.message) == ("skipped", "needs 180 MiB, card has 100")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_there_is_no_answer() -> None:
    with pytest.raises(NotMeasuredError, match=r"the card cannot be used now: .*(CUDA|NVIDIA)"):
        ask_card(())


def test_scenario_files_are_imported_before_processes_fork(card: StandInCard) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    runs("fits")
    assert ForkedWorkers.preloaded == [["scenario_needs.py"]] * 2  # the process that asks, and those that record


def test_files_that_touch_cuda_are_imported_in_each_process(card: StandInCard, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    asked = card_here._asked
    monkeypatch.setattr(card_here, "_asked", lambda files: "CUDA is unusable" if files else asked(files))
    runs("fits")
    assert only_case()["outcome"] == "ok"
    assert ForkedWorkers.preloaded == [[], []]


def test_a_recording_follows_its_own_precheck(card: StandInCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an interrupted run has results."""
    write_scenarios(Path(), "needs", NEEDS)
    started: list[str] = []
    monkeypatch.setattr(RichProgress, "started", lambda _, what: started.append(what.partition("/")[0]))
    runs("fits", "caught")
    assert started == ["need of fits", "fits", "need of caught", "caught"]


def test_a_skipped_case_is_tried_again_when_there_is_room(card: StandInCard) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    arguments = ("fits", "too-large", "--card", "h100-80gb", "--resume")
    runs(*arguments, code=4)
    assert len(card.used("recorded")) == 1
    card.free = 400 * 2**20
    runs(*arguments)
    assert len(card.used("recorded")) == 2  # "fits" was kept
    runs(*arguments)
    assert len(card.used("recorded")) == 2
    assert [c["outcome"] for c in cases_in(Path()).values()] == ["ok", "ok"]


def test_each_conf_has_a_process_of_its_own_and_is_verified(card: StandInCard) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    confs = ["", "expandable_segments:True", "max_split_size_mb:64"]
    runs("fits", *(word for conf in confs for word in ("--conf", conf)))
    used = card.used("recorded")
    assert [conf for _, conf in used] == confs
    assert len({pid for pid, _ in used}) == len(confs)
    cases = results_in(Path())["cases"]
    assert [c["conf"] for c in cases] == confs
    assert all(c["verify"]["compared"] > 10 and c["verify"]["mismatches"] == 0 for c in cases)


TIES = """
    @fragscope.scenario("ties", presets={"one": {}})
    def _(case):
        # Two free blocks of one size: by age the first is taken, by address (up to 2.11) the one placed lower.
        with case.measure():
            first, second = on_card(30 * 2**20), on_card(30 * 2**20)
            del first, second
            kept = on_card(30 * 2**20)
"""


def test_a_recording_is_verified_under_the_rules_that_ran(card: StandInCard) -> None:
    write_scenarios(Path(), "ties", TIES)
    runs("--torch", "2.9", "--torch", "2.12")
    cases = results_in(Path())["cases"]
    assert [c["torch"] for c in cases] == ["2.9", "2.12"]
    assert len(card.used("recorded")) == 1
    assert all(c["verify"]["compared"] > 0 and c["verify"]["mismatches"] == 0 for c in cases)


def test_a_statistic_that_the_model_misses_is_seen_everywhere(
    card: StandInCard, capfd: pytest.CaptureFixture[str]
) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    card.wrong_reserved = 2 * 2**20
    runs("fits", code=1)
    case = only_case()
    assert (case["outcome"], case["exact"], case["verify"]["mismatches"]) == ("ok", False, 1)
    first = f"peak reserved: PyTorch says {102 * 2**20}, the model {100 * 2**20}"
    assert case["verify"]["first"] == first
    out, err = capfd.readouterr()
    (line,) = [text for text in err.splitlines() if "model" in text]
    assert line.startswith(f"fragscope: model: {case['id']}: the allocator model differs from the recording in 1 of ")
    assert first in line
    assert "please report it (recorded: out/traces/" in line
    assert "original: the allocator model differs from the recording in 1 of" in out
    Path("budgets.toml").write_text('[budget."*/*/*"]\npeak_reserved = "1 GiB"\n')
    assert run(["gate", "out"]) == 4
    out = capfd.readouterr().out
    assert out.splitlines()[0].startswith(
        "not measured  fits/one/original  the model differs from the recording in 1 of "
    )
    assert out.count("\n") == 2


def test_a_wrong_model_is_said_beside_what_else_went_wrong(
    card: StandInCard, capfd: pytest.CaptureFixture[str]
) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    card.wrong_reserved = 2 * 2**20
    for arguments, code in ((("fits", "limits-itself"), 3), (("fits", "too-large"), 1)):
        runs(*arguments, code=code)
        err = capfd.readouterr().err
        assert "fragscope: model: fits/one/original" in err
        assert "fragscope: oom: limits" in err or "fragscope: skipped: too-large" in err


def test_where_the_model_is_wrong_the_trace_is_what_the_card_did(card: StandInCard) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    card.wrong_address = True
    runs("fits", code=1)
    case = only_case()
    assert case["verify"]["first"].startswith("event ")
    trace = Path("out", case["trace"])
    assert load_trace(trace).source == "cuda"
    assert run(["replay", str(trace), "--verify"]) == 1


def test_what_was_predicted_stands_beside_what_was_measured(card: StandInCard) -> None:
    write_scenarios(Path(), "needs", NEEDS)
    runs("fits")
    case = only_case()
    predicted = case["predicted"]
    assert predicted["exact"]
    for figure in ("base", "transient", "retained", "allocs", "peak", "end"):
        assert predicted[figure] == case[figure], figure
    runs("fits", "--torch", "2.13", "--torch", "2.11")
    of_release = {c["torch"]: c["predicted"] for c in results_in(Path())["cases"]}
    installed = ".".join(torch.__version__.split(".")[:2])
    # Under other rules the card was not asked, so there is nothing to hold a prediction against.
    assert {release for release, said in of_release.items() if said} <= {installed}


def test_a_prediction_for_a_card_with_a_profile_is_as_exact_as_one_for_any_other(
    card: StandInCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CARDS, "tests-100mb", Card("tests-100mb", "Test Card", TOTAL, FREE, (9, 0), 4, 2**20, "test"))
    write_scenarios(Path(), "needs", NEEDS)
    runs("fits")
    case = only_case()
    assert case["card"] == "tests-100mb"
    assert case["predicted"]["exact"]


TWICE = """
    @fragscope.scenario("grows", presets={"one": {}})
    def _(case):
        from pathlib import Path

        seen = Path(__file__).with_name("seen")
        with case.measure():
            kept = on_card(3 * 2**20 if seen.exists() else 2**20)
        seen.touch()
"""


def test_a_card_that_does_otherwise_than_predicted_is_told(card: StandInCard) -> None:
    write_scenarios(Path(), "grows", TWICE)
    runs("grows")
    results = load_results(Path("out"))
    (case,) = results.cases
    assert case.surprises["peak requested"] == case.surprises["retained"] == 2 * 2**20
    assert "allocs" not in case.surprises
    (row,) = (row for group in summarize(results).groups for row in group.rows)
    assert any("against what the virtual device said: retained +2.00 MiB" in note for note in row.notes)
