"""``case.device_memory``: what scenarios take past the allocator counts on every card, under every conf."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenario_files import MIB, cases_in, results_in, run_in, write_scenarios

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SCENARIOS = """
    ONE = {"one": {}}
    MIB, GIB = 2**20, 2**30

    @fragscope.scenario("taken", presets=ONE)
    def taken(case):
        before = case.device_memory(3 * MIB)
        with case.measure():
            kept = on_card(30 * MIB)
            block = case.device_memory(5 * MIB + 1)
            assert block.size == 6 * MIB
            block.free()
            for size in (MIB, 2 * MIB, 3 * MIB):
                case.device_memory(size, how="cudaMalloc").free()

    @fragscope.scenario("too-much", presets=ONE, expect="oom")
    def too_much(case):
        with case.measure():
            held = case.device_memory(50 * GIB)
            kept = on_card(40 * GIB)

    @fragscope.scenario("past-cached", presets=ONE, expect="oom")
    def past_cached(case):
        with case.measure():
            cached = on_card(60 * GIB)
            del cached
            held = case.device_memory(30 * GIB, how="cudaMalloc")

    @fragscope.scenario("caught", presets=ONE)
    def caught(case):
        with case.measure():
            try:
                case.device_memory(500 * GIB)
            except torch.OutOfMemoryError as e:
                assert "cuMemCreate: 500.00 GiB asked for" in str(e)
            free, total = torch.cuda.mem_get_info()
            block = case.device_memory(8 * MIB)
            assert torch.cuda.mem_get_info() == (free - 8 * MIB, total)
            assert torch.cuda.memory_reserved() == 0
            block.free()
            assert torch.cuda.mem_get_info() == (free, total)

    @fragscope.scenario("wrong", presets=ONE, expect="crash")
    def wrong(case):
        with case.measure():
            case.device_memory(0)

    @fragscope.scenario("fits-one-conf", presets=ONE,
                        expect=[fragscope.Expect("oom", conf="expandable*"), fragscope.Expect("ok")])
    def fits_one_conf(case):
        # 14 MiB take a segment of 14, or a page of 20 where segments expand.
        with case.measure():
            held = case.device_memory(case.free * MIB)
            kept = on_card(14 * MIB)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device-memory")
    text = SCENARIOS.replace('"fits-one-conf", presets=ONE', '"fits-one-conf", presets={"one": {"free": FREE}}')
    from fragscope.allocator import card_named

    text = text.replace("FREE", str(card_named("h100-80gb").free // MIB // 2 * 2 - 14))
    write_scenarios(folder, "raw", text)
    run_in(folder, "scenario_raw.py", "--card", "h100-80gb", "--conf", "", "--conf", "expandable_segments:True")
    return folder


def test_peaks_are_of_whole_pages_and_of_both_together(ran: Path) -> None:
    """4 MiB before; 6 MiB beside 30 reserved."""
    case = cases_in(ran)["taken/original"]
    assert (case["peak"]["raw"], case["end"]["raw"], case["exact"]) == (10 * MIB, 4 * MIB, True)
    assert case["peak"]["hbm"] == 10 * MIB + case["peak"]["reserved"]
    assert case["peak"]["reserved"] >= 30 * MIB


def test_what_is_taken_makes_pytorchs_own_request_fail(ran: Path) -> None:
    case = cases_in(ran)["too-much/original"]
    assert (case["outcome"], case["ooms"][0]["requested"]) == ("oom", 40 * 2**30)
    assert (case["peak"]["raw"], case["peak"]["reserved"]) == (50 * 2**30, 0)


def test_what_is_cached_stands_in_the_way_of_the_driver(ran: Path) -> None:
    case = cases_in(ran)["past-cached/original"]
    assert case["outcome"] == "oom"
    assert case["message"].startswith("cudaMalloc: 30.00 GiB asked for, ")
    assert [o["requested"] for o in case["ooms"]] == [30 * 2**30]


def test_programs_may_catch_it_and_see_what_is_free(ran: Path) -> None:
    assert cases_in(ran)["caught/original"]["outcome"] == "ok"


def test_what_is_no_request_is_told(ran: Path) -> None:
    case = cases_in(ran)["wrong/original"]
    assert "UsageError: device memory of 0 bytes: a positive whole number is needed" in case["message"]


def test_replays_under_another_conf_know_it(ran: Path) -> None:
    outcomes = {c["conf"]: c["outcome"] for c in results_in(ran)["cases"] if c["scenario"] == "fits-one-conf"}
    assert outcomes == {"": "ok", "expandable_segments:True": "oom"}
