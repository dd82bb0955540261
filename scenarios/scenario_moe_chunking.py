"""NVFP4 MoE launches of many tokens: how they are cut, and the memory of one launch.

Source: vLLM #43599. Up to 0.21.0 all tokens of a step went into one launch of FlashInfer's TensorRT-LLM kernels, whose
grid has y up to 65,535; from 0.22.0 on a launch has at most 300,000 tokens, or what the grid has room for.
``memory-aware`` is a proposal. ``chunked-unsliced`` is the fix as it was retold, with routing that is not sliced: every
chunk after the first then goes by the routing of the first tokens.

A launch allocates what ``fragscope.thresholds.Launch`` says, in the order of FlashInfer 0.6.11.post2, for all variants.
The matrix products' own workspaces are not among it, so real launches need somewhat more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from moe_models import launched

import fragscope
from fragscope.allocator import ReplaySettings, rules_for
from fragscope.thresholds import FREED, MAX_GRID_Y, Launch, recommended_chunk, upstream_chunk

PRESETS = {
    "nemotron-3-super": launched("nemotron-3-super", tokens=400_000),  # 8 ranks with 50,000 each, as reported
    "deepseek-v3": launched("deepseek-v3", tokens=640_000),
    "qwen3-next-80b": launched("qwen3-next-80b", tokens=400_000),
}
SPARE = 0.9  # share of the free memory that memory-aware counts on


def chunks(tokens: int, chunk: int) -> Iterator[slice]:
    """Rows of each launch."""
    for start in range(0, tokens, chunk):
        yield slice(start, min(start + chunk, tokens))


def run(case: fragscope.Case, chunk: int, *, sliced: bool = True) -> None:
    """Hold the inputs of all tokens, then launch chunk by chunk."""
    launch = _launch(case)
    inputs = {b.name: _empty(case, b.shape, b.dtype) for b in launch.inputs(case.tokens)}
    with case.measure():
        for rows in chunks(case.tokens, chunk):
            tokens = rows.stop - rows.start
            start(case, launch, tokens, tokens if sliced else case.tokens)
    del inputs


def start(case: fragscope.Case, launch: Launch, tokens: int, routed: int) -> None:
    """One launch: its tensors, then the kernels. A grid that is too large is refused when all of them stand."""
    held = {b.name: _empty(case, b.shape, b.dtype) for b in launch.buffers(tokens, routed)}
    for name in FREED:
        del held[name]
    ctas = launch.ctas(tokens)
    if ctas > MAX_GRID_Y:
        case.end(
            "overflow",
            f"a launch for {tokens:,} tokens has {ctas:,} CTAs in y, {ctas - MAX_GRID_Y:,} more than a grid can have",
        )


def _launch(case: fragscope.Case) -> Launch:
    return Launch(case.experts, case.top_k, case.hidden, case.intermediate, case.tile)


def _outgrows_the_grid(values: Mapping[str, Any]) -> bool:
    sizes = (values[name] for name in ("experts", "top_k", "hidden", "intermediate", "tile"))
    return Launch(*sizes).ctas(values["tokens"]) > MAX_GRID_Y


def _empty(case: fragscope.Case, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device=case.device)


def _memory_aware(launch: Launch, tokens: int) -> int:
    """A chunk that is large enough, and keeps to the grid, upstream's cap and what the inputs will leave free."""
    free, total = torch.cuda.mem_get_info()
    inputs = sum(b.nbytes for b in launch.inputs(tokens))
    settings = ReplaySettings(rules_for(torch.__version__), "", total, max(0, int(free * SPARE) - inputs))
    return max(1, recommended_chunk(launch, settings))


_APPLY = "vllm.model_executor.layers.fused_moe.experts.trtllm_nvfp4_moe:TrtLlmNvFp4ExpertsModular.apply"


@fragscope.scenario(
    "moe-chunking",
    presets=PRESETS,
    variant="unchunked",
    params={"tile": 128},
    source="vLLM #43599, before",
    expect=(
        fragscope.Expect("overflow", preset="nemotron-3-super", when=_outgrows_the_grid),
        fragscope.Expect("oom", preset="deepseek-v3", card="*-80gb"),
    ),
    replays=fragscope.Replays("vllm", "0.21.0", _APPLY, "cee45384d92288010b7a5fdb"),
)
def moe_chunking(case: fragscope.Case) -> None:
    """All tokens in one launch."""
    run(case, case.tokens)


@moe_chunking.variant(
    "chunked", role="fixed", replays=fragscope.Replays("vllm", "0.22.0", _APPLY, "a14abfe52a7849e15350cd94")
)
def _(case: fragscope.Case) -> None:
    """At most 300,000 tokens in a launch (vLLM 0.22.0)."""
    run(case, upstream_chunk(_launch(case)))


@moe_chunking.variant("chunked-unsliced", role="fixed", expect="wrong")
def _(case: fragscope.Case) -> None:
    """The same with the routing of all tokens in every launch: wrong from the second on."""
    run(case, upstream_chunk(_launch(case)), sliced=False)


@moe_chunking.variant("memory-aware", role="proposed")
def _(case: fragscope.Case) -> None:
    """Launches just large enough to hide their padding, within the grid, upstream's cap and free memory."""
    run(case, _memory_aware(_launch(case), case.tokens))


_SMALL = Launch(experts=6, top_k=2, hidden=32, intermediate=48, tile=8)
_TOKENS = 100
_CHUNKS = {"unchunked": _TOKENS, "chunked": 40, "chunked-unsliced": 40, "memory-aware": 7}


def _layer(device: str) -> tuple[torch.Tensor, ...]:
    """Activations ``[tokens, hidden]``, routing ``[tokens, top_k]`` twice, w13 and w2 of every expert.

    The values are those of bfloat16, the arithmetic is that of float32. Which experts a token goes to changes along the
    tokens, so that routing of other tokens is wrong.
    """
    generator = torch.Generator().manual_seed(43599)
    s = _SMALL

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().float()

    hidden = values(_TOKENS, s.hidden)
    w13, w2 = values(s.experts, 2 * s.intermediate, s.hidden) / 8, values(s.experts, s.hidden, s.intermediate) / 8
    weights, ids = values(_TOKENS, s.experts).softmax(-1).topk(s.top_k)
    return tuple(t.to(device) for t in (hidden, ids, weights, w13, w2))


def experts(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """Routed experts, expert by expert: gate and up projection, SwiGLU, down projection, weighted sum."""
    out = torch.zeros_like(hidden)
    for expert in range(w13.shape[0]):
        token, slot = (ids[: len(hidden)] == expert).nonzero(as_tuple=True)
        gate, up = (hidden[token] @ w13[expert].T).chunk(2, dim=-1)
        down = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
        out.index_add_(0, token, down * weights[token, slot, None])
    return out


@moe_chunking.numeric(tolerance=(1e-4, 1e-5))
def outputs(variant: str, device: str) -> Sequence[torch.Tensor]:
    """A small layer's results, and the experts that each token went to."""
    hidden, ids, weights, w13, w2 = _layer(device)
    out, seen = torch.empty_like(hidden), torch.empty_like(ids)
    for rows in chunks(_TOKENS, _CHUNKS[variant]):
        routed = slice(None) if variant == "chunked-unsliced" else rows
        out[rows] = experts(hidden[rows], ids[routed], weights[routed], w13, w2)
        seen[rows] = ids[routed][: rows.stop - rows.start]
    return out, seen


@moe_chunking.reference
def reference(device: str) -> Sequence[torch.Tensor]:
    """Token by token, in double precision."""
    hidden, ids, weights, w13, w2 = _layer("cpu")
    out = torch.zeros_like(hidden)
    for token in range(_TOKENS):
        total = torch.zeros(_SMALL.hidden, dtype=torch.float64)
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (w13[expert].double() @ hidden[token].double()).chunk(2)
            total += weight * (w2[expert].double() @ (gate * torch.sigmoid(gate) * up))
        out[token] = total.float()
    return out.to(device), ids.to(device)
