"""What one launch of FlashInfer's NVFP4 MoE allocates, in order.

Source: FlashInfer 0.6.11.post2, which vLLM 0.22.0 requires: ``csrc/trtllm_fused_moe_kernel_launcher.cu``
(``FP4BlockScaleLauncher``: ``prepare_routing``, ``prepare_moe``), ``flashinfer/fused_moe/core.py``
(``trtllm_fp4_block_scale_moe_op``), ``csrc/nv_internal/tensorrt_llm/kernels/quantization.h``
(``computeSwizzledLayoutSFSize``); and vLLM 0.22.0, ``trtllm_nvfp4_moe.py`` and ``trtllm_moe_pack_topk_ids_weights``.
All of it comes from PyTorch's caching allocator, on the current stream.

Left out: the workspaces of the two matrix products, whose sizes only the compiled kernels know and which depend on the
tactic. So what a launch needs is a lower bound, and how many tokens fit is an upper one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fragscope.thresholds.launch_grid import ctas, most_tokens
from fragscope.thresholds.models import MoeModel

_BYTES = {"int32": 4, "float32": 4, "bfloat16": 2, "uint8": 1}
_FLOOR = 128 * 1024  # bytes that gemm1_output and gemm2_output have at least: maybeGetMinTokenCount
_HISTOGRAM = 512  # elements that it has at least


@dataclass(frozen=True, slots=True)
class Buffer:
    """One tensor.

    Attributes:
        name: what FlashInfer or vLLM calls it.
        shape: elements in each dimension.
        dtype: name of the torch dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes asked of the allocator."""
        return prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Launch:
    """The NVFP4 MoE kernels of one layer on one rank, at one tile size.

    Attributes:
        experts: experts of the layer on all ranks; expert parallelism does not divide what a launch allocates.
        top_k: experts a token goes to.
        hidden: hidden size the experts see.
        intermediate: width of one expert on this rank.
        tile: rows of a tile.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    tile: int

    @classmethod
    def of(cls, model: MoeModel, tile: int) -> Launch:
        """The launch of a model's layer."""
        return cls(model.experts, model.top_k, model.hidden, model.intermediate, tile)

    def ctas(self, tokens: int) -> int:
        """CTAs of the grid's y dimension."""
        return ctas(tokens, self.top_k, self.experts, self.tile)

    def most_tokens(self) -> int:
        """The largest number of tokens that the grid has room for."""
        return most_tokens(self.top_k, self.experts, self.tile)

    def inputs(self, tokens: int) -> tuple[Buffer, ...]:
        """What the caller of the launches holds: activations with their scales, routing, and room for the results."""
        return (
            Buffer("output", (tokens, self.hidden), "bfloat16"),
            Buffer("hidden_states", (tokens, self.hidden // 2), "uint8"),
            Buffer("hidden_states_scale", (tokens, self.hidden // 16), "uint8"),
            Buffer("topk_weights", (tokens, self.top_k), "float32"),
            Buffer("topk_ids", (tokens, self.top_k), "int32"),
        )

    def buffers(self, tokens: int, routed: int | None = None) -> tuple[Buffer, ...]:
        """What a launch for so many tokens allocates, in order; all of it lives until the launch is made.

        Args:
            tokens: rows of the activations.
            routed: rows of the routing that is handed over; as many as tokens where None.
        """
        tiles = self.ctas(tokens)
        rows = tiles * self.tile
        rows1 = max(rows, -(-_FLOOR * 8 // (self.intermediate * 4)))
        rows2 = max(rows, -(-_FLOOR * 8 // (self.hidden * 16)))
        scales = _padded(rows1, 128) * _padded(self.intermediate // 16, 4)
        return (
            Buffer("packed_topk", ((tokens if routed is None else routed) * self.top_k,), "int32"),
            Buffer("expert_weights", (tokens, self.top_k), "bfloat16"),
            Buffer("num_tokens_per_expert", (self.experts,), "int32"),
            Buffer("total_num_padded_tokens", (1,), "int32"),
            Buffer("expanded_idx_to_permuted_idx", (tokens * self.top_k,), "int32"),
            Buffer("permuted_idx_to_token_idx", (rows,), "int32"),
            Buffer("expert_count_histogram", (max(2 * self.experts, _HISTOGRAM),), "int32"),
            Buffer("cta_idx_xy_to_batch_idx", (tiles,), "int32"),
            Buffer("cta_idx_xy_to_mn_limit", (tiles,), "int32"),
            Buffer("num_non_exiting_ctas", (1,), "int32"),
            Buffer("gemm1_output_scale", (scales,), "uint8"),
            Buffer("gemm1_output", (rows1, self.intermediate // 2), "uint8"),
            Buffer("gemm2_output", (rows2, self.hidden), "bfloat16"),
        )


FREED = (
    "gemm1_output_scale", "gemm2_output", "gemm1_output", "num_non_exiting_ctas", "cta_idx_xy_to_mn_limit",
    "cta_idx_xy_to_batch_idx", "expert_count_histogram", "permuted_idx_to_token_idx", "expanded_idx_to_permuted_idx",
    "total_num_padded_tokens", "num_tokens_per_expert", "expert_weights", "packed_topk",
)  # fmt: skip
"""The order in which a launch's tensors end: the launcher's members in reverse, the derived class's first, then what
Python holds, innermost function first."""


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
