"""Which conf is the best, and which are tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from requests_of import MIB, trace_of

from fragscope.allocator import Assumption, DriverCalls, TieBreak, parse_conf
from fragscope.errors import UsageError
from fragscope.search import (
    Figures,
    Given,
    Goal,
    Subject,
    Trial,
    Tuning,
    play_one,
    play_other_orders,
    player,
    subject_of,
    tune,
)
from fragscope.search.candidates import material_of, neighbours, singles, together
from fragscope.search.confs import TUNED, effective, kept, settings_in
from fragscope.trace import RequestKind

EXPANDABLE = "expandable_segments:True"
USUAL = Figures(1000, 100, 0, 0, DriverCalls(10, 0, 0), True, ())


def subject(conf: str = "", torch: str = "2.11.0", **fields: object) -> Subject:
    requests = [("alloc", 0, 30 * MIB), ("alloc", 1, 48 * MIB), ("free", 0), ("alloc", 2, 5 * MIB)]
    return subject_of(trace_of(*requests, conf=conf, torch=torch), "t", Given(**fields))


class Table:
    """Replays that were decided beforehand: figures by conf, one for each trace."""

    def __init__(self, usual: Sequence[Figures], figures: dict[str | None, Sequence[Figures]]) -> None:
        self.usual, self.figures = usual, figures
        self.played: list[str | None] = []

    def __call__(self, confs: Sequence[str | None]) -> list[tuple[Figures, ...]]:
        self.played += confs
        return [tuple(self.figures.get(conf, self.usual)) for conf in confs]


def best(figures: dict[str | None, Figures], goal: Goal = "reserved", keep: Sequence[str] = ()) -> Tuning:
    return tune([subject()], Table([USUAL], {c: [o] for c, o in figures.items()}), goal=goal, keep=keep)


def conf_of(tuning: Tuning) -> str | None:
    return None if tuning.best is None else tuning.best.conf


def test_less_reserved_is_better() -> None:
    t = best({EXPANDABLE: replace(USUAL, reserved=900), "roundup_power2_divisions:2": replace(USUAL, reserved=950)})
    assert conf_of(t) == EXPANDABLE
    assert t.best is t.ranked[0]
    assert t.saved(t.ranked[0]) == 100


def test_nothing_beats_what_is_as_good() -> None:
    t = best({EXPANDABLE: replace(USUAL, calls=DriverCalls(1, 0, 0))})
    assert t.best is None
    assert t.ranked[0].conf == "", "fewer driver calls than recorded are no reason for a setting"


def test_each_goal_has_its_figure() -> None:
    figures = {
        EXPANDABLE: replace(USUAL, reserved=900),
        "max_split_size_mb:49": replace(USUAL, stranded=50),
        "roundup_power2_divisions:2": replace(USUAL, retries=-1),
    }
    assert conf_of(best(figures)) == EXPANDABLE
    assert conf_of(best(figures, "stranded")) == "max_split_size_mb:49"
    assert conf_of(best(figures, "no-oom")) == "roundup_power2_divisions:2"


def test_fewer_ooms_come_before_bytes() -> None:
    failing = replace(USUAL, ooms=3)
    t = best({None: failing, "": failing, EXPANDABLE: replace(USUAL, reserved=1200, ooms=2),
              "roundup_power2_divisions:2": replace(failing, reserved=100)} | dict.fromkeys(
                  ["roundup_power2_divisions:4"], replace(USUAL, reserved=1100, ooms=2)))  # fmt: skip
    assert t.current.ooms == 3
    assert t.ranked[0].ooms == 0
    assert [x.conf for x in t.ranked if x.ooms == 2] == ["roundup_power2_divisions:4", EXPANDABLE]


def test_a_conf_that_fails_where_the_recorded_one_did_not_is_never_the_best() -> None:
    t = best({EXPANDABLE: replace(USUAL, reserved=1, ooms=1)})
    assert t.best is None
    assert t.ranked[-1].conf == EXPANDABLE


def test_no_oom_of_one_trace_pays_for_one_of_another() -> None:
    failing = replace(USUAL, ooms=5)
    swapped = [replace(USUAL, ooms=1), replace(USUAL, ooms=0)]
    t = tune([subject(), subject()], Table([USUAL, failing], {EXPANDABLE: swapped}))
    assert t.best is None
    assert t.ranked[-1].conf == EXPANDABLE


def test_the_worst_trace_decides() -> None:
    even = [replace(USUAL, reserved=900), replace(USUAL, reserved=900)]
    uneven = [replace(USUAL, reserved=100), replace(USUAL, reserved=950)]
    t = tune([subject(), subject()], Table([USUAL, USUAL], {EXPANDABLE: even, "roundup_power2_divisions:2": uneven}))
    assert conf_of(t) == EXPANDABLE


def test_where_the_worst_trace_cannot_gain_the_others_decide() -> None:
    one = [USUAL, replace(USUAL, reserved=500)]
    t = tune([subject(), subject()], Table([USUAL, USUAL], {EXPANDABLE: one}))
    assert conf_of(t) == EXPANDABLE
    assert t.best is not None
    assert t.saved(t.best) == 0, "in the trace where it saves least"


def test_a_trace_counts_by_its_own_size() -> None:
    """Ten bytes of a hundred are more than fifty of a thousand."""
    small = replace(USUAL, reserved=100)
    a = [replace(USUAL, reserved=950), small]
    b = [USUAL, replace(small, reserved=90)]
    t = tune([subject(), subject()], Table([USUAL, small], {EXPANDABLE: a, "roundup_power2_divisions:2": b}))
    assert conf_of(t) == "roundup_power2_divisions:2", "the worst is equal; the other is 90 % against 95 %"


def test_equal_bytes_go_to_fewer_more_driver_calls_then_to_fewer_settings() -> None:
    less = replace(USUAL, reserved=900)
    busy = replace(less, calls=DriverCalls(10, 5, 1))
    t = best({EXPANDABLE: busy, "roundup_power2_divisions:2": less})
    assert conf_of(t) == "roundup_power2_divisions:2"
    both = f"{EXPANDABLE},roundup_power2_divisions:2"
    assert [x.conf for x in best({EXPANDABLE: less, both: less}).ranked][:2] == [EXPANDABLE, both]


def test_what_is_calmer_simpler_and_surer_is_named_beside_the_best() -> None:
    assumed = (Assumption("tie_by_modelled_address", "unknown", 1, "."),)
    both = f"{EXPANDABLE},roundup_power2_divisions:2"
    t = best({
        both: replace(USUAL, reserved=700, calls=DriverCalls(50, 40, 3), exact=False, assumptions=assumed),
        EXPANDABLE: replace(USUAL, reserved=800, calls=DriverCalls(11, 0, 0), exact=False, assumptions=assumed),
        "roundup_power2_divisions:2": replace(USUAL, reserved=850),
    })  # fmt: skip
    assert conf_of(t) == both
    assert t.simpler is not None
    assert t.calmer is not None
    assert t.surer is not None
    assert (t.simpler.conf, t.calmer.conf) == (EXPANDABLE, "roundup_power2_divisions:2")
    assert t.surer.conf == "roundup_power2_divisions:2"
    alone = best({EXPANDABLE: replace(USUAL, reserved=800)})
    assert (alone.simpler, alone.calmer, alone.surer) == (None, None, None)


def test_of_what_several_traces_assume_the_worst_counts() -> None:
    fine = replace(USUAL, assumptions=(Assumption("card_assumed", "none", 5, "it has no effect there"),))
    not_fine = replace(USUAL, exact=False, assumptions=(Assumption("card_assumed", "unknown", 7, "here it has"),))
    for pair in ((fine, not_fine), (not_fine, fine)):
        trial = Trial("", 0, pair)
        assert trial.assumptions == (Assumption("card_assumed", "unknown", 12, "here it has"),)
        assert not trial.exact


def test_the_neighbourhood_of_good_confs_is_searched() -> None:
    """``large_segment_size_mb`` 20 is the default and 26 is on no list, but next to 24 and 28."""
    good = {f"large_segment_size_mb:{n}": replace(USUAL, reserved=900 + abs(n - 26)) for n in range(12, 200, 2)}
    assert conf_of(best(good)) == "large_segment_size_mb:26"


def test_a_search_ends_and_says_how_many_were_tried() -> None:
    table = Table([USUAL], {})
    told: list[int] = []
    t = tune([subject()], table, most=17, found=told.append)
    assert len(t.ranked) == 17 == told[-1]
    assert len(table.played) == 18, "and the recorded one"
    assert len(set(table.played)) == 18


def test_what_is_kept_does_not_change() -> None:
    table = Table([USUAL], {})
    tune([subject(conf="max_split_size_mb:40")], table, keep=["expandable_segments:False", "max_split_size_mb"])
    confs = [c for c in table.played if c is not None]
    assert len(confs) > 10
    assert all("max_split_size_mb:40" in c and "expandable_segments" not in c for c in confs)


def test_a_forced_value_is_in_every_candidate() -> None:
    table = Table([USUAL], {})
    tune([subject()], table, keep=[EXPANDABLE])
    assert all(c is None or EXPANDABLE in c for c in table.played)


def test_settings_that_are_not_tuned_stay_as_recorded() -> None:
    table = Table([USUAL], {})
    tune([subject(conf="pinned_use_background_threads:True,max_split_size_mb:40")], table)
    confs = [c for c in table.played if c is not None]
    assert "pinned_use_background_threads:True" in confs
    assert all("pinned_use_background_threads:True" in c for c in confs)


@pytest.mark.parametrize(
    ("keep", "named"),
    [
        (["expandable_segment:True"], "did you mean expandable_segments"),
        (["nonsense"], "no such setting"),
        ([""], "no such setting"),
        (["expandable_segments:"], "write KEY, or KEY:VALUE"),
        (["expandable_segments:perhaps"], "True or False"),
        (["max_split_size_mb:3"], "large_segment_size"),
        (["max_split_size_mb:64,expandable_segments:True"], "repeat --keep"),
        (["expandable_segments:True", "expandable_segments:False"], "cannot be both"),
        (["throw_on_cudamalloc_oom:True"], "2.11 has no such setting"),
        (["backend:cudaMallocAsync"], "backend"),
        (["large_segment_size_mb:13", "expandable_segments:True"], "even"),
    ],
)
def test_nonsense_to_keep_is_refused(keep: list[str], named: str) -> None:
    with pytest.raises(UsageError, match="--keep") as caught:
        tune([subject()], Table([USUAL], {}), keep=keep)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_left_to_tune_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing is left to tune"):
        tune([subject()], Table([USUAL], {}), keep=TUNED)


def test_recordings_that_differ_in_what_stays_are_refused() -> None:
    two = [subject(), subject(conf="pinned_use_background_threads:True")]
    with pytest.raises(UsageError, match="pinned_use_background_threads"):
        tune(two, Table([USUAL, USUAL], {}))
    tune(two, Table([USUAL, USUAL], {}), keep=["pinned_use_background_threads:True"])
    with pytest.raises(UsageError, match="say which with --keep max_split_size_mb:VALUE"):
        tune([subject(), subject(conf="max_split_size_mb:40")], Table([USUAL, USUAL], {}), keep=["max_split_size_mb"])


def test_the_variable_is_the_newest_name_that_all_releases_read() -> None:
    def variable(*releases: str) -> str:
        return tune([subject(torch=r) for r in releases], Table([USUAL] * len(releases), {})).variable

    assert variable("2.9.1") == "PYTORCH_CUDA_ALLOC_CONF"
    assert variable("2.10.0") == variable("2.14.0") == "PYTORCH_ALLOC_CONF"
    assert variable("2.13.0", "2.9.0") == "PYTORCH_CUDA_ALLOC_CONF"


def played(torch: str = "2.11.0", **fields: object) -> list[str]:
    table = Table([USUAL], {})
    tune([subject(torch=torch, **fields)], table)
    return [c for c in table.played if c is not None]


@pytest.mark.parametrize("torch", ["2.9.0", "2.10.0", "2.11.0", "2.14.0"])
def test_every_candidate_is_one_that_the_release_takes(torch: str) -> None:
    s = subject(torch=torch, memory_fraction=0.5)
    confs = played(torch, memory_fraction=0.5)
    assert all(parse_conf(c, s.settings.rules.rules) for c in confs)
    assert len({effective(c, [s.settings.rules.rules]) for c in confs}) == len(confs), "each means something else"


def test_a_release_is_offered_its_own_settings_only() -> None:
    assert not any("large_segment_size_mb" in c for c in played("2.10.0"))
    assert any("large_segment_size_mb" in c for c in played("2.11.0"))
    assert all(int(c.partition("large_segment_size_mb:")[2].partition(",")[0]) % 2 == 0
               for c in played("2.11.0") if "large_segment_size_mb" in c)  # fmt: skip


def test_collection_is_tried_only_where_a_limit_is_in_force() -> None:
    assert not any("garbage" in c for c in played())
    assert any("garbage" in c for c in played(memory_fraction=0.5))
    assert not any("garbage" in c for c in played(memory_fraction=1.0)), "without a limit it does nothing"
    assert any("garbage" in c for c in played("2.9.0", memory_fraction=1.0)), "up to 2.9 that is a limit"


def test_split_limits_stand_around_the_sizes_that_are_asked_for() -> None:
    splits = material_of([subject()], ()).splits
    assert {20, 30, 31, 48, 49} <= set(splits)
    assert max(splits) == 49, "above all requests nothing changes any more"
    assert min(material_of([subject(torch="2.9.0")], ()).splits) == 21


def test_rounding_of_large_requests_only_leaves_the_others_alone() -> None:
    for torch in ("2.9.0", "2.11.0"):
        s = subject(torch=torch)
        rules = s.settings.rules.rules
        lists = [c for c in singles(material_of([s], ())) if c[0][1].startswith("[")]
        assert lists
        for ((key, value),) in lists:
            slots = parse_conf(f"{key}:{value}", rules).roundup_power2_divisions
            first = next(i for i, n in enumerate(slots) if n)
            assert 0 < first <= 5, "requests are below 64 MiB"
            assert set(slots[first:]) in ({4}, {8})


def test_pairs_do_not_set_a_thing_twice() -> None:
    one, two, other = (("a", "1"),), (("a", "2"),), (("expandable_segments", "True"),)
    assert list(together([one, two])) == []
    assert len(list(together([one, other, two]))) == 2


def test_non_split_rounding_comes_with_a_split_limit_only() -> None:
    m = material_of([subject()], ())
    assert any("max_non_split_rounding_mb" in dict(c) for c in neighbours((("max_split_size_mb", "30"),), m))
    assert not any("max_non_split_rounding_mb" in dict(c) for c in neighbours((("expandable_segments", "True"),), m))


def test_settings_are_read_as_the_release_does() -> None:
    rules = subject().settings.rules.rules
    text = "max_split_size_mb: 64, roundup_power2_divisions:[256:1,>:2],expandable_segments:True"
    assert settings_in(text, rules) == {
        "max_split_size_mb": "64", "roundup_power2_divisions": "[256:1,>:2]", "expandable_segments": "True",
    }  # fmt: skip
    assert settings_in("", rules) == {}
    assert kept(["roundup_power2_divisions:[256:1,>:2]"], [{}], [rules]) == {"roundup_power2_divisions": "[256:1,>:2]"}


def real(play: Callable[..., object] = player) -> Tuning:
    """The whole search over a real allocator: two blocks that a split limit keeps apart."""
    requests = [("alloc", 0, 60 * MIB), ("free", 0)] + [("alloc", i, 14 * MIB) for i in range(1, 5)]
    s = subject_of(trace_of(*requests, conf="max_split_size_mb:20"), "t")
    with player([s], jobs=1, tries=10) as here:
        return tune([s], here, goal="reserved")


def test_a_split_limit_that_costs_memory_is_found() -> None:
    t = real()
    assert t.current.reserved == (60 + 4 * 14) * MIB, "the 60 MiB block may not be split"
    assert t.best is not None
    assert t.best.reserved == 60 * MIB
    assert t.best.conf == ""
    assert t.ranked == real().ranked


def test_what_failed_when_recorded_is_given_back_where_it_is_served() -> None:
    requests = [("alloc", 0, 30 * MIB), ("alloc", 1, 60 * MIB), ("free", 0), ("alloc", 2, 40 * MIB)]
    s = subject_of(trace_of(*requests, failed=[1]), "t", Given(capacity=80 * MIB))
    recorded = play_one(s, None)
    assert (recorded.ooms, recorded.reserved) == (1, 70 * MIB)
    roomy = play_one(replace(s, settings=replace(s.settings, capacity=100 * MIB)), None)
    assert (roomy.ooms, roomy.reserved) == (0, 90 * MIB), "the 40 MiB lie in the 60 MiB block, not beside it"
    assert {a.code for a in roomy.assumptions if a.effect != "none"} == {"ooms_caught", "fraction_assumed"}
    assert not roomy.exact


def test_other_orders_of_equal_blocks_are_those_of_other_releases() -> None:
    s = subject(torch="2.13.0")
    figures = play_other_orders(s, "")
    assert set(figures) == {TieBreak.ADDRESS, TieBreak.BLOCK_ORDER}
    # No two blocks are equal here: 30 and 48 MiB, and 20 MiB for the 5 (the 30 are left whole, since 25 would remain).
    assert {o.reserved for o in figures.values()} == {play_one(s, "").reserved}


def test_what_is_given_back_stands_right_behind_its_request() -> None:
    requests = [("alloc", 0, MIB), ("alloc", 1, MIB), ("alloc", 2, MIB), ("free", 0), ("alloc", 3, MIB)]
    s = subject_of(trace_of(*requests, failed=[1, 2]), "t")
    trial = s.trial.trace
    asked = [
        (RequestKind(k).name, i) for k, i in zip(trial.requests.kind.tolist(), trial.requests.id.tolist(), strict=True)
    ]
    assert asked == [
        ("ALLOC", 0), ("ALLOC", 1), ("FREE", 1), ("ALLOC", 2), ("FREE", 2), ("FREE", 0), ("ALLOC", 3),
    ]  # fmt: skip
    assert trial.decisions is not None
    assert trial.decisions.request.tolist() == [0, 1, 3, 6], "decisions go with their requests"
    assert [s.trial.event_of(row) for row in range(7)] == [0, 1, 1, 2, 2, 3, 4]
    assert s.trial.kind.tolist() == trial.requests.kind.tolist()
