"""The limit that memory sets to a launch, against launches tried one after the other."""

from __future__ import annotations

import pytest

from fragscope.allocator import ReplaySettings, card_named, rules_for
from fragscope.thresholds import Launch, launch_peak, memory_limit

MIB = 1024**2


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
@pytest.mark.parametrize("capacity", [24 * MIB, 64 * MIB, 96 * MIB])
def test_memory_limit_is_found_as_by_trying_one_after_the_other(conf: str, capacity: int) -> None:
    made = Launch(experts=16, top_k=2, hidden=1024, intermediate=512, tile=32)
    under = ReplaySettings.on(card_named("h100-80gb"), rules_for("2.11.0"), conf, capacity)
    refused = next(t for t in range(1, 20_001, 7) if not launch_peak(made, t, under).fits)
    found = memory_limit(made, under)
    assert refused - 7 <= found.tokens < refused
    assert not launch_peak(made, found.tokens + 1, under).fits
    assert 0 < found.tried < 600
