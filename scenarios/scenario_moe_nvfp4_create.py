"""A whole model's NVFP4 MoE layers, made, loaded and shuffled, with and without placeholders for swizzled scales.

Source: ``ModelOptNvFp4FusedMoEMethod.create_weights`` of SGLang and its loader, before and after #26861. Up to
0.5.12.post1 every layer got swizzled copies of its block scales when it was made, of the right shape and with
meaningless content, since nothing was loaded. With TensorRT-LLM kernels nobody reads them: they lie there for all
layers while the checkpoint is read, and go one layer at a time when its scales take their place. 0.5.13 does not make
them.

The measured phase begins with nothing and holds the expert weights of one rank; the rest of a model is left out, and so
are a layer's few kilobytes of scales that are one number for an expert. Reading a checkpoint writes into the parameters
and allocates nothing. Results are copied into the parameters, whose storage stays. The shuffle is the same in both
variants: made of whole matrices, scales first, so that on the way it needs the results and nothing else; what the
releases need there, expert by expert, is the subject of ``moe-nvfp4-shuffle``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from flashinfer import nvfp4_block_scale_interleave
from flashinfer.fused_moe.core import get_reorder_rows_for_gated_act_gemm_row_indices
from flashinfer.utils import get_shuffle_matrix_a_row_indices
from moe_layouts import interleave_on_host, rearranged, swizzled
from moe_loading import copy_or_rebind, parameter
from moe_models import whole_preset

import fragscope

EPILOGUE_TILE_M = 128
GROUP = 16  # values that share a scale

PRESETS = {
    "deepseek-v3-tp4": whole_preset("deepseek-v3", tp=4),
    "deepseek-v3-tp8": whole_preset("deepseek-v3", tp=8),
    "kimi-k2-tp8": whole_preset("kimi-k2", tp=8),
    "qwen3-235b-a22b-tp4": whole_preset("qwen3-235b-a22b", tp=4),
}

Interleave = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Layer:
    """One layer's expert weights; two 4-bit values a byte, one scale for 16 values.

    w13 uint8 ``[experts, rows, hidden/2]``, w2 uint8 ``[experts, hidden, intermediate/2]``, their scales float8_e4m3fn
    ``[experts, rows, hidden/16]`` and ``[experts, hidden, intermediate/16]``. Swizzled scales are padded to 128 rows
    and 4 columns until the scales themselves take their place; None where they are not made.
    """

    w13: torch.nn.Parameter
    w2: torch.nn.Parameter
    w13_scale: torch.nn.Parameter
    w13_swizzled: torch.nn.Parameter | None
    w2_scale: torch.nn.Parameter
    w2_swizzled: torch.nn.Parameter | None


def placeholder(scales: torch.Tensor) -> torch.nn.Parameter:
    """Padded and swizzled copy of scales: one full temporary, and the result."""
    experts, rows, columns = scales.shape
    shape = (experts, -(-rows // 128) * 128, -(-columns // 4) * 4)
    padded = torch.zeros(shape, dtype=scales.dtype, device=scales.device)
    padded[:, :rows, :columns] = scales
    tiles = padded.reshape(experts, shape[1] // 128, 4, 32, shape[2] // 4, 4).permute(0, 1, 4, 3, 2, 5)
    return parameter(tiles.contiguous().reshape(shape))


def create(experts: int, intermediate: int, hidden: int, device: str, *, placeholders: bool) -> Layer:
    """The parameters of a layer, in the order they are made."""

    def empty(rows: int, columns: int, dtype: torch.dtype) -> torch.nn.Parameter:
        return parameter(torch.empty(experts, rows, columns, dtype=dtype, device=device))

    w13 = empty(2 * intermediate, hidden // 2, torch.uint8)
    w2 = empty(hidden, intermediate // 2, torch.uint8)
    w13_scale = empty(2 * intermediate, hidden // GROUP, torch.float8_e4m3fn)
    w13_swizzled = placeholder(w13_scale) if placeholders else None
    w2_scale = empty(hidden, intermediate // GROUP, torch.float8_e4m3fn)
    w2_swizzled = placeholder(w2_scale) if placeholders else None
    return Layer(w13, w2, w13_scale, w13_swizzled, w2_scale, w2_swizzled)


def shuffle(layer: Layer, interleave: Interleave) -> None:
    """Weights and scales in the kernels' order, copied into the layer's parameters."""

    def row_index(w: torch.Tensor, *, woven: bool) -> torch.Tensor:
        index: torch.Tensor = get_shuffle_matrix_a_row_indices(w[0], EPILOGUE_TILE_M)
        if woven:
            index = get_reorder_rows_for_gated_act_gemm_row_indices(w[0])[index]
        return index.to(w.device)

    def gathered(w: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.index_select(w.view(torch.uint8), 1, index)

    index13, index2 = row_index(layer.w13, woven=True), row_index(layer.w2, woven=False)
    s13 = interleave(gathered(layer.w13_scale, index13)).view(torch.float8_e4m3fn).reshape(layer.w13_scale.shape)
    s2 = interleave(gathered(layer.w2_scale, index2)).view(torch.float8_e4m3fn).reshape(layer.w2_scale.shape)
    w13, w2 = gathered(layer.w13, index13), gathered(layer.w2, index2)
    for name, new in (("w13", w13), ("w2", w2), ("w13_scale", s13), ("w2_scale", s2)):
        copy_or_rebind(layer, name, new)


def process(layer: Layer, interleave: Interleave) -> None:
    """Shuffle; then the scales are their own swizzled form, and placeholders die."""
    shuffle(layer, interleave)
    layer.w13_swizzled = layer.w13_scale
    layer.w2_swizzled = layer.w2_scale


def load(case: fragscope.Case, *, placeholders: bool) -> None:
    """Make all layers, then process them one after the other."""
    with case.measure():
        layers = [
            create(case.experts, case.intermediate, case.hidden, case.device, placeholders=placeholders)
            for _ in range(case.layers)
        ]
        for layer in layers:
            process(layer, nvfp4_block_scale_interleave)


_FUNCTION = "sglang.srt.layers.quantization.modelopt_quant:ModelOptNvFp4FusedMoEMethod.create_weights"


def _replays(version: str, digest: str) -> fragscope.Replays:
    return fragscope.Replays("sglang", version, _FUNCTION, digest)


_TOO_LARGE = fragscope.Expect("oom", preset="deepseek-v3-tp4", card="h100-80gb")  # 86 GiB of weights


@fragscope.scenario(
    "moe-nvfp4-create",
    presets=PRESETS,
    variant="placeholders",
    source="SGLang #26861, before",
    expect=_TOO_LARGE,
    replays=_replays("0.5.12.post1", "9e2c3040214a86201895ae1e"),
)
def moe_nvfp4_create(case: fragscope.Case) -> None:
    """Swizzled copies of all scales from the beginning (SGLang 0.5.12.post1)."""
    load(case, placeholders=True)


@moe_nvfp4_create.variant(
    "skipped", role="fixed", expect=_TOO_LARGE, replays=_replays("0.5.13", "f164b59f9ef968569286701a")
)
def _(case: fragscope.Case) -> None:
    """No placeholders (SGLang 0.5.13)."""
    load(case, placeholders=False)


_SMALL = (3, 128, 256)  # experts, intermediate, hidden


def _weights() -> tuple[torch.Tensor, ...]:
    experts, intermediate, hidden = _SMALL
    generator = torch.Generator().manual_seed(9744)

    def bytes_of(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(0, 256, (experts, rows, columns), dtype=torch.uint8, generator=generator)

    return (
        bytes_of(2 * intermediate, hidden // 2),
        bytes_of(hidden, intermediate // 2),
        bytes_of(2 * intermediate, hidden // GROUP),
        bytes_of(hidden, intermediate // GROUP),
    )


@moe_nvfp4_create.numeric
def outputs(variant: str, device: str) -> Sequence[torch.Tensor]:
    """A layer, made and processed, for small random weights; on a GPU with the real interleave kernel."""
    layer = create(*_SMALL, device, placeholders=variant == "placeholders")
    for p, data in zip((layer.w13, layer.w2, layer.w13_scale, layer.w2_scale), _weights(), strict=True):
        p.data.view(torch.uint8).copy_(data)
    process(layer, nvfp4_block_scale_interleave if device == "cuda" else interleave_on_host)
    assert layer.w13_swizzled is not None
    assert layer.w2_swizzled is not None
    return [p.data for p in (layer.w13, layer.w2, layer.w13_swizzled, layer.w2_swizzled)]


@moe_nvfp4_create.reference
def reference(device: str) -> Sequence[torch.Tensor]:
    """Byte by byte from the layouts' definitions."""
    w13, w2, s13, s2 = _weights()
    results = (
        rearranged(w13, woven=True),
        rearranged(w2, woven=False),
        swizzled(rearranged(s13, woven=True)).view(torch.float8_e4m3fn),
        swizzled(rearranged(s2, woven=False)).view(torch.float8_e4m3fn),
    )
    return [r.to(device) for r in results]
