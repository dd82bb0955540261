"""Where tests are recorded, seen without a GPU and without torch."""

from __future__ import annotations

import sys
from enum import StrEnum
from types import ModuleType, SimpleNamespace

import pytest

from fragscope.testing import devices
from fragscope.testing.devices import CudaGpu, why_no_virtual_card


def test_without_torch_nothing_can_be_recorded(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert CudaGpu().why_not() == why_no_virtual_card() == "torch is not installed (pip install 'fragscope[torch]')"


def test_a_torch_without_cuda_has_a_virtual_card_only(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert CudaGpu().why_not() == f"this torch ({torch.__version__}) is built without CUDA"
    assert why_no_virtual_card() is None


def test_a_gpu_is_recorded_with_the_stacks_that_a_failure_shows(monkeypatch):
    class Stacks(StrEnum):
        PYTHON = "python"

    class Recorder:
        def __init__(self, options: SimpleNamespace) -> None:
            self.options, self.started = options, False

        def start(self) -> None:
            self.started = True

    module = ModuleType("fragscope.record.cuda")
    module.Recorder, module.RecorderOptions, module.Stacks = Recorder, SimpleNamespace, Stacks
    monkeypatch.setitem(sys.modules, "fragscope.record.cuda", module)
    source = CudaGpu().start()
    assert (source.started, source.options.stacks) == (True, Stacks.PYTHON)


@pytest.mark.torch
def test_later_recordings_do_not_see_what_torch_keeps(monkeypatch):
    pytest.importorskip("torch")
    from fragscope.record import process

    calls = []
    monkeypatch.setattr(process, "forget_earlier_work", lambda: calls.append(1))
    CudaGpu().prepare()
    assert calls == [1]
