"""Where everything lay at one event: segments, blocks and the holes between them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fragscope.errors import UsageError
from fragscope.measure.lifetimes import Lifetimes, lifetimes
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
    """One segment, or a contiguous mapped range of an expandable one, with its blocks; they cover it without gaps.

    Attributes:
        addr: first byte.
        size: bytes.
        stream: raw stream handle.
        pool: index into ``Trace.pools``.
        blocks: in address order; a hole is one block however many frees made it, as the allocator merges them.
        page: bytes that the expandable segment maps at a time, 0 for an ordinary segment.
        base: where the segment begins; pages count from here.
        held: whether it belongs to a private pool that has users, so that nothing of it goes back to the driver.
    """

    addr: int
    size: int
    stream: int
    pool: int
    blocks: tuple[BlockLayout, ...]
    page: int
    base: int
    held: bool

    @property
    def expandable(self) -> bool:
        """Whether it is a mapped range of an expandable segment."""
        return self.page > 0

    @property
    def active(self) -> int:
        """Bytes in blocks that are handed out or wait for another stream."""
        return sum(b.size for b in self.blocks if b.state != "free")

    @property
    def pool_idle(self) -> int:
        """Idle bytes that stay because the private pool has users."""
        return self.size - self.active if self.held else 0

    @property
    def releasable(self) -> int:
        """Bytes that ``empty_cache()`` would return now: the segment if it is wholly idle, or whole idle pages."""
        if self.held:
            return 0
        if not self.expandable:
            return 0 if self.active else self.size
        return sum(self._whole_pages(b) for b in self.blocks if b.state == "free")

    @property
    def stranded(self) -> int:
        """Idle bytes that a live block keeps from being returned."""
        return 0 if self.held else self.size - self.active - self.releasable

    def _whole_pages(self, hole: BlockLayout) -> int:
        start = hole.addr - self.base
        first, stop = -(-start // self.page), (start + hole.size) // self.page
        return max(0, stop - first) * self.page


def layout_at(trace: Trace, row: int, lives: Lifetimes | None = None) -> tuple[SegmentLayout, ...]:
    """The segments and mapped ranges in address order after request ``row`` was served.

    Args:
        trace: with the decisions of a replay.
        row: of the request.
        lives: ``lifetimes(trace)`` where the caller has it.

    Raises:
        UsageError: no such row, or the decisions lack block sizes, or there are none.
        InputFileError: the decisions contradict each other.
    """
    if not 0 <= row < len(trace.requests):
        raise UsageError(f"event {row}: the trace has events 0 to {len(trace.requests) - 1}")
    lives = lifetimes(trace) if lives is None else lives
    segments = lives.segments
    now = int(lives.upto[row])  # decisions with a position below this have been made
    inside = _blocks_at(lives, now)
    held = lives.holds.held_at(row)
    out = []
    for segment, start, stop in _runs_at(lives, now):
        blocks = inside.get(segment, [])
        here = blocks[bisect_left(blocks, start, key=_addr) : bisect_left(blocks, stop, key=_addr)]
        stream, pool = int(segments.stream[segment]), int(segments.pool[segment])
        page, base = int(segments.page[segment]), int(segments.addr[segment])
        covered = _with_holes(start, stop, here)
        out.append(SegmentLayout(start, stop - start, stream, pool, covered, page, base, pool in held))
    return tuple(out)


def _addr(block: BlockLayout) -> int:
    return block.addr


def _blocks_at(lives: Lifetimes, now: int) -> dict[int, list[BlockLayout]]:
    """Blocks by the row of their segment, in address order."""
    blocks = lives.blocks
    here = np.flatnonzero((blocks.born < now) & (blocks.died >= now))
    out: dict[int, list[BlockLayout]] = {}
    for b in here[np.argsort(blocks.addr[here], kind="stable")].tolist():
        state: BlockState = "allocated" if blocks.released[b] >= now else "pending"
        block = BlockLayout(int(blocks.addr[b]), int(blocks.size[b]), state, int(blocks.id[b]))
        out.setdefault(int(blocks.segment[b]), []).append(block)
    return out


def _runs_at(lives: Lifetimes, now: int) -> list[tuple[int, int, int]]:
    """Row, first and last byte (exclusive) of each segment or mapped range, in address order."""
    pieces = lives.pieces
    there = np.flatnonzero((pieces.born < now) & (pieces.died >= now))
    there = there[np.argsort(pieces.addr[there], kind="stable")]
    columns = (pieces.segment[there], pieces.addr[there], pieces.addr[there] + pieces.size[there])
    out: list[tuple[int, int, int]] = []
    for segment, start, stop in zip(*(c.tolist() for c in columns), strict=True):
        if out and out[-1][0] == segment and out[-1][2] == start:  # an ordinary segment has one piece
            out[-1] = (segment, out[-1][1], stop)
        else:
            out.append((segment, start, stop))
    return out


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
