"""Convolutions: cuDNN picks an algorithm for each, and with it a workspace that only a recording tells.

``convolutions.json.xz`` holds what a card took, by the call: operator, types, shapes, layouts and options. A call that
is not there, another card, another choice of algorithm (``torch.backends.cudnn.benchmark`` or ``deterministic``) are
estimated: results alone.

Recorded by ``python tests/gpu/record_convolutions.py`` on the card and versions that the file names.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import lzma
from collections.abc import Callable
from typing import Any

import torch

from fragscope.allocator import Card
from fragscope.record.virtual.scratch.plan import RECORDED, Plan, outputs_then

_STEPS = {"o": "out", "t": "take", "g": "give"}


@functools.cache
def _table() -> dict[str, str]:
    file = importlib.resources.files("fragscope.record.virtual.scratch") / "convolutions.json.xz"
    calls: dict[str, str] = json.loads(lzma.decompress(file.read_bytes()))["calls"]
    return calls


def layout_of(tensor: torch.Tensor) -> str:
    """``c`` for contiguous, ``l`` for channels last, else the strides."""
    if tensor.is_contiguous():
        return "c"
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return "l"
    return "s" + ".".join(map(str, tensor.stride()))


def _described(tensor: torch.Tensor) -> str:
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}:{shape}:{layout_of(tensor)}"


def key_of(op: str, args: tuple[Any, ...]) -> str:
    """What a call is filed under.

    Args:
        op: ``aten::convolution`` or ``aten::convolution_backward``.
        args: all of its arguments, in order.
    """
    if op == "aten::convolution":
        tensors, (bias, *options) = args[:2], args[2:9]
        rest = ["bias" if bias is not None else "plain", *options]
    else:
        tensors, (bias, *options) = args[:3], args[3:11]
        rest = ["bias" if bias else "plain", *options]
    texts = [_described(t) for t in tensors]
    return " ".join((op.removeprefix("aten::"), *texts, *(str(r).replace(" ", "") for r in rest)))


def steps_of(text: str) -> list[tuple[str, int]]:
    """The plan that a line of the table spells: ``t`` with bytes, ``o`` and ``g`` with numbers."""
    return [(_STEPS[word[0]], int(word[1:])) for word in text.split()]


def _convolution(op: str) -> Callable[..., Plan]:
    def plan(args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor], card: Card) -> Plan:
        groups, layouts = args[-1] if op == "aten::convolution" else args[-2], [layout_of(t) for t in args[:2]]
        if groups != 1 and "l" in layouts:  # some kernels of groups want their channels first
            return outputs_then(len(results)).guessed("of groups, channels last")
        known = _table().get(key_of(op, args)) if not kwargs and card.capability == RECORDED else None
        if known is None or torch.backends.cudnn.deterministic or torch.backends.cudnn.benchmark:
            return outputs_then(len(results)).guessed("of this shape")
        return Plan(steps_of(known))

    return plan


PLANS: dict[str, Callable[..., Plan]] = {
    op: _convolution(op) for op in ("aten::convolution", "aten::convolution_backward")
}
