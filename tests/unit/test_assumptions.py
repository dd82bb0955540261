"""What a replay takes for granted, and when that can change its figures."""

from __future__ import annotations

import ast
from dataclasses import replace
from operator import add
from pathlib import Path

import numpy as np
import pytest
from builders import bare_recording, own_settings, recording
from requests_of import MIB, trace_of
from snapshots import RELEASES, small_snapshot, write

from fragscope.allocator import Assumption, Replay, ReplaySettings, card_named, merged, replay, rules_for
from fragscope.allocator.assumptions import EFFECTS, LOSSES
from fragscope.search import Given, play_one, subject_of
from fragscope.trace import DecisionKind, Loss, Trace, load_trace

ROOT = Path(__file__).parents[2]
GIB = 2**30
SPLIT = "max_split_size_mb:20"


def effects(found: Replay) -> dict[str, str]:
    return {a.code: a.effect for a in found.assumptions}


def said(found: Replay, code: str) -> str:
    (detail,) = (a.detail for a in found.assumptions if a.code == code)
    return detail


def replayed(trace: Trace, conf: str | None = None) -> Replay:
    own = own_settings(trace)
    return replay(trace, own if conf is None else own.with_conf(conf), compiled=False)


# --- the table is whole -------------------------------------------------------------------------------------------


def first_arguments(function: str) -> set[str]:
    """The first arguments, where they are literal, of all calls of a function in the package."""
    found = set()
    for file in (ROOT / "fragscope").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


def test_every_loss_makes_an_assumption_with_an_effect() -> None:
    assert first_arguments("Loss") == set(LOSSES)
    assert {code for code in LOSSES.values() if code is not None} <= set(EFFECTS)


def test_every_stand_in_has_an_effect() -> None:
    codes = first_arguments("StandIn")
    assert len(codes) == 11
    assert codes <= set(EFFECTS)


def test_the_documentation_names_every_code() -> None:
    text = (ROOT / "docs/exactness.md").read_text()
    assert [code for code in EFFECTS if f"`{code}`" not in text] == []


def test_a_loss_of_another_version_is_not_passed_over() -> None:
    trace = replace(trace_of(("alloc", 0, MIB)), lost=(Loss("never_heard_of", "something is missing", 3),))
    found = replayed(trace)
    assert effects(found)["never_heard_of"] == "unknown"
    assert not found.exact


# --- what stands in for settings ----------------------------------------------------------------------------------


def test_memory_that_nobody_named_matters_only_where_it_is_short() -> None:
    small, large = trace_of(("alloc", 0, 30 * MIB), card=None), trace_of(("alloc", 0, 90 * GIB), card=None)
    assert replayed(small).exact
    assert effects(replayed(small))["capacity_assumed"] == "none"
    assert effects(replayed(large))["capacity_assumed"] == "unknown"
    named = own_settings(large).with_capacity(100 * GIB)
    assert replay(large, named, compiled=False).exact
    released = trace_of(("alloc", 0, 60 * GIB), ("free", 0), ("alloc", 1, 70 * GIB), card=None)
    found = replayed(released)
    assert (found.whole.ooms, found.whole.retries) == (0, 1)
    assert not found.exact, "with more memory nothing would have gone back"


def test_what_a_card_has_in_all_matters_to_a_fraction_of_it() -> None:
    trace = trace_of(("alloc", 0, 30 * MIB), card=None)
    half = own_settings(trace).with_fraction(0.5)
    assert effects(replay(trace, half, compiled=False))["card_assumed"] == "unknown"
    named = half.with_card(card_named("h100-80gb"))
    assert "card_assumed" not in effects(replay(trace, named, compiled=False))


def test_a_limit_that_nobody_knows_of_matters_where_old_segments_are_collected() -> None:
    trace = trace_of(("alloc", 0, 30 * MIB))
    collecting = "garbage_collection_threshold:0.8"
    assert effects(replayed(trace))["fraction_assumed"] == "none"
    assert effects(replayed(trace, collecting))["fraction_assumed"] == "unknown"
    known = own_settings(trace).with_conf(collecting).with_fraction(0.5)
    assert "fraction_assumed" not in effects(replay(trace, known, compiled=False))
    assert "fraction_assumed" not in effects(replayed(replace(trace, source="virtual"), collecting))


def test_memory_that_the_recording_does_not_show_to_have_been_there_is_assumed() -> None:
    """The split limit makes this program reserve more than its recording ever did."""
    trace = bare_recording("fp8-dsv3-tp8.newest.default")
    more = replayed(trace, SPLIT)
    assert more.whole.peak.reserved > replayed(trace).whole.peak.reserved
    assert effects(more)["capacity_assumed"] == effects(more)["fraction_assumed"] == "unknown"
    assert replayed(trace).exact
    named = own_settings(trace).with_conf(SPLIT).with_capacity(70 * GIB).with_fraction(1.0)
    named = named.with_card(card_named("h100-80gb"))
    assert replay(trace, named).exact


@pytest.mark.parametrize("release", RELEASES)
def test_keys_tell_the_release_but_for_the_oldest_and_the_newest(release: str, tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path / "s.pickle", small_snapshot(release)))
    expected = "unknown" if release in ("2.9", "2.14") else "none"
    assert effects(replayed(trace))["release_by_keys"] == expected
    named = own_settings(trace).with_rules(rules_for(release))
    assert "release_by_keys" not in effects(replay(trace, named, compiled=False))
    confirmed = replay(trace, own_settings(trace), verify=True, compiled=False)
    assert confirmed.verify is not None
    assert confirmed.verify.mismatches == 0
    assert confirmed.exact, "the recorded decisions are those of these rules"


def test_a_release_that_is_not_named_is_assumed() -> None:
    trace = replace(trace_of(("alloc", 0, MIB)), torch=None)
    assert effects(replayed(trace))["release_assumed"] == "unknown"


def test_a_conf_that_is_not_named_is_assumed_until_one_is_asked_for() -> None:
    trace = replace(trace_of(("alloc", 0, MIB)), lost=(Loss("allocator_settings", "the default is assumed"),))
    assert effects(replayed(trace))["conf_assumed"] == "unknown"
    assert "conf_assumed" not in effects(replayed(trace, SPLIT))


def test_settings_that_are_named_are_no_stand_ins() -> None:
    s = own_settings(replace(trace_of(("alloc", 0, MIB)), torch=None, card=None))
    assert [x.of for x in s.stand_ins] == ["torch", "card", "capacity", "limit"]
    assert [x.of for x in s.with_rules(rules_for("2.13.0")).stand_ins] == ["card", "capacity", "limit"]
    assert [x.of for x in s.with_total(GIB).stand_ins] == ["torch", "capacity", "limit"]
    assert [x.of for x in s.with_capacity(GIB).stand_ins] == ["torch", "card", "limit"]
    assert [x.of for x in s.with_fraction(0.5).stand_ins] == ["torch", "card", "capacity"]
    other = replace(s, card="another").with_card(card_named("h100-80gb"))
    assert [x.of for x in other.stand_ins] == ["torch"]
    assert (other.capacity, other.limit) == (card_named("h100-80gb").free, None)


# --- what a recording does not hold -------------------------------------------------------------------------------


def test_a_comparison_confirms_what_was_inferred_but_one_with_the_models_own_decisions_does_not() -> None:
    trace = recording("streams-default")
    confirmed = replay(trace, own_settings(trace), verify=True)
    assert confirmed.exact
    assert effects(confirmed)["inferred_releases"] == "none"
    again = replay(confirmed.trace, own_settings(confirmed.trace), verify=True)
    assert again.verify is not None
    assert again.verify.mismatches == 0
    assert effects(again)["inferred_releases"] == "unknown"


def test_what_was_freed_and_never_seen_allocated_is_in_no_figure() -> None:
    found = replayed(trace_of(("alloc", 0, MIB), ("free", 7), ("free", 0), ("free", 0)))
    (late,) = (a for a in found.assumptions if a.code == "late_start")
    assert (late.effect, late.events) == ("unknown", 2)


def test_a_lost_event_is_not_confirmed_by_a_comparison(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path / "s.pickle", small_snapshot()))
    found = replay(
        replace(trace, lost=(Loss("late_start", "began late", 1),)), own_settings(trace), verify=True, compiled=False
    )
    assert found.verify is not None
    assert found.verify.mismatches == 0
    assert not found.exact


USES = (("alloc", 0, 30 * MIB), ("uses", 0, 9), ("free", 0), ("done", 0), ("alloc", 1, 30 * MIB))


def test_recorded_completions_are_those_of_the_recorded_run() -> None:
    trace = trace_of(*USES)
    assert effects(replayed(trace))["deferred_frees"] == "none"
    assert effects(replayed(trace, "expandable_segments:False"))["deferred_frees"] == "none", "it means the same"
    assert effects(replayed(trace, SPLIT))["deferred_frees"] == "bounded"
    other = own_settings(trace).with_rules(rules_for("2.13.0"))
    assert effects(replay(trace, other, compiled=False))["deferred_frees"] == "bounded"
    patch = own_settings(trace).with_rules(rules_for("2.11.1+cu128"))
    assert effects(replay(trace, patch, compiled=False))["deferred_frees"] == "none", "its rules are the same"


def test_on_the_virtual_device_they_come_as_late_as_can_be() -> None:
    assert effects(replayed(trace_of(*USES, source="virtual")))["deferred_frees"] == "bounded"


def test_the_size_of_a_request_that_failed_matters_to_another_rounding() -> None:
    rounded = (Loss("oom_size", "known only after rounding", 1),)
    trace = trace_of(("alloc", 0, 90 * GIB), failed=[0], lost=rounded)
    assert effects(replayed(trace))["oom_size"] == "none"
    assert effects(replayed(trace, SPLIT))["oom_size"] == "none"
    assert effects(replayed(trace, "roundup_power2_divisions:4"))["oom_size"] == "bounded"


# --- what the replay did otherwise --------------------------------------------------------------------------------


def test_which_requests_fail_is_compared_and_not_how_many() -> None:
    """Recorded: 60 MiB fail and 40 are served. In 95 MiB it is the other way round."""
    trace = trace_of(("alloc", 0, 30 * MIB), ("alloc", 1, 60 * MIB), ("alloc", 2, 40 * MIB), failed=[1])
    found = replay(trace, own_settings(trace).with_capacity(95 * MIB), compiled=False)
    assert [oom.event for oom in found.ooms] == [2]
    assert effects(found)["after_oom"] == effects(found)["ooms_caught"] == "unknown"
    assert "event 2 fails, which did not fail when recorded" in said(found, "after_oom")
    assert "the first at event 1" in said(found, "ooms_caught")
    alike = replay(trace, own_settings(trace).with_capacity(75 * MIB), compiled=False)
    assert [oom.event for oom in alike.ooms] == [1]
    assert not {"after_oom", "ooms_caught"} & set(effects(alike))


def test_events_are_numbered_as_in_the_recording() -> None:
    trace = trace_of(("alloc", 0, 30 * MIB), ("alloc", 1, 60 * MIB), ("alloc", 2, 90 * MIB), failed=[1])
    figures = play_one(subject_of(trace, "t", Given(capacity=100 * MIB)), "")
    assert figures.ooms == 1
    (failing,) = (a for a in figures.assumptions if a.code == "after_oom")
    assert "event 2 fails" in failing.detail


def test_an_impossible_request_fails_in_its_row() -> None:
    trace = trace_of(("alloc", 0, MIB), ("alloc", 1, 2**61), ("alloc", 2, MIB))
    for decisions in (True, False):
        found = replay(trace, own_settings(trace), decisions=decisions, compiled=False)
        assert found.whole.ooms == 1
        assert [(oom.event, oom.requested) for oom in found.ooms] == [(1, 2**61)]
        assert "after_oom" in effects(found)
    recorded = replace(found.trace, decisions=replay(trace, own_settings(trace), compiled=False).trace.decisions)
    assert not {"after_oom", "ooms_caught"} & set(effects(replayed(recorded))), "it failed then too"


def test_a_request_that_is_refused_before_the_driver_is_asked_fails_in_its_row() -> None:
    conf = "throw_on_cudamalloc_oom:True,per_process_memory_fraction:0.001"
    trace = trace_of(("alloc", 0, 30 * MIB), ("alloc", 1, 80 * MIB), torch="2.12.0")
    found = replay(trace, own_settings(trace).with_conf(conf).with_fraction(1.0), compiled=False)
    assert found.trace.decisions is not None
    assert not np.any(found.trace.decisions.kind == DecisionKind.OOM), "the allocator takes no note of it"
    assert [(oom.event, oom.rounded) for oom in found.ooms] == [(1, 80 * MIB)]
    assert found.whole.ooms == 1
    assert "event 1 fails" in said(found, "after_oom")


def test_changes_of_settings_that_another_conf_drops_are_told() -> None:
    trace = trace_of(("alloc", 0, 60 * MIB), ("free", 0), ("conf", SPLIT), ("alloc", 1, 14 * MIB))
    kept = replayed(trace, "expandable_segments:False")
    assert kept.whole.peak.reserved == 74 * MIB, "the 60 MiB block may not be split any more"
    assert "settings_dropped" not in effects(kept)
    dropped = replayed(trace, "garbage_collection_threshold:0.9")
    assert dropped.whole.peak.reserved == 60 * MIB
    assert effects(dropped)["settings_dropped"] == "unknown"


def test_the_program_may_act_otherwise_only_under_other_settings() -> None:
    trace = trace_of(("alloc", 0, MIB), ("seen", "torch.cuda.mem_get_info"))
    assert effects(replayed(trace))["observations"] == "none"
    assert effects(replayed(trace, SPLIT))["observations"] == "unknown"
    assert effects(replayed(trace, "expandable_segments:False"))["observations"] == "none"


def test_an_oom_that_ended_the_program_and_is_served_leaves_open_what_comes_next() -> None:
    trace = trace_of(("alloc", 0, 30 * MIB), ("alloc", 1, 60 * MIB), failed=[1])
    roomy = replay(trace, own_settings(trace).with_capacity(GIB), compiled=False)
    assert effects(roomy)["ends_with_oom"] == "unknown"
    short = replay(trace, own_settings(trace).with_capacity(40 * MIB), compiled=False)
    assert "ends_with_oom" not in effects(short)


# --- several replays ----------------------------------------------------------------------------------------------


def test_the_worst_effect_of_several_replays_counts() -> None:
    one = [Assumption("a", "none", 3, "fine"), Assumption("b", "bounded", 1, "b")]
    two = [Assumption("a", "unknown", 4, "not fine"), Assumption("a", "bounded", 1, "so so")]
    assert merged([one, two], add) == (Assumption("a", "unknown", 8, "not fine"), Assumption("b", "bounded", 1, "b"))
    assert merged([two, one], max) == (Assumption("a", "unknown", 4, "not fine"), Assumption("b", "bounded", 1, "b"))


def test_settings_of_the_users_making_stand_in_for_nothing() -> None:
    assert ReplaySettings(rules_for("2.11.0"), "h100-80gb", GIB, GIB).stand_ins == ()
