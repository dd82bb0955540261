"""fragscope says what code costs in GPU memory, byte for byte, mostly without a GPU, and gates merges on it."""

from fragscope.errors import (
    FragscopeError,
    InputFileError,
    NotMeasuredError,
    UnmodelledError,
    UnsupportedError,
    UsageError,
)
from fragscope.suite.scenario import Case, Scenario, scenario
from fragscope.trace import Trace, load_trace

__all__ = [
    "Case",
    "FragscopeError",
    "InputFileError",
    "NotMeasuredError",
    "Scenario",
    "Trace",
    "UnmodelledError",
    "UnsupportedError",
    "UsageError",
    "load_trace",
    "scenario",
]
