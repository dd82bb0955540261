"""The timeline counts what the allocator model counts, also where a recording is replayed under other settings."""

from dataclasses import replace

import pytest
from builders import TRACES, settings

from fragscope.allocator import replay
from fragscope.measure import timeline
from fragscope.trace import load_trace

COUNTERS = ("requested", "allocated", "active", "reserved", "stranded", "pool_idle")


@pytest.mark.parametrize("name", ["moe_list_stack-default", "streams-default", "oom-default"])
@pytest.mark.parametrize("conf", ["max_split_size_mb:20", "expandable_segments:True", "roundup_power2_divisions:4"])
@pytest.mark.parametrize("divisor", [1, 10])
def test_under_other_settings_too_they_are_the_models(name: str, conf: str, divisor: int) -> None:
    """On a tenth of the card there are OOMs and releases."""
    recorded = settings(name)
    other = replace(recorded, conf=conf, capacity=recorded.capacity // divisor, memory_fraction=None)
    result = replay(load_trace(TRACES / f"{name}.pickle.xz"), other)
    line = timeline(result.trace)
    for counter in COUNTERS:
        assert getattr(line.peak(), counter) == getattr(result.whole.peak, counter), counter
        assert getattr(line.at(-1), counter) == getattr(result.whole.end, counter), counter
    assert len(line.oom) == result.whole.ooms
