"""What reading a snapshot's entries had to infer or leave out, counted."""

from __future__ import annotations

from dataclasses import dataclass

from fragscope.trace.trace import Loss


@dataclass(slots=True)
class Inferred:
    """Counts of what entries do not say.

    Attributes:
        held: blocks that were live when recording began.
        unsure: of those, blocks that may have been larger.
        contradiction: why what stood then cannot be found, ``""`` if it can.
        unknown_frees: frees of what was never seen allocated.
        uses: uses by other streams.
        releases: releases of cached memory.
        pools: private pools made.
        toggles: switches of expandable segments.
        ooms: failed requests, whose size is known only after rounding.
    """

    held: int = 0
    unsure: int = 0
    contradiction: str = ""
    unknown_frees: int = 0
    uses: int = 0
    releases: int = 0
    pools: int = 0
    toggles: int = 0
    ooms: int = 0

    def losses(self) -> list[Loss]:
        """What the counts say, for people."""
        lost = []
        if self.held:
            detail = "recording began late; what stood then is found by undoing it"
            if self.unsure:
                detail += f"; {self.unsure} of its blocks may have been up to 1 MiB larger"
            lost.append(Loss("start_state", detail, self.held))
        if self.contradiction:
            detail = f"what stood when recording began cannot be found: {self.contradiction}"
            lost.append(Loss("start_state", detail))
        if self.unknown_frees:
            lost.append(
                Loss(
                    "late_start",
                    "recording began late or its ring overflowed: memory was freed that was never seen allocated",
                    self.unknown_frees,
                )
            )
        if self.uses:
            lost.append(Loss("record_stream", "snapshots do not record record_stream; uses are inferred", self.uses))
        if self.releases:
            lost.append(
                Loss(
                    "empty_cache",
                    "snapshots do not record empty_cache; calls are inferred from released segments",
                    self.releases,
                )
            )
        if self.pools:
            lost.append(
                Loss(
                    "pool_scopes",
                    "snapshots do not record when private pools are made and released; inferred from their blocks",
                    self.pools,
                )
            )
        if self.toggles:
            lost.append(
                Loss(
                    "settings_changes",
                    "expandable segments were switched on or off; when is inferred from the next memory that was taken",
                    self.toggles,
                )
            )
        if self.ooms:
            lost.append(Loss("oom_size", "an OOM's request is known only after rounding", self.ooms))
        return lost
