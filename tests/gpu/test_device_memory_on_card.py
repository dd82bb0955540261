"""On a machine with an NVIDIA GPU: memory past the allocator is really taken, and the model knows what it leaves."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from scenario_files import MIB, results_in, run_in, write_scenarios

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-bindings is not installed"),
]

SCENARIOS = """
    ONE = {"one": {}}
    MIB, GIB = 2**20, 2**30

    def missing():
        return torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]

    @fragscope.scenario("taken", presets={"created": {"how": "cuMemCreate"}, "malloced": {"how": "cudaMalloc"}})
    def taken(case):
        on_card(1)
        with case.measure():
            before = missing()
            block = case.device_memory(300 * MIB, how=case.how)
            assert missing() - before == 300 * MIB, missing() - before
            kept = on_card(100 * MIB)
            block.free()
            assert missing() - before == torch.cuda.memory_reserved() - 2 * MIB

    @fragscope.scenario("one-expert-at-a-time", presets=ONE)
    def one_expert_at_a_time(case):
        with case.measure():
            for _ in range(200):
                case.device_memory(7 * MIB // 4, how="cudaMalloc").free()

    @fragscope.scenario("too-much", presets=ONE, expect="oom")
    def too_much(case):
        with case.measure():
            held = case.device_memory(torch.cuda.mem_get_info()[0] - GIB)
            kept = on_card(4 * GIB)

    @fragscope.scenario("past-cached", presets=ONE, expect="oom")
    def past_cached(case):
        with case.measure():
            cached = on_card(torch.cuda.mem_get_info()[0] - 2 * GIB)
            del cached
            held = case.device_memory(4 * GIB, how="cudaMalloc")
"""


def test_what_is_taken_is_gone_from_the_card_and_the_model_follows(tmp_path: Path) -> None:
    write_scenarios(tmp_path, "raw", SCENARIOS)
    run_in(tmp_path, "scenario_raw.py", "--device", "cuda")
    cases = {f"{c['scenario']}/{c['preset']}": c for c in results_in(tmp_path)["cases"]}
    assert {name: c["outcome"] for name, c in cases.items()} == {
        "taken/created": "ok", "taken/malloced": "ok", "one-expert-at-a-time/one": "ok", "too-much/one": "oom",
        "past-cached/one": "oom",
    }  # fmt: skip
    assert {c["verify"]["mismatches"] for c in cases.values()} == {0}
    assert [cases[f"taken/{how}"]["peak"]["raw"] for how in ("created", "malloced")] == [300 * MIB] * 2
    assert cases["one-expert-at-a-time/one"]["peak"]["raw"] == 2 * MIB
