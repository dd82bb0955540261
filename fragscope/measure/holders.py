"""Who holds memory at one moment: live blocks by the call stack that asked for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fragscope.measure.lifetimes import Lifetimes, lifetimes
from fragscope.trace import RequestKind, Stack, Trace


@dataclass(frozen=True, slots=True)
class Holder:
    """Blocks that one call stack asked for.

    Attributes:
        stack: innermost frame first; empty where none was recorded.
        bytes: of the blocks.
        blocks: how many.
    """

    stack: Stack
    bytes: int
    blocks: int


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
    found: dict[int, tuple[int, int]] = {}
    for stack, size in zip(trace.requests.stack[asking].tolist(), blocks.size[live].tolist(), strict=True):
        held, count = found.get(stack, (0, 0))
        found[stack] = (held + size, count + 1)
    most = sorted(found.items(), key=lambda item: -item[1][0])
    return tuple(Holder(trace.stacks[stack], held, count) for stack, (held, count) in most)
