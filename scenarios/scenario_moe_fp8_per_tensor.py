"""FP8 MoE weights with one scale a matrix, shuffled for TensorRT-LLM kernels after loading.

Source: ``rotate_weights_for_fi_trtllm_fp8_per_tensor_moe`` of vLLM and its caller for ModelOpt checkpoints. It is the
sister of the function that vLLM #39054 repaired, and works in two phases of list and stack to this day (0.33.0): the
halves of w13 are woven expert by expert and stacked, then all experts are shuffled and stacked again. With the swapped
copy of w13 that its caller makes, four more w13 and two more w2 are there on the way. ``vllm`` is the function itself,
as it is installed. ``in-place`` is a proposal.

Lifetimes are the caller's. The lists live until the function returns. So does the swapped copy: giving a tensor other
``.data`` frees nothing where it is a view, as the result of a reshape is, since a view holds its base. w13's result is
copied into the old parameter and lives until the layer is done.

Left out: bringing both halves of w13 to one scale, before, which works in place on one half of an expert at a time; and
padding, which widths that are a multiple of 16, or of 128 without gate, do not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from flashinfer import reorder_rows_for_gated_act_gemm, shuffle_matrix_a
from moe_in_place import EPILOGUE_TILE_M, permute_rows, row_scratch, w2_rows, w13_rows
from moe_layouts import rearranged
from moe_loading import copy_or_rebind, parameter, swap_halves
from moe_models import gated_preset

import fragscope

_FUNCTION = (
    "vllm.model_executor.layers.quantization.utils.flashinfer_utils:rotate_weights_for_fi_trtllm_fp8_per_tensor_moe"
)
VLLM_ROTATE = fragscope.Installed("vllm", _FUNCTION, first=("vllm.model_executor.layers.fused_moe",))

PRESETS = {
    "llama-4-scout-tp1": gated_preset("llama-4-scout", tp=1, layers=4),
    "llama-4-scout-tp8": gated_preset("llama-4-scout", tp=8, layers=8),
    "nemotron-3-super-tp1": gated_preset("nemotron-3-super", tp=1, layers=2),
}


@dataclass
class Layer:
    """One layer's expert weights, float8_e4m3fn; ``rows`` is 2 x intermediate, or 1 x without gate.

    w13 ``[experts, rows, hidden]``, w2 ``[experts, hidden, intermediate]``.
    """

    w13: torch.nn.Parameter
    w2: torch.nn.Parameter


Rotate = Callable[[torch.Tensor, torch.Tensor, bool], None]
Process = Callable[[Layer, bool], None]


def two_phases(w13: torch.Tensor, w2: torch.Tensor, gated: bool) -> None:
    """Weave into a list, stack, shuffle into two lists, stack; both tensors get new storage."""
    experts, rows, hidden = w13.shape
    woven = []
    for i in range(experts):
        expert = w13[i].view(torch.uint8)  # older hosts cannot index float8; to a card a byte is a byte
        woven.append(reorder_rows_for_gated_act_gemm(expert) if gated else expert)
    del expert  # a view, which would keep the storage
    # Rebinding the list's name frees the list as soon as its stack is made.
    woven = torch.stack(woven).reshape(experts, rows, hidden)  # type: ignore[assignment]
    w13_shuffled = []
    w2_shuffled = []
    for i in range(experts):
        w13_shuffled.append(shuffle_matrix_a(woven[i], EPILOGUE_TILE_M))
        w2_shuffled.append(shuffle_matrix_a(w2[i].view(torch.uint8), EPILOGUE_TILE_M))
    w13.data = torch.stack(w13_shuffled).view(torch.float8_e4m3fn)
    w2.data = torch.stack(w2_shuffled).view(torch.float8_e4m3fn)


def swapped_and_shuffled(
    rotate: Rotate, w13: torch.Tensor, w2: torch.Tensor, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The halves of w13 swapped into a copy, then both shuffled."""
    if gated:
        w13 = swap_halves(w13)
    rotate(w13, w2, gated)
    return w13, w2


def through(rotate: Rotate) -> Process:
    """A layer as vLLM processes it. w2 is its own result; w13's is copied into the old parameter."""

    def process(layer: Layer, gated: bool) -> None:
        w13, w2 = swapped_and_shuffled(rotate, layer.w13, layer.w2, gated)
        copy_or_rebind(layer, "w13", w13)
        copy_or_rebind(layer, "w2", w2)

    return process


def vllm_rotate(w13: torch.Tensor, w2: torch.Tensor, gated: bool) -> None:
    """What the installed vLLM does."""
    VLLM_ROTATE.load()(w13, w2, gated)


def in_place(layer: Layer, gated: bool) -> None:
    """Swapping, weaving and shuffling are one permutation of rows, done a slice of columns at a time."""
    scratch = row_scratch(layer.w13.data, layer.w2.data)
    for w, index in ((layer.w13.data, w13_rows(layer.w13[0], gated=gated)), (layer.w2.data, w2_rows(layer.w2[0]))):
        permute_rows(w, index.to(w.device), scratch)


def load(case: fragscope.Case, process: Process) -> None:
    """Make all layers, then process them one after the other, as a loader does after reading a checkpoint."""

    def empty(rows: int, columns: int) -> torch.nn.Parameter:
        return parameter(torch.empty(case.experts, rows, columns, dtype=torch.float8_e4m3fn, device=case.device))

    rows = case.intermediate * (2 if case.gated else 1)
    layers = [Layer(empty(rows, case.hidden), empty(case.hidden, case.intermediate)) for _ in range(case.layers)]
    with case.measure():
        for layer in layers:
            process(layer, case.gated)


@fragscope.scenario(
    "moe-fp8-per-tensor",
    presets=PRESETS,
    variant="list-stack",
    source="vLLM 0.33.0",
    replays=fragscope.Replays("vllm", "0.33.0", _FUNCTION, digest="bb6d104a239c0af86e3187eb"),
)
def moe_fp8_per_tensor(case: fragscope.Case) -> None:
    """Two phases of lists of experts, each stacked at its end (still so in vLLM 0.33.0)."""
    load(case, through(two_phases))


@moe_fp8_per_tensor.installed("vllm", VLLM_ROTATE)
def _(case: fragscope.Case) -> None:
    """The function of vLLM, as it is installed."""
    load(case, through(vllm_rotate))


@moe_fp8_per_tensor.variant("in-place", role="proposed")
def _(case: fragscope.Case) -> None:
    """Rewritten in place through 4 MiB of scratch; no swapped copy."""
    load(case, in_place)


_PROCESSES: dict[str, Process] = {
    "list-stack": through(two_phases),
    "vllm": through(vllm_rotate),
    "in-place": in_place,
}
_SMALL = (3, 160, 256)  # experts, intermediate, hidden


def _weights(*, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    experts, intermediate, hidden = _SMALL
    generator = torch.Generator().manual_seed(93)
    w13 = torch.randint(0, 256, (experts, (1 + gated) * intermediate, hidden), dtype=torch.uint8, generator=generator)
    w2 = torch.randint(0, 256, (experts, hidden, intermediate), dtype=torch.uint8, generator=generator)
    return w13.view(torch.float8_e4m3fn), w2.view(torch.float8_e4m3fn)


@moe_fp8_per_tensor.numeric
def outputs(variant: str, device: str) -> Sequence[torch.Tensor]:
    """A layer after a variant processed it, with gate and without, for small random weights."""
    results = []
    for gated in (True, False):
        w13, w2 = _weights(gated=gated)
        layer = Layer(parameter(w13.to(device)), parameter(w2.to(device)))
        _PROCESSES[variant](layer, gated)
        results += [layer.w13.data, layer.w2.data]
    return results


@moe_fp8_per_tensor.reference
def reference(device: str) -> Sequence[torch.Tensor]:
    """Row by row from the layout's definition; with gate, w13's halves are swapped, then woven, then shuffled."""
    results = []
    for gated in (True, False):
        w13, w2 = _weights(gated=gated)
        results += [rearranged(w13, woven=gated, swapped=gated), rearranged(w2, woven=False)]
    return [r.view(torch.float8_e4m3fn).to(device) for r in results]
