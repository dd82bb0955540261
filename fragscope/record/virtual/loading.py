"""What a program's own files see of CUDA while they are imported, which is before a virtual card exists.

``DEVICE = "cuda" if torch.cuda.is_available() else "cpu"`` at the top of a file would take the host for good, and the
case would show nothing on the card. What the card is called and can do is that of the default profile: a run may be for
several. Installed packages see the machine as it is: many of them ask more than is answered here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from fragscope.allocator import DEFAULT_CARD, card_named

_INSTALLED = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_FOLDERS = ("/site-packages/", "/dist-packages/")


@contextlib.contextmanager
def card_in_sight() -> Iterator[None]:
    """Answer questions of files that are no installed package's for a machine with one card, until the end."""
    with mock.patch.dict(os.environ, {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):  # CUDA itself would be of no use to forks
        has_card = torch.cuda.is_available()
    if has_card:
        yield
        return
    card = card_named(DEFAULT_CARD)
    properties = SimpleNamespace(
        name=card.product, total_memory=card.total, major=card.capability[0], minor=card.capability[1],
        multi_processor_count=card.multiprocessors, L2_cache_size=card.l2,
    )  # fmt: skip
    answers: tuple[tuple[str, Any], ...] = (
        ("is_available", True), ("device_count", 1), ("current_device", 0), ("set_device", None),
        ("get_device_name", card.product), ("get_device_capability", card.capability),
        ("get_device_properties", properties),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers:
            stack.enter_context(mock.patch.object(torch.cuda, name, _answering(getattr(torch.cuda, name), answer)))
        available = _answering(torch.accelerator.is_available, True)
        stack.enter_context(mock.patch.object(torch.accelerator, "is_available", available))
        yield


def _answering(real: Any, answer: Any) -> Any:
    def ask(*args: Any, **kwargs: Any) -> Any:
        return answer if _is_own(sys._getframe(1)) else real(*args, **kwargs)

    return ask


def _is_own(frame: FrameType) -> bool:
    """Whether the code of a frame is the program's own."""
    file = frame.f_code.co_filename
    return not file.startswith((*_INSTALLED, "<")) and not any(folder in file for folder in _FOLDERS)
