"""How autograd adds up gradients: in place, where it holds the last reference to the first of them.

It never does so while a dispatch mode is active, and asks for a sum instead. Whether it would have is told by the
references to the tensor it hands over, counted once on a gradient that nobody else holds. A sum of the program's own
has more; one of a formula may not, so that sums in backward passes stay estimated.

Source: ``accumulate`` and ``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fragscope.record.virtual.threads import PlainThread

ADD = torch.ops.aten.add.Tensor
ADD_IN_PLACE = torch.ops.aten.add_.Tensor


def is_accumulation(func: Any) -> bool:
    """Whether an operator may be autograd's own sum of two gradients; a few formulas of derivatives add as well."""
    return func is ADD and torch._C._current_graph_task_id() != -1


def is_in_place(gradient: torch.Tensor) -> bool:
    """Whether autograd would write the sum into the first gradient."""
    if torch.is_grad_enabled() or not hasattr(gradient, "_use_count"):  # a torch that does not tell
        return False
    return torch.ops.aten.is_non_overlapping_and_dense(gradient) and _references(gradient) == _references_to_the_last()


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
        if is_accumulation(func):
            self._seen.append(_references(args[0]))
        return func(*args, **(kwargs or {}))


def _count(seen: list[tuple[int, int]]) -> None:
    with _Watch(seen):
        x = torch.empty(2, device="meta", requires_grad=True)
        (x * 2 + x * 3).backward(torch.empty(2, device="meta"))
