"""Device memory outside the allocator: what was sampled less what was reserved at that moment."""

from __future__ import annotations

import numpy as np

from fragscope.measure import non_torch
from fragscope.trace import DecisionKind, DecisionLog, RequestKind, RequestLog, Trace

MIB = 2**20


def sampled(*what: tuple[str, int]) -> Trace:
    """``("take", bytes)``, ``("return", bytes)``, ``("sample", bytes)`` in order."""
    requests, decisions = RequestLog(), DecisionLog()
    for number, (kind, size) in enumerate(what):
        if kind == "sample":
            requests.append(RequestKind.NON_TORCH, size=size)
            continue
        decisions.request = requests.append(RequestKind.ALLOC if kind == "take" else RequestKind.EMPTY_CACHE, id=number)
        made = DecisionKind.SEGMENT_ALLOC if kind == "take" else DecisionKind.SEGMENT_FREE
        decisions.append(made, -1, 0x7F00_0000_0000 + number * 2**30, size, 0, 0)
    return Trace(requests=requests.finish(), decisions=decisions.finish())


def test_reserved_memory_is_not_in_it():
    seen = non_torch(sampled(("sample", 500 * MIB), ("take", 20 * MIB), ("sample", 520 * MIB), ("sample", 1032 * MIB)))
    assert seen is not None
    assert (seen.non_torch // MIB).tolist() == [500, 500, 1012]
    assert seen.rows.tolist() == [0, 2, 3]
    assert seen.peak == 1012 * MIB
    assert seen.peak_hbm == 1032 * MIB


def test_the_sum_peaks_between_samples_too():
    seen = non_torch(sampled(("sample", 500 * MIB), ("take", 200 * MIB), ("return", 200 * MIB), ("sample", 500 * MIB)))
    assert seen is not None
    assert seen.peak == 500 * MIB
    assert seen.peak_hbm == 700 * MIB


def test_without_samples_there_is_none():
    assert non_torch(sampled(("take", 20 * MIB))) is None
    assert non_torch(Trace(requests=RequestLog().finish())) is None


def test_segments_before_the_first_sample_count_with_it():
    seen = non_torch(sampled(("take", 200 * MIB), ("return", 200 * MIB), ("sample", 300 * MIB)))
    assert seen is not None
    assert seen.peak_hbm == 500 * MIB
    assert np.all(seen.non_torch == 300 * MIB)
