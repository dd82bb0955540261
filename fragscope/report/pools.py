"""Which pool memory belonged to and how it was held: as words for an address, and summed up at one event."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fragscope.measure import Lifetimes, SegmentLayout, layout_at
from fragscope.measure.segments import Ints
from fragscope.report.memory_map import AddressRanges
from fragscope.report.traces import Recording
from fragscope.trace import Trace

MOST_SHARES = 12
"""Lines of a breakdown; what is beyond them is one line more."""


@dataclass(frozen=True, slots=True)
class Places:
    """What kind of memory each part of a memory map's vertical axis was.

    Attributes:
        offset: int64, where each part begins, ascending; it reaches to the next.
        word: int64, index into ``words`` of each part.
        words: such as ``expandable segment, pool (0, 1)``; one that changed in the window names both.
    """

    offset: Ints
    word: Ints
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PoolShare:
    """What one pool held in one way; bytes.

    Attributes:
        words: the pool, and whether its segments are expandable.
        ranges: segments, or contiguous mapped ranges of expandable ones.
        reserved: held from the driver.
        active: handed out, or waiting for another stream.
        stranded: idle, kept by a live block.
        pool_idle: idle, kept because the pool has users.
        releasable: idle, returned by ``empty_cache()``.
    """

    words: str
    ranges: int
    reserved: int
    active: int
    stranded: int
    pool_idle: int
    releasable: int


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A Recording's reserved memory by pool, when it was largest.

    Attributes:
        event: row of the request after which it was.
        shares: largest first.
    """

    event: int
    shares: tuple[PoolShare, ...]


def pool_word(trace: Trace, pool: int) -> str:
    """A pool as people know it: torch's id of a private one."""
    if pool == 0:
        return "default pool"
    known = 0 < pool < len(trace.pools)
    return f"pool {trace.pools[pool]}" if known else f"pool number {pool}"


def is_plain(lives: Lifetimes) -> bool:
    """Whether all memory was ordinary segments of the default pool, of which there is nothing more to say."""
    return not bool(np.any((lives.segments.page > 0) | (lives.segments.pool != 0)))


def places(trace: Trace, lives: Lifetimes, rows: slice, ranges: AddressRanges) -> Places:
    """Say what kind of memory was at the addresses of a map while the request rows were served."""
    pieces, segments = lives.pieces, lives.segments
    row = np.append(lives.request, len(lives.upto))
    seen = np.flatnonzero((row[pieces.born] < rows.stop) & (row[pieces.died] > rows.start))
    low = ranges.place(pieces.addr[seen])
    high = low + pieces.size[seen]
    home = pieces.segment[seen]
    kind = np.stack([segments.pool[home], segments.page[home] > 0], axis=1)
    kinds, which = np.unique(kind, axis=0, return_inverse=True)
    which = which.reshape(-1)
    edges = np.unique(np.concatenate([low, high]))
    there = np.zeros((max(len(edges) - 1, 0), len(kinds)), dtype=bool)
    for number in range(len(kinds)):
        mine = which == number
        change = np.zeros(len(edges), dtype=np.int64)
        np.add.at(change, np.searchsorted(edges, low[mine]), 1)
        np.add.at(change, np.searchsorted(edges, high[mine]), -1)
        there[:, number] = np.cumsum(change)[:-1] > 0
    mixes, word = np.unique(there, axis=0, return_inverse=True)
    word = word.reshape(-1)
    names = [_segment_word(trace, int(pool), bool(expandable)) for pool, expandable in kinds.tolist()]
    words = tuple(" or ".join(n for n, is_in in zip(names, mix, strict=True) if is_in) for mix in mixes.tolist())
    first = np.ones(len(word), dtype=bool)
    first[1:] = word[1:] != word[:-1]
    return Places(edges[:-1][first], word[first], words)


def _segment_word(trace: Trace, pool: int, expandable: bool) -> str:
    word = "expandable segment" if expandable else "segment"
    return f"{word}, {pool_word(trace, pool)}" if pool else word


def breakdown(recording: Recording) -> Breakdown | None:
    """Sum up what each pool held when the Recording's reserved memory was largest; None if there is no more to say."""
    trace, lives, rows = recording.trace, recording.lives, recording.rows
    if is_plain(lives):
        return None
    event = rows.start + int(np.argmax(recording.timeline.reserved[rows]))
    groups: dict[tuple[int, bool], list[SegmentLayout]] = {}
    for segment in layout_at(trace, event, lives):
        groups.setdefault((segment.pool, segment.expandable), []).append(segment)
    shares = [_share(_share_words(trace, *key), members) for key, members in groups.items()]
    shares.sort(key=lambda share: -share.reserved)
    return Breakdown(event, tuple(_shortened(shares)))


def _share_words(trace: Trace, pool: int, expandable: bool) -> str:
    return f"{pool_word(trace, pool)}, expandable" if expandable else pool_word(trace, pool)


def _share(words: str, segments: list[SegmentLayout]) -> PoolShare:
    return PoolShare(
        words=words,
        ranges=len(segments),
        reserved=sum(s.size for s in segments),
        active=sum(s.active for s in segments),
        stranded=sum(s.stranded for s in segments),
        pool_idle=sum(s.pool_idle for s in segments),
        releasable=sum(s.releasable for s in segments),
    )


def _shortened(shares: list[PoolShare]) -> list[PoolShare]:
    rest = shares[MOST_SHARES:]
    if len(rest) < 2:
        return shares
    columns = ("ranges", "reserved", "active", "stranded", "pool_idle", "releasable")
    total = {name: sum(getattr(share, name) for share in rest) for name in columns}
    return [*shares[:MOST_SHARES], PoolShare(words=f"{len(rest)} more", **total)]
