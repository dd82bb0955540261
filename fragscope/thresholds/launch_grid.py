"""How many CTAs a launch of FlashInfer's TensorRT-LLM MoE kernels asks for, and how many tokens the grid has room for.

Source: FlashInfer 0.6.11.post2, ``include/flashinfer/trtllm/fused_moe/runner.h``, ``getMaxNumCtasInBatchDim`` and
``getMaxPermutedPaddedCount``; the same up to 0.7.2.post1.

Which tokens go to which expert is known on the device only, so the launch is as large as the worst routing needs: every
expert gets one token, and all others fill whole tiles.
"""

from __future__ import annotations

MAX_GRID_Y = 65_535
"""Largest y dimension of a grid of thread blocks, on every device. Source: CUDA C++ Programming Guide, technical
specifications by compute capability."""

TILES = (8, 16, 32, 64, 128, 256)
"""Rows of a tile that the FP4 launcher has kernels for. Source: FlashInfer 0.6.11.post2,
``csrc/trtllm_fused_moe_kernel_launcher.cu``, ``FP4BlockScaleLauncher::getSupportedTileNums``.

Without a tuned choice the launcher takes the tile next below the power of two above the tokens that a rank's experts
have on average, at most 128 (``computeSelectedTileN``): so 128 in every launch near a limit, as vLLM 0.22.0 assumes."""


def ctas(tokens: int, top_k: int, experts: int, tile: int) -> int:
    """CTAs in the token dimension, which is y, of a launch for so many tokens.

    Args:
        tokens: of the launch.
        top_k: experts a token goes to.
        experts: experts of the layer on all ranks.
        tile: rows of a tile.
    """
    rows = tokens * top_k
    filled = min(experts, rows)
    return filled + (rows - filled) // tile


def most_tokens(top_k: int, experts: int, tile: int, limit: int = MAX_GRID_Y) -> int:
    """The largest number of tokens whose launch has at most ``limit`` CTAs in y.

    With one tile for each expert, ``limit - experts`` whole tiles are left, and the last row before one more of them.
    """
    rows = limit if limit < experts else experts + (limit - experts + 1) * tile - 1
    return rows // top_k
