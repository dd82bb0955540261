"""A test has the same figures and the same verdict alone, after fifty others, beside other workers and in any order."""

from __future__ import annotations

import pytest
from sessions import WITH_FAKE_GPU, prepare, properties, run, verdicts

pytest_plugins = ["pytester"]
MIB = 2**20

SUBJECTS = """
    import pytest
    from fake_gpu import alloc, empty_cache
    from test_1_others import kept

    @pytest.mark.gpu_memory_budget(peak_reserved="60 MiB", stranded="16 MiB", peak_allocated="44 MiB")
    def test_fragments():
        weights = [alloc(9.5) for _ in range(4)]
        small, copy = alloc(0.1), alloc(3, "side")
        if kept:
            kept.pop().free()  # not its own
        weights[0].free(), weights[2].free()
        empty_cache()
        held = alloc(1.5)

    @pytest.mark.gpu_memory_budget(transient="30 MiB")
    def test_phase(fragscope_recorder):
        base = alloc(12)
        with fragscope_recorder.phase("load"):
            staged = alloc(24), alloc(8)
            if kept:
                kept.pop(0).free()
            for block in staged:
                block.free()
        base.free()

    @pytest.mark.gpu_memory_budget(peak_reserved="42 MiB")
    def test_within():
        first = alloc(40)
        second = alloc(0.3)
        first.free()
        second.free()
"""

OTHERS = """
    import pytest
    from fake_gpu import alloc, empty_cache, process

    kept = []

    @pytest.mark.parametrize("number", range(50))
    def test_other(number):
        blocks = [alloc(1.3 + (7 * number + 5 * n) % 23, "copy" if n == 3 else "") for n in range(6)]
        for block in blocks[number % 2 :: 2]:
            block.free()
        kept.extend(blocks[1 - number % 2 :: 2])
        while len(kept) > 24:  # each keeps a segment of at most 26 MiB: whatever ran here before, the rest has room
            kept.pop(number % 24).free()
        if number % 23 == 5:
            empty_cache()

    def test_left_a_full_and_fragmented_card():
        now = process.allocator.now
        assert now.reserved > 300 * 2**20 and now.stranded > 30 * 2**20 and len(kept) == 24
"""

REVERSED = """
def pytest_collection_modifyitems(items):
    items.reverse()
"""

NAMES = ("test_fragments", "test_phase", "test_within")


def session(pytester: pytest.Pytester, *arguments: str, conftest: str = "", subprocess: bool = False):
    """Verdicts and properties of the subjects."""
    prepare(pytester, WITH_FAKE_GPU + conftest, test_1_others=OTHERS, test_2_subjects=SUBJECTS)
    result = run(pytester, *arguments, subprocess=subprocess)
    outcomes = result.parseoutcomes()
    assert outcomes.get("failed") == 2, result.stdout.str()
    assert "errors" not in outcomes
    return verdicts(result), {name: properties(pytester, name) for name in NAMES}, outcomes["passed"]


@pytest.mark.parametrize("conf", ["", "expandable_segments:True", "max_split_size_mb:20"])
def test_alone_after_fifty_others_in_workers_and_reversed(pytester, monkeypatch, conf):
    monkeypatch.setenv("FAKE_CONF", conf)
    alone = session(pytester, "test_2_subjects.py")
    after = session(pytester)
    assert (alone[2], after[2]) == (1, 52)
    assert after[:2] == alone[:2]
    reverse = session(pytester, "-k", "not left", conftest=REVERSED)
    assert reverse[:2] == alone[:2]
    workers = session(pytester, "-k", "not left", "-n", "2", subprocess=True)
    assert workers[:2] == alone[:2]


def test_the_figures_are_those_of_an_empty_allocator(pytester, monkeypatch):
    """By hand: 9.5 MiB come from segments of 20 (kLargeBuffer), the second without a rest (not above kSmallSize)."""
    monkeypatch.delenv("FAKE_CONF", raising=False)
    texts, found, _ = session(pytester)
    fragments = found["test_fragments"]
    requested = 4 * int(9.5 * MIB) + int(0.1 * MIB) + 3 * MIB
    small = -(-int(0.1 * MIB) // 512) * 512
    assert int(fragments["fragscope_peak_requested"]) == requested
    assert int(fragments["fragscope_peak_allocated"]) == 40 * MIB + small + 3 * MIB
    assert int(fragments["fragscope_peak_reserved"]) == (20 + 20 + 2 + 20) * MIB
    # The rests: of the small segment, of the side stream's, one weight's place, and the other's without 1.5 MiB.
    assert int(fragments["fragscope_stranded"]) == (2 + 17) * MIB - small + int(9.5 * MIB) + 8 * MIB
    assert "over  peak_reserved  budget 60.00 MiB  value 62.00 MiB  excess 2.00 MiB (+3.3 %)" in texts["test_fragments"]
    assert "within  peak_allocated" in texts["test_fragments"]
    assert int(found["test_phase"]["fragscope_peak_allocated"]) == 12 * MIB + 24 * MIB + 8 * MIB
    assert "over  phase load  transient  budget 30.00 MiB  value 32.00 MiB" in texts["test_phase"]
    assert int(found["test_within"]["fragscope_peak_reserved"]) == 42 * MIB
