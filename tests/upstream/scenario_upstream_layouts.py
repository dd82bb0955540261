"""More of what vLLM and SGLang do to expert weights for TensorRT-LLM's kernels, unmodified.

For a Python in which both can be imported, as ``scenario_upstream_code.py``. What both do to the same layer stands
side by side. Layers are stand-ins with the attributes that the functions read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import vllm.model_executor.layers.fused_moe  # noqa: F401  # first: its modules import each other in a circle
from flashinfer import nvfp4_block_scale_interleave
from flashinfer.fused_moe.core import get_w2_permute_indices_with_cache
from sglang.srt.layers.moe.moe_runner import flashinfer_trtllm
from sglang.srt.layers.quantization import mxfp4
from vllm.model_executor.layers.fused_moe.oracle import mxfp4 as vllm_mxfp4

import fragscope

sys.path.append(str(Path(__file__).parents[2] / "scenarios"))
from moe_models import preset  # shapes of models, as the shipped scenarios have them

# SGLang's module imports these two only where it finds a card.
mxfp4.nvfp4_block_scale_interleave = nvfp4_block_scale_interleave
mxfp4.get_w2_permute_indices_with_cache = get_w2_permute_indices_with_cache

MX = 32  # values that share a scale


def parameter(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device="cuda"), requires_grad=False)


def mxfp4_layers(case: fragscope.Case) -> list[torch.nn.Module]:
    """Layers of FP4 weights with a scale for 32 values and biases, padded as vLLM pads them for these kernels."""
    backend = vllm_mxfp4.Mxfp4MoeBackend.FLASHINFER_TRTLLM_MXFP4_MXFP8
    round_up = vllm_mxfp4.mxfp4_round_up_hidden_size_and_intermediate_size
    h, i = round_up(backend, case.hidden, case.intermediate)
    e = case.experts

    def layer() -> torch.nn.Module:
        made = torch.nn.Module()
        made.num_local_experts, made.hidden, made.intermediate = e, h, i
        made.moe_runner_config = SimpleNamespace(gate_up_interleaved=True)
        made.w13_weight, made.w2_weight = parameter(e, 2 * i, h // 2), parameter(e, h, i // 2)
        made.w13_weight_scale, made.w2_weight_scale = parameter(e, 2 * i, h // MX), parameter(e, h, i // MX)
        made.w13_weight_bias = parameter(e, 2 * i, dtype=torch.bfloat16)
        made.w2_weight_bias = parameter(e, h, dtype=torch.bfloat16)
        return made

    return [layer() for _ in range(case.layers)]


NAMES = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale", "w13_weight_bias", "w2_weight_bias")


def vllm_converted(case: fragscope.Case, convert: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """Each layer's tensors replaced by what a function of vLLM's makes of them."""
    backend = vllm_mxfp4.Mxfp4MoeBackend.FLASHINFER_TRTLLM_MXFP4_MXFP8
    layers = mxfp4_layers(case)
    with case.measure():
        cache: dict[torch.Size, torch.Tensor] = {}
        for made in layers:
            tensors = convert(backend, made, *(getattr(made, n) for n in NAMES), _cache_permute_indices=cache)
            for name, tensor in zip(NAMES, tensors, strict=True):
                setattr(made, name, torch.nn.Parameter(tensor, requires_grad=False))
            del tensors, tensor


@fragscope.scenario(
    "upstream-mxfp4",
    presets={
        "gpt-oss-120b-tp1": preset("gpt-oss-120b", tp=1, layers=2),
        "gpt-oss-20b-tp1": preset("gpt-oss-20b", tp=1, layers=2),
    },
    variant="vllm-gpt-oss",
    source="vllm.model_executor.layers.fused_moe.oracle.mxfp4:convert_gpt_oss_weight_to_mxfp4_moe_kernel_format",
)
def upstream_mxfp4(case: fragscope.Case) -> None:
    """vLLM's own function for gpt-oss: lists of every expert, then stacked."""
    vllm_converted(case, vllm_mxfp4.convert_gpt_oss_weight_to_mxfp4_moe_kernel_format)


@upstream_mxfp4.variant("vllm", role="newest")
def _(case: fragscope.Case) -> None:
    """vLLM's function for other models with the same kernels: all experts at once."""
    vllm_converted(case, vllm_mxfp4.convert_weight_to_mxfp4_moe_kernel_format)


@upstream_mxfp4.variant("sglang", role="newest")
def _(case: fragscope.Case) -> None:
    """``Mxfp4MoEMethod.process_weights_after_loading`` of SGLang: lists of every expert, then stacked."""
    layers = mxfp4_layers(case)
    # Made without its initialiser, which asks SGLang's settings and which card this is.
    method = object.__new__(mxfp4.Mxfp4MoEMethod)
    method.use_marlin = method.use_mega_moe = method.use_deep_gemm = False
    method.use_flashinfer, method._fi_kernel = True, "trtllm_sm100"
    method.hidden_size, method.intermediate_size_per_partition = layers[0].hidden, layers[0].intermediate
    with case.measure():
        for made in layers:
            method.process_weights_after_loading(made)


@fragscope.scenario(
    "upstream-fp8-per-tensor",
    presets={"llama-4-scout-tp1": preset("llama-4-scout", tp=1, layers=1)},
    variant="sglang",
    source="sglang.srt.layers.moe.moe_runner.flashinfer_trtllm:align_fp8_moe_weights_for_flashinfer_trtllm",
)
def upstream_fp8_per_tensor(case: fragscope.Case) -> None:
    """Lists of every expert, then stacked, twice."""
    e, h, i = case.experts, case.hidden, case.intermediate
    made = torch.nn.Module()
    made.moe_runner_config = SimpleNamespace(is_gated=True)
    made.w13_weight = parameter(e, 2 * i, h, dtype=torch.float8_e4m3fn)
    made.w2_weight = parameter(e, h, i, dtype=torch.float8_e4m3fn)
    made.w13_weight_scale, made.w2_weight_scale = (parameter(e, dtype=torch.float32) for _ in range(2))
    made.w13_input_scale, made.w2_input_scale = (parameter(1, dtype=torch.float32) for _ in range(2))
    with case.measure():
        flashinfer_trtllm.align_fp8_moe_weights_for_flashinfer_trtllm(made)


@fragscope.scenario(
    "upstream-mxfp8",
    presets={"deepseek-v3-tp8": preset("deepseek-v3", tp=8, layers=2)},
    variant="sglang",
    source="sglang.srt.layers.moe.moe_runner.flashinfer_trtllm:align_mxfp8_moe_weights_for_flashinfer_trtllm",
)
def upstream_mxfp8(case: fragscope.Case) -> None:
    """Outputs made first, each expert copied into them."""
    e, h, i = case.experts, case.hidden, case.intermediate
    layers = []
    for _ in range(case.layers):
        made = torch.nn.Module()
        made.moe_runner_config = SimpleNamespace(is_gated=True)
        made.w13_weight = parameter(e, 2 * i, h, dtype=torch.float8_e4m3fn)
        made.w2_weight = parameter(e, h, i, dtype=torch.float8_e4m3fn)
        made.w13_weight_scale_inv, made.w2_weight_scale_inv = parameter(e, 2 * i, h // MX), parameter(e, h, i // MX)
        layers.append(made)
    del made
    with case.measure():
        for made in layers:
            flashinfer_trtllm.align_mxfp8_moe_weights_for_flashinfer_trtllm(made)
