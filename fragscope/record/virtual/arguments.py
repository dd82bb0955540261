"""The tensors among the arguments and results of an operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_META = torch.device("meta")


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument or a result: itself, or those of lists at any depth, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, torch.Tensor):
                yield item
            elif isinstance(item, list | tuple):
                yield from tensors_in(item)


def as_metadata(value: Any) -> Any:
    """Real host tensors as metadata, so that they can meet host tensors of unknown contents."""
    if isinstance(value, torch.Tensor):
        return value.to(_META) if value.device.type == "cpu" else value
    if isinstance(value, list | tuple):
        return type(value)(as_metadata(v) for v in value)
    return value
