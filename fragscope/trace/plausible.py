"""What a trace can be: the bounds of its numbers, and what must have begun before it ends.

Readers see to it that a file's parts fit together. Whether the numbers are such as a device and a program could have
made is decided here, for every format alike, before anything is computed from them:

* **memory** (capacity, device total, a segment, all segments that stand at once): at most ``MOST_MEMORY``, 16 TiB.
  The largest device has 0.3 TiB, and modelled address ranges, as long as the device is large, stay within 64 bits.
* **addresses**: below ``MOST_ADDRESS``, 2**60. Page tables address 57 bits; the ranges that the model makes up go
  beyond them only in theory, and an address with a size added stays within 64 bits.
* **requested bytes**: below 2**62. A program may ask for more than any device has, and is refused; twice as much, which
  rounding may make of it, is within 64 bits.
* **all decided sizes together**: below 2**62, so that no sum over a recording wraps. A year at 100 GB/s is 2**62.
* **private pools**: at most ``MOST_POOLS``. Each takes some kilobytes in a replay, whether it is used or not.
* **ids, streams**: -1, which is "none" or "unknown", or a number below 2**63, as the columns hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fragscope.errors import InputFileError
from fragscope.trace.events import (
    FRACTION_UNIT,
    NO_ID,
    UNKNOWN_SIZE,
    UNKNOWN_STREAM,
    Column,
    DecisionKind,
    Decisions,
    RequestKind,
)
from fragscope.trace.trace import DEFAULT_POOL, SegmentState, Trace
from fragscope.units import MOST_MEMORY, format_bytes

MOST_ADDRESS = 2**60
MOST_REQUESTED = 2**62 - 1  # bytes
MOST_POOLS = 1 << 16
_MOST_TRAFFIC = 2**62  # bytes of all decisions together
_MOST_INTEGER = 2**63 - 1
_POOL_OPTIONS = 3  # use_on_oom and no_split


def check_plausible(trace: Trace, path: Path) -> None:
    """Refuse a Trace that no device and program can have made.

    Args:
        trace: its indices must point at something.
        path: the file it came from, for errors.

    Raises:
        InputFileError: naming what is wrong, with the row or segment that is.
    """
    check = _Check(path)
    check.settings(trace)
    check.requests(trace)
    if trace.decisions is not None:
        check.decisions(trace.decisions)
    check.raw(trace)
    check.users(trace)
    check.phases(trace)
    check.segments(trace.final or (), "the end")
    check.start(trace)
    check.segments(trace.initial, "the start")
    check.held(trace)


class _Check:
    """Each method checks one part and raises for the first thing that cannot be."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _refuse(self, why: str) -> InputFileError:
        return InputFileError(self._path, f"is inconsistent: {why}")

    def _within(self, rows: Column, column: Column, low: int, high: int, table: str, what: str) -> None:
        """Whether a column's values in some rows lie between two bounds, both allowed."""
        values = column[rows]
        wrong = np.flatnonzero((values < low) | (values > high))
        if len(wrong):
            row, value = int(rows[wrong[0]]), int(values[wrong[0]])
            raise self._refuse(f"{table} {row}: {what} {value} is not between {low} and {high}")

    def settings(self, trace: Trace) -> None:
        fraction = trace.settings.memory_fraction
        if fraction is not None and not 0.0 <= fraction <= 1.0:
            raise self._refuse(f"the memory fraction {fraction:g} is not between 0 and 1")
        for what, size, least in (
            ("capacity", trace.settings.capacity, 0),
            ("device_total", trace.device_total, 1),
        ):
            if size is not None and not least <= size <= MOST_MEMORY:
                raise self._refuse(f"{what} is {size:.4g} bytes; a device has up to {format_bytes(MOST_MEMORY)}")
        if not 0 <= trace.device <= _MOST_INTEGER:
            raise self._refuse("the device index is no such")
        if len(trace.pools) > MOST_POOLS:
            raise self._refuse(f"it names {len(trace.pools):,} pools; at most {MOST_POOLS:,} are read")
        if trace.pools[:1] != (DEFAULT_POOL,) or len(set(trace.pools)) < len(trace.pools):
            raise self._refuse("the default pool is not the first of its pools, or one is there twice")
        if any(not 0 <= part <= _MOST_INTEGER for pool in trace.pools for part in pool):
            raise self._refuse("a pool's id is no such")
        if any(not 0 <= loss.events <= _MOST_INTEGER for loss in trace.lost):
            raise self._refuse("a number of lost events is no such")

    def requests(self, trace: Trace) -> None:
        r = trace.requests
        every = np.arange(len(r))
        self._within(every, r.id, NO_ID, _MOST_INTEGER, "request", "id")
        self._within(every, r.size, UNKNOWN_SIZE, MOST_REQUESTED, "request", "size")
        self._within(every, r.stream, UNKNOWN_STREAM, _MOST_INTEGER, "request", "stream")
        self._within(every, r.thread, 0, _MOST_INTEGER, "request", "thread")
        fractions = np.flatnonzero(r.kind == RequestKind.MEMORY_FRACTION)
        self._within(fractions, r.size, 0, FRACTION_UNIT, "request", "memory fraction in billionths")
        made = np.flatnonzero(r.kind == RequestKind.POOL_CREATE)
        self._within(made, r.size, 0, _POOL_OPTIONS, "request", "pool options")
        private = np.flatnonzero(np.isin(r.kind, [*_ADD_USER, RequestKind.SCOPE_CLOSE, RequestKind.POOL_RELEASE]))
        self._within(private, r.pool, 1, _MOST_INTEGER, "request", "private pool")

    def decisions(self, d: Decisions) -> None:
        every, failed = np.arange(len(d)), d.kind == DecisionKind.OOM
        took, failures = np.flatnonzero(~failed), np.flatnonzero(failed)
        self._within(every, d.id, NO_ID, _MOST_INTEGER, "decision", "id")
        self._within(every, d.stream, UNKNOWN_STREAM, _MOST_INTEGER, "decision", "stream")
        self._within(took, d.addr, 0, MOST_ADDRESS, "decision", "address")
        self._within(took, d.size, UNKNOWN_SIZE, MOST_MEMORY, "decision", "size")
        # Less than nothing is free where a replay with little capacity begins with what stood.
        self._within(failures, d.addr, -MOST_ADDRESS, MOST_ADDRESS, "decision", "free memory")
        self._within(failures, d.size, 0, MOST_REQUESTED, "decision", "size")
        segments = np.flatnonzero(np.isin(d.kind, _SEGMENT_KINDS))
        self._within(segments, d.size, 1, MOST_MEMORY, "decision", "size")
        if float(np.sum(d.size[took], dtype=np.float64)) > _MOST_TRAFFIC:
            raise self._refuse("its decisions are about more bytes than any program can have moved")

    def raw(self, trace: Trace) -> None:
        """Memory taken past the allocator is given back once, after it was taken, and as much of it."""
        r, d = trace.requests, trace.decisions
        taken = np.flatnonzero(r.kind == RequestKind.RAW_ALLOC)
        given = np.flatnonzero(r.kind == RequestKind.RAW_FREE)
        served = taken if d is None else taken[~np.isin(taken, d.request[d.kind == DecisionKind.OOM])]
        if d is not None:  # bare requests may ask for what no device has
            self._within(served, r.size, 0, MOST_MEMORY, "request", "size past the allocator")
        if float(np.sum(r.size[served], dtype=np.float64)) > _MOST_TRAFFIC:
            raise self._refuse("it asks for more bytes past the allocator than any program can have moved")
        if not len(given):
            return
        given, taken = (rows[np.argsort(r.id[rows], kind="stable")] for rows in (given, taken))
        at = np.minimum(np.searchsorted(r.id[taken], r.id[given]), max(len(taken) - 1, 0))
        right = np.zeros(len(given), dtype=bool)
        if len(taken):
            own = taken[at]
            right = (r.id[own] == r.id[given]) & (r.size[own] == r.size[given]) & (own < given)
        right[1:] &= r.id[given][1:] != r.id[given][:-1]
        if not right.all():
            row = int(given[np.flatnonzero(~right)].min())
            raise self._refuse(f"request {row}: RAW_FREE of what was not taken, or of another size")

    def users(self, trace: Trace) -> None:
        """Scopes, users of private pools and captures: none ends that has not begun."""
        r = trace.requests
        for begins, ends, what in (
            (_ADD_USER, RequestKind.POOL_RELEASE, "a private pool that has no user"),
            ((RequestKind.SCOPE_OPEN,), RequestKind.SCOPE_CLOSE, "a scope that was not opened"),
            ((RequestKind.CAPTURE_BEGIN,), RequestKind.CAPTURE_END, "a capture that was not begun"),
        ):
            # Captures are of the process, so all of them count as of one pool; a file may write another beside them.
            of_pool = r.pool if ends != RequestKind.CAPTURE_END else np.zeros(len(r), dtype=np.int32)
            row = _first_unbegun(np.isin(r.kind, begins), r.kind == ends, of_pool)
            if row is not None:
                raise self._refuse(f"request {row}: {RequestKind(ends).name} of {what}")

    def phases(self, trace: Trace) -> None:
        """Measured phases have a name and follow each other."""
        r = trace.requests
        inside = 0
        for row in np.flatnonzero((r.kind == RequestKind.PHASE_BEGIN) | (r.kind == RequestKind.PHASE_END)).tolist():
            phase = int(r.phase[row])
            if r.kind[row] == RequestKind.PHASE_BEGIN:
                if inside or not phase:
                    raise self._refuse(f"request {row}: a measured phase begins inside another, or is none")
                inside = phase
            else:
                if phase != inside or not inside:
                    raise self._refuse(f"request {row}: a measured phase ends that did not begin")
                inside = 0

    def start(self, trace: Trace) -> None:
        """What stood at the start must be told by the first rows, one for each live block."""
        kind = trace.requests.kind
        held = np.flatnonzero(kind == RequestKind.HELD)
        starts = np.flatnonzero(kind == RequestKind.START)
        live = sum(state != "free" for s in trace.initial for _, _, state in s.blocks)
        right = len(held) == live and len(starts) == bool(trace.initial) and not starts.any()
        if right and len(held):
            before = kind[: int(held[-1])]
            right = bool(np.all(np.isin(before, [RequestKind.START, RequestKind.POOL_CREATE, RequestKind.HELD])))
        if not right:
            raise self._refuse("what stood at the start is not what its events say")

    def segments(self, segments: Sequence[SegmentState], when: str) -> None:
        """Segments are in order and apart, and blocks cover them."""
        end = total = 0
        for segment in segments:
            if not 0 <= segment.addr <= MOST_ADDRESS or not 0 < segment.size <= MOST_MEMORY:
                raise self._refuse(f"a segment at {when} lies where no memory can be")
            if not UNKNOWN_STREAM <= segment.stream <= _MOST_INTEGER:
                raise self._refuse(f"a segment at {when} is of no stream")
            at = segment.addr
            for addr, size, _ in segment.blocks:
                if addr != at or not 0 < size <= MOST_MEMORY:
                    raise self._refuse(f"blocks at {when} do not cover their segment")
                at += size
            if at != segment.addr + segment.size or segment.addr < end:
                raise self._refuse(f"segments at {when} overlap or have gaps")
            end = at
            total += segment.size
        if total > MOST_MEMORY:
            raise self._refuse(f"segments at {when} hold more than {format_bytes(MOST_MEMORY)}")

    def held(self, trace: Trace) -> None:
        """What was held at the start fits into its block, and is of its segment's pool and stream."""
        r = trace.requests
        rows = np.flatnonzero(r.kind == RequestKind.HELD).tolist()
        blocks = [(size, s.pool, s.stream) for s in trace.initial for _, size, state in s.blocks if state != "free"]
        for row, (size, pool, stream) in zip(rows, blocks, strict=True):
            if r.size[row] > size or r.pool[row] != pool or r.stream[row] != stream:
                raise self._refuse(f"request {row}: what was held at the start is not what its block holds")


_ADD_USER = (RequestKind.POOL_CREATE, RequestKind.SCOPE_OPEN)
_SEGMENT_KINDS = (
    DecisionKind.SEGMENT_ALLOC,
    DecisionKind.SEGMENT_FREE,
    DecisionKind.SEGMENT_MAP,
    DecisionKind.SEGMENT_UNMAP,
)


def _first_unbegun(begins: Column, ends: Column, of: Column) -> int | None:
    """The first row by which more has ended of something than had begun."""
    rows = np.flatnonzero(begins | ends)
    if not len(rows):
        return None
    order = np.argsort(of[rows], kind="stable")
    rows = rows[order]
    change = np.where(begins[rows], 1, -1)
    running = np.cumsum(change)
    is_first = np.append(True, of[rows][1:] != of[rows][:-1])
    before = np.where(is_first, running - change, 0)
    before = before[np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))]
    wrong = rows[running - before < 0]
    return int(wrong.min()) if len(wrong) else None
