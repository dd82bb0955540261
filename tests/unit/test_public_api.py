"""The public API is what ``import fragscope`` offers: exported, documented, typed."""

from __future__ import annotations

import importlib
import inspect
import typing
from pathlib import Path

import pytest

import fragscope

PUBLIC = {
    "Case", "DeviceMemory", "Expect", "FragscopeError", "InputFileError", "Installed", "NotMeasuredError", "Rank",
    "RankFailedError", "RanksHungError", "Recorder", "RecorderOptions", "Replays", "Scenario", "Stacks", "Trace",
    "UnmodelledError", "UnsupportedError", "UsageError", "load_trace", "phase", "run_ranks", "scenario",
    "supplied", "supply",
}  # fmt: skip
ROOMS = [
    "fragscope", "fragscope.trace", "fragscope.allocator", "fragscope.measure", "fragscope.results", "fragscope.gate",
    "fragscope.report", "fragscope.search", "fragscope.doctor", "fragscope.thresholds", "fragscope.toml",
]  # fmt: skip


def test_names_are_a_decision():
    assert set(fragscope.__all__) == PUBLIC


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_exports_is_there_and_documented(room):
    module = importlib.import_module(room)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{room}.{name} has no docstring"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_functions_are_typed(name):
    value = getattr(fragscope, name)
    if inspect.isfunction(value):
        hints = typing.get_type_hints(value)
        assert "return" in hints
        assert set(inspect.signature(value).parameters) <= set(hints)


def test_the_package_says_that_it_is_typed():
    assert (Path(fragscope.__file__).parent / "py.typed").exists()
