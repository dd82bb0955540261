"""Pipeline stages that rebuild their all-to-all workspace, some more often than others, and wait after each time.

Source: vLLM #42976, the end of ``FlashInferNVLinkOneSidedManager.initialize``. A stage without the bf16 head builds its
workspace once, one with it twice. Before the fix whoever had built waited for the whole world (0.20.0): harmless while
every rank built exactly once, a deadlock as soon as workspaces grow. Now it waits for its own expert-parallel group.

Ranks are real processes with gloo groups; nothing here needs a GPU or takes memory of one.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from moe_alltoall import MoeLayer, needed_by, release_of

import fragscope

PRESETS = {"pp2-ep2": {"stages": 2, "ranks": 2, "layers": 2}}
_FOREVER = timedelta(hours=1)  # gloo itself gives up later than anyone waits


class Stage:
    """One rank's part: its layers, its expert-parallel group and its workspace."""

    def __init__(self, case: fragscope.Case, rank: fragscope.Rank, *, whole_world: bool) -> None:
        dist.init_process_group(
            "gloo", init_method=rank.rendezvous, rank=rank.number, world_size=rank.ranks, timeout=_FOREVER
        )
        members = [[stage * case.ranks + i for i in range(case.ranks)] for stage in range(case.stages)]
        groups = [dist.new_group(m, timeout=_FOREVER) for m in members]
        self.number, self.place = divmod(rank.number, case.ranks)
        self.barrier_group = None if whole_world else groups[self.number]
        self.ranks, self.is_last = case.ranks, self.number == case.stages - 1
        base = MoeLayer("nvfp4", hidden=4096, top_k=2, experts=8, tokens=1024)
        self.layers = [base] * case.layers + [base.sent_as("bf16")] * self.is_last
        self.size = 0

    def build(self) -> None:
        """All layers, one after the other."""
        for layer in self.layers:
            self.initialize(layer)

    def initialize(self, layer: MoeLayer) -> None:
        """Grow the workspace if the layer needs more, and wait until the others have."""
        needed = needed_by(release_of("0.6.11.post2"), self.ranks, layer)
        if needed <= self.size:
            return
        self.size = needed
        dist.barrier(group=self.barrier_group)

    def first_token(self) -> None:
        """What a stage waits for once it has loaded: the last one says what to go on with."""
        token = torch.zeros(1, dtype=torch.int64)
        last = dist.get_world_size() - self.ranks + self.place
        if not self.is_last:
            dist.recv(token, src=last)
            return
        for rank in range(self.place, last, self.ranks):
            dist.send(token, dst=rank)


def run(case: fragscope.Case, *, whole_world: bool) -> None:
    """All stages load, then the pipeline turns once."""

    def work(rank: fragscope.Rank) -> None:
        stage = Stage(case, rank, whole_world=whole_world)
        stage.build()
        stage.first_token()
        dist.destroy_process_group()

    with case.measure():
        fragscope.run_ranks(work, case.stages * case.ranks)


_INITIALIZE = "vllm.distributed.device_communicators.all2all:FlashInferNVLinkOneSidedManager.initialize"


@fragscope.scenario(
    "a2a-barrier",
    presets=PRESETS,
    variant="world-barrier",
    source="vLLM #42976, before",
    expect="timeout",
    replays=fragscope.Replays("vllm", "0.20.0", _INITIALIZE, "04260f16a1babac9ac577b89"),
)
def a2a_barrier(case: fragscope.Case) -> None:
    """Whoever has built waits for the whole world."""
    run(case, whole_world=True)


@a2a_barrier.variant(
    "group-barrier", role="fixed", replays=fragscope.Replays("vllm", "0.22.0", _INITIALIZE, "51533b255ec5d752eb08a875")
)
def _(case: fragscope.Case) -> None:
    """Whoever has built waits for its own group."""
    run(case, whole_world=False)
