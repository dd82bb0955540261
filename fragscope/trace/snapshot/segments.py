"""Segments and blocks as they stood when a snapshot was taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fragscope.errors import InputFileError
from fragscope.trace.sizes import SMALL_SEGMENT
from fragscope.trace.snapshot.pools import Pools
from fragscope.trace.snapshot.shape import MAX_INT, MAX_SIZE, Checker
from fragscope.trace.start import LiveBlock
from fragscope.trace.trace import DEFAULT_POOL, SegmentState

_STATES = {"inactive": "free", "active_allocated": "allocated", "active_pending_free": "pending"}


def final_segments(
    check: Checker, segments: Sequence[Any], device: int, pools: Pools, large: int
) -> tuple[SegmentState, ...]:
    """Segments as they stood at the end, in the order of their addresses; ``large`` is the large pool's page."""
    out = []
    seen: set[int] = set()
    for number, item in enumerate(segments):
        where = f"segment {number}"
        segment = check.mapping(item, where)
        if check.integer(segment, "device", where) != device:
            continue
        addr = check.integer(segment, "address", where)
        size = check.integer(segment, "total_size", where)
        pool = check.pool(segment, "segment_pool_id", where) or DEFAULT_POOL
        number_of_pool = pools.number(pool)
        items = check.sequence(segment.get("blocks"), f"{where}, 'blocks'")
        if items and id(items) in seen:  # one long list, referred to often, would unfold beyond all memory
            raise InputFileError(check.path, f"{where}: shares its list of blocks with another segment")
        seen.add(id(items))
        if addr + size > MAX_INT:
            raise InputFileError(check.path, f"{where}: ends outside of what an address can be")
        blocks = []
        at = addr
        for item_block in items:
            block = check.mapping(item_block, where)
            state = _STATES.get(check.text(block, "state", where))
            if state is None:
                raise InputFileError(check.path, f"{where}: unknown block state {block['state']!r}")
            length = check.integer(block, "size", where)
            blocks.append((at, length, state))
            at += length
        if at != addr + size:
            raise InputFileError(check.path, f"{where}: its blocks cover {at - addr} of {size} bytes")
        stream = check.integer(segment, "stream", where)
        page = SMALL_SEGMENT if segment.get("segment_type") == "small" else large
        page = page if segment.get("is_expandable", False) is True else 0
        out.append(SegmentState(addr, size, stream, number_of_pool, tuple(blocks), page))  # type: ignore[arg-type]
    return tuple(sorted(out, key=lambda s: s.addr))


def live_at_end(check: Checker, segments: Sequence[Any], device: int) -> list[LiveBlock]:
    """Blocks that are not idle, from segments that were checked before."""
    out = []
    for number, segment in enumerate(segments):
        if segment["device"] != device:
            continue
        at = segment["address"]
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                where = f"segment {number}"
                requested = check.integer(block, "requested_size", where, MAX_SIZE)
                pending = block["state"] == "active_pending_free"
                out.append(LiveBlock(at, requested, block["size"], pending, segment["stream"]))
            at += block["size"]
    return out
