"""Tests that take ``fragscope_device`` run on a virtual card, GPU or not."""

from __future__ import annotations

import pytest
from sessions import WITHOUT_GPU, prepare, properties, run

pytest.importorskip("torch._dynamo")  # cannot be imported twice in a process either
pytest.importorskip("fragscope.record.virtual")
pytestmark = pytest.mark.torch
pytest_plugins = ["pytester"]
MIB = 2**20

LOADER = """
    import pytest
    import torch

    def load():
        old = torch.empty(100, 2**20, dtype=torch.uint8, device="cuda")
        new = torch.empty(120, 2**20, dtype=torch.uint8, device="cuda")
        del old
        return new
"""


def test_a_test_runs_on_the_virtual_card_and_is_held_to_its_budget(pytester):
    prepare(
        pytester,
        WITHOUT_GPU,
        test_load=LOADER
        + """
    @pytest.mark.gpu_memory_budget(peak_allocated="220 MiB", retained=0)
    def test_within(fragscope_device):
        assert load().is_cuda

    @pytest.mark.gpu_memory_budget(transient="90 MiB")
    def test_over(fragscope_device):
        with fragscope_device.phase("load"):
            weights = load()

    def test_only_measured(fragscope_device):
        load()
        assert fragscope_device.stop().source == "virtual"

    def test_the_card_is_gone():
        assert not torch.cuda.is_available() or torch.cuda.get_device_name()
""",
    )
    result = run(pytester)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        [
            "GPU memory over budget: transient 100.00 MiB of 90.00 MiB",
            "over  phase load  transient  budget 90.00 MiB  value 100.00 MiB  excess 10.00 MiB (+11.1 %)  *",
            "held at the peak of allocated bytes: 220.00 MiB in 2 blocks",
            "      120.00 MiB  1 block  test_load.py:6 (load) < test_load.py:17 (test_over)",
            "recorded on the virtual h100-80gb; *",
        ]
    )
    found = properties(pytester, "test_only_measured")
    assert found["fragscope_peak_allocated"] == str(220 * MIB)
    assert found["fragscope_recorded_on"] == "the virtual h100-80gb"


def test_the_card_is_that_of_the_marker_the_option_or_the_settings(pytester):
    """There is one profile so far; an unknown one shows which setting was taken."""
    pytester.makepyprojecttoml("[tool.fragscope]\ncard = 'of-all'\n[tool.fragscope.pytest]\ncard = 'of-tests'\n")
    prepare(
        pytester,
        test_load=LOADER
        + """
    def test_setting(fragscope_device):
        load()

    @pytest.mark.gpu_memory_budget(card="h100-80gb", peak_allocated="1 GiB")
    def test_marker(fragscope_device):
        load()
""",
    )
    for arguments, name in (((), "of-tests"), (("--fragscope-card=of-option",), "of-option")):
        result = run(pytester, *arguments)
        result.assert_outcomes(passed=1, errors=1)
        result.stdout.fnmatch_lines([f"--fragscope-card: no profile named '{name}'; *known cards: *h100-80gb*"])


def test_the_conf_of_the_environment_decides_as_it_would_on_a_gpu(pytester, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    prepare(
        pytester,
        test_load=LOADER
        + """
    @pytest.mark.gpu_memory_budget(peak_reserved=0)
    def test_load(fragscope_device):
        torch.empty(30 * 2**20, dtype=torch.uint8, device="cuda")
""",
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    # Expandable segments of the large pool grow by 20 MiB (kLargeBuffer); an ordinary one would have 30.
    result.stdout.fnmatch_lines(
        [
            "over  peak_reserved  budget 0 B  value 40.00 MiB  *",
            "recorded on *its own requests under conf 'expandable_segments:True', rules of *",
        ]
    )


def test_what_makes_figures_uncertain_is_said(pytester):
    prepare(
        pytester,
        test_load=LOADER
        + """
    @pytest.mark.gpu_memory_budget(peak_allocated=0)
    def test_load(fragscope_device):
        torch.cuda.mem_get_info()
        load().sort()
""",
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "estimated: hidden temporaries of *sort* are unknown",
            "the test read memory state (torch.cuda.mem_get_info), which depends on more than itself",
        ]
    )
    assert "sort" in properties(pytester, "test_load")["fragscope_caveats"]


def test_code_that_needs_values_fails_with_its_own_error(pytester):
    prepare(
        pytester,
        test_load=LOADER
        + """
    @pytest.mark.gpu_memory_budget(peak_allocated="1 GiB")
    def test_load(fragscope_device):
        load().amax().item()
""",
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*UnsupportedError*", "within  peak_allocated  *"])
