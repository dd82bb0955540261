"""The stand-in recorder of tests/data/stand_in, in the tests' own process."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

STAND_IN = Path(__file__).parent / "data" / "stand_in"


@pytest.fixture
def stand_in_readers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in recorder; recordings are those that it writes."""
    for name in ("fragscope.trace.recording", "fragscope.trace.open_recording", "stand_in_recorder"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    spec = spec_from_file_location("stand_in_recorder", STAND_IN / "stand_in_recorder.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["stand_in_recorder"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
