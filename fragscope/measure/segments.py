"""What the allocator held from the driver: segments, and the pieces of expandable ones as they came and went.

An expandable segment is a range of addresses into which pages are mapped. Decisions show it only by its mappings: the
first one of a new range is made at its base, and the range is given up when its last page is unmapped. Its pages all
have one size, count from its base, and each mapping or unmapping is a row of them. A mapped range that stood when a
recording began says how large its pages are; where its segment's base lies is not seen, but it is whole pages away.
Source: c10/cuda/CUDACachingAllocator.cpp (try_allocate_expandable_block, map_block, unmap_block).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import numpy.typing as npt

from fragscope.allocator import NEWEST, Conf, parse_conf, rules_for
from fragscope.errors import InputFileError
from fragscope.trace import DecisionKind, Decisions, RequestKind, Trace

Ints = npt.NDArray[np.int64]

_SMALL_REQUEST = 1 << 20  # kSmallSize: no rounding crosses it, so requested bytes tell the size class
_SMALL_PAGE = 2 << 20  # kSmallBuffer: page of expandable segments of the small size class


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """Segments in the order in which they first held memory; each column int64 of shape ``(n,)``.

    Attributes:
        addr: first byte; of an expandable segment that stood when recording began the lowest that was ever mapped.
        size: bytes; of an expandable segment from there to the highest byte that was ever mapped.
        stream: raw stream handle.
        pool: index into ``Trace.pools``.
        page: bytes that an expandable segment maps at a time, 0 for an ordinary segment.
        born: position of the decision that took it, or that mapped its first page.
        died: position of the decision that returned it, or that unmapped its last page.
    """

    addr: Ints
    size: Ints
    stream: Ints
    pool: Ints
    page: Ints
    born: Ints
    died: Ints


@dataclass(frozen=True, slots=True)
class PieceTable:
    """Memory that came from the driver and went back at once; each column int64 of shape ``(n,)``.

    An ordinary segment is one piece. Of an expandable one, a piece is what one decision mapped and another unmapped.
    No two pieces overlap at any time; all that live together are the reserved bytes.

    Attributes:
        segment: row in the ``SegmentTable``.
        addr: first byte.
        size: bytes.
        born: position of the decision that brought it.
        died: position of the decision that returned it.
    """

    segment: Ints
    addr: Ints
    size: Ints
    born: Ints
    died: Ints


@dataclass(slots=True)
class _Range:
    """An expandable segment while its mappings are followed; bytes."""

    row: int
    base: int
    end: int  # where its reserved addresses end
    key: tuple[int, int, bool]  # stream, pool, whether it is of the small size class
    born: int
    died: int
    top: int = 0
    mapped: int = 0
    grain: int = 0  # what all its mappings and unmappings are multiples of
    page: int = 0  # known when all are seen, or from the beginning if it stood when recording began
    stood: bool = False

    def may_hold(self, addr: int, key: tuple[int, int, bool]) -> bool:
        """Whether pages mapped at an address, which is not below its base, can be its own."""
        return self.key == key and addr < self.end and (not self.stood or self.is_on_page(addr))

    def may_begin(self, addr: int, reach: int, key: tuple[int, int, bool]) -> bool:
        """Whether it can begin at an address below what is seen of it, if its addresses reach so far."""
        return self.stood and self.key == key and self.is_on_page(addr) and self.base - addr < reach

    def is_on_page(self, addr: int) -> bool:
        """Whether one of its pages, which stood when recording began, begins at an address."""
        return (addr - self.base) % self.page == 0

    def take(self, addr: int, size: int) -> None:
        """Pages are mapped."""
        self.mapped += size
        self.top = max(self.top, addr + size)
        self.grain = gcd(self.grain, addr - self.base, size)

    def give(self, addr: int, size: int) -> None:
        """Pages are unmapped."""
        self.mapped -= size
        self.grain = gcd(self.grain, addr - self.base, size)


@dataclass(slots=True)
class _Pieces:
    """Pieces of expandable segments: those that live by their first byte, and those that have died."""

    starts: list[int] = field(default_factory=list)
    live: dict[int, tuple[_Range, int, int]] = field(default_factory=dict)  # range, bytes, born
    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)  # columns of a PieceTable

    def add(self, range_: _Range, addr: int, size: int, born: int) -> bool:
        """Add a piece; False if something of it is there already."""
        at = bisect_right(self.starts, addr)
        if at < len(self.starts) and self.starts[at] < addr + size:
            return False
        if at > 0 and self.starts[at - 1] + self.live[self.starts[at - 1]][1] > addr:
            return False
        insort(self.starts, addr)
        self.live[addr] = (range_, size, born)
        return True

    def range_at(self, addr: int) -> _Range | None:
        """The range whose mapped memory holds an address."""
        at = bisect_right(self.starts, addr) - 1
        if at < 0:
            return None
        range_, size, _ = self.live[self.starts[at]]
        return range_ if addr < self.starts[at] + size else None

    def cut(self, range_: _Range, addr: int, size: int, died: int) -> bool:
        """End what lies in ``[addr, addr + size)``; False if not all of it is mapped memory of the range."""
        end = addr + size
        at = first = bisect_right(self.starts, addr) - 1
        reach = addr
        while reach < end and 0 <= at < len(self.starts):
            start = self.starts[at]
            if start > reach or self.live[start][0] is not range_:
                return False
            reach = start + self.live[start][1]
            at += 1
        if reach < end:
            return False
        kept = []
        for start in self.starts[first:at]:
            _, length, born = self.live.pop(start)
            low, high = max(start, addr), min(start + length, end)
            self.rows.append((range_.row, low, high - low, born, died))
            for left, right in ((start, low), (high, start + length)):
                if left < right:
                    self.live[left] = (range_, right - left, born)
                    kept.append(left)
        self.starts[first:at] = kept
        return True

    def finish(self, end: int) -> Ints:
        """All pieces as rows of a table; those that live die at ``end``."""
        rows = self.rows + [(r.row, addr, size, born, end) for addr, (r, size, born) in self.live.items()]
        return np.array(rows, dtype=np.int64).reshape(-1, 5)


def segments_and_pieces(trace: Trace, decisions: Decisions, stood: int) -> tuple[SegmentTable, PieceTable]:
    """Follow what came from the driver and went back.

    Args:
        trace: that the decisions are about.
        decisions: what was done.
        stood: how many of them stand for what the recording began with.

    Raises:
        InputFileError: the decisions contradict each other.
        UsageError: expandable segments under a conf or a release that is not known.
    """
    ordinary = _ordinary(decisions)
    ranges, rows = _expandable(trace, decisions, stood, len(ordinary.addr))
    rows = np.concatenate([_as_pieces(ordinary), rows])
    table = _with_ranges(ordinary, ranges)
    order = np.argsort(table.born, kind="stable")
    row_of = np.empty(len(order), dtype=np.int64)
    row_of[order] = np.arange(len(order))
    rows = rows[np.argsort(rows[:, 3], kind="stable")]
    segments = SegmentTable(*(getattr(table, name)[order] for name in SegmentTable.__slots__))
    return segments, PieceTable(row_of[rows[:, 0]], *(np.ascontiguousarray(rows[:, i]) for i in range(1, 5)))


def require(fine: npt.NDArray[np.bool_], what: str, at: Ints | None = None) -> None:
    """Refuse the Trace at the first decision that is not fine; ``at`` gives positions where rows are not decisions."""
    if not bool(np.all(fine)):
        row = int(np.argmin(fine))
        raise _contradiction(row if at is None else int(at[row]), what)


def _contradiction(position: int, what: str) -> InputFileError:
    return InputFileError("the trace", f"is inconsistent: decision {position} {what}")


def _ordinary(decisions: Decisions) -> SegmentTable:
    """Match each segment's return with its arrival: at one address they alternate."""
    took, gave = DecisionKind.SEGMENT_ALLOC, DecisionKind.SEGMENT_FREE
    rows = np.flatnonzero((decisions.kind == took) | (decisions.kind == gave))
    order = np.argsort(decisions.addr[rows], kind="stable")
    rows = rows[order]
    addr, size, is_alloc = decisions.addr[rows], decisions.size[rows], decisions.kind[rows] == took
    same = np.zeros(len(rows), dtype=bool)  # the row before is about the same address
    same[1:] = addr[1:] == addr[:-1]
    require(is_alloc | same, "returns a segment that was not there", rows)
    alternates = np.ones(len(rows), dtype=bool)
    alternates[1:] = ~same[1:] | (is_alloc[1:] != is_alloc[:-1])
    require(alternates, "takes or returns a segment twice", rows)
    fits = np.ones(len(rows), dtype=bool)
    fits[1:] = is_alloc[1:] | (size[1:] == size[:-1])
    require(fits, "returns a segment of another size than was taken", rows)
    follows = np.zeros(len(rows), dtype=bool)
    follows[:-1] = same[1:]  # a return follows, since the rows of one address alternate
    died = np.full(len(rows), len(decisions), dtype=np.int64)
    died[:-1][follows[:-1]] = rows[1:][follows[:-1]]
    born = rows[is_alloc]
    return SegmentTable(
        addr=decisions.addr[born].astype(np.int64),
        size=decisions.size[born].astype(np.int64),
        stream=decisions.stream[born].astype(np.int64),
        pool=decisions.pool[born].astype(np.int64),
        page=np.zeros(len(born), dtype=np.int64),
        born=born.astype(np.int64),
        died=died[is_alloc],
    )


def _as_pieces(segments: SegmentTable) -> Ints:
    row = np.arange(len(segments.addr), dtype=np.int64)
    return np.stack([row, segments.addr, segments.size, segments.born, segments.died], axis=1)


def _with_ranges(segments: SegmentTable, ranges: list[_Range]) -> SegmentTable:
    rows = [(r.base, r.top - r.base, r.key[0], r.key[1], r.page, r.born, r.died) for r in ranges]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 7).T
    names = SegmentTable.__slots__
    return SegmentTable(*(np.concatenate([getattr(segments, n), c]) for n, c in zip(names, columns, strict=True)))


# --- expandable segments ------------------------------------------------------------------------------------------


def _expandable(trace: Trace, decisions: Decisions, stood: int, first_row: int) -> tuple[list[_Range], Ints]:
    """Expandable segments, numbered from ``first_row``, and their pieces as columns of a ``PieceTable``."""
    maps = decisions.kind == DecisionKind.SEGMENT_MAP
    at = np.flatnonzero(maps | (decisions.kind == DecisionKind.SEGMENT_UNMAP))
    pieces, ranges = _Pieces(), _Ranges(trace.device_total, first_row, len(decisions))
    columns = (at, maps[at], decisions.addr[at], decisions.size[at], decisions.stream[at], decisions.pool[at])
    pages_at_start = {s.addr: s.page for s in trace.initial if s.expandable}
    small = _is_small(trace, decisions, at) if len(at) else at
    for position, is_map, addr, size, stream, pool, is_small in zip(
        *(c.tolist() for c in columns), small.tolist(), strict=True
    ):
        if size <= 0:
            raise _contradiction(position, "maps or unmaps nothing")
        if is_map:
            if position < stood:
                page = pages_at_start.get(addr)
                if page is None:
                    raise _contradiction(position, "maps what did not stand when recording began")
                range_ = ranges.stood(addr, (stream, pool, page == _SMALL_PAGE), page, position)
            else:
                range_ = ranges.of(addr, (stream, pool, is_small), position)
            range_.take(addr, size)
            if not pieces.add(range_, addr, size, position):
                raise _contradiction(position, "maps memory that is mapped")
        else:
            unmapped = pieces.range_at(addr)
            if unmapped is None or not pieces.cut(unmapped, addr, size, position):
                raise _contradiction(position, "unmaps memory that is not mapped")
            unmapped.give(addr, size)
            if unmapped.mapped == 0:
                ranges.drop(unmapped, position)
    pages = _PageSizes(trace, decisions)
    for range_ in ranges.all:
        if not range_.stood:
            range_.page = _SMALL_PAGE if range_.key[2] else pages.of(range_)
        if range_.grain % range_.page:
            raise _contradiction(range_.born, "begins an expandable segment of which parts of pages are mapped")
    return ranges.all, pieces.finish(len(decisions))


def _is_small(trace: Trace, decisions: Decisions, at: Ints) -> npt.NDArray[np.bool_]:
    """Whether the requests that these decisions served belong to the small size class."""
    request = decisions.request[at]
    require((request >= 0) & (request < len(trace.requests)), "serves a request that is not there", at)
    small: npt.NDArray[np.bool_] = trace.requests.size[request] <= _SMALL_REQUEST
    return small


class _Ranges:
    """The expandable segments that hold mapped pages, by address.

    Args:
        total: bytes of device memory in all, None where unknown: then addresses of one stream, pool and size class
            belong together.
        first_row: number of the first segment.
        end: position after the last decision.
    """

    def __init__(self, total: int | None, first_row: int, end: int) -> None:
        # Each reserves addresses for nine eighths of the device (ExpandableSegment's constructor).
        self._reach = 2**62 if total is None else total + total // 8
        self._first_row = first_row
        self._end = end
        self._bases: list[int] = []
        self._live: dict[int, _Range] = {}
        self.all: list[_Range] = []

    def stood(self, addr: int, key: tuple[int, int, bool], page: int, position: int) -> _Range:
        """The range that memory mapped when recording began belongs to; asked in the order of addresses.

        One and the same range counts as such however far it reaches: on which card that was, a replay's Trace does not
        say, and where two of one kind follow each other, nothing but their number depends on it.
        """
        at = bisect_right(self._bases, addr) - 1
        found = self._live[self._bases[at]] if at >= 0 else None
        if found is None or (found.key, found.page) != (key, page) or not found.is_on_page(addr):
            found = self._new(addr, key, position)
            found.stood, found.page = True, page
        found.end = addr + self._reach
        return found

    def of(self, addr: int, key: tuple[int, int, bool], position: int) -> _Range:
        """The range that a mapping belongs to; a new one begins with the mapping."""
        at = bisect_right(self._bases, addr) - 1
        if at >= 0:
            found = self._live[self._bases[at]]
            if found.may_hold(addr, key):
                return found
            if found.base == addr:
                raise _contradiction(position, "maps memory that is mapped")
        above = self._live[self._bases[at + 1]] if at + 1 < len(self._bases) else None
        if above is not None and above.may_begin(addr, self._reach, key):
            self._begin(above, addr)
            return above
        return self._new(addr, key, position)

    def drop(self, range_: _Range, position: int) -> None:
        """Its last page is unmapped: memory at these addresses would be another expandable segment's."""
        range_.died = position
        del self._live[range_.base]
        self._bases.remove(range_.base)

    def _new(self, addr: int, key: tuple[int, int, bool], position: int) -> _Range:
        new = _Range(self._first_row + len(self.all), addr, addr + self._reach, key, position, self._end)
        insort(self._bases, addr)
        self._live[addr] = new
        self.all.append(new)
        return new

    def _begin(self, range_: _Range, addr: int) -> None:
        """A range that stood when recording began turns out to begin lower."""
        del self._live[range_.base]
        self._bases.remove(range_.base)
        range_.base = addr
        insort(self._bases, addr)
        self._live[addr] = range_


class _PageSizes:
    """Bytes that expandable segments of the large size class map at a time: ``large_segment_size`` when they began.

    That can be before their first mapping, if the request they were made for failed, and whether a replay heeded the
    settings that the program changed is not written down. So of the sizes that were set until then, it is the newest
    that agrees with what was mapped. It can be wrong only where a program changes that size after a failed request.
    """

    def __init__(self, trace: Trace, decisions: Decisions) -> None:
        self._trace = trace
        self._decisions = decisions
        self._known: list[tuple[int, int]] | None = None  # request row from which on, bytes

    def of(self, range_: _Range) -> int:
        """The page of an expandable segment of the large size class."""
        if self._known is None:
            self._known = self._read()
        row = int(self._decisions.request[range_.born])
        candidates = [page for since, page in self._known if since < row]
        if len(set(candidates)) > 1:
            needed, first = self._needed(range_.born, row), int(self._decisions.size[range_.born])
            for page in reversed(candidates):
                if range_.grain % page == 0 and -(-needed // page) * page == first:
                    return page
        return candidates[0]

    def _needed(self, position: int, row: int) -> int:
        """Bytes that a new range was mapped for: the block then cut from its base, or what was asked for."""
        d = self._decisions
        at = position + 1
        while at < len(d) and d.request[at] == row:
            if d.kind[at] == DecisionKind.ALLOC and d.addr[at] == d.addr[position]:
                return int(d.size[at])
            at += 1
        return int(self._trace.requests.size[row])

    def _read(self) -> list[tuple[int, int]]:
        trace = self._trace
        rules = NEWEST if trace.torch is None else rules_for(trace.torch).rules
        conf: Conf = parse_conf(trace.settings.conf, rules)
        out = [(-1, conf.large_segment_size)]
        for row in np.flatnonzero(trace.requests.kind == RequestKind.SETTINGS).tolist():
            conf = parse_conf(trace.confs[int(trace.requests.size[row])], rules, conf)
            out.append((row, conf.large_segment_size))
        return out
