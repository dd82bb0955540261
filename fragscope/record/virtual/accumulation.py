"""How autograd adds up gradients: in place, where it holds the last reference to the first of them.

It never does so while a dispatch mode is active, and asks for a sum instead. Whether it would have is told by the
references to the tensor it hands over, counted once on a gradient that nobody else holds. A sum of the program's own
has more; one of a formula may not, so that sums in backward passes stay estimated.

Source: ``accumulate`` and ``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ADD = torch.ops.aten.add.Tensor
ADD_IN_PLACE = torch.ops.aten.add_.Tensor


def is_accumulation(func: Any) -> bool:
    """Whether an operator may be autograd's own sum of two gradients; a few formulas of derivatives add as well."""
    return func is ADD and torch._C._current_graph_task_id() != -1


class Accumulation:
    """Tells sums that a card makes in place."""

    def __init__(self) -> None:
        self._of_last: tuple[int, int] = _references_to_the_last()

    def is_in_place(self, gradient: torch.Tensor) -> bool:
        """Whether autograd would write the sum into the first gradient."""
        is_favorable = not torch.is_grad_enabled() and torch.ops.aten.is_non_overlapping_and_dense(gradient)
        return bool(is_favorable) and _references(gradient) == self._of_last


def _references(tensor: torch.Tensor) -> tuple[int, int]:
    """Of a tensor and of its storage, as seen from a dispatch mode."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


def _references_to_the_last() -> tuple[int, int]:
    seen: list[tuple[int, int]] = []

    class Watch(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if is_accumulation(func):
                seen.append(_references(args[0]))
            return func(*args, **(kwargs or {}))

    with Watch(), torch.enable_grad():  # type: ignore[no-untyped-call]
        x = torch.empty(2, device="meta", requires_grad=True)
        (x * 2 + x * 3).backward(torch.empty(2, device="meta"))
    return seen[0]
