"""The allocator as it stood when a recording began, found by undoing the recording from its end.

A snapshot shows the segments and blocks at its end. Every entry of its trace can be undone on them, last one first:
what was handed out is taken back, what was freed lives again, a segment that went back is there again. What is left
stood before the first entry: from process start on, nothing.

A block that was freed during the recording shows how much the program had asked for, not how large it was. Its size
follows from what lies around it: a rest that the allocator would not have kept as a block of its own belongs to it, and
memory handed out behind it begins where it ends, since idle neighbours merge and are handed out from their front.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fragscope.trace.trace import SegmentState

MIN_BLOCK = 512  # kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp
SMALL_SIZE = 1 << 20  # kSmallSize: rests up to this stay with a large block of an ordinary segment
SMALL_SEGMENT = 2 << 20  # kSmallBuffer: only the small pool has segments of this size


@dataclass(frozen=True, slots=True)
class LiveBlock:
    """Memory that is not idle.

    Attributes:
        addr: first byte.
        requested: bytes asked for.
        size: bytes of the block, None where it is not known.
        pending: freed by the program, in use by other streams.
        stream: raw stream handle.
    """

    addr: int
    requested: int
    size: int | None
    pending: bool
    stream: int


@dataclass(frozen=True, slots=True)
class StartState:
    """What stood when the recording began.

    Attributes:
        segments: with their blocks in address order.
        live: blocks that are not idle, by address.
    """

    segments: tuple[SegmentState, ...]
    live: tuple[LiveBlock, ...]


class ContradictionError(Exception):
    """The entries do not fit to what stands at the end."""


class _Undo:
    """Segments and live blocks, with an entry undone at a time."""

    def __init__(self, final: Sequence[SegmentState], live: Sequence[LiveBlock]) -> None:
        self.segments = {s.addr: replace(s, blocks=()) for s in final}
        self.live = {b.addr: b for b in live}
        self._addresses = sorted(self.live)
        self._starts = sorted(s.addr for s in final if s.expandable)  # of mapped ranges
        self._begins = sorted(s.addr for s in final)

    def undo(self, action: str, addr: int, size: int, stream: int, pool: int) -> None:
        if action == "alloc":
            if self.live.pop(addr, None) is None:
                raise ContradictionError(f"{addr:#x} was handed out last of all and is not live at the end")
            at = bisect_left(self._addresses, addr)
            del self._addresses[at]
            self._learn_end(at - 1, addr)
        elif action == "free_completed":
            if addr in self.live:
                raise ContradictionError(f"{addr:#x} is freed and lives on")
            self.live[addr] = LiveBlock(addr, size, None, True, stream)
            insort(self._addresses, addr)
        elif action == "free_requested":
            block = self.live.get(addr)
            if block is None:
                raise ContradictionError(f"{addr:#x} is freed, and its end is not shown")
            self.live[addr] = replace(block, pending=False)
        elif action == "segment_alloc":
            if self.segments.pop(addr, None) is None:
                raise ContradictionError(f"the segment at {addr:#x} was taken last of all and is not there at the end")
            del self._begins[bisect_left(self._begins, addr)]
        elif action == "segment_free":
            self.segments[addr] = SegmentState(addr, size, stream, pool, ())
            insort(self._begins, addr)
        elif action == "segment_map":
            self._unmap(addr, size)
        elif action == "segment_unmap":
            self._map(SegmentState(addr, size, stream, pool, (), expandable=True))

    def _learn_end(self, at: int, addr: int) -> None:
        """Memory was handed out at ``addr``: the live block before it in its segment ends there."""
        if at < 0:
            return
        block = self.live[self._addresses[at]]
        if block.size is None and not self._a_segment_begins(block.addr, addr):
            self.live[block.addr] = replace(block, size=addr - block.addr)

    def _a_segment_begins(self, above: int, up_to: int) -> bool:
        at = bisect_right(self._begins, above)
        return at < len(self._begins) and self._begins[at] <= up_to

    def _unmap(self, addr: int, size: int) -> None:
        at = bisect_right(self._starts, addr) - 1
        if at < 0:
            raise ContradictionError(f"{addr:#x} was mapped last of all and is not mapped at the end")
        whole = self.segments[self._starts[at]]
        if addr + size > whole.addr + whole.size:
            raise ContradictionError(f"{addr:#x} was mapped last of all and is not mapped at the end")
        self._forget(whole.addr, at)
        for start, end in ((whole.addr, addr), (addr + size, whole.addr + whole.size)):
            if start < end:
                self._map(replace(whole, addr=start, size=end - start))

    def _map(self, part: SegmentState) -> None:
        at = bisect_right(self._starts, part.addr)
        if at < len(self._starts):
            after = self.segments[self._starts[at]]
            if after.addr == part.addr + part.size and (after.stream, after.pool) == (part.stream, part.pool):
                part = replace(part, size=part.size + after.size)
                self._forget(after.addr, at)
        if at > 0:
            before = self.segments[self._starts[at - 1]]
            if before.addr + before.size == part.addr and (before.stream, before.pool) == (part.stream, part.pool):
                part = replace(part, addr=before.addr, size=before.size + part.size)
                self._forget(before.addr, at - 1)
        self.segments[part.addr] = part
        insort(self._starts, part.addr)
        insort(self._begins, part.addr)

    def _forget(self, addr: int, at: int) -> None:
        """A mapped range, the ``at``-th of them."""
        del self.segments[addr], self._starts[at]
        del self._begins[bisect_left(self._begins, addr)]


def start_state(
    final: Sequence[SegmentState],
    live: Sequence[LiveBlock],
    entries: Sequence[Mapping[str, Any]],
    pool_of: Callable[[int, Mapping[str, Any]], int],
    max_split_size: int,
) -> StartState | None:
    """What stood before the first entry; None for nothing.

    Args:
        final: segments at the end.
        live: blocks at the end that are not idle.
        entries: of the trace.
        pool_of: the pool of an entry, by its number.
        max_split_size: bytes from which on blocks are not split.

    Raises:
        ContradictionError: the entries do not lead to what stands at the end.
    """
    state = _Undo(final, live)
    for number in range(len(entries) - 1, -1, -1):
        entry = entries[number]
        action = entry["action"]
        pool = pool_of(number, entry) if action in ("segment_free", "segment_unmap") else 0
        state.undo(action, entry.get("addr", 0), entry["size"], entry["stream"], pool)
    if not state.segments:
        if state.live:
            raise ContradictionError("memory is freed that lies in no segment")
        return None
    return _laid_out(state, max_split_size)


def _laid_out(state: _Undo, max_split_size: int) -> StartState:
    """The segments with blocks that cover them."""
    live = sorted(state.live.values(), key=lambda b: b.addr)
    out: list[SegmentState] = []
    blocks: list[LiveBlock] = []
    at = 0
    for segment in sorted(state.segments.values(), key=lambda s: s.addr):
        end = segment.addr + segment.size
        parts: list[tuple[int, int, Any]] = []
        reached = segment.addr
        while at < len(live) and live[at].addr < end:
            block = live[at]
            if block.addr < reached:
                raise ContradictionError(f"{block.addr:#x} overlaps another block or lies in no segment")
            if block.addr > reached:
                parts.append((reached, block.addr - reached, "free"))
            room = min(end, live[at + 1].addr if at + 1 < len(live) else end) - block.addr
            size = block.size if block.size is not None else _block_size(block.requested, room, segment, max_split_size)
            if size > room:
                raise ContradictionError(f"{block.addr:#x} overlaps what lies behind it")
            parts.append((block.addr, size, "pending" if block.pending else "allocated"))
            blocks.append(replace(block, size=size))
            reached = block.addr + size
            at += 1
        if reached < end:
            parts.append((reached, end - reached, "free"))
        out.append(replace(segment, blocks=tuple(parts)))
    if at < len(live):
        raise ContradictionError(f"{live[at].addr:#x} lies in no segment")
    return StartState(tuple(out), tuple(blocks))


def _block_size(requested: int, room: int, segment: SegmentState, max_split_size: int) -> int:
    """Bytes of a block that was handed out before the recording and freed during it.

    ``room`` is what lies between its beginning and that of the next block. Rounding up by ``roundup_power2_divisions``
    cannot be seen where idle memory follows.
    """
    rounded = max(MIN_BLOCK, -(-requested // MIN_BLOCK) * MIN_BLOCK)
    rest = room - rounded
    keeps_rest = segment.expandable or segment.size == SMALL_SEGMENT
    unsplit = not keeps_rest and (rest <= SMALL_SIZE or rounded >= max_split_size)
    return room if unsplit and rest > 0 else rounded
