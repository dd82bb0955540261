"""How large a grid's y dimension may be on the card at hand: 65,535 blocks start, 65,536 are refused. One line each.

    PYTHONPATH=. python tests/gpu/launch_grid.py

The kernel counts the blocks that ran. Ends with 1 where the card has another limit than ``fragscope.thresholds`` says.
"""

from __future__ import annotations

import sys

import torch

from fragscope.thresholds import MAX_GRID_Y

SOURCE = 'extern "C" __global__ void count(unsigned long long* blocks) { atomicAdd(blocks, 1ULL); }'


def launched(blocks: int) -> tuple[str, int]:
    """Start so many blocks along y: what CUDA refuses it with, ``""`` if it does not, and how many blocks ran."""
    kernel = torch.cuda._compile_kernel(SOURCE, "count")
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    refused = ""
    try:
        kernel(grid=(1, blocks, 1), block=(1, 1, 1), args=[counter])
    except RuntimeError as e:
        refused = str(e)
    torch.cuda.synchronize()
    return refused, int(counter.item())


def main() -> int:
    """Launch the largest grid and one that is larger by a block."""
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU and a CUDA build of torch")
    found = {blocks: launched(blocks) for blocks in (MAX_GRID_Y, MAX_GRID_Y + 1)}
    for blocks, (refused, ran) in found.items():
        says = f"refused ({refused})" if refused else "started"
        print(f"{torch.cuda.get_device_name()}: grid.y = {blocks:,} {says}, {ran:,} blocks ran")
    right = found[MAX_GRID_Y] == ("", MAX_GRID_Y) and found[MAX_GRID_Y + 1] == ("CUDA error: invalid argument", 0)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
