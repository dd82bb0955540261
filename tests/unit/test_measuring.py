"""What a recorded test needs: under which settings, per phase, and how certain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from requests_of import MIB, trace_of

from fragscope.allocator import ReplaySettings, replay, rules_for
from fragscope.errors import UnmodelledError
from fragscope.testing.marker import Bound
from fragscope.testing.measuring import measure
from fragscope.testing.recording import Finished
from fragscope.trace import Loss, RequestKind, Trace


def measured(trace: Trace, *estimated: str):
    return measure(Finished(trace, "the GPU", estimated))


def test_neither_the_card_nor_its_limits_count():
    requests = [("alloc", 0, 30 * MIB), ("free", 0), ("alloc", 1, 60 * MIB)]
    small = trace_of(("fraction", 0.001), *requests, conf="garbage_collection_threshold:0.01")
    limits = replace(small.settings, memory_fraction=0.1, capacity=64 * MIB)
    small = replace(small, device_total=64 * MIB, settings=limits)
    found = measured(small)
    # On a card of 64 MiB the second request would send the first segment back.
    assert found.value("peak_reserved") == 90 * MIB
    assert found.caveats == ()


def test_the_conf_decides():
    requests = [("alloc", 0, 30 * MIB), ("free", 0), ("alloc", 1, 9 * MIB), ("alloc", 2, 12 * MIB)]
    assert measured(trace_of(*requests)).value("peak_reserved") == 30 * MIB
    # Blocks of 20 MiB and more are not split, and only oversized requests take them.
    unsplit = measured(trace_of(*requests, conf="max_split_size_mb:20"))
    assert unsplit.value("peak_reserved") == (30 + 20 + 12) * MIB


def test_a_conf_that_no_model_covers_is_named():
    with pytest.raises(UnmodelledError, match="backend"):
        measured(trace_of(("alloc", 0, MIB), conf="backend:cudaMallocAsync"))


def test_each_phase_has_its_own_base_and_peaks():
    trace = trace_of(
        ("alloc", 0, 12 * MIB), ("alloc", 1, 20 * MIB), ("free", 1), ("alloc", 2, 30 * MIB), ("free", 2), ("free", 0)
    )
    r = trace.requests
    marks = {1: (RequestKind.PHASE_BEGIN, 1), 3: (RequestKind.PHASE_END, 1), 6: (RequestKind.PHASE_BEGIN, 2)}
    columns = {name: getattr(r, name) for name in type(r).__slots__}
    for row, (kind, phase) in sorted(marks.items(), reverse=True):
        at = min(row, len(r))
        values = dict.fromkeys(columns, 0) | {"kind": int(kind), "phase": phase, "id": -1, "stack": -1}
        columns = {name: np.insert(column, at, values[name]) for name, column in columns.items()}
    found = measured(replace(trace, requests=type(r)(**columns), phases=("", "load", "run")))
    assert [(p.name, p.span.transient, p.span.peak.allocated) for p in found.phases] == [
        ("load", 20 * MIB, 32 * MIB),
        ("run", 0, 0),  # begins when all is over
    ]
    assert found.value("transient") == 20 * MIB


def test_comparisons_put_the_worst_excess_first():
    found = measured(trace_of(("alloc", 0, 30 * MIB)))
    bounds = {"peak_allocated": Bound(25 * MIB, "a"), "retained": Bound(10 * MIB, "b"), "stranded": Bound(0, "c")}
    assert [(c.metric, c.over) for c in found.held_against(bounds)] == [
        ("retained", True),
        ("peak_allocated", True),
        ("stranded", False),
    ]


def test_what_makes_figures_uncertain():
    trace = trace_of(("alloc", 0, MIB), ("seen", "torch.cuda.mem_get_info"), ("alloc", 1, 2**40), failed=[2])
    trace = replace(trace, lost=(Loss("gap", "", 3), Loss("torch_release", ""), Loss("non_torch_samples", "", 1)))
    assert measured(trace, "sort").caveats == (
        "estimated: hidden temporaries of sort are unknown",
        "assumed with unknown effect: gap",
        "1 request ran out of memory and does not count",
        "the test read memory state (torch.cuda.mem_get_info), which depends on more than itself",
    )


def test_releases_that_a_recording_only_shows_are_told_apart_first():
    """On a card of 64 MiB the program empties its cache, and later the allocator makes room by itself."""
    trace = trace_of(
        ("alloc", 0, 30 * MIB),
        ("free", 0),
        ("empty",),
        ("alloc", 1, 32 * MIB),
        ("free", 1),
        ("seen", ""),
        ("alloc", 2, 60 * MIB),
    )
    card = ReplaySettings(rules_for("2.11.0"), "a card", 64 * MIB, 64 * MIB)
    trace = replay(trace, card).trace
    kind = trace.requests.kind.copy()
    kind[[2, 5]] = RequestKind.RELEASE_SEEN
    shown = replace(trace, requests=replace(trace.requests, kind=kind), observations=(), source="cuda")
    found = measured(shown)
    assert found.phases[0].subject.count(RequestKind.EMPTY_CACHE) == 1
    assert found.value("peak_reserved") == (32 + 60) * MIB
