"""Who holds memory at one moment: live blocks by the call stack that asked for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fragscope.measure.lifetimes import Lifetimes, lifetimes
from fragscope.trace import DecisionKind, RequestKind, Stack, Trace
from fragscope.trace.sizes import DRIVER_PAGE


@dataclass(frozen=True, slots=True)
class Holder:
    """Blocks that one call stack asked for.

    Attributes:
        stack: innermost frame first; empty where none was recorded.
        bytes: of the blocks.
        blocks: how many.
        requested: bytes that were asked for.
    """

    stack: Stack
    bytes: int
    blocks: int
    requested: int


def holders_at(trace: Trace, row: int, lives: Lifetimes | None = None) -> tuple[Holder, ...]:
    """Who holds the blocks that the program has after a request was served, most bytes first.

    Blocks that are freed and wait for another stream count no more. Of equal ones, who asked first comes first.

    Args:
        trace: with the decisions of a replay.
        row: of the request.
        lives: ``lifetimes(trace)`` where the caller has it.

    Raises:
        UsageError: the decisions lack block sizes, or there are none.
        InputFileError: the decisions contradict each other.
    """
    lives = lifetimes(trace) if lives is None else lives
    position = int(lives.upto[row])
    blocks = lives.blocks
    live = np.flatnonzero((blocks.born < position) & (blocks.released >= position))
    asked = np.flatnonzero(trace.requests.kind == RequestKind.ALLOC)
    order = np.argsort(trace.requests.id[asked], kind="stable")
    asking = asked[order][np.searchsorted(trace.requests.id[asked][order], blocks.id[live])]
    found: dict[int, tuple[int, int, int]] = {}
    columns = (trace.requests.stack[asking], blocks.size[live], blocks.requested[live])
    for stack, size, asked_for in zip(*(column.tolist() for column in columns), strict=True):
        held, count, requested = found.get(stack, (0, 0, 0))
        found[stack] = (held + size, count + 1, requested + asked_for)
    most = sorted(found.items(), key=lambda item: -item[1][0])
    return tuple(Holder(trace.stacks[stack], *figures) for stack, figures in most)


def raw_holders_at(trace: Trace, row: int) -> tuple[Holder, ...]:
    """Who holds memory of the driver past the allocator after a request was served, in the driver's pages."""
    r, d = trace.requests, trace.decisions
    failed = r.id[d.request[d.kind == DecisionKind.OOM]] if d is not None else r.id[:0]
    upto = slice(0, row + 1)
    freed = r.id[upto][r.kind[upto] == RequestKind.RAW_FREE]
    taken = (r.kind[upto] == RequestKind.RAW_ALLOC) & ~np.isin(r.id[upto], np.concatenate([freed, failed]))
    found: dict[int, tuple[int, int, int]] = {}
    for stack, size in zip(r.stack[upto][taken].tolist(), r.size[upto][taken].tolist(), strict=True):
        held, count, requested = found.get(stack, (0, 0, 0))
        found[stack] = (held + -(-size // DRIVER_PAGE) * DRIVER_PAGE, count + 1, requested + size)
    most = sorted(found.items(), key=lambda item: -item[1][0])
    return tuple(Holder(trace.stacks[stack], *figures) for stack, figures in most)
