"""MXFP8 MoE weights and block scales, shuffled for TensorRT-LLM kernels after loading.

Source: ``_shuffle_mxfp8_moe_weights`` of vLLM and its callers, in two forms: six lists and four stacks (0.19.0 to
0.27.0), and one gather a step for all experts (0.33.0). ``vllm`` is the function itself, as it is installed.
``in-place`` is a proposal.

Lifetimes are the callers': swapped copies of w13 and its scales live until the shuffle returns. Up to 0.27.0 results
become new parameters and the old die; 0.33.0 copies results into the old parameters, so that they live until the layer
is done. Left out: padding, which widths that are a multiple of 128, and hidden sizes that are one of 256, do not need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from flashinfer import block_scale_interleave, reorder_rows_for_gated_act_gemm, shuffle_matrix_a
from flashinfer.fused_moe.core import get_reorder_rows_for_gated_act_gemm_row_indices
from flashinfer.utils import get_shuffle_matrix_a_row_indices
from moe_in_place import EPILOGUE_TILE_M, permute_rows, row_scratch, w2_rows, w13_rows
from moe_layouts import interleave_on_host, rearranged, swizzled
from moe_loading import copy_or_rebind, parameter, rebind, swap_halves
from moe_models import gated_preset

import fragscope

_FUNCTION = "vllm.model_executor.layers.quantization.utils.flashinfer_utils:_shuffle_mxfp8_moe_weights"
VLLM_SHUFFLE = fragscope.Installed("vllm", _FUNCTION, first=("vllm.model_executor.layers.fused_moe",))
BLOCK = 32  # values that share a scale

PRESETS = {
    "deepseek-v3-tp1": gated_preset("deepseek-v3", tp=1, layers=1),
    "deepseek-v3-tp8": gated_preset("deepseek-v3", tp=8, layers=2),
    "minimax-m2-tp2": gated_preset("minimax-m2", tp=2, layers=2),
    "qwen3-30b-a3b-tp1": gated_preset("qwen3-30b-a3b", tp=1, layers=3),
    "nemotron-3-super-tp1": gated_preset("nemotron-3-super", tp=1, layers=1),
}

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Interleave = Callable[..., torch.Tensor]
Shuffle = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool, Interleave], Weights]
Process = Callable[["Layer", bool, Interleave], None]


@dataclass
class Layer:
    """One layer's expert weights; ``rows`` is 2 x intermediate, or 1 x without gate.

    w13 float8_e4m3fn ``[experts, rows, hidden]``, w2 ``[experts, hidden, intermediate]``; their scales, powers of two
    as uint8, ``[experts, rows, hidden/32]`` and ``[experts, hidden, intermediate/32]``.
    """

    w13: torch.nn.Parameter
    w2: torch.nn.Parameter
    w13_scale: torch.nn.Parameter
    w2_scale: torch.nn.Parameter


def shuffle_scales(scales: torch.Tensor, interleave: Interleave) -> torch.Tensor:
    """As flashinfer's ``shuffle_matrix_sf_a``, with the interleave kernel to be chosen."""
    index = get_shuffle_matrix_a_row_indices(scales, EPILOGUE_TILE_M)
    shuffled = scales[index.to(scales.device)]
    return interleave(shuffled)


def lists_and_stacks(
    w13: torch.Tensor, w2: torch.Tensor, s13: torch.Tensor, s2: torch.Tensor, gated: bool, interleave: Interleave
) -> Weights:
    """Weave into two lists, shuffle into four; all of them live until the stacks are made."""
    w13_woven, s13_woven = [], []
    for i in range(w13.shape[0]):
        expert = w13[i].view(torch.uint8)  # older hosts cannot index float8; to a card a byte is a byte
        w13_woven.append(reorder_rows_for_gated_act_gemm(expert) if gated else expert)
        s13_woven.append(reorder_rows_for_gated_act_gemm(s13[i]) if gated else s13[i])
    w13_list, w2_list, s13_list, s2_list = [], [], [], []
    for i in range(w13.shape[0]):
        w13_list.append(shuffle_matrix_a(w13_woven[i], EPILOGUE_TILE_M))
        w2_list.append(shuffle_matrix_a(w2[i].view(torch.uint8), EPILOGUE_TILE_M))
        s13_list.append(shuffle_scales(s13_woven[i], interleave))
        s2_list.append(shuffle_scales(s2[i], interleave))
    return (
        torch.stack(w13_list).view(torch.float8_e4m3fn),
        torch.stack(w2_list).view(torch.float8_e4m3fn),
        torch.stack(s13_list).reshape(s13.shape),
        torch.stack(s2_list).reshape(s2.shape),
    )


def batched(
    w13: torch.Tensor, w2: torch.Tensor, s13: torch.Tensor, s2: torch.Tensor, gated: bool, interleave: Interleave
) -> Weights:
    """One gather of all experts to weave, one to shuffle, one interleave."""
    w13_bytes, w2_bytes = w13.view(torch.uint8), w2.view(torch.uint8)
    if gated:
        woven = get_reorder_rows_for_gated_act_gemm_row_indices(w13_bytes[0])
        w13_bytes = w13_bytes[:, woven]
        s13 = s13[:, woven]

    def weights(w: torch.Tensor) -> torch.Tensor:
        index = get_shuffle_matrix_a_row_indices(w[0], EPILOGUE_TILE_M).to(w.device)
        return w[:, index].view(torch.float8_e4m3fn)

    def scales(s: torch.Tensor) -> torch.Tensor:
        index = get_shuffle_matrix_a_row_indices(s[0], EPILOGUE_TILE_M).to(s.device)
        return interleave(s[:, index]).reshape(s.shape)

    return weights(w13_bytes), weights(w2_bytes), scales(s13), scales(s2)


def vllm_shuffle(
    w13: torch.Tensor, w2: torch.Tensor, s13: torch.Tensor, s2: torch.Tensor, gated: bool, interleave: Interleave
) -> Weights:
    """What the installed vLLM does; ``interleave`` takes the place of the kernel that it imports on each call."""
    with mock.patch("flashinfer.quantization.fp4_quantization.block_scale_interleave", interleave):
        made: Weights = VLLM_SHUFFLE.load()(w13, w2, s13, s2, gated)
    return made


def in_place(layer: Layer, gated: bool, interleave: Interleave) -> None:
    """Swapping, weaving and shuffling are one permutation of rows; scales go through scratch back to their place."""
    w13, w2, s13, s2 = (p.data for p in (layer.w13, layer.w2, layer.w13_scale, layer.w2_scale))
    scratch = row_scratch(w13, w2)
    writes_in_place = "out" in inspect.signature(interleave).parameters  # of flashinfer from 0.7.2 on

    def rewrite(w: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> None:
        index = rows.to(w.device)
        permute_rows(w, index, scratch)
        shuffled = scratch[: s[0].numel()].view(s[0].shape)
        for expert in s.unbind():
            torch.index_select(expert, 0, index, out=shuffled)
            if writes_in_place:
                interleave(shuffled, out=expert.view(-1))
            else:
                expert.view(-1).copy_(interleave(shuffled))

    rewrite(w13, s13, w13_rows(w13[0], gated=gated))
    rewrite(w2, s2, w2_rows(w2[0]))


def swapped_and_shuffled(layer: Layer, shuffle: Shuffle, gated: bool, interleave: Interleave) -> Weights:
    """The halves of w13 and of its scales swapped into copies, then all shuffled; the copies die when this returns."""
    w13: torch.Tensor = layer.w13
    s13: torch.Tensor = layer.w13_scale
    if gated:
        w13 = swap_halves(w13)
        s13 = swap_halves(s13)
    return shuffle(w13, layer.w2, s13, layer.w2_scale, gated, interleave)


def through(shuffle: Shuffle, replace: Callable[[Any, str, torch.Tensor], None]) -> Process:
    """A layer as vLLM processes it: shuffled, then results in the place of its parameters, one after the other."""

    def process(layer: Layer, gated: bool, interleave: Interleave) -> None:
        w13, w2, s13, s2 = swapped_and_shuffled(layer, shuffle, gated, interleave)
        replace(layer, "w13", w13)
        replace(layer, "w2", w2)
        replace(layer, "w13_scale", s13)
        replace(layer, "w2_scale", s2)

    return process


_PROCESSES: dict[str, Process] = {
    "list-stack": through(lists_and_stacks, rebind),
    "batched": through(batched, copy_or_rebind),
    "vllm": through(vllm_shuffle, copy_or_rebind),
    "in-place": in_place,
}


def load(case: fragscope.Case) -> None:
    """Make all layers, then process them one after the other, as a loader does after reading a checkpoint."""

    def empty(rows: int, columns: int, dtype: torch.dtype) -> torch.nn.Parameter:
        return parameter(torch.empty(case.experts, rows, columns, dtype=dtype, device=case.device))

    rows = case.intermediate * (2 if case.gated else 1)
    layers = [
        Layer(
            w13=empty(rows, case.hidden, torch.float8_e4m3fn),
            w2=empty(case.hidden, case.intermediate, torch.float8_e4m3fn),
            w13_scale=empty(rows, case.hidden // BLOCK, torch.uint8),
            w2_scale=empty(case.hidden, case.intermediate // BLOCK, torch.uint8),
        )
        for _ in range(case.layers)
    ]
    process = _PROCESSES[case.variant]
    with case.measure():
        for layer in layers:
            process(layer, case.gated, block_scale_interleave)


def _replays(version: str, digest: str) -> fragscope.Replays:
    return fragscope.Replays("vllm", version, _FUNCTION, digest)


@fragscope.scenario(
    "moe-mxfp8-shuffle",
    presets=PRESETS,
    variant="list-stack",
    source="vLLM 0.23.0",
    replays=_replays("0.23.0", "7cd4fd74e685afaf73100fdc"),
)
def moe_mxfp8_shuffle(case: fragscope.Case) -> None:
    """Lists of woven and of shuffled experts, stacked at the end (vLLM 0.23.0)."""
    load(case)


@moe_mxfp8_shuffle.variant("batched", role="newest", replays=_replays("0.33.0", "0b2439f3a570d40d350f33e5"))
def _(case: fragscope.Case) -> None:
    """One gather a step for all experts (vLLM 0.33.0)."""
    load(case)


@moe_mxfp8_shuffle.installed("vllm", VLLM_SHUFFLE)
def _(case: fragscope.Case) -> None:
    """The function of vLLM, as it is installed, and its newest callers."""
    load(case)


@moe_mxfp8_shuffle.variant("in-place", role="proposed")
def _(case: fragscope.Case) -> None:
    """Rewritten in place through 4 MiB of scratch; no swapped copies."""
    load(case)


_SMALL = (3, 128, 384)  # experts, intermediate, hidden


def _weights(*, gated: bool) -> Weights:
    experts, intermediate, hidden = _SMALL
    generator = torch.Generator().manual_seed(32)

    def bytes_of(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(0, 256, (experts, rows, columns), dtype=torch.uint8, generator=generator)

    rows = (1 + gated) * intermediate
    return (
        bytes_of(rows, hidden).view(torch.float8_e4m3fn),
        bytes_of(hidden, intermediate).view(torch.float8_e4m3fn),
        bytes_of(rows, hidden // BLOCK),
        bytes_of(hidden, intermediate // BLOCK),
    )


@moe_mxfp8_shuffle.numeric
def outputs(variant: str, device: str) -> Sequence[torch.Tensor]:
    """A layer after a variant processed it, with gate and without; on a GPU with the real interleave kernel."""
    interleave: Interleave = block_scale_interleave if device == "cuda" else interleave_on_host
    results = []
    for gated in (True, False):
        layer = Layer(*(parameter(w.to(device)) for w in _weights(gated=gated)))
        _PROCESSES[variant](layer, gated, interleave)
        results += [layer.w13.data, layer.w2.data, layer.w13_scale.data, layer.w2_scale.data]
    return results


@moe_mxfp8_shuffle.reference
def reference(device: str) -> Sequence[torch.Tensor]:
    """Byte by byte from the layouts' definitions; with gate, w13's halves are swapped, then woven, then shuffled."""
    results = []
    for gated in (True, False):
        w13, w2, s13, s2 = _weights(gated=gated)
        results += [
            rearranged(w13, woven=gated, swapped=gated).view(torch.float8_e4m3fn),
            rearranged(w2, woven=False).view(torch.float8_e4m3fn),
            swizzled(rearranged(s13, woven=gated, swapped=gated)),
            swizzled(rearranged(s2, woven=False)),
        ]
    return [r.to(device) for r in results]
