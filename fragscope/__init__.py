"""fragscope says what code costs in GPU memory, byte for byte, mostly without a GPU, and gates merges on it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fragscope.errors import (
        FragscopeError,
        InputFileError,
        NotMeasuredError,
        UnmodelledError,
        UnsupportedError,
        UsageError,
    )
    from fragscope.record.cuda import Recorder, RecorderOptions, Stacks, phase
    from fragscope.record.device_memory import DeviceMemory
    from fragscope.record.virtual.supply import supplied, supply
    from fragscope.suite.expect import Expect, Replays
    from fragscope.suite.installed import Installed
    from fragscope.suite.ranks import Rank, RankFailedError, RanksHungError, run_ranks
    from fragscope.suite.scenario import Case, Scenario, scenario
    from fragscope.trace import Trace, load_trace

__all__ = [
    "Case",
    "DeviceMemory",
    "Expect",
    "FragscopeError",
    "InputFileError",
    "Installed",
    "NotMeasuredError",
    "Rank",
    "RankFailedError",
    "RanksHungError",
    "Recorder",
    "RecorderOptions",
    "Replays",
    "Scenario",
    "Stacks",
    "Trace",
    "UnmodelledError",
    "UnsupportedError",
    "UsageError",
    "load_trace",
    "phase",
    "run_ranks",
    "scenario",
    "supplied",
    "supply",
]

# Every pytest session imports this package for its plugin; numpy and the rest are for those who use them.
_HOMES = {
    "Recorder": "fragscope.record.cuda",
    "RecorderOptions": "fragscope.record.cuda",
    "Stacks": "fragscope.record.cuda",
    "phase": "fragscope.record.cuda",
    "DeviceMemory": "fragscope.record.device_memory",
    "supplied": "fragscope.record.virtual.supply",
    "supply": "fragscope.record.virtual.supply",
    "Rank": "fragscope.suite.ranks",
    "RankFailedError": "fragscope.suite.ranks",
    "RanksHungError": "fragscope.suite.ranks",
    "run_ranks": "fragscope.suite.ranks",
    "Expect": "fragscope.suite.expect",
    "Replays": "fragscope.suite.expect",
    "Installed": "fragscope.suite.installed",
    "Case": "fragscope.suite.scenario",
    "Scenario": "fragscope.suite.scenario",
    "scenario": "fragscope.suite.scenario",
    "Trace": "fragscope.trace",
    "load_trace": "fragscope.trace",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES.get(name, "fragscope.errors")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
