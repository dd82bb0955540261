"""Loader functions of vLLM and SGLang, whole and unmodified, on the virtual device.

For a Python in which both can be imported; a GPU is not needed, nor are their compiled extensions:
``fragscope run tests/upstream --device virtual``. The layers are stand-ins with the attributes that the functions read.
What the shipped scenarios run of these packages themselves (their ``vllm`` and ``sglang`` variants) is not repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import vllm.model_executor.layers.fused_moe  # noqa: F401  # first: its modules import each other in a circle
from sglang.srt.layers.moe.moe_runner.flashinfer_trtllm import align_fp4_moe_weights_for_flashinfer_trtllm
from sglang.srt.layers.quantization import modelopt_quant
from sglang.srt.layers.quantization.utils import swizzle_blockscale
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod

import fragscope

sys.path.append(str(Path(__file__).parents[2] / "scenarios"))
from moe_models import preset, whole_preset  # shapes of models, as the shipped scenarios have them

BLOCK = 128


def parameter(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device="cuda"), requires_grad=False)


@fragscope.scenario(
    "vllm-fp8-moe",
    presets={"deepseek-v3-tp8": preset("deepseek-v3", tp=8, layers=4), "glm-5-tp8": preset("glm-5", tp=8, layers=2)},
    variant="vllm",
    source="vllm.model_executor.layers.quantization.fp8:Fp8MoEMethod.process_weights_after_loading",
)
def vllm_fp8_moe(case: fragscope.Case) -> None:
    """A checkpoint's layers, processed for TensorRT-LLM's kernels one after the other."""
    # Made without its initialiser, which asks which kernels this machine has; its end would make one of them.
    method = object.__new__(Fp8MoEMethod)
    method.quant_config = SimpleNamespace(activation_scheme="dynamic")
    method.block_quant, method.weight_scale_name = True, "weight_scale_inv"
    method.fp8_backend = Fp8MoeBackend.FLASHINFER_TRTLLM
    method._init_moe_kernel = lambda layer: None
    e, h, i = case.experts, case.hidden, case.intermediate

    def layer() -> torch.nn.Module:
        made = torch.nn.Module()
        made.w13_weight = parameter(e, 2 * i, h, dtype=torch.float8_e4m3fn)
        made.w2_weight = parameter(e, h, i, dtype=torch.float8_e4m3fn)
        made.w13_weight_scale_inv = parameter(e, 2 * i // BLOCK, h // BLOCK, dtype=torch.float32)
        made.w2_weight_scale_inv = parameter(e, h // BLOCK, i // BLOCK, dtype=torch.float32)
        made.weight_block_size = [BLOCK, BLOCK]
        made.moe_config = SimpleNamespace(is_act_and_mul=True)
        made.activation = SimpleNamespace(is_gated=True)
        made.w13_input_scale = made.w2_input_scale = None
        return made

    layers = [layer() for _ in range(case.layers)]
    with case.measure():
        for made in layers:
            method.process_weights_after_loading(made)


@fragscope.scenario(
    "sglang-nvfp4-moe",
    presets={
        "deepseek-v3-tp8": whole_preset("deepseek-v3", tp=8),
        "qwen3-235b-a22b-tp4": whole_preset("qwen3-235b-a22b", tp=4),
    },
    variant="sglang",
    source="sglang.srt.layers.quantization.modelopt_quant:ModelOptNvFp4FusedMoEMethod.create_weights",
)
def sglang_nvfp4_moe(case: fragscope.Case) -> None:
    """All layers made under ``with torch.device("cuda")``, then each aligned and shuffled."""
    # Made without its initialiser, which refuses machines without a Blackwell card.
    method = object.__new__(modelopt_quant.ModelOptNvFp4FusedMoEMethod)
    method.quant_config = SimpleNamespace(
        group_size=16, is_checkpoint_nvfp4_serialized=True, get_name=lambda: "modelopt_fp4"
    )
    method.enable_flashinfer_trtllm_moe = method.use_flashinfer_trtllm_weight_layout = True
    method._cache_permute_indices = {}

    def layer() -> torch.nn.Module:
        made = torch.nn.Module()
        made.num_experts = made.num_local_experts = case.experts
        made.moe_runner_config = SimpleNamespace(is_gated=True, activation="silu")
        with torch.device("cuda"):
            method.create_weights(
                made, case.experts, case.hidden, case.intermediate, torch.bfloat16, weight_loader=lambda *_: None
            )
            # What the rest of the loader sets before the weights are aligned: a number an expert.
            for name in ("g1_alphas", "g2_alphas", "w2_input_scale_quant"):
                setattr(made, name, parameter(case.experts, dtype=torch.float32))
            made.g1_scale_c = parameter(case.experts, dtype=torch.float32)
        return made

    with case.measure():
        layers = [layer() for _ in range(case.layers)]
        for made in layers:
            align_fp4_moe_weights_for_flashinfer_trtllm(made)
            made.w13_blockscale_swizzled = made.w13_weight_scale
            made.w2_blockscale_swizzled = made.w2_weight_scale


@fragscope.scenario(
    "sglang-swizzle",
    presets={"deepseek-v3-tp8": preset("deepseek-v3", tp=8, layers=1)},
    variant="sglang",
    source="sglang.srt.layers.quantization.utils:swizzle_blockscale",
)
def sglang_swizzle(case: fragscope.Case) -> None:
    """The swizzled copy of one layer's scales, which layers were given when they were made up to 0.5.12.post1."""
    scale = parameter(case.experts, 2 * case.intermediate, case.hidden // 16, dtype=torch.float8_e4m3fn)
    with case.measure():
        kept = swizzle_blockscale(scale)
    assert kept.shape == scale.shape
