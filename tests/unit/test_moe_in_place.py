"""Rewriting experts in their own storage, a slice at a time, against the same rearrangement into new tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("flashinfer")
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scenarios"))

from moe_in_place import SCRATCH, block_scratch, permute_rows, row_scratch, to_block_layout, w2_rows, w13_rows
from moe_layouts import interleave_on_host, source_row, swizzled

pytestmark = pytest.mark.torch


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("columns", [32, 96, 100, 224])
@pytest.mark.parametrize("scratch", [64 * 32, 64 * 64 + 5, 64 * 224])
def test_rows_are_permuted_whatever_the_width_of_a_slice(columns, scratch):
    w = random_bytes(3, 64, columns)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(8))
    expected = torch.stack([torch.stack([expert[index[r]] for r in range(64)]) for expert in w])
    permute_rows(w, index, torch.empty(scratch, dtype=torch.uint8))
    assert torch.equal(w, expected)


def test_scratch_for_rows_is_at_most_four_mib_and_an_expert():
    small, large = torch.empty(2, 64, 256, dtype=torch.uint8), torch.empty(1, 4096, 2048, dtype=torch.uint8)
    assert row_scratch(small).numel() == 64 * 256
    assert row_scratch(small, large).numel() == SCRATCH == 4 * 2**20


def test_scratch_for_rows_holds_the_narrowest_slice():
    """32 bytes of each of 262,144 rows are 8 MiB."""
    tall = torch.empty(1, 262_144, 64, dtype=torch.uint8)
    assert row_scratch(tall).numel() == 262_144 * 32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_block_layout_in_place(dtype):
    w = random_bytes(2, 64, 640).view(dtype)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(9))
    before = w.view(torch.uint8).clone()
    scratch = block_scratch(w)
    assert scratch.numel() == 64 * 640 // 4
    out = to_block_layout(w, index, scratch)
    assert out.data_ptr() == w.data_ptr()
    assert out.dtype == dtype
    data = out.view(torch.uint8)
    assert data.shape == (2, 5, 64, 128)
    for expert in range(2):
        for block in range(5):
            for row in range(64):
                expected = before[expert, index[row], 128 * block : 128 * (block + 1)]
                assert torch.equal(data[expert, block, row], expected)


@pytest.mark.parametrize("gated", [True, False])
def test_rows_of_w13_are_those_of_the_definition(gated):
    expert = torch.empty(192, 8)
    assert w13_rows(expert, gated=gated).tolist() == [
        source_row(r, 192, woven=gated, swapped=gated) for r in range(192)
    ]


def test_rows_of_w2_are_those_of_the_definition():
    assert w2_rows(torch.empty(96, 8)).tolist() == [source_row(r, 96, woven=False) for r in range(96)]


def test_scales_interleaved_on_the_host_are_those_of_the_definition():
    scales = random_bytes(2, 256, 12)
    expected = swizzled(scales)
    assert torch.equal(interleave_on_host(scales).view(2, 256, 12), expected)
    assert torch.equal(interleave_on_host(scales[1]).view(256, 12), expected[1])
    out = torch.zeros(256 * 12, dtype=torch.uint8)
    assert interleave_on_host(scales[0], out=out) is out
    assert torch.equal(out.view(256, 12), expected[0])


def test_scales_interleaved_on_the_host_are_padded():
    """A tile is 128 rows of 4 columns; row 0 begins it, row 32 follows at byte 4, and padding is zero."""
    flat = interleave_on_host(torch.full((33, 3), 9, dtype=torch.uint8))
    assert flat.numel() == 128 * 4
    assert flat[:8].tolist() == [9, 9, 9, 0, 9, 9, 9, 0]
    assert int((flat == 9).sum()) == 33 * 3
