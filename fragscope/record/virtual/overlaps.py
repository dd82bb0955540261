"""Torch's own refusal to write where several elements, or an input, lie in the same memory.

Metadata has no memory, so that torch does not look there.

Source: aten/src/ATen/MemoryOverlap.cpp, and ``compute_mem_overlaps`` in TensorIterator.cpp beside it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

UNCHECKED = frozenset({"aten::fill_", "aten::zero_", "aten::masked_fill_"})
"""Operators on elements that write the same to all that overlap, and so may."""

_dense = torch.ops.aten.is_non_overlapping_and_dense


def check_overlaps(written: Iterable[torch.Tensor], given: Iterable[torch.Tensor]) -> None:
    """Refuse what an operator on elements refuses: ``given`` are all its tensors, ``written`` those it writes.

    Raises:
        RuntimeError: as torch does.
    """
    others = list(given)
    for out in written:
        if not out.is_contiguous() and _overlaps_itself(out):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single memory "
                "location. Please clone() the tensor before performing the operation."
            )
        for other in others:
            if other is not out and _overlap_in_part(out, other):
                raise RuntimeError(
                    "unsupported operation: some elements of the input tensor and the written-to tensor refer to a "
                    "single memory location. Please clone() the tensor before performing the operation."
                )


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlap_in_part(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share some elements and are not the same; False where that is hard to tell, as in torch."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or not a.numel() or not b.numel():
        return False
    if not (_dense(a) and _dense(b)):
        return False
    (begin, end), (other_begin, other_end) = _bytes(a), _bytes(b)
    if (begin, end) == (other_begin, other_end):
        return a.stride() != b.stride()
    return begin < other_end and other_begin < end


def _bytes(dense: torch.Tensor) -> tuple[int, int]:
    begin = int(dense.storage_offset()) * dense.itemsize
    return begin, begin + int(dense.numel()) * dense.itemsize
