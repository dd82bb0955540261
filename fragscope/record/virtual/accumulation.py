"""How autograd adds up gradients: in place, where it holds the last reference to the first of them.

It never does so while a dispatch mode is active, and asks for a sum instead. Whether it would have is told by the
references to the tensor it hands over, counted once on a gradient that nobody else holds. A sum of the program's own
has fewer; one of a formula of derivatives may have as many, and those formulas that add two results of their own are
named here.

Formulas that write by index into zeros of their own do so in place, unless a dispatch mode is active, too; so does that
of binary cross entropy, step by step.

Source: ``accumulate`` and ``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp;
``areAnyTensorSubclassLike`` in torch/csrc/autograd/FunctionsManual.cpp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fragscope.record.virtual.threads import PlainThread

ADD = torch.ops.aten.add.Tensor
ADD_IN_PLACE = torch.ops.aten.add_.Tensor
_aten = torch.ops.aten
IN_PLACE = {
    _aten.index_add.default: _aten.index_add_.default,
    _aten.scatter_add.default: _aten.scatter_add_.default,
    _aten.scatter.src: _aten.scatter_.src,
    _aten.scatter.value: _aten.scatter_.value,
    _aten.index_put.default: _aten.index_put_.default,
    _aten._index_put_impl.default: _aten._index_put_impl_.default,
}
"""What formulas of derivatives call on zeros, and what they call without a dispatch mode."""
_STEPS = {_aten.sub.Tensor: _aten.sub_.Tensor, _aten.mul.Tensor: _aten.mul_.Tensor}
"""The same of the formula of binary cross entropy, on what it began with."""
_STEPWISE = "BinaryCrossEntropyWithLogitsBackward"
_BEGUN_WITH = ("aten::sigmoid", "aten::add", "aten::log_sigmoid_forward")
_ZEROS = ("aten::new_zeros", "aten::zeros", "aten::zeros_like")


_ADDING = (
    "Linalg", "Cholesky", "Lu", "Svd", "Qr", "Solve", "Det", "Inverse", "Prod", "Cumprod", "Logcumsumexp", "Lerp",
    "VarMean", "StdMean", "Bilinear", "Cdist", "Pdist", "ThnnFused", "Prelu", "Renorm", "NormBackward", "Trace",
)  # fmt: skip
"""How names of nodes begin whose formulas add tensors. Source: tools/autograd/derivatives.yaml, FunctionsManual.cpp."""
_ADDS_NOTHING = "LinalgVectorNorm"
"""How the name of one of them begins whose formula only multiplies, whatever the order of the norm."""


def in_place(func: Any, first: Any, made_by: Callable[[torch.Tensor], str]) -> Any:
    """What a formula of derivatives calls without a dispatch mode, where it calls an operator with one.

    Args:
        func: the operator that it calls.
        first: its first argument.
        made_by: the operator that made a tensor's memory.
    """
    if func in IN_PLACE:
        begun, other = _ZEROS, IN_PLACE[func]
    elif func in _STEPS and _node_name().startswith(_STEPWISE):
        begun, other = _BEGUN_WITH, _STEPS[func]
    else:
        return func
    return other if is_of_formula(first) and made_by(first) in begun else func


def _node_name() -> str:
    """Name of the node of the graph whose formula runs; empty where none does."""
    node: Any = torch._C._current_autograd_node()
    return "" if node is None else str(node.name())


def adds_itself() -> str:
    """Name of the node whose formula runs, if that adds tensors; else empty."""
    name = _node_name()
    if name.startswith(_ADDS_NOTHING):
        return ""
    return name if name.startswith(_ADDING) or "BackwardBackward" in name else ""


def is_in_place(gradient: torch.Tensor) -> bool:
    """Whether autograd would write into a tensor that is the first argument of what it calls."""
    if torch.is_grad_enabled() or not hasattr(gradient, "_use_count"):  # a torch that does not tell
        return False
    return torch.ops.aten.is_non_overlapping_and_dense(gradient) and _references(gradient) == _references_to_the_last()


def is_of_formula(tensor: torch.Tensor) -> bool:
    """Whether a formula in C++ holds a tensor, and not the program."""
    return (
        not torch.is_grad_enabled()
        and hasattr(tensor, "_use_count")
        and _references(tensor) >= _references_to_the_last()
    )


def _references(tensor: Any) -> tuple[int, int]:
    """Of a tensor and of its storage, as seen from a dispatch mode."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@functools.cache
def _references_to_the_last() -> tuple[int, int]:
    """What they are for a gradient that nobody else holds; counted in a thread, which no backward pass runs in."""
    seen: list[tuple[int, int]] = []
    thread = PlainThread(target=_count, args=(seen,), name="fragscope-accumulation")
    thread.start()
    thread.join()
    return seen[0]


class _Watch(TorchDispatchMode):
    """Counts the references to the first gradient of each sum."""

    def __init__(self, seen: list[tuple[int, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is ADD and torch._C._current_graph_task_id() != -1:
            self._seen.append(_references(args[0]))
        return func(*args, **(kwargs or {}))


def _count(seen: list[tuple[int, int]]) -> None:
    with _Watch(seen):
        x = torch.empty(2, device="meta", requires_grad=True)
        (x * 2 + x * 3).backward(torch.empty(2, device="meta"))
