"""The allocator as it stood when a recording began, found by undoing the recording from its end.

A snapshot shows the segments and blocks at its end. Every entry of its trace can be undone on them, last one first:
what was handed out is taken back, what was freed lives again, a segment that went back is there again. What is left
stood before the first entry: from process start on, nothing.

A block that was freed during the recording shows how much the program had asked for, not how large it was. Its size
follows from the conf and from what lies around it: a rest that the allocator would not have kept as a block of its own
belongs to it, and memory handed out behind it begins where it ends, since idle neighbours merge and are handed out from
their front.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fragscope.trace.sizes import LARGE_SEGMENT, SMALL_SEGMENT, SMALL_SIZE, block_bytes, interval_of
from fragscope.trace.trace import SegmentState
from fragscope.units import MIB

UNLIMITED = 2**63 - 1  # max_split_size where none is set
_UNSEEN = -1  # page of a mapped range while nothing has told it


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
        unsure: how many of those may be larger, by a rest that the allocator left unsplit.
    """

    segments: tuple[SegmentState, ...]
    live: tuple[LiveBlock, ...]
    unsure: int = 0


@dataclass(frozen=True, slots=True)
class SizeRules:
    """What of the conf decides how large blocks and pages are; bytes.

    Attributes:
        max_split_size: from here on blocks are not split.
        divisions: steps between powers of two in each of the 16 intervals of ``roundup_power2_divisions``.
        large_page: page of the large pool's expandable segments.
    """

    max_split_size: int = UNLIMITED
    divisions: tuple[int, ...] = (0,) * 16
    large_page: int = LARGE_SEGMENT

    def rounded(self, requested: int) -> int:
        """Bytes of a request's block, before a larger one is taken unsplit."""
        return block_bytes(requested, self.divisions[interval_of(requested)])

    def page_for(self, requested: int) -> int:
        """Bytes of the pages that serve such a request."""
        return SMALL_SEGMENT if self.rounded(requested) <= SMALL_SIZE else self.large_page


_LARGE_SEGMENT_SIZE = re.compile(r"large_segment_size_mb\s*:\s*(\d{1,6})")


def large_page(conf: str) -> int:
    """Bytes of the large pool's pages under a conf string; snapshots report this setting in no other way."""
    named = _LARGE_SEGMENT_SIZE.findall(conf)
    return int(named[-1]) * MIB if named else LARGE_SEGMENT


def with_large_page(segments: Sequence[SegmentState], page: int) -> tuple[SegmentState, ...]:
    """The segments, those of the large pool mapped in such pages."""
    return tuple(replace(s, page=page) if s.page > SMALL_SEGMENT else s for s in segments)


def size_rules(settings: Mapping[str, Any], conf: str) -> SizeRules:
    """The rules that a snapshot's ``allocator_settings`` tell; what is not such a value is taken as the default."""
    max_split = settings.get("max_split_size", -1)
    divisions = settings.get("roundup_power2_divisions")
    steps = [divisions.get(str(1 << slot), 0) if isinstance(divisions, dict) else 0 for slot in range(16)]
    return SizeRules(
        max_split if isinstance(max_split, int) and max_split > 0 else UNLIMITED,
        tuple(s if isinstance(s, int) and 0 < s < 2**54 else 0 for s in steps),
        large_page(conf),
    )


class ContradictionError(Exception):
    """The entries do not fit to what stands at the end."""


class _Undo:
    """Segments and live blocks, with an entry undone at a time, the last one first."""

    def __init__(self, final: Sequence[SegmentState], live: Sequence[LiveBlock]) -> None:
        self.segments = {s.addr: replace(s, blocks=()) for s in final}
        self.live = {b.addr: b for b in live}
        self.freed_at: dict[int, int] = {}  # those of unknown size: the entry that freed them
        self.pending = {b.addr for b in live if b.pending}
        self.served = (array("q"), array("q"), array("q"))  # requests: entry, address, bytes asked for
        # Mapped ranges by address: no more than the device has pages, however long the recording is.
        self._starts = sorted(s.addr for s in final if s.expandable)

    def undo(self, number: int, action: str, addr: int, size: int, stream: int, pool: int) -> None:
        if action == "alloc":
            if self.live.pop(addr, None) is None:
                raise ContradictionError(f"{addr:#x} was handed out last of all and is not live at the end")
            self.freed_at.pop(addr, None)
            self.pending.discard(addr)
            numbers, addrs, sizes = self.served
            numbers.append(number)
            addrs.append(addr)
            sizes.append(size)
        elif action == "free_requested":
            if addr not in self.live:
                raise ContradictionError(f"{addr:#x} is freed, and its end is not shown")
            self.pending.discard(addr)
        elif action == "free_completed":
            if addr in self.live:
                raise ContradictionError(f"{addr:#x} is freed and lives on")
            self.live[addr] = LiveBlock(addr, size, None, True, stream)
            self.freed_at[addr] = number
            self.pending.add(addr)
        elif action == "segment_alloc":
            if self.segments.pop(addr, None) is None:
                raise ContradictionError(f"the segment at {addr:#x} was taken last of all and is not there at the end")
        elif action == "segment_free":
            self.segments[addr] = SegmentState(addr, size, stream, pool, ())
        elif action == "segment_map":
            self._unmap(addr, size)
        elif action == "segment_unmap":
            self._map(SegmentState(addr, size, stream, pool, (), _UNSEEN))

    def _unmap(self, addr: int, size: int) -> None:
        at = bisect_right(self._starts, addr) - 1
        if at < 0:
            raise ContradictionError(f"{addr:#x} was mapped last of all and is not mapped at the end")
        whole = self.segments[self._starts[at]]
        if addr + size > whole.addr + whole.size:
            raise ContradictionError(f"{addr:#x} was mapped last of all and is not mapped at the end")
        self._forget(at)
        for start, end in ((whole.addr, addr), (addr + size, whole.addr + whole.size)):
            if start < end:
                self._map(replace(whole, addr=start, size=end - start))

    def _map(self, part: SegmentState) -> None:
        """Reserved ranges of addresses do not touch where they are mapped: what touches is of one segment."""
        at = bisect_right(self._starts, part.addr)
        if at < len(self._starts):
            after = self.segments[self._starts[at]]
            if after.addr == part.addr + part.size and (after.stream, after.pool) == (part.stream, part.pool):
                part = replace(part, size=part.size + after.size, page=max(part.page, after.page))
                self._forget(at)
        if at > 0:
            before = self.segments[self._starts[at - 1]]
            if before.addr + before.size == part.addr and (before.stream, before.pool) == (part.stream, part.pool):
                page = max(part.page, before.page)
                part = replace(part, addr=before.addr, size=before.size + part.size, page=page)
                self._forget(at - 1)
        self.segments[part.addr] = part
        insort(self._starts, part.addr)

    def _forget(self, at: int) -> None:
        """The ``at``-th mapped range."""
        del self.segments[self._starts[at]], self._starts[at]


def start_state(
    final: Sequence[SegmentState],
    live: Sequence[LiveBlock],
    entries: Sequence[Mapping[str, Any]],
    pool_of: Callable[[int, Mapping[str, Any]], int],
    rules: SizeRules,
    *,
    frees_at_once: bool = False,
) -> StartState | None:
    """What stood before the first entry; None for nothing.

    Args:
        final: segments at the end.
        live: blocks at the end that are not idle.
        entries: of the trace.
        pool_of: the pool of an entry, by its number.
        rules: how large blocks and pages are.
        frees_at_once: one entry stands for the request and the completion of a free.

    Raises:
        ContradictionError: the entries do not lead to what stands at the end.
    """
    state = _Undo(final, live)
    for number in range(len(entries) - 1, -1, -1):
        entry = entries[number]
        action = entry["action"]
        pool = pool_of(number, entry) if action in ("segment_free", "segment_unmap") else 0
        if frees_at_once and action in ("free_requested", "free_completed"):
            state.undo(number, "free_completed", entry["addr"], entry["size"], entry["stream"], 0)
            action = "free_requested"
        state.undo(number, action, entry.get("addr", 0), entry["size"], entry["stream"], pool)
    if not state.segments:
        if state.live:
            raise ContradictionError("memory is freed that lies in no segment")
        return None
    return _laid_out(state, rules)


def _laid_out(state: _Undo, rules: SizeRules) -> StartState:
    """The segments with blocks that cover them."""
    live = sorted(state.live.values(), key=lambda b: b.addr)
    segments = sorted(state.segments.values(), key=lambda s: s.addr)
    served = _Served(state.served)
    ends = served.ends(live, segments, state.freed_at)
    out: list[SegmentState] = []
    blocks: list[LiveBlock] = []
    at = unsure = 0
    for segment in segments:
        if out and segment.addr < out[-1].addr + out[-1].size:
            raise ContradictionError(f"the segment at {segment.addr:#x} lies in another")
        end = segment.addr + segment.size
        if segment.page == _UNSEEN:
            asked = live[at].requested if at < len(live) and live[at].addr < end else served.first_in(segment.addr, end)
            segment = replace(segment, page=_page(segment, asked, rules))  # noqa: PLW2901 - the same, better known
        parts: list[tuple[int, int, Any]] = []
        reached = segment.addr
        while at < len(live) and live[at].addr < end:
            block = live[at]
            if block.addr < reached:
                raise ContradictionError(f"{block.addr:#x} overlaps another block or lies in no segment")
            if block.addr > reached:
                parts.append((reached, block.addr - reached, "free"))
            room = min(end, live[at + 1].addr if at + 1 < len(live) else end) - block.addr
            size = block.size
            if size is None and not segment.expandable and ends[at] >= 0:
                size = ends[at] - block.addr
            elif size is None:
                size, is_sure = _block_size(block.requested, room, segment, rules)
                unsure += not is_sure
            if size > room:
                raise ContradictionError(f"{block.addr:#x} overlaps what lies behind it")
            is_pending = block.addr in state.pending
            parts.append((block.addr, size, "pending" if is_pending else "allocated"))
            blocks.append(LiveBlock(block.addr, block.requested, size, is_pending, block.stream))
            reached = block.addr + size
            at += 1
        if reached < end:
            parts.append((reached, end - reached, "free"))
        out.append(replace(segment, blocks=tuple(parts)))
    if at < len(live):
        raise ContradictionError(f"{live[at].addr:#x} lies in no segment")
    return StartState(tuple(out), tuple(blocks), unsure)


class _Served:
    """The requests that were served during the recording, by address and time."""

    def __init__(self, columns: tuple[array[int], array[int], array[int]]) -> None:
        entry, addr, size = (np.array(c, dtype=np.int64)[::-1] for c in columns)  # the first one first
        order = np.argsort(addr, kind="stable")
        self._entry, self._addr, self._size = entry[order], addr[order], size[order]

    def ends(
        self, live: Sequence[LiveBlock], segments: Sequence[SegmentState], freed_at: Mapping[int, int]
    ) -> list[int]:
        """Where blocks that lived at the start end, as memory handed out directly behind them tells; else -1.

        Between a block and the next one that lived at the start all is idle, one block if it is an ordinary segment.
        So what is handed out there first begins where that block ends, as long as it lives.

        Args:
            live: the blocks, by address.
            segments: those they lie in, by address.
            freed_at: the entry that freed each, by address; none where its size is known.
        """
        ends = np.full(len(live), -1, dtype=np.int64)
        if not len(live) or not len(self._addr):
            return [int(end) for end in ends]
        addrs = np.array([b.addr for b in live], dtype=np.int64)
        until = np.array([freed_at.get(b.addr, -1) for b in live], dtype=np.int64)
        home = np.searchsorted([s.addr for s in segments], addrs, side="right") - 1
        limit = np.array([s.addr + s.size for s in segments], dtype=np.int64)[home]
        before = np.searchsorted(addrs, self._addr) - 1  # the block that each request was served behind
        behind = np.flatnonzero((before >= 0) & (self._addr < limit[before]) & (self._entry < until[before]))
        order = behind[np.lexsort((self._entry[behind], before[behind]))]
        blocks, at = np.unique(before[order], return_index=True)
        ends[blocks] = self._addr[order[at]]
        return [int(end) for end in ends]

    def first_in(self, start: int, end: int) -> int | None:
        """Bytes asked for by the first request that was served there; None where there was none."""
        low, high = np.searchsorted(self._addr, (start, end))
        return int(self._size[low + int(np.argmin(self._entry[low:high]))]) if low < high else None


def _page(segment: SegmentState, asked: int | None, rules: SizeRules) -> int:
    """Bytes of the pages of a mapped range that is gone at the end, from a request that it served if there is one."""
    if asked is not None:
        return rules.page_for(asked)
    return rules.large_page if segment.size % rules.large_page == 0 else SMALL_SEGMENT


def _block_size(requested: int, room: int, segment: SegmentState, rules: SizeRules) -> tuple[int, bool]:
    """Bytes of a block that was handed out before the recording and freed during it, and whether they are sure.

    ``room`` is what lies between its beginning and that of the next block. A block may have taken up to 1 MiB more than
    it needed from memory behind which another block was, and that one may be gone when the recording begins.
    """
    rounded = min(rules.rounded(requested), max(room, block_bytes(requested, 0)))  # the conf may have been another
    rest = room - rounded
    if segment.expandable or segment.size == SMALL_SEGMENT or rest <= 0:
        return rounded, True
    if rest <= SMALL_SIZE or rounded >= rules.max_split_size:
        return room, True
    return rounded, False
