"""What a process has of CUDA, asked where there is none."""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fragscope.record.process import forget_earlier_work, installed_release, why_no_cuda  # noqa: E402


def test_the_reason_why_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_no_cuda() == f"this torch ({torch.__version__}) is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_no_cuda() == "there is no usable NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "native")
    assert why_no_cuda() is None
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert why_no_cuda() == "the allocator backend is 'cudaMallocAsync'; only PyTorch's own (native) is recorded"


def test_the_release_is_named_without_its_build(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    assert installed_release() == "2.13.0"


def test_workspaces_are_given_back_once_cuda_is_in_use(monkeypatch):
    calls = []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls.append(1), raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    forget_earlier_work()
    assert (calls, "torch._dynamo" in sys.modules) == ([], True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    forget_earlier_work()
    assert calls == [1]
