"""NVFP4 MoE weights and block scales, shuffled for TensorRT-LLM kernels after loading.

Source: ``prepare_static_weights_for_trtllm_fp4_moe`` of SGLang (#26861) and its twin in vLLM (#55407), in three forms:
before (list and stack), after (SGLang 0.5.13: preallocated outputs, scratch for permuted scales) and the newest (vLLM
0.33.0: gathers straight into the outputs). ``sglang`` and ``vllm`` are the functions themselves, as they are installed.
``in-place`` is a proposal.

``finalize``: vLLM rebinds the parameters to the results; SGLang copies the results into the old parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from flashinfer import nvfp4_block_scale_interleave
from flashinfer.fused_moe.core import _maybe_get_cached_w3_w1_permute_indices, get_w2_permute_indices_with_cache
from moe_layouts import interleave_on_host, rearranged, swizzled
from moe_models import preset

import fragscope

_FUNCTION = "prepare_static_weights_for_trtllm_fp4_moe"
VLLM_SHUFFLE = fragscope.Installed(
    "vllm",
    f"vllm.model_executor.layers.quantization.utils.flashinfer_fp4_moe:{_FUNCTION}",
    first=("vllm.model_executor.layers.fused_moe",),
)
SGLANG_SHUFFLE = fragscope.Installed("sglang", f"sglang.srt.layers.quantization.utils:{_FUNCTION}")
EPILOGUE_TILE_M = 128
ELEMENTS_PER_SCALE = 16

PRESETS = {
    "deepseek-v3-tp4": preset("deepseek-v3", tp=4, layers=3),
    "qwen3-next-80b-tp4": preset("qwen3-next-80b", tp=4, layers=4),
    "kimi-k2-tp8": preset("kimi-k2", tp=8, layers=2),
}

Interleave = Callable[[torch.Tensor], torch.Tensor]
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Shuffle = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Interleave], Weights]
_Cache = dict[Any, torch.Tensor]


@dataclass
class Layer:
    """One layer's expert weights; two 4-bit values a byte, one scale for 16 values.

    w13 uint8 ``[experts, rows, hidden/2]``, w2 uint8 ``[experts, hidden, intermediate/2]``, their scales float8_e4m3fn
    ``[experts, rows, hidden/16]`` and ``[experts, hidden, intermediate/16]``.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor


def _w13_index(cache: _Cache, expert: torch.Tensor, elements_per_scale: int | None = None) -> torch.Tensor:
    return _maybe_get_cached_w3_w1_permute_indices(cache, expert, EPILOGUE_TILE_M, elements_per_scale)  # type: ignore[no-any-return]


def _w2_index(cache: _Cache, expert: torch.Tensor, elements_per_scale: int | None = None) -> torch.Tensor:
    return get_w2_permute_indices_with_cache(cache, expert, EPILOGUE_TILE_M, elements_per_scale)  # type: ignore[no-any-return]


def list_and_stack(
    w13: torch.Tensor, w2: torch.Tensor, s13: torch.Tensor, s2: torch.Tensor, interleave: Interleave
) -> Weights:
    """Four lists of shuffled experts; each is freed once its stack stands."""
    cache: _Cache = {}
    w13_list, s13_list, w2_list, s2_list = [], [], [], []
    for i in range(w13.shape[0]):
        index = _w13_index(cache, w13[i].view(torch.uint8))
        w13_list.append(w13[i].view(torch.uint8)[index.to(w13.device)].contiguous())
        index = _w13_index(cache, s13[i].view(torch.uint8), ELEMENTS_PER_SCALE)
        s13_list.append(interleave(s13[i].view(torch.uint8)[index.to(s13.device)].contiguous()))
        index = _w2_index(cache, w2[i].view(torch.uint8))
        w2_list.append(w2[i].view(torch.uint8)[index.to(w2.device)].contiguous())
        index = _w2_index(cache, s2[i].view(torch.uint8), ELEMENTS_PER_SCALE)
        s2_list.append(interleave(s2[i].view(torch.uint8)[index.to(s2.device)].contiguous()))
    # Rebinding the list's name frees the list as soon as its stack is made.
    w13_list = torch.stack(w13_list)  # type: ignore[assignment]
    s13_list = torch.stack(s13_list).view(torch.float8_e4m3fn).reshape(s13.shape)  # type: ignore[assignment]
    w2_list = torch.stack(w2_list)  # type: ignore[assignment]
    s2_list = torch.stack(s2_list).view(torch.float8_e4m3fn).reshape(s2.shape)  # type: ignore[assignment]
    return w13_list, w2_list, s13_list, s2_list  # type: ignore[return-value]


def _scale_outputs(s: torch.Tensor) -> torch.Tensor:
    """Room for every expert's interleaved scales: rows padded to 128, columns to 4."""
    experts, rows, columns = s.shape
    padded = -(-rows // 128) * 128 * (-(-columns // 4) * 4)
    return torch.empty(experts, padded, dtype=torch.uint8, device=s.device)


def preallocated(
    w13: torch.Tensor, w2: torch.Tensor, s13: torch.Tensor, s2: torch.Tensor, interleave: Interleave
) -> Weights:
    """Outputs first; permuted scales go through scratch. Weight gathers and interleaved scales are still temporary."""
    cache: _Cache = {}
    w13_out, w2_out = torch.empty_like(w13), torch.empty_like(w2)
    s13_out = _scale_outputs(s13)
    s13_scratch = torch.empty(s13.shape[1:], dtype=torch.uint8, device=s13.device)
    s2_out = _scale_outputs(s2)
    s2_scratch = torch.empty(s2.shape[1:], dtype=torch.uint8, device=s2.device)
    for i in range(w13.shape[0]):
        index = _w13_index(cache, w13[i])
        w13_out[i] = w13[i].view(torch.uint8)[index]
        scale = s13[i].view(torch.uint8)
        scale_index = _w13_index(cache, scale, ELEMENTS_PER_SCALE)
        torch.index_select(scale, 0, scale_index, out=s13_scratch)
        s13_out[i] = interleave(s13_scratch)
        index = _w2_index(cache, w2[i])
        w2_out[i] = w2[i].view(torch.uint8)[index]
        scale = s2[i].view(torch.uint8)
        scale_index = _w2_index(cache, scale, ELEMENTS_PER_SCALE)
        torch.index_select(scale, 0, scale_index, out=s2_scratch)
        s2_out[i] = interleave(s2_scratch)
    del s13_scratch, s2_scratch
    return (
        w13_out,
        w2_out,
        s13_out.view(torch.float8_e4m3fn).reshape(s13.shape),
        s2_out.view(torch.float8_e4m3fn).reshape(s2.shape),
    )


def indexed_out(
    w13: torch.Tensor, w2: torch.Tensor, s13: torch.Tensor, s2: torch.Tensor, interleave: Interleave
) -> Weights:
    """Indices once; weights are gathered straight into their outputs."""
    cache: _Cache = {}
    index13 = _w13_index(cache, w13[0])
    scale_index13 = _w13_index(cache, s13[0].view(torch.uint8), ELEMENTS_PER_SCALE)
    index2 = _w2_index(cache, w2[0])
    scale_index2 = _w2_index(cache, s2[0].view(torch.uint8), ELEMENTS_PER_SCALE)
    w13_out, s13_out = torch.empty_like(w13), _scale_outputs(s13)
    w2_out, s2_out = torch.empty_like(w2), _scale_outputs(s2)
    s13_scratch = torch.empty(s13.shape[1:], dtype=torch.uint8, device=s13.device)
    s2_scratch = torch.empty(s2.shape[1:], dtype=torch.uint8, device=s2.device)
    for i in range(w13.shape[0]):
        torch.index_select(w13[i], 0, index13, out=w13_out[i])
        torch.index_select(s13[i].view(torch.uint8), 0, scale_index13, out=s13_scratch)
        s13_out[i].copy_(interleave(s13_scratch))
        torch.index_select(w2[i], 0, index2, out=w2_out[i])
        torch.index_select(s2[i].view(torch.uint8), 0, scale_index2, out=s2_scratch)
        s2_out[i].copy_(interleave(s2_scratch))
    return (
        w13_out,
        w2_out,
        s13_out.view(torch.float8_e4m3fn).reshape(s13.shape),
        s2_out.view(torch.float8_e4m3fn).reshape(s2.shape),
    )


def in_place(
    w13: torch.Tensor, w2: torch.Tensor, s13: torch.Tensor, s2: torch.Tensor, interleave: Interleave
) -> Weights:
    """Each expert into its own storage through one scratch of an expert's largest matrix."""
    cache: _Cache = {}
    experts = (w13[0], w2[0], s13[0], s2[0])
    scratch = torch.empty(max(e.numel() for e in experts), dtype=torch.uint8, device=w13.device)

    def rewrite(w: torch.Tensor, index: torch.Tensor, *, scales: bool) -> None:
        rows, columns = w.shape[1:]
        shuffled = scratch[: rows * columns].view(rows, columns)
        for i in range(w.shape[0]):
            expert = w[i].view(torch.uint8)
            torch.index_select(expert, 0, index, out=shuffled)
            if scales:
                expert.view(-1).copy_(interleave(shuffled))
            else:
                expert.copy_(shuffled)

    rewrite(w13, _w13_index(cache, w13[0]), scales=False)
    rewrite(s13, _w13_index(cache, s13[0].view(torch.uint8), ELEMENTS_PER_SCALE), scales=True)
    rewrite(w2, _w2_index(cache, w2[0]), scales=False)
    rewrite(s2, _w2_index(cache, s2[0].view(torch.uint8), ELEMENTS_PER_SCALE), scales=True)
    return w13, w2, s13, s2


def load(case: fragscope.Case, shuffle: Shuffle) -> None:
    """Make all layers, then process them one after the other."""

    def empty(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(case.experts, rows, columns, dtype=dtype, device=case.device)

    layers = [
        Layer(
            w13=empty(2 * case.intermediate, case.hidden // 2, torch.uint8),
            w2=empty(case.hidden, case.intermediate // 2, torch.uint8),
            w13_scale=empty(2 * case.intermediate, case.hidden // 16, torch.float8_e4m3fn),
            w2_scale=empty(case.hidden, case.intermediate // 16, torch.float8_e4m3fn),
        )
        for _ in range(case.layers)
    ]
    with case.measure():
        for layer in layers:
            process(layer, shuffle, copy=case.finalize == "copy")


def process(layer: Layer, shuffle: Shuffle, *, copy: bool) -> None:
    """Replace a layer's weights by their shuffled form, or copy the results into them."""
    results = shuffle(layer.w13, layer.w2, layer.w13_scale, layer.w2_scale, nvfp4_block_scale_interleave)
    if copy:
        for old, new in zip((layer.w13, layer.w2, layer.w13_scale, layer.w2_scale), results, strict=True):
            if old is not new:
                old.copy_(new)
        return
    layer.w13, layer.w2, layer.w13_scale, layer.w2_scale = results


@fragscope.scenario(
    "moe-nvfp4-shuffle",
    presets=PRESETS,
    variant="list-stack",
    params={"finalize": ("rebind", "copy")},
    source="SGLang #26861, vLLM #55407, before",
    replays=fragscope.Replays("sglang", "0.5.12.post1", SGLANG_SHUFFLE.function, "2604814bd0bae7c462f7cf5c"),
)
def moe_nvfp4_shuffle(case: fragscope.Case) -> None:
    """Lists of shuffled experts, stacked at the end."""
    load(case, list_and_stack)


@moe_nvfp4_shuffle.variant(
    "preallocated",
    role="fixed",
    replays=fragscope.Replays("sglang", "0.5.13", SGLANG_SHUFFLE.function, "8db7a30b535ec49dcac6a2b2"),
)
def _(case: fragscope.Case) -> None:
    """Outputs allocated first, scratch for permuted scales (SGLang 0.5.13)."""
    load(case, preallocated)


@moe_nvfp4_shuffle.variant(
    "indexed-out",
    role="newest",
    replays=fragscope.Replays("vllm", "0.33.0", VLLM_SHUFFLE.function, "e0f0118e648e1a51d1238967"),
)
def _(case: fragscope.Case) -> None:
    """Gathers straight into the outputs (vLLM 0.33.0)."""
    load(case, indexed_out)


def of_package(code: fragscope.Installed) -> Shuffle:
    """What an installed package does; ``interleave`` takes the place of the kernel that it imports on each call."""

    def shuffle(
        w13: torch.Tensor, w2: torch.Tensor, s13: torch.Tensor, s2: torch.Tensor, interleave: Interleave
    ) -> Weights:
        experts, hidden, gated = w13.shape[0], w2.shape[1], True
        with mock.patch("flashinfer.nvfp4_block_scale_interleave", interleave):
            w13, s13, w2, s2 = code.load()(w13, w2, s13, s2, hidden, w13.shape[1] // 2, experts, gated)
        return w13, w2, s13, s2

    return shuffle


@moe_nvfp4_shuffle.installed("sglang", SGLANG_SHUFFLE)
def _(case: fragscope.Case) -> None:
    """The function of SGLang, as it is installed."""
    load(case, of_package(SGLANG_SHUFFLE))


@moe_nvfp4_shuffle.installed("vllm", VLLM_SHUFFLE)
def _(case: fragscope.Case) -> None:
    """The function of vLLM, as it is installed."""
    load(case, of_package(VLLM_SHUFFLE))


@moe_nvfp4_shuffle.variant("in-place", role="proposed")
def _(case: fragscope.Case) -> None:
    """Rewritten in place through one expert of scratch."""
    load(case, in_place)


_SHUFFLES: dict[str, Shuffle] = {
    "list-stack": list_and_stack,
    "preallocated": preallocated,
    "indexed-out": indexed_out,
    "sglang": of_package(SGLANG_SHUFFLE),
    "vllm": of_package(VLLM_SHUFFLE),
    "in-place": in_place,
}
_SMALL = (3, 128, 256)  # experts, intermediate, hidden


def _weights(device: str) -> Weights:
    experts, intermediate, hidden = _SMALL
    generator = torch.Generator().manual_seed(26861)

    def bytes_of(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(0, 256, (experts, rows, columns), dtype=torch.uint8, generator=generator).to(device)

    return (
        bytes_of(2 * intermediate, hidden // 2),
        bytes_of(hidden, intermediate // 2),
        bytes_of(2 * intermediate, hidden // 16).view(torch.float8_e4m3fn),
        bytes_of(hidden, intermediate // 16).view(torch.float8_e4m3fn),
    )


@moe_nvfp4_shuffle.numeric
def outputs(variant: str, device: str) -> Sequence[torch.Tensor]:
    """A variant's results for small random weights; on a GPU with the real interleave kernel."""
    interleave = nvfp4_block_scale_interleave if device == "cuda" else interleave_on_host
    return _SHUFFLES[variant](*_weights(device), interleave)


@moe_nvfp4_shuffle.reference
def reference(device: str) -> Sequence[torch.Tensor]:
    """Byte by byte from the layouts' definitions. w13 comes with its up half first, so that nothing is swapped."""
    w13, w2, s13, s2 = _weights("cpu")
    results = (
        rearranged(w13, woven=True),
        rearranged(w2, woven=False),
        swizzled(rearranged(s13, woven=True)).view(torch.float8_e4m3fn),
        swizzled(rearranged(s2, woven=False)).view(torch.float8_e4m3fn),
    )
    return [r.to(device) for r in results]
