"""What CUDA there is for this process, and what torch keeps in it from earlier work."""

from __future__ import annotations

import importlib

import torch


def why_no_cuda() -> str | None:
    """Why nothing can be recorded on a GPU here, in one line; None where it can."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no usable NVIDIA GPU"
    backend = torch.cuda.memory.get_allocator_backend()
    if backend != "native":
        return f"the allocator backend is {backend!r}; only PyTorch's own (native) is recorded"
    return None


def installed_release() -> str:
    """The torch release without its build: ``"2.13.0"``."""
    return str(torch.__version__).partition("+")[0]


def forget_earlier_work() -> None:
    """Undo what earlier work in this process changes about the requests of later work.

    *Workspaces* for cuBLAS are made by the first matrix product on a stream, through the caching allocator, and stay:
    two of 32 MiB for a training step on an H100. They are given back, so that whoever comes next makes its own.
    Source: aten/src/ATen/cuda/CublasHandlePool.cpp (getNewWorkspace, clearCublasWorkspaces).

    *torch._dynamo* is imported by the first optimizer step, among others. Errors caught in that import keep the frames
    of all its callers alive, and with them the tensors there, until garbage is collected. So it is imported now.
    """
    importlib.import_module("torch._dynamo")
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()
