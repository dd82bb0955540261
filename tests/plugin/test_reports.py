"""Figures reach whoever reads a session: JUnit, workers, reruns, pytest-benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from sessions import prepare, properties, properties_of_runs, run

pytest_plugins = ["pytester"]
MIB = 2**20
ROOT = Path(__file__).parents[2]


def test_workers_hand_over_properties_and_sections(pytester):
    prepare(
        pytester,
        test_load="""
            import pytest
            from fake_gpu import alloc

            @pytest.mark.parametrize("mib", [40, 60, 80])
            @pytest.mark.gpu_memory_budget(peak_allocated="60 MiB")
            def test_load(mib, request):
                request.node.user_properties.append(("theirs", mib))
                alloc(mib)
        """,
    )
    result = run(pytester, "-n", "2", subprocess=True)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*- fragscope -*", "over  peak_allocated  budget 60.00 MiB  value 80.00 MiB  *"])
    for mib in (40, 60, 80):
        found = properties(pytester, f"test_load[{mib}]")
        assert (found["theirs"], found["fragscope_peak_allocated"]) == (str(mib), str(mib * MIB))


def test_a_rerun_states_its_own_figures_only(pytester):
    prepare(
        pytester,
        test_load="""
            import pytest
            from fake_gpu import alloc

            runs = []

            @pytest.mark.gpu_memory_budget(peak_allocated="60 MiB")
            def test_load():
                runs.append(1)
                alloc(80 if len(runs) < 3 else 40)
        """,
    )
    result = run(pytester, "--reruns", "2")
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["rerun"]) == (1, 2)
    peaks = [found["fragscope_peak_allocated"] for found in properties_of_runs(pytester, "test_load")]
    assert peaks == [str(80 * MIB), str(80 * MIB), str(40 * MIB)]


def test_a_test_that_stays_over_fails_after_its_reruns(pytester):
    prepare(
        pytester,
        test_load="""
            import pytest
            from fake_gpu import alloc

            @pytest.mark.gpu_memory_budget(peak_allocated="60 MiB")
            def test_load():
                alloc(80)
        """,
    )
    result = run(pytester, "--reruns", "1")
    outcomes = result.parseoutcomes()
    assert (outcomes["failed"], outcomes["rerun"]) == (1, 1)


def test_memory_stands_beside_times(pytester):
    prepare(
        pytester,
        test_load="""
            import pytest
            from fake_gpu import alloc

            def load():
                staged, weights = alloc(30), alloc(20)
                staged.free()
                weights.free()

            @pytest.mark.gpu_memory_budget(peak_allocated="60 MiB")
            def test_load(benchmark):
                benchmark.extra_info["theirs"] = 1
                benchmark.pedantic(load, rounds=3)
        """,
    )
    run(pytester, "--benchmark-json=times.json").assert_outcomes(passed=1)
    (case,) = json.loads((pytester.path / "times.json").read_text())["benchmarks"]
    assert case["extra_info"] == {
        "theirs": 1,
        "fragscope_peak_requested": 50 * MIB,
        "fragscope_peak_allocated": 50 * MIB,
        "fragscope_peak_reserved": 50 * MIB,
        "fragscope_peak_hbm": 50 * MIB,
        "fragscope_transient": 50 * MIB,
        "fragscope_retained": 0,
        "fragscope_stranded": 0,
    }


def test_sessions_that_measure_nothing_import_nothing(pytester):
    """Neither numpy nor anything that reads a budget."""
    pytester.makepyfile(
        """
        import sys

        def test_modules():
            heavy = {"numpy", "torch", "msgspec", "fragscope.trace", "fragscope.gate", "fragscope.config"}
            assert "fragscope.pytest_plugin" in sys.modules
            assert not heavy & set(sys.modules)
        """
    )
    run(pytester, subprocess=True).assert_outcomes(passed=1)


def test_the_entry_point_is_the_module():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"fragscope": "fragscope.pytest_plugin"}
    code = "import sys, fragscope.pytest_plugin; print(sorted({'numpy', 'torch', 'msgspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
