"""The workspace of FlashInfer's one-sided all-to-all (``MoeAlltoAll``): its size, and what its kernels refuse.

A rank's share of the workspace is auxiliary data, the rows that dispatch receives from every rank, and those that
combine does. Sizes follow ``moe_a2a_get_workspace_size_per_rank`` (flashinfer/comm/trtllm_moe_alltoall.py), which asks
a compiled CUDA module for the auxiliary part; that is ``calculateOffsets`` of csrc/trtllm_moe_alltoall.cu. What differs
between releases is in ``RELEASES``, read from the wheels 0.6.6 to 0.7.2.post1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

ALIGNMENT = 128  # kCachelineAlignment
INT32 = 4
MAX_RANKS = 64  # kMaxRanks

Format = Literal["nvfp4", "mxfp8", "bf16"]


@dataclass(frozen=True, slots=True)
class Release:
    """What a release of FlashInfer fixes.

    Attributes:
        since: the first release it holds for.
        max_top_k: ``kMaxTopK``; two tables of so many int32 a token are part of the auxiliary data.
        max_payloads: ``kMaxPayloads`` of one dispatch.
        top_ks: numbers of experts a token for which kernels are compiled (``SWITCH_TOP_K``).
        experts_divide: the number of experts must be a multiple of the ranks.
        has_eplb: space for the load balancer's statistics can be reserved.
    """

    since: str
    max_top_k: int
    max_payloads: int
    top_ks: tuple[int, ...]
    experts_divide: bool
    has_eplb: bool


RELEASES = (
    Release("0.6.6", 8, 8, (1, 2, 4, 8), True, False),
    Release("0.6.8", 22, 4, (1, 2, 4, 6, 8, 10, 16, 22), True, False),
    Release("0.6.14", 22, 6, (1, 2, 4, 6, 8, 10, 16, 22), True, False),
    Release("0.6.16", 22, 6, (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 22), False, True),
)


class RefusedError(Exception):
    """FlashInfer or the engine refuses; the message names the check."""


class TooSmallError(Exception):
    """The workspace lacks bytes for a layer's dispatch and combine.

    Attributes:
        missing: how many.
    """

    def __init__(self, missing: int, message: str) -> None:
        super().__init__(message)
        self.missing = missing


def release_of(version: str) -> Release:
    """The row that a release of FlashInfer belongs to.

    Raises:
        RefusedError: the one-sided all-to-all was not read in releases before 0.6.6.
    """
    wanted = _number(version)
    known = [r for r in RELEASES if _number(r.since) <= wanted]
    if not known:
        raise RefusedError(f"flashinfer {version}: releases before {RELEASES[0].since} are not known here")
    return known[-1]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """What one layer sends through the all-to-all.

    Attributes:
        format: of the activations it dispatches.
        hidden: their width.
        top_k, experts: experts a token goes to, and experts in all.
        tokens: most tokens that a rank dispatches at once.
    """

    format: Format
    hidden: int
    top_k: int
    experts: int
    tokens: int

    @property
    def payloads(self) -> tuple[int, ...]:
        """Bytes a token of each payload: activations, scales if there are any, expert ids, router weights.

        Source: ``maybe_make_prepare_finalize``, vllm/model_executor/layers/fused_moe/all2all_utils.py (0.23.0).
        """
        activations, scales = {
            "nvfp4": (self.hidden // 2, self.hidden // 16),
            "mxfp8": (self.hidden, self.hidden // 32),
            "bf16": (2 * self.hidden, 0),
        }[self.format]
        routing = (INT32 * self.top_k, INT32 * self.top_k)
        return (activations, scales, *routing) if scales else (activations, *routing)

    @property
    def dispatch_bytes(self) -> int:
        """Bytes a token on its way to the experts."""
        return sum(self.payloads)

    @property
    def combine_bytes(self) -> int:
        """Bytes a token on its way back: bf16, whatever was dispatched."""
        return 2 * self.hidden

    def sent_as(self, format_: Format) -> MoeLayer:
        """The same layer with activations in another format."""
        return replace(self, format=format_)


def aligned(size: int) -> int:
    """Rounded up to a cache line."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def aux_bytes(release: Release, ranks: int, tokens: int, eplb_experts: int = 0) -> int:
    """Bytes before the payloads: flags and counters of every rank, then where each token's copies went.

    Raises:
        RefusedError: the release has no space for the load balancer's statistics.
    """
    if eplb_experts and not release.has_eplb:
        raise RefusedError(f"eplb_stats_num_experts: not in flashinfer {release.since}")
    offset = aligned((2 + 2 * ranks) * INT32)
    for table in (ranks, ranks, tokens * release.max_top_k, tokens * release.max_top_k):
        offset = aligned(offset + table * INT32)
    return aligned(offset + ranks * eplb_experts * INT32)


def workspace_bytes(
    release: Release, ranks: int, tokens: int, dispatch: int, combine: int, eplb_experts: int = 0
) -> int:
    """Bytes of the workspace on each rank.

    Args:
        release: of FlashInfer.
        ranks: of the expert-parallel group.
        tokens: most that a rank dispatches at once.
        dispatch: bytes a token on its way to the experts.
        combine: bytes a token on its way back.
        eplb_experts: experts whose load statistics are gathered.
    """
    rows = ranks * tokens
    return aux_bytes(release, ranks, tokens, eplb_experts) + aligned(rows * dispatch) + aligned(rows * combine)


def needed_by(release: Release, ranks: int, layer: MoeLayer) -> int:
    """Bytes of a workspace made for one layer."""
    return workspace_bytes(release, ranks, layer.tokens, layer.dispatch_bytes, layer.combine_bytes)


def check_use(release: Release, ranks: int, layer: MoeLayer, size: int, tokens: int) -> None:
    """What dispatch and combine of a full batch check, in their order (``moeA2ADispatchOp``, ``moeA2ACombineOp``).

    Args:
        release: of FlashInfer.
        ranks: of the expert-parallel group.
        layer: that runs.
        size: bytes of the workspace on this rank.
        tokens: that it was made for, which decides where payloads begin.

    Raises:
        RefusedError: the layer's numbers are none that the release takes.
        TooSmallError: the workspace lacks bytes.
    """
    if layer.tokens > tokens:
        raise RefusedError(f"runtime_max_tokens_per_rank {layer.tokens} exceeds the {tokens} of the workspace")
    if len(layer.payloads) > release.max_payloads:
        raise RefusedError(f"too many payloads: {len(layer.payloads)} > {release.max_payloads}")
    if not 0 < ranks <= MAX_RANKS:
        raise RefusedError(f"ep_size {ranks} is not within 1 to {MAX_RANKS}")
    if layer.experts < ranks or (release.experts_divide and layer.experts % ranks):
        multiple = " and a multiple of it" if release.experts_divide else ""
        raise RefusedError(f"num_experts {layer.experts} must be at least ep_size {ranks}{multiple}")
    if not 0 < layer.top_k <= release.max_top_k:
        raise RefusedError(f"top_k {layer.top_k} is not within 1 to {release.max_top_k}")
    rows, begin = ranks * layer.tokens, aux_bytes(release, ranks, tokens)
    dispatched = begin + rows * layer.dispatch_bytes
    combined = aligned(dispatched) + rows * layer.combine_bytes
    if size < combined:
        check = "dispatch: workspace size per rank" if size < dispatched else "combine: payload region"
        missing = combined - size
        raise TooSmallError(missing, f"{check} insufficient, {layer.format} needs {combined} bytes of {size}")
    if layer.top_k not in release.top_ks:
        raise RefusedError(f"unsupported top_k {layer.top_k}: kernels are compiled for {release.top_ks}")
