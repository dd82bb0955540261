"""Where everything lay at one event: segments, blocks and the holes between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fragscope.errors import UsageError
from fragscope.measure.lifetimes import lifetimes
from fragscope.trace import NO_ID, Trace

BlockState = Literal["free", "allocated", "pending"]


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A contiguous part of a segment; bytes.

    Attributes:
        addr: first byte.
        size: bytes.
        state: ``free`` is a hole, ``pending`` waits for another stream before it can be handed out again.
        id: lifetime id, ``NO_ID`` for a hole.
    """

    addr: int
    size: int
    state: BlockState
    id: int


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """One segment with its blocks in address order; they cover it without gaps.

    Attributes:
        addr: first byte.
        size: bytes.
        stream: raw stream handle.
        pool: index into ``Trace.pools``.
        blocks: in address order; a hole is one block however many frees made it, as the allocator merges them.
    """

    addr: int
    size: int
    stream: int
    pool: int
    blocks: tuple[BlockLayout, ...]

    @property
    def stranded(self) -> int:
        """Idle bytes that a live block keeps from being returned."""
        idle = sum(b.size for b in self.blocks if b.state == "free")
        return idle if idle < self.size else 0


def layout_at(trace: Trace, row: int) -> tuple[SegmentLayout, ...]:
    """The segments in address order after request ``row`` was served.

    Raises:
        UsageError: no such row, or the decisions lack block sizes, or there are none.
        InputFileError: the decisions contradict each other.
    """
    if not 0 <= row < len(trace.requests):
        raise UsageError(f"event {row}: the trace has events 0 to {len(trace.requests) - 1}")
    lives = lifetimes(trace)
    segments, blocks = lives.segments, lives.blocks
    now = int(lives.upto[row])  # decisions with a position below this have been made
    here = np.flatnonzero((blocks.born < now) & (blocks.died >= now))
    here = here[np.argsort(blocks.addr[here], kind="stable")]
    inside: dict[int, list[BlockLayout]] = {}
    for b in here.tolist():
        state: BlockState = "allocated" if blocks.released[b] >= now else "pending"
        block = BlockLayout(int(blocks.addr[b]), int(blocks.size[b]), state, int(blocks.id[b]))
        inside.setdefault(int(blocks.segment[b]), []).append(block)
    there = np.flatnonzero((segments.born < now) & (segments.died >= now))
    out = []
    for s in there[np.argsort(segments.addr[there], kind="stable")].tolist():
        addr, size = int(segments.addr[s]), int(segments.size[s])
        covered = _with_holes(addr, addr + size, inside.get(s, []))
        out.append(SegmentLayout(addr, size, int(segments.stream[s]), int(segments.pool[s]), covered))
    return tuple(out)


def _with_holes(start: int, stop: int, blocks: list[BlockLayout]) -> tuple[BlockLayout, ...]:
    out = []
    at = start
    for block in blocks:
        if block.addr > at:
            out.append(BlockLayout(at, block.addr - at, "free", NO_ID))
        out.append(block)
        at = block.addr + block.size
    if at < stop:
        out.append(BlockLayout(at, stop - at, "free", NO_ID))
    return tuple(out)
