"""FP8 block-scale MoE weights, shuffled for TensorRT-LLM kernels after loading.

Source: vLLM #39054, ``_shuffle_deepseek_fp8_moe_weights`` and its caller, in three forms: before the fix (list and
stack), after it (0.20.0: preallocated outputs) and the newest (0.33.0: one batched gather a matrix). ``vllm`` is the
function itself, as it is installed. ``in-place`` is a proposal.

Every form keeps the lifetimes of the original: the loader's locals hold the old parameters until a layer is done, and
the swap of w13's halves, a full copy, lives until the shuffle returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from flashinfer import shuffle_matrix_a
from flashinfer.fused_moe.core import convert_to_block_layout
from flashinfer.utils import get_shuffle_matrix_a_row_indices
from moe_loading import swap_halves
from moe_models import preset

import fragscope

VLLM_SHUFFLE = fragscope.Installed(
    "vllm",
    "vllm.model_executor.layers.quantization.utils.flashinfer_utils:_shuffle_deepseek_fp8_moe_weights",
    first=("vllm.model_executor.layers.fused_moe",),
)
EPILOGUE_TILE_M = 64
BLOCK_K = 128

PRESETS = {
    "deepseek-v3-tp1": preset("deepseek-v3", tp=1, layers=1),
    "deepseek-v3-tp8": preset("deepseek-v3", tp=8, layers=4),
    "qwen3-30b-a3b-tp1": preset("qwen3-30b-a3b", tp=1, layers=6),
    "kimi-k2-tp8": preset("kimi-k2", tp=8, layers=2),
    "minimax-m2-tp2": preset("minimax-m2", tp=2, layers=2),
    "glm-5-tp8": preset("glm-5", tp=8, layers=2),
}

Pair = tuple[torch.Tensor, torch.Tensor]
Shuffle = Callable[[torch.Tensor, torch.Tensor], Pair]


@dataclass
class Layer:
    """A layer: w13 ``[experts, 2 x intermediate, hidden]``, w2 ``[experts, hidden, intermediate]``."""

    w13: torch.Tensor
    w2: torch.Tensor


def list_and_stack(w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """Shuffle expert by expert into lists, then stack them: everything exists twice."""
    w13_shuffled = []
    w2_shuffled = []
    for i in range(w13.shape[0]):
        t13 = shuffle_matrix_a(w13[i].view(torch.uint8), EPILOGUE_TILE_M)
        t13 = convert_to_block_layout(t13, BLOCK_K)
        w13_shuffled.append(t13)
        t2 = shuffle_matrix_a(w2[i].view(torch.uint8), EPILOGUE_TILE_M)
        t2 = convert_to_block_layout(t2, BLOCK_K)
        w2_shuffled.append(t2)
    w13_out = torch.stack(w13_shuffled).view(torch.float8_e4m3fn)
    w2_out = torch.stack(w2_shuffled).view(torch.float8_e4m3fn)
    return w13_out, w2_out


def preallocated(w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """Outputs first, then expert by expert into their slices."""
    experts, rows13, hidden = w13.shape
    _, rows2, width = w2.shape
    w13_out = torch.empty(experts, hidden // BLOCK_K, rows13, BLOCK_K, dtype=torch.uint8, device=w13.device)
    w2_out = torch.empty(experts, width // BLOCK_K, rows2, BLOCK_K, dtype=torch.uint8, device=w2.device)
    for i in range(experts):
        t13 = shuffle_matrix_a(w13[i].view(torch.uint8), EPILOGUE_TILE_M)
        w13_out[i] = convert_to_block_layout(t13, BLOCK_K)
        t2 = shuffle_matrix_a(w2[i].view(torch.uint8), EPILOGUE_TILE_M)
        w2_out[i] = convert_to_block_layout(t2, BLOCK_K)
    return w13_out.view(torch.float8_e4m3fn), w2_out.view(torch.float8_e4m3fn)


def batched(w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """One gather a matrix over all experts, straight into block layout."""

    def gather(w: torch.Tensor) -> torch.Tensor:
        experts, rows, columns = w.shape
        index = get_shuffle_matrix_a_row_indices(w[0], EPILOGUE_TILE_M).to(w.device)
        blocks = w.view(torch.uint8).view(experts, rows, columns // BLOCK_K, BLOCK_K).permute(0, 2, 1, 3)
        return blocks[:, :, index, :].contiguous().view(torch.float8_e4m3fn)

    return gather(w13), gather(w2)


def in_place(w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """Each expert into its own storage through one expert of scratch; the half swap is part of the row index.

    ``w13`` is not swapped: row r of the swapped matrix is row (r + rows/2) mod rows of this one.
    """
    rows13 = w13.shape[1]
    index13 = (get_shuffle_matrix_a_row_indices(w13[0], EPILOGUE_TILE_M) + rows13 // 2) % rows13
    index2 = get_shuffle_matrix_a_row_indices(w2[0], EPILOGUE_TILE_M)
    scratch = torch.empty(max(w13[0].numel(), w2[0].numel()), dtype=torch.uint8, device=w13.device)

    def rewrite(w: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        experts, rows, columns = w.shape
        shuffled = scratch[: rows * columns].view(rows, columns)
        for i in range(experts):
            expert = w[i].view(torch.uint8)
            torch.index_select(expert, 0, index, out=shuffled)
            blocks = shuffled.view(rows, columns // BLOCK_K, BLOCK_K).permute(1, 0, 2)
            expert.view(columns // BLOCK_K, rows, BLOCK_K).copy_(blocks)
        return w.view(experts, columns // BLOCK_K, rows, BLOCK_K)

    return rewrite(w13, index13.to(w13.device)), rewrite(w2, index2.to(w2.device))


def load(case: fragscope.Case, shuffle: Shuffle, *, swap: bool = True) -> None:
    """Make all layers, then process them one after the other, as a loader does after reading a checkpoint."""
    layers = [
        Layer(
            torch.empty(
                case.experts, 2 * case.intermediate, case.hidden, dtype=torch.float8_e4m3fn, device=case.device
            ),
            torch.empty(case.experts, case.hidden, case.intermediate, dtype=torch.float8_e4m3fn, device=case.device),
        )
        for _ in range(case.layers)
    ]
    with case.measure():
        for layer in layers:
            process(layer, shuffle, swap=swap)
        later = [
            torch.empty(shape, dtype=torch.bfloat16, device=case.device)
            for _ in layers
            for shape in ((128, 512, 128), (128, 128, 512))
        ]
    del later


def process(layer: Layer, shuffle: Shuffle, *, swap: bool) -> None:
    """Replace a layer's weights by their shuffled form; the old ones die when this returns."""
    w13, w2 = layer.w13, layer.w2
    layer.w13, layer.w2 = converted(w13, w2, shuffle, swap=swap)


def converted(w13: torch.Tensor, w2: torch.Tensor, shuffle: Shuffle, *, swap: bool) -> Pair:
    """Swap, then shuffle; the swapped copy dies when this returns."""
    if swap:
        w13 = swap_halves(w13)
    return shuffle(w13, w2)


def _replays(version: str, digest: str) -> fragscope.Replays:
    return fragscope.Replays("vllm", version, VLLM_SHUFFLE.function, digest)


# No release has the form before the fix. This commit has, in wzhao18/vllm, where the fix was written.
@fragscope.scenario(
    "moe-fp8-shuffle",
    presets=PRESETS,
    variant="list-stack",
    source="vLLM #39054, before",
    replays=_replays("0a75c822", "b70d5731611b1aa171fca687"),
)
def moe_fp8_shuffle(case: fragscope.Case) -> None:
    """Lists of shuffled experts, stacked at the end."""
    load(case, list_and_stack)


@moe_fp8_shuffle.variant("preallocated", role="fixed", replays=_replays("0.20.0", "cd92809c5eba7774d063980a"))
def _(case: fragscope.Case) -> None:
    """Outputs allocated first (vLLM 0.20.0)."""
    load(case, preallocated)


@moe_fp8_shuffle.variant("batched", role="newest", replays=_replays("0.33.0", "dbcc24965a0f082b965aa23a"))
def _(case: fragscope.Case) -> None:
    """One gather a matrix (vLLM 0.33.0)."""
    load(case, batched)


def vllm_shuffle(w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """What the installed vLLM does."""
    made: Pair = VLLM_SHUFFLE.load()(w13, w2)
    return made


@moe_fp8_shuffle.installed("vllm", VLLM_SHUFFLE)
def _(case: fragscope.Case) -> None:
    """The function of vLLM, as it is installed."""
    load(case, vllm_shuffle)


@moe_fp8_shuffle.variant("in-place", role="proposed")
def _(case: fragscope.Case) -> None:
    """Rewritten in place through one expert of scratch; no swapped copy."""
    load(case, in_place, swap=False)


_SHUFFLES: dict[str, tuple[Shuffle, bool]] = {
    "list-stack": (list_and_stack, True),
    "preallocated": (preallocated, True),
    "batched": (batched, True),
    "vllm": (vllm_shuffle, True),
    "in-place": (in_place, False),
}
_SMALL = (3, 256, 384)  # experts, intermediate, hidden


def _weights(device: str) -> Pair:
    experts, intermediate, hidden = _SMALL
    generator = torch.Generator().manual_seed(39054)
    w13 = torch.randint(0, 256, (experts, 2 * intermediate, hidden), dtype=torch.uint8, generator=generator)
    w2 = torch.randint(0, 256, (experts, hidden, intermediate), dtype=torch.uint8, generator=generator)
    return w13.view(torch.float8_e4m3fn).to(device), w2.view(torch.float8_e4m3fn).to(device)


@moe_fp8_shuffle.numeric
def outputs(variant: str, device: str) -> Sequence[torch.Tensor]:
    """A variant's results for small random weights."""
    shuffle, swap = _SHUFFLES[variant]
    return converted(*_weights(device), shuffle, swap=swap)


@moe_fp8_shuffle.reference
def reference(device: str) -> Sequence[torch.Tensor]:
    """Element by element from the layout's definition: output[e, b, r, k] = input[e, source(r), 128 b + k].

    An epilogue tile of 64 rows shuffles blocks of 16: the even rows of a block come first, then the odd ones. w13's
    halves are swapped before.
    """
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    results = []
    for w, swapped in zip(_weights("cpu"), (True, False), strict=True):
        experts, rows, columns = w.shape
        data = w.view(torch.uint8)
        out = torch.empty(experts, columns // BLOCK_K, rows, BLOCK_K, dtype=torch.uint8)
        for row in range(rows):
            source = row // 16 * 16 + order[row % 16]
            if swapped:
                source = (source + rows // 2) % rows
            for block in range(columns // BLOCK_K):
                out[:, block, row] = data[:, source, block * BLOCK_K : (block + 1) * BLOCK_K]
        results.append(out.view(torch.float8_e4m3fn).to(device))
    return results
