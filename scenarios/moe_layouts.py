"""Layouts that TensorRT-LLM's MoE kernels want, from their definitions, with none of flashinfer's helpers.

What is here computes references, and stands in for kernels on a host that has none.
"""

from __future__ import annotations

import torch


def source_row(row: int, rows: int, *, woven: bool, swapped: bool = False) -> int:
    """The row of an expert's matrix that comes to ``row`` under an epilogue tile of 128 rows.

    Blocks of 32 rows are shuffled: row n of a block is row 4 (n mod 8) + n div 8 of it.

    Args:
        row: in the kernel's layout.
        rows: of the matrix.
        woven: before, the two halves were woven: row 0 of each, row 1 of each, and so on.
        swapped: before that, the two halves changed places.
    """
    row = row // 32 * 32 + 4 * (row % 8) + row % 32 // 8
    if woven:
        row = row // 2 + (row % 2) * (rows // 2)
    if swapped:
        row = (row + rows // 2) % rows
    return row


def rearranged(w: torch.Tensor, *, woven: bool, swapped: bool = False) -> torch.Tensor:
    """``w`` ``[experts, rows, columns]``, row by row in the kernel's order, as bytes."""
    data = w.view(torch.uint8)
    rows = w.shape[1]
    return torch.stack([data[:, source_row(r, rows, woven=woven, swapped=swapped)] for r in range(rows)], dim=1)


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """Scales uint8 ``[experts, rows, columns]`` byte by byte in the kernel's order, in the same shape.

    Row m, column k goes to byte 512 (m div 128 * columns/4 + k div 4) + 16 (m mod 32) + 4 (m mod 128 div 32) + k mod 4.
    Rows are a multiple of 128 and columns of 4.
    """
    experts, rows, columns = scales.shape
    out = torch.zeros(experts, rows * columns, dtype=torch.uint8)
    for m in range(rows):
        for k in range(columns):
            tile = m // 128 * (columns // 4) + k // 4
            out[:, 512 * tile + 16 * (m % 32) + 4 * (m % 128 // 32) + k % 4] = scales[:, m, k]
    return out.reshape(scales.shape)


def interleave_on_host(scales: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """What flashinfer's ``block_scale_interleave`` does, for a host without that kernel.

    Tiles of 128 rows x 4 columns, 32 x 4 x 4 inside; rows and columns are padded to whole tiles.

    Args:
        scales: ``[rows, columns]`` or ``[experts, rows, columns]``.
        out: where to, flat; a new tensor where None.
    """
    *experts, rows, columns = scales.shape
    padded = torch.zeros(*experts, -(-rows // 128) * 128, -(-columns // 4) * 4, dtype=scales.dtype)
    padded[..., :rows, :columns] = scales
    tiles = padded.view(-1, padded.shape[-2] // 128, 4, 32, padded.shape[-1] // 4, 4)
    flat = tiles.permute(0, 1, 4, 3, 2, 5).reshape(-1)
    return flat if out is None else out.copy_(flat)
