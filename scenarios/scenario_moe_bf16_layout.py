"""BF16 MoE weights, brought into the block layout of TensorRT-LLM kernels after loading.

Source: ``convert_moe_weights_to_flashinfer_trtllm_block_layout`` of vLLM and its callers, in three forms: clones and
gathers of every expert in two lists, then stacks (0.23.0); outputs first, and the swap of w13's halves part of the row
index (#45589; 0.24.0); and in place through scratch of one expert (#54699; 0.33.0). ``vllm`` is the function itself, as
it is installed. ``sliced``, a proposal, does the same with a quarter of that scratch: of every run of 128 bytes a
quarter is moved at a time, and a byte keeps its place within its run, so what is overwritten has been read.

Lifetimes are the callers': the old parameters live until a layer is done, the swapped copy of w13, where there is one,
until the conversion returns, row indices for as long as the conversion of their layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flashinfer.fused_moe.core import (
    _maybe_get_cached_w3_w1_permute_indices,
    convert_to_block_layout,
    get_w2_permute_indices_with_cache,
)
from moe_in_place import BLOCK_K, EPILOGUE_TILE_M, block_scratch, to_block_layout, w2_rows, w13_rows
from moe_layouts import source_row
from moe_loading import parameter, rebind, swap_halves
from moe_models import preset

import fragscope

_FUNCTION = (
    "vllm.model_executor.layers.quantization.utils.flashinfer_utils:"
    "convert_moe_weights_to_flashinfer_trtllm_block_layout"
)
VLLM_CONVERT = fragscope.Installed("vllm", _FUNCTION, first=("vllm.model_executor.layers.fused_moe",))

PRESETS = {
    "qwen3-235b-a22b-tp4": preset("qwen3-235b-a22b", tp=4, layers=2),
    "qwen3-30b-a3b-tp1": preset("qwen3-30b-a3b", tp=1, layers=2),
    "glm-4.5-air-tp1": preset("glm-4.5-air", tp=1, layers=2),
    "llama-4-scout-tp4": preset("llama-4-scout", tp=4, layers=4),
}

Pair = tuple[torch.Tensor, torch.Tensor]
Convert = Callable[[torch.Tensor, torch.Tensor], Pair]
_Cache = dict[Any, torch.Tensor]


@dataclass
class Layer:
    """bfloat16: w13 ``[experts, 2 x intermediate, hidden]``, w2 ``[experts, hidden, intermediate]``."""

    w13: torch.nn.Parameter
    w2: torch.nn.Parameter


def _w13_index(cache: _Cache, expert: torch.Tensor) -> torch.Tensor:
    return _maybe_get_cached_w3_w1_permute_indices(cache, expert, EPILOGUE_TILE_M)  # type: ignore[no-any-return]


def _w2_index(cache: _Cache, expert: torch.Tensor) -> torch.Tensor:
    return get_w2_permute_indices_with_cache(cache, expert, EPILOGUE_TILE_M)  # type: ignore[no-any-return]


def _blocks(expert: torch.Tensor) -> torch.Tensor:
    """The bytes of an expert ``[rows, columns]`` seen as ``[columns/128, rows, 128]``."""
    rows, columns = expert.shape
    return expert.view(rows, columns // BLOCK_K, BLOCK_K).permute(1, 0, 2)


def list_and_stack(w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """The halves of w13 swapped into a copy, then lists and stacks; copy and row indices outlive the lists."""
    w13 = swap_halves(w13)
    cache: _Cache = {}
    return stacked(cache, w13, w2)


def stacked(cache: _Cache, w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """Each expert cloned, gathered and brought into blocks, into lists; then stacks."""
    w13_list = []
    w2_list = []
    for i in range(w13.shape[0]):
        index = _w13_index(cache, w13[i].view(torch.uint8))
        t13 = w13[i].clone().view(torch.uint8)[index]
        index = _w2_index(cache, w2[i].view(torch.uint8))
        t2 = w2[i].clone().view(torch.uint8)[index]
        t13 = convert_to_block_layout(t13, BLOCK_K)
        t2 = convert_to_block_layout(t2, BLOCK_K)
        w13_list.append(t13.view(torch.bfloat16))
        w2_list.append(t2.view(torch.bfloat16))
    return torch.stack(w13_list), torch.stack(w2_list)


def preallocated(w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """Outputs first; every expert is gathered straight into its place."""
    cache: _Cache = {}

    def output(w: torch.Tensor) -> torch.Tensor:
        experts, rows, columns = w.view(torch.uint8).shape
        return torch.empty(experts, columns // BLOCK_K, rows, BLOCK_K, dtype=torch.uint8, device=w.device)

    w13_out, w2_out = output(w13), output(w2)
    for i in range(w13.shape[0]):
        expert = w13[i].view(torch.uint8)
        index = _w13_index(cache, expert)
        index = (index + expert.shape[0] // 2) % expert.shape[0]
        torch.index_select(_blocks(expert), 1, index, out=w13_out[i])
        expert = w2[i].view(torch.uint8)
        index = _w2_index(cache, expert)
        torch.index_select(_blocks(expert), 1, index, out=w2_out[i])
    return w13_out.view(torch.bfloat16), w2_out.view(torch.bfloat16)


def in_place(w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """Every expert into scratch of its size and back over itself."""
    cache: _Cache = {}

    def rewrite(w: torch.Tensor, index_of: Callable[[_Cache, torch.Tensor], torch.Tensor], swap: int) -> torch.Tensor:
        experts, rows, columns = w.view(torch.uint8).shape
        scratch = torch.empty(columns // BLOCK_K, rows, BLOCK_K, dtype=torch.uint8, device=w.device)
        for i in range(experts):
            expert = w[i].view(torch.uint8)
            index = index_of(cache, expert)
            if swap:
                index = (index + swap) % rows
            torch.index_select(_blocks(expert), 1, index, out=scratch)
            expert.view(-1).copy_(scratch.view(-1))
        return w.view(torch.uint8).view(experts, *scratch.shape).view(torch.bfloat16)

    return rewrite(w13, _w13_index, w13.shape[1] // 2), rewrite(w2, _w2_index, 0)


def vllm_convert(w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """What the installed vLLM does."""
    made: Pair = VLLM_CONVERT.load()({}, w13, w2)
    return made


def sliced(w13: torch.Tensor, w2: torch.Tensor) -> Pair:
    """A quarter of every run of 128 bytes at a time; one index a matrix."""
    scratch = block_scratch(w13, w2)

    def rewrite(w: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return to_block_layout(w, rows.to(w.device), scratch)

    return rewrite(w13, w13_rows(w13[0], gated=True)), rewrite(w2, w2_rows(w2[0]))


_CONVERTS: dict[str, Convert] = {
    "list-stack": list_and_stack,
    "preallocated": preallocated,
    "in-place": in_place,
    "vllm": vllm_convert,
    "sliced": sliced,
}


def replaced(layer: Layer, convert: Convert) -> None:
    """Results become the layer's parameters; the old ones die when this returns."""
    w13, w2 = layer.w13, layer.w2
    new13, new2 = convert(w13, w2)
    rebind(layer, "w13", new13)
    rebind(layer, "w2", new2)


def rewritten(layer: Layer, convert: Convert) -> None:
    """The parameters keep the checkpoint's shape; kernels see their bytes in blocks."""
    convert(layer.w13, layer.w2)


def load(case: fragscope.Case, process: Callable[[Layer, Convert], None]) -> None:
    """Make all layers, then process them one after the other, as a loader does after reading a checkpoint."""

    def empty(rows: int, columns: int) -> torch.nn.Parameter:
        return parameter(torch.empty(case.experts, rows, columns, dtype=torch.bfloat16, device=case.device))

    layers = [
        Layer(empty(2 * case.intermediate, case.hidden), empty(case.hidden, case.intermediate))
        for _ in range(case.layers)
    ]
    convert = _CONVERTS[case.variant]
    with case.measure():
        for layer in layers:
            process(layer, convert)


def _replays(version: str, digest: str) -> fragscope.Replays:
    return fragscope.Replays("vllm", version, _FUNCTION, digest)


@fragscope.scenario(
    "moe-bf16-layout",
    presets=PRESETS,
    variant="list-stack",
    source="vLLM #45589 and #54699, before",
    replays=_replays("0.23.0", "071185958a4334047c54fdac"),
)
def moe_bf16_layout(case: fragscope.Case) -> None:
    """Clones, gathers and blocks of every expert in lists, stacked at the end (vLLM 0.23.0)."""
    load(case, replaced)


@moe_bf16_layout.variant("preallocated", role="fixed", replays=_replays("0.24.0", "c1dabfb552323d2bff2d003a"))
def _(case: fragscope.Case) -> None:
    """Outputs allocated first; the swap of halves is part of the row index (vLLM 0.24.0)."""
    load(case, replaced)


@moe_bf16_layout.variant("in-place", role="newest", replays=_replays("0.33.0", "1b708bf2f0ac11cd81f54c9d"))
def _(case: fragscope.Case) -> None:
    """Rewritten in place through one expert of scratch (vLLM 0.33.0)."""
    load(case, rewritten)


@moe_bf16_layout.installed("vllm", VLLM_CONVERT)
def _(case: fragscope.Case) -> None:
    """The function of vLLM, as it is installed."""
    load(case, rewritten)


@moe_bf16_layout.variant("sliced", role="proposed")
def _(case: fragscope.Case) -> None:
    """Rewritten in place through a quarter of an expert of scratch."""
    load(case, rewritten)


_SMALL = (3, 128, 192)  # experts, intermediate, hidden


def _weights() -> Pair:
    experts, intermediate, hidden = _SMALL
    generator = torch.Generator().manual_seed(54699)

    def bytes_of(rows: int, columns: int) -> torch.Tensor:
        made = torch.randint(0, 256, (experts, rows, 2 * columns), dtype=torch.uint8, generator=generator)
        return made.view(torch.bfloat16)

    return bytes_of(2 * intermediate, hidden), bytes_of(hidden, intermediate)


@moe_bf16_layout.numeric
def outputs(variant: str, device: str) -> Sequence[torch.Tensor]:
    """A variant's results for small random weights."""
    w13, w2 = _weights()
    return _CONVERTS[variant](parameter(w13.to(device)), parameter(w2.to(device)))


@moe_bf16_layout.reference
def reference(device: str) -> Sequence[torch.Tensor]:
    """Byte by byte from the layout's definition: output[e, b, r, k] = input[e, source(r), 128 b + k]."""
    results = []
    for w, woven in zip(_weights(), (True, False), strict=True):
        data = w.view(torch.uint8)
        experts, rows, columns = data.shape
        out = torch.empty(experts, columns // 128, rows, 128, dtype=torch.uint8)
        for row in range(rows):
            source = source_row(row, rows, woven=woven, swapped=woven)
            for block in range(columns // 128):
                out[:, block, row] = data[:, source, 128 * block : 128 * (block + 1)]
        results.append(out.view(torch.bfloat16).to(device))
    return results
