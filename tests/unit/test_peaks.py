"""Peaks by adding up a recording equal what torch counted on the card."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import TRACES, torch_statistics
from requests_of import trace_of

from fragscope.measure import Peaks, peaks
from fragscope.trace import RequestKind, SegmentState, load_trace


@pytest.mark.parametrize("conf", ["default", "expandable", "split20"])
@pytest.mark.parametrize("variant", ["orig", "fixed", "newest"])
def test_recordings_have_the_peaks_that_torch_reported(variant, conf):
    name = f"fp8-dsv3-tp8.{variant}.{conf}"
    reported = torch_statistics(name)
    assert peaks(load_trace(TRACES / f"{name}.pickle.xz")) == Peaks(
        reported["requested_bytes.all.peak"], reported["reserved_bytes.all.peak"]
    )


def test_what_failed_or_was_never_seen_does_not_count():
    requests = [("alloc", 1, 100), ("alloc", 2, 1000), ("free", 1), ("free", 77), ("alloc", 3, 60)]
    assert peaks(trace_of(*requests, failed=[1])).requested == 100
    assert peaks(trace_of(*requests)) == Peaks(1100, None)
    assert peaks(trace_of()) == Peaks(0, None)


def test_what_stood_at_the_start_counts():
    trace = trace_of(("alloc", 1, 100), ("alloc", 2, 50), ("free", 1), failed=[1])
    kind = trace.requests.kind.copy()
    kind[0] = RequestKind.HELD
    segment = SegmentState(0, 2 << 20, 0, 0, ((0, 512, "allocated"), (512, (2 << 20) - 512, "free")))
    stood = replace(trace, requests=replace(trace.requests, kind=kind), initial=(segment,))
    assert peaks(stood) == Peaks(100, 2 << 20)
