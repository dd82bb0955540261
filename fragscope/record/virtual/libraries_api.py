"""What a program is told of the libraries that a build of torch for CUDA comes with: cuDNN, NCCL, cuSPARSELt.

They are there, as with every wheel for CUDA on Linux; which version is told where it is known of the release whose
rules are modelled. None of them runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.backends.cusparselt
import torch.distributed

from fragscope.record.virtual.card import VirtualCard

_CUDNN = {"2.11": 91900}
_NCCL = {"2.11": (2, 28, 9)}
"""Versions by release; read from torch 2.11.0+cu130 on an H100."""


def replace_libraries(device: VirtualCard, replace: Callable[[Any, str, Any], None]) -> None:
    """Answer for the libraries, with a function that replaces an attribute for as long as the device is active."""
    release = device.memory.settings.rules.rules.release

    def version(library: str, known: dict[str, Any]) -> Callable[[], Any]:
        def answer() -> Any:
            if release not in known:
                raise device.unsupported(f"the version of {library} is not known for torch {release}")
            return known[release]

        return answer

    cudnn: Any = torch.backends.cudnn
    replace(torch._C, "_has_cudnn", True)
    replace(cudnn.m, "_init", lambda: True)
    replace(cudnn.m, "version", version("cuDNN", _CUDNN))
    replace(torch._C, "_has_cusparselt", True)
    replace(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    replace(torch.cuda.nccl, "version", version("NCCL", _NCCL))
    if torch.distributed.is_available():
        # Not in distributed_c10d: its code then asks for classes that a build without NCCL does not have.
        replace(torch.distributed, "is_nccl_available", lambda: True)
