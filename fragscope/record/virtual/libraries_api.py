"""What a program is told of the libraries that a build of torch for CUDA comes with: cuDNN, NCCL, cuSPARSELt.

They are there, as with every wheel for CUDA on Linux, in the version that comes with the release whose rules are
modelled. None of them runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.backends.cusparselt
import torch.distributed

from fragscope.record.virtual.card import VirtualCard

_VERSIONS: dict[str, tuple[int, tuple[int, int, int]]] = {
    "2.9": (91002, (2, 27, 5)),
    "2.10": (91002, (2, 27, 5)),
    "2.11": (91900, (2, 28, 9)),
    "2.12": (92000, (2, 29, 7)),
    "2.13": (92000, (2, 29, 7)),
    "2.14": (92400, (2, 30, 7)),
}
"""Of cuDNN, as it counts them, and of NCCL, by release.

Source: what the wheels for CUDA on Linux require (nvidia-cudnn and nvidia-nccl in their metadata on pypi.org, of
2.9.1, 2.10.0, 2.11.0, 2.12.0, 2.13.0 and 2.14.1); 2.11.0+cu130 says the same on an H100.
"""


def replace_libraries(device: VirtualCard, replace: Callable[[Any, str, Any], None]) -> None:
    """Answer for the libraries, with a function that replaces an attribute for as long as the device is active."""
    rules = device.memory.settings.rules
    versions = None if rules.assumed else _VERSIONS.get(rules.rules.release)

    def version(library: str, which: int) -> Callable[[], Any]:
        def answer() -> Any:
            if versions is None:
                raise device.unsupported(f"the version of {library} is not known for torch {rules.torch}")
            return versions[which]

        return answer

    cudnn: Any = torch.backends.cudnn
    replace(torch._C, "_has_cudnn", True)
    replace(cudnn.m, "_init", lambda: True)
    replace(cudnn.m, "version", version("cuDNN", 0))
    replace(torch._C, "_has_cusparselt", True)
    replace(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    if hasattr(torch.cuda, "nccl"):
        replace(torch.cuda.nccl, "version", version("NCCL", 1))
    if torch.distributed.is_available():
        # Not in distributed_c10d: its code then asks for classes that a build without NCCL does not have.
        replace(torch.distributed, "is_nccl_available", lambda: True)
