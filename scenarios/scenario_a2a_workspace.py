"""One all-to-all workspace for layers that need different ones: NVFP4 layers, and a head that sends something else.

Source: vLLM #42976, ``FlashInferNVLinkOneSidedManager.initialize``. Before it the first layer's workspace stayed
(0.20.0), so that a bf16 head overran it at its first combine. Since then it grows (0.22.0, and 0.33.0 by parts), but
FlashInfer's ``MoeAlltoAll`` keeps every workspace it ever made in a table of the class: what was grown out of stays
mapped. SGLang makes the largest one at once. ``grow-freed`` is a proposal.

The workspace is memory of the driver (``MnnvlMemory``: ``cuMemCreate``), which no counter of PyTorch shows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from moe_alltoall import MoeLayer, TooSmallError, check_use, needed_by, release_of, workspace_bytes

import fragscope
from fragscope.thresholds import shipped_models

TOKENS = 8192  # scheduler_config.max_num_batched_tokens


def preset(model: str, head: str, ranks: int = 8) -> dict[str, int | str]:
    """Values for a model whose layers send NVFP4 and whose head sends ``head``."""
    shape = shipped_models()[model]
    return {
        "hidden": shape.hidden, "top_k": shape.top_k, "experts": shape.experts, "ranks": ranks, "tokens": TOKENS,
        "layers": 2, "head": head,
    }  # fmt: skip


PRESETS: dict[str, dict[str, int | str]] = {
    # The sizes of vLLM's test_one_sided_manager_workspace_grow.
    "pr-test-bf16": {
        "hidden": 4096, "top_k": 2, "experts": 8, "ranks": 2, "tokens": 1024, "layers": 1, "head": "bf16",
    },
    "deepseek-v3-ep8-bf16": preset("deepseek-v3", "bf16"),
    "deepseek-v3-ep8-mxfp8": preset("deepseek-v3", "mxfp8"),
    "deepseek-v3-ep8-nvfp4": preset("deepseek-v3", "nvfp4"),
    "qwen3-235b-ep8-bf16": preset("qwen3-235b-a22b", "bf16"),
    "nemotron-3-super-ep8-bf16": preset("nemotron-3-super", "bf16"),
    "gpt-oss-120b-ep8-mxfp8": preset("gpt-oss-120b", "mxfp8"),
}  # fmt: skip
HOMOGENEOUS = "*-nvfp4"


class Workspaces:
    """FlashInfer's side: workspaces by size, each made once and kept, as the class-level table does."""

    def __init__(self, case: fragscope.Case) -> None:
        self._case = case
        self._made: dict[tuple[int, int], fragscope.DeviceMemory] = {}

    def get(self, size: int, tokens: int) -> None:
        """The workspace of this geometry, from the table if it is there."""
        if (size, tokens) not in self._made:
            self._made[size, tokens] = self._case.device_memory(size, how="cuMemCreate")

    def forget(self, size: int, tokens: int) -> None:
        """Take a workspace out of the table, which unmaps it; nothing upstream does."""
        self._made.pop((size, tokens)).free()


class Manager(Protocol):
    """The engine's side: one for all layers of a process."""

    size: int
    tokens: int

    def initialize(self, layer: MoeLayer) -> None:
        """A layer is being built."""


class OneShot:
    """Whoever comes first decides."""

    def __init__(self, case: fragscope.Case) -> None:
        self.release, self.ranks, self.workspaces = release_of(case.flashinfer), case.ranks, Workspaces(case)
        self.size = self.tokens = 0
        self.shape = (0, 0)

    def initialize(self, layer: MoeLayer) -> None:
        """Size it for NVFP4, whatever the layer sends."""
        if not self.size:
            self.make(needed_by(self.release, self.ranks, layer.sent_as("nvfp4")), layer)

    def make(self, size: int, layer: MoeLayer) -> None:
        """The workspace in force from now on."""
        self.size, self.tokens = size, max(self.tokens, layer.tokens)
        self.shape = (layer.top_k, layer.experts)
        self.workspaces.get(self.size, self.tokens)


class WorstCase(OneShot):
    """With speculation bf16 is taken for granted, since the draft's layers are not quantised."""

    def initialize(self, layer: MoeLayer) -> None:
        """Size it for bf16, whatever the layer sends."""
        if not self.size:
            self.make(needed_by(self.release, self.ranks, layer.sent_as("bf16")), layer)


class Grown(OneShot):
    """Grows to the larger of what it has and what a layer needs; the old one stays in FlashInfer's table."""

    def initialize(self, layer: MoeLayer) -> None:
        """Grow if the layer needs more."""
        needed = self.needed(layer)
        if self.size:
            # The kernels insist on one top_k, and experts are found by their number among all.
            assert layer.top_k == self.shape[0], f"heterogeneous top_k: {layer.top_k}, was built with {self.shape[0]}"
            assert layer.experts == self.shape[1], (
                f"heterogeneous num_experts: {layer.experts}, was built with {self.shape[1]}"
            )
            if needed <= self.size and layer.tokens <= self.tokens:
                return
            self.give_up()
        self.make(max(self.size, needed), layer)

    def needed(self, layer: MoeLayer) -> int:
        """Bytes for this layer."""
        return needed_by(self.release, self.ranks, layer)

    def give_up(self) -> None:
        """The wrapper is dropped; what it wrapped stays."""


class GrownByParts(Grown):
    """Largest tokens, dispatch row and combine row each by itself; PyTorch's idle memory goes back before."""

    def __init__(self, case: fragscope.Case) -> None:
        super().__init__(case)
        self.rows = (0, 0)

    def needed(self, layer: MoeLayer) -> int:
        """Bytes for this layer and all before."""
        dispatch, combine = self.rows
        self.rows = max(dispatch, layer.dispatch_bytes), max(combine, layer.combine_bytes)
        return workspace_bytes(self.release, self.ranks, max(self.tokens, layer.tokens), *self.rows)

    def make(self, size: int, layer: MoeLayer) -> None:
        """What PyTorch holds idle goes back first."""
        torch.cuda.empty_cache()
        super().make(size, layer)


class GrownFreed(Grown):
    """The old workspace is unmapped before the new one is made: nothing is on its way while layers are built."""

    def give_up(self) -> None:
        """Unmapped."""
        self.workspaces.forget(self.size, self.tokens)


def load(case: fragscope.Case, manager: Manager) -> None:
    """Build the layers, then send one full batch through each."""
    base = MoeLayer("nvfp4", case.hidden, case.top_k, case.experts, case.tokens)
    layers = [base] * case.layers + [base.sent_as(case.head)]
    hidden = torch.empty(case.tokens, case.hidden, dtype=torch.bfloat16, device=case.device)
    with case.measure():
        for layer in layers:
            manager.initialize(layer)
        for layer in layers:
            hidden = forward(case, manager, layer, hidden)


def forward(case: fragscope.Case, manager: Manager, layer: MoeLayer, hidden: torch.Tensor) -> torch.Tensor:
    """Dispatch and combine of one layer: payloads on this side, received rows in the workspace."""
    payloads = [torch.empty(layer.tokens, n, dtype=torch.uint8, device=case.device) for n in layer.payloads]
    release = release_of(case.flashinfer)
    try:
        check_use(release, case.ranks, layer, manager.size, manager.tokens)
    except TooSmallError as e:
        case.overflow(e.missing, str(e))
    del payloads
    return torch.empty_like(hidden)


_MODULE = "vllm.distributed.device_communicators.all2all"
_INITIALIZE = f"{_MODULE}:FlashInferNVLinkOneSidedManager.initialize"


@fragscope.scenario(
    "a2a-workspace",
    presets=PRESETS,
    params={"flashinfer": "0.6.11.post2"},
    variant="one-shot",
    source="vLLM #42976, before",
    expect=[fragscope.Expect("ok", preset=HOMOGENEOUS), fragscope.Expect("overflow")],
    replays=fragscope.Replays("vllm", "0.20.0", _INITIALIZE, "04260f16a1babac9ac577b89"),
)
def a2a_workspace(case: fragscope.Case) -> None:
    """The first layer's workspace serves all."""
    load(case, OneShot(case))


@a2a_workspace.variant(
    "grow-cached", role="fixed", replays=fragscope.Replays("vllm", "0.22.0", _INITIALIZE, "51533b255ec5d752eb08a875")
)
def _(case: fragscope.Case) -> None:
    """Grown to what a layer needs; the superseded workspace stays mapped."""
    load(case, Grown(case))


@a2a_workspace.variant(
    "worst-case",
    role="fixed",
    replays=fragscope.Replays(
        "sglang",
        "0.5.13",
        "sglang.srt.layers.moe.token_dispatcher.flashinfer:FlashinferDispatcher.__init__",
        "7cc4295bd8a1ad3724e61772",
    ),
)
def _(case: fragscope.Case) -> None:
    """Sized for bf16 from the start."""
    load(case, WorstCase(case))


@a2a_workspace.variant(
    "grow-parts", role="newest", replays=fragscope.Replays("vllm", "0.33.0", _INITIALIZE, "ac6c2cb1a15522edbd3bc932")
)
def _(case: fragscope.Case) -> None:
    """Grown by its parts after ``empty_cache()``; the superseded workspace stays mapped."""
    load(case, GrownByParts(case))


@a2a_workspace.variant("grow-freed", role="proposed")
def _(case: fragscope.Case) -> None:
    """Grown, and the superseded workspace is unmapped first."""
    load(case, GrownFreed(case))
