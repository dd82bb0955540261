"""Why a request fails: what it asked for, what was left, and the idle bytes that it was not given."""

from __future__ import annotations

from dataclasses import dataclass

from fragscope.allocator import Conf, ReplaySettings, Tape, parse_conf, replay
from fragscope.allocator.engine.sizes import SMALL_SEGMENT, SMALL_SIZE, page_bytes, segment_bytes
from fragscope.measure import SegmentLayout, layout_at
from fragscope.trace import RequestKind, Trace
from fragscope.trace.sizes import driver_pages

_REASONS = {
    "other_pool": "in another memory pool",
    "other_stream": "cached for another stream",
    "other_size_class": "kept for requests of the other size class, up to 1 MiB or above",
    "too_small": "in pieces smaller than the request, beside live blocks",
    "split_limit": "large enough, but max_split_size_mb keeps it for requests of another size",
    "large_enough": "large enough, but kept for another use",
    "waiting": "freed, but still in use by another stream",
}


@dataclass(frozen=True, slots=True)
class Idle:
    """Bytes that nobody used when a request failed, and that were no use to it.

    Attributes:
        code: stable identifier of the reason.
        detail: the reason for people.
        bytes: all of them.
        largest: the largest contiguous piece.
        pieces: how many.
    """

    code: str
    detail: str
    bytes: int
    largest: int
    pieces: int


@dataclass(frozen=True, slots=True)
class Failure:
    """The first request that failed, and what stood once everything that could be released was; bytes.

    Attributes:
        capacity: what segments could take together.
        event: row of the request.
        requested: asked for.
        rounded: the block for it.
        stream: asked for on; None where it was asked of the driver itself.
        frame: innermost frame of the call stack, ``""`` where none is recorded.
        reserved: held from the driver.
        allocated: in live blocks.
        stranded: idle, beside live blocks.
        raw: taken past the allocator.
        left: what the driver still had.
        needed: what a new segment takes, or pages of an expandable one if none of them hold idle memory yet.
        idle: idle bytes by why they were no use, most first.
    """

    capacity: int
    event: int
    requested: int
    rounded: int
    stream: int | None
    frame: str
    reserved: int
    allocated: int
    stranded: int
    raw: int
    left: int
    needed: int
    idle: tuple[Idle, ...]


def failure_of(tape: Tape, settings: ReplaySettings, compiled: bool | None = None) -> Failure | None:
    """The first request that fails under these settings; None where none does."""
    replayed = replay(tape, settings, stop_at_oom=True, compiled=compiled)
    if not replayed.ooms:
        return None
    trace, now = replayed.trace, replayed.whole.end
    event, rounded = replayed.ooms[0].event, replayed.ooms[0].rounded
    stream, pool = int(trace.requests.stream[event]), int(trace.requests.pool[event])
    conf = parse_conf(settings.conf, settings.rules.rules)
    is_raw = trace.requests.kind[event] == RequestKind.RAW_ALLOC  # of the driver itself, which no idle block serves
    return Failure(
        capacity=settings.capacity,
        event=event,
        requested=int(trace.requests.size[event]),
        rounded=rounded,
        stream=None if is_raw else stream,
        frame=_frame(trace, event),
        reserved=now.reserved,
        allocated=now.allocated,
        stranded=now.stranded,
        raw=now.raw,
        left=max(0, settings.capacity - now.hbm),
        needed=driver_pages(rounded) if is_raw else _needed(rounded, conf),
        idle=() if is_raw else _idle(layout_at(trace, event), rounded, stream, pool, conf),
    )


def _needed(rounded: int, conf: Conf) -> int:
    if conf.expandable_segments:
        return page_bytes(rounded, conf.large_segment_size)
    return segment_bytes(rounded, conf.large_segment_size)


def _frame(trace: Trace, event: int) -> str:
    stack = trace.stacks[int(trace.requests.stack[event])]
    return str(stack[0]) if stack else ""


def _idle(segments: tuple[SegmentLayout, ...], rounded: int, stream: int, pool: int, conf: Conf) -> tuple[Idle, ...]:
    pieces: dict[str, list[int]] = {}
    for segment in segments:
        for block in segment.blocks:
            if block.state == "pending":
                pieces.setdefault("waiting", []).append(block.size)
            elif block.state == "free":
                code = _why(segment, block.size, rounded, stream, pool, conf)
                pieces.setdefault(code, []).append(block.size)
    found = (Idle(code, _REASONS[code], sum(sizes), max(sizes), len(sizes)) for code, sizes in pieces.items())
    return tuple(sorted(found, key=lambda idle: (-idle.bytes, idle.code)))


def _why(segment: SegmentLayout, hole: int, rounded: int, stream: int, pool: int, conf: Conf) -> str:
    if segment.pool != pool:
        return "other_pool"
    if segment.stream != stream:
        return "other_stream"
    if ((segment.page or segment.size) <= SMALL_SEGMENT) != (rounded <= SMALL_SIZE):
        return "other_size_class"
    if hole < rounded:
        return "too_small"
    limit = conf.max_split_size
    if (rounded < limit <= hole) or (rounded >= limit and hole >= rounded + conf.max_non_split_rounding):
        return "split_limit"
    return "large_enough"
