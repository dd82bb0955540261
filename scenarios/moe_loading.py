"""What the loaders of vLLM and SGLang do around a shuffle: before it, and with its results."""

from __future__ import annotations

from typing import Any

import torch


def parameter(data: torch.Tensor) -> torch.nn.Parameter:
    """A parameter that is not trained."""
    return torch.nn.Parameter(data, requires_grad=False)


def swap_halves(w13: torch.Tensor) -> torch.Tensor:
    """``[experts, rows, columns]`` with the up half first, as the kernels want it; a full copy.

    Source: ``swap_w13_to_w31`` in vllm/model_executor/layers/quantization/utils/flashinfer_utils.py.
    """
    experts, rows, columns = w13.shape
    return w13.reshape(experts, 2, rows // 2, columns).flip(dims=[1]).reshape(experts, rows, columns)


def rebind(layer: Any, name: str, new: torch.Tensor) -> None:
    """A new parameter in the place of the old, which dies with its last reference.

    Source: ``replace_parameter`` in vllm/model_executor/utils.py of vLLM 0.23.0.
    """
    setattr(layer, name, parameter(new.data if isinstance(new, torch.nn.Parameter) else new))


def copy_or_rebind(layer: Any, name: str, new: torch.Tensor) -> None:
    """Into the parameter's own storage where the form is the same; the parameter stays the same object in any case.

    Source: ``replace_parameter`` of vLLM 0.33.0; ``copy_or_rebind_param`` in sglang/srt/layers/utils/common.py of
    SGLang 0.5.12.post1, which does not ask about strides.
    """
    old: torch.nn.Parameter = getattr(layer, name)
    data = new.data if isinstance(new, torch.nn.Parameter) else new
    if (old.shape, old.stride(), old.dtype) == (data.shape, data.stride(), data.dtype):
        old.data.copy_(data)
    else:
        old.data = data
