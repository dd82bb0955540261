"""Matrices of experts brought into a kernel's layout in their own storage, through scratch smaller than one expert.

A layout that only moves whole rows moves every column alike, so a slice of columns can be rewritten when it alone has
been read. In block layout a byte keeps its place within its run of 128, so there the slices are of those runs.
"""

from __future__ import annotations

import torch
from flashinfer.fused_moe.core import get_reorder_rows_for_gated_act_gemm_row_indices
from flashinfer.utils import get_shuffle_matrix_a_row_indices

EPILOGUE_TILE_M = 128
BLOCK_K = 128
SECTOR = 32
"""Bytes that a card's memory moves at once; slices are not narrower, so that none is read for a part of it."""
SCRATCH = 4 * 2**20
"""Bytes of scratch for rows: a few launches for the largest experts."""


def w13_rows(expert: torch.Tensor, *, gated: bool) -> torch.Tensor:
    """For each row of the layout the row of a checkpoint's w13 that comes there: int64 on the host.

    Swapping a gated expert's halves, weaving them and shuffling are one permutation.
    """
    index: torch.Tensor = get_shuffle_matrix_a_row_indices(expert, EPILOGUE_TILE_M)
    if not gated:
        return index
    rows = expert.shape[0]
    woven: torch.Tensor = get_reorder_rows_for_gated_act_gemm_row_indices(expert)[index]
    return (woven + rows // 2) % rows


def w2_rows(expert: torch.Tensor) -> torch.Tensor:
    """As ``w13_rows``, of w2."""
    index: torch.Tensor = get_shuffle_matrix_a_row_indices(expert, EPILOGUE_TILE_M)
    return index


def row_scratch(*weights: torch.Tensor) -> torch.Tensor:
    """Scratch for ``permute_rows``: as much as the largest expert, and no more than ``SCRATCH`` where that will do."""
    narrowest = max(w.shape[1] for w in weights) * SECTOR
    largest = max(w[0].numel() for w in weights)
    return torch.empty(min(largest, max(SCRATCH, narrowest)), dtype=torch.uint8, device=weights[0].device)


def permute_rows(w: torch.Tensor, index: torch.Tensor, scratch: torch.Tensor) -> None:
    """Row ``index[r]`` of every expert comes to row r, one slice of columns at a time.

    Args:
        w: ``[experts, rows, columns]`` of one byte each.
        index: int64 ``[rows]`` on the device of ``w``.
        scratch: of ``row_scratch``.
    """
    experts, rows, columns = w.shape
    width = min(columns, scratch.numel() // rows // SECTOR * SECTOR)
    data = w.view(torch.uint8)
    for i in range(experts):
        for start in range(0, columns, width):
            part = data[i, :, start : start + width]
            moved = scratch[: part.numel()].view(part.shape)
            torch.index_select(part, 0, index, out=moved)
            part.copy_(moved)


def block_scratch(*weights: torch.Tensor) -> torch.Tensor:
    """Scratch for ``to_block_layout``: ``SECTOR`` bytes of each run of 128, so a quarter of the largest expert."""
    largest = max(w[0].numel() * w.itemsize for w in weights)
    return torch.empty(largest // (BLOCK_K // SECTOR), dtype=torch.uint8, device=weights[0].device)


def to_block_layout(w: torch.Tensor, index: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Permute rows as ``permute_rows`` does and bring experts into runs of 128 bytes: ``[columns/128, rows, 128]``.

    Args:
        w: contiguous ``[experts, rows, columns]`` of any type; a row's bytes are a multiple of 128.
        index: int64 ``[rows]`` on the device of ``w``.
        scratch: of ``block_scratch``.

    Returns:
        A view of ``w`` in its type.
    """
    data = w.view(torch.uint8)
    experts, rows, columns = data.shape
    blocks = columns // BLOCK_K
    moved = scratch[: blocks * rows * SECTOR].view(blocks, rows, SECTOR)
    for i in range(experts):
        before = data[i].view(rows, blocks, BLOCK_K).permute(1, 0, 2)
        after = data[i].view(blocks, rows, BLOCK_K)
        for start in range(0, BLOCK_K, SECTOR):
            torch.index_select(before[..., start : start + SECTOR], 1, index, out=moved)
            after[..., start : start + SECTOR].copy_(moved)
    return data.view(experts, blocks, rows, BLOCK_K).view(w.dtype)
