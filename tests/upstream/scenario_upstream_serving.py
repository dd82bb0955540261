"""What vLLM takes past its weights: launches of expert kernels, and the workspace of its one-sided all-to-all.

For a Python in which vLLM and flashinfer 0.7.2 can be imported, as ``scenario_upstream_code.py``:
``fragscope run tests/upstream --device virtual``. Their Python runs unmodified; stand-ins begin where it would call a
compiled kernel, the driver, or another rank.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import flashinfer.fused_moe
import torch
import vllm.model_executor.layers.fused_moe  # noqa: F401  # first: its modules import each other in a circle
from flashinfer.comm import mnnvl, trtllm_moe_alltoall
from flashinfer.comm.mnnvl import MnnvlMemory
from flashinfer.fused_moe import QuantFormat
from vllm.distributed.device_communicators.all2all import FlashInferNVLinkOneSidedManager
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
    nvfp4_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts.trtllm_nvfp4_moe import TrtLlmNvFp4ExpertsModular
from vllm.platforms import current_platform

import fragscope
from fragscope.thresholds import Launch, shipped_models

sys.path.append(str(Path(__file__).parents[2] / "scenarios"))
from moe_alltoall import aux_bytes, release_of  # what flashinfer's compiled module answers
from moe_models import launched


@fragscope.scenario(
    "vllm-nvfp4-apply",
    presets={name: launched(name, tokens=400_000) for name in ("nemotron-3-super", "qwen3-next-80b")},
    params={"tile": 128},
    variant="vllm",
    source="vllm.model_executor.layers.fused_moe.experts.trtllm_nvfp4_moe:TrtLlmNvFp4ExpertsModular.apply",
)
def vllm_nvfp4_apply(case: fragscope.Case) -> None:
    """One step of many tokens, cut into launches as vLLM cuts it; weights are those of two experts on this rank."""
    local = 2
    h, i, k, tokens = case.hidden, case.intermediate, case.top_k, case.tokens
    gated = shipped_models()[case.preset].gated
    activation = MoEActivation.SILU if gated else MoEActivation.RELU2_NO_MUL
    up = i * (2 if gated else 1)

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    def an_expert() -> torch.Tensor:
        return torch.ones(local, dtype=torch.float32, device="cuda")

    with mock.patch.object(current_platform, "is_cuda_alike", lambda: True):  # vLLM found no driver when imported
        config = FusedMoEConfig(
            num_experts=case.experts, experts_per_token=k, hidden_dim=h, intermediate_size=i, num_local_experts=local,
            num_logical_experts=case.experts, activation=activation, device="cuda",
            routing_method=RoutingMethodType.Renormalize, in_dtype=torch.bfloat16,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        )  # fmt: skip
    experts = TrtLlmNvFp4ExpertsModular(
        config,
        nvfp4_moe_quant_config(
            an_expert(), an_expert(), an_expert(), an_expert(), empty(local, up, h // 16), empty(local, h, i // 16)
        ),
    )
    w13, w2 = empty(local, up, h // 2), empty(local, h, i // 2)
    output = empty(tokens, h, dtype=torch.bfloat16)
    activations, scales = empty(tokens, h // 2), empty(tokens, h // 16)
    weights, ids = empty(tokens, k, dtype=torch.float32), empty(tokens, k, dtype=torch.int32)
    none = empty(0)
    with (
        mock.patch.object(flashinfer.fused_moe, "trtllm_fp4_block_scale_routed_moe", _launcher(case)),
        case.measure(),
    ):
        experts.apply(
            output, activations, w13, w2, weights, ids, activation, case.experts, None, scales, None, none, none, None,
            apply_router_weight_on_input=False,
        )  # fmt: skip


def _launcher(case: fragscope.Case) -> Any:
    """In place of flashinfer's launch: the tensors of its launcher, ``FP4BlockScaleLauncher`` of 0.7.2.

    Against those of 0.6.11.post2 (``fragscope.thresholds.Launch``), routing is handed over unpacked, so that nothing is
    packed for it; expert indexes have a tensor of their own; and the map of rows is one number longer. The matrix
    products' own workspaces are not known, here as there.
    """
    launch = Launch(case.experts, case.top_k, case.hidden, case.intermediate, case.tile)

    def routed_moe(
        *, topk_ids: tuple[torch.Tensor, torch.Tensor], hidden_states: torch.Tensor, output: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        tokens = hidden_states.shape[0]
        held = {}
        for buffer in launch.buffers(tokens):
            if buffer.name in ("packed_topk", "expert_weights"):
                continue
            shape = buffer.shape
            if buffer.name == "permuted_idx_to_token_idx":
                shape = (shape[0] + 1,)
            if buffer.name == "expert_count_histogram":
                held["expert_indexes"] = torch.empty(tokens, case.top_k, dtype=torch.int32, device="cuda")
            held[buffer.name] = torch.empty(shape, dtype=getattr(torch, buffer.dtype), device="cuda")
        reads = [hidden_states, *topk_ids]
        case.kernel("trtllm_fp4_block_scale_moe", reads=reads, writes=[output, *held.values()])
        return output

    return routed_moe


_HEADS = {"bf16": QuantFormat.BF16, "mxfp8": QuantFormat.MXFP8, "nvfp4": QuantFormat.NVFP4}


def _workspace_preset(model: str, head: str) -> dict[str, int | str]:
    shape = shipped_models()[model]
    return {"hidden": shape.hidden, "top_k": shape.top_k, "experts": shape.experts, "ranks": 8, "tokens": 8192,
            "layers": 2, "head": head}  # fmt: skip


@fragscope.scenario(
    "vllm-one-sided",
    presets={
        **{f"deepseek-v3-ep8-{head}": _workspace_preset("deepseek-v3", head) for head in _HEADS},
        "nemotron-3-super-ep8-bf16": _workspace_preset("nemotron-3-super", "bf16"),
    },
    variant="vllm",
    source="vllm.distributed.device_communicators.all2all:FlashInferNVLinkOneSidedManager.initialize",
)
def vllm_one_sided(case: fragscope.Case) -> None:
    """Layers that send NVFP4, then a head that sends something else; each tells the manager what it needs."""
    # Made without its initialiser, which asks vLLM's distributed groups.
    manager = object.__new__(FlashInferNVLinkOneSidedManager)
    manager.initialized, manager.communication, manager.top_k, manager.num_experts = False, None, 0, 0
    manager.rank, manager.world_size = 0, case.ranks
    manager.cpu_group = SimpleNamespace(rank=lambda: 0, size=lambda: case.ranks)
    with _stand_ins(case), case.measure():
        for sent in [QuantFormat.NVFP4] * case.layers + [_HEADS[case.head]]:
            manager.initialize(case.tokens, case.top_k, case.experts, case.hidden, sent)


@contextlib.contextmanager
def _stand_ins(case: fragscope.Case) -> Iterator[None]:
    """The other ranks, the driver, and flashinfer's compiled module."""

    def gather(into: list[Any], value: Any, group: Any = None) -> None:
        into[:] = [value] * len(into)  # the others answer as this one does

    def opened(mapping: Any, size: int) -> tuple[int, int]:
        place = len(MnnvlMemory.allocated_map) + 1
        comm = MnnvlMemory.get_comm(mapping)
        memory = case.device_memory(size, how="cuMemCreate")
        MnnvlMemory.allocated_map[place] = SimpleNamespace(comm=comm, mapped=True, memory=memory)
        return place, size

    release = release_of(flashinfer.__version__)
    compiled = SimpleNamespace(
        moe_a2a_get_aux_data_size=lambda ranks, tokens, experts: aux_bytes(release, ranks, tokens, experts),
        moe_a2a_get_metainfo_index_pairs=lambda: ((), ()),
        moe_a2a_initialize=lambda *_: torch.empty(0, dtype=torch.int64, device="cpu"),
    )
    with contextlib.ExitStack() as stack:
        for target, name, stand_in in (
            (torch.distributed, "all_gather_object", gather),
            (torch.distributed, "barrier", lambda group=None: None),
            (mnnvl.pynvml, "nvmlDeviceGetCount", lambda: 1),
            (MnnvlMemory, "supports_mnnvl", staticmethod(lambda: True)),
            (MnnvlMemory, "open_mnnvl_memory", staticmethod(opened)),
            (MnnvlMemory, "as_torch_strided_tensor", lambda memory, dtype: None),
            (trtllm_moe_alltoall, "get_moe_alltoall_module", lambda backend="trtllm": compiled),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        yield
