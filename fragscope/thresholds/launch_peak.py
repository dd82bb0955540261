"""What a launch takes from the driver: its allocations, served by the allocator model."""

from __future__ import annotations

from dataclasses import dataclass

from fragscope.allocator import Assumption, Replay, ReplaySettings, replay
from fragscope.thresholds.launch_memory import FREED, Launch
from fragscope.trace import RequestKind, RequestLog, Trace

_STEPS = 0.97  # factor between the numbers of tokens that are tried below an answer
_NEAR = 16  # tokens below an answer that are all tried


@dataclass(frozen=True, slots=True)
class LaunchPeak:
    """The most that one launch needs at once, in an allocator that holds nothing else; bytes.

    Attributes:
        tokens: of the launch.
        ctas: of its grid's y dimension.
        requested: asked for.
        allocated: in blocks handed out.
        reserved: taken from the driver.
        fits: whether every allocation was served.
    """

    tokens: int
    ctas: int
    requested: int
    allocated: int
    reserved: int
    fits: bool


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """How many tokens of one launch fit into memory.

    A larger launch can need less: a buffer that grows past 10 MiB moves from a shared segment of 20 MiB to its own. So
    the answer is the largest number from which on downwards all that were tried fit.

    Attributes:
        tokens: the answer; 0 where not even one token fits.
        tried: numbers of tokens tried.
        assumptions: what the answer takes for granted.
    """

    tokens: int
    tried: int
    assumptions: tuple[Assumption, ...]


def launch_trace(launch: Launch, tokens: int) -> Trace:
    """One launch as requests, all on the default stream."""
    log, ids = RequestLog(), {}
    for id_, buffer in enumerate(launch.buffers(tokens)):
        log.append(RequestKind.ALLOC, id=id_, size=buffer.nbytes)
        ids[buffer.name] = id_
    for name in FREED:
        log.append(RequestKind.FREE, id=ids[name])
    return Trace(requests=log.finish())


def launch_peak(launch: Launch, tokens: int, settings: ReplaySettings) -> LaunchPeak:
    """The peak of one launch under a conf, a release's rules and a card."""
    done = _played(launch, tokens, settings)
    peak = done.whole.peak
    return LaunchPeak(tokens, launch.ctas(tokens), peak.requested, peak.allocated, peak.reserved, not done.ooms)


def memory_limit(launch: Launch, settings: ReplaySettings) -> MemoryLimit:
    """The most tokens for which a launch fits into ``settings.capacity``.

    An upper bound, since what the kernels themselves need is not known; and what else is in memory is not counted.
    """
    tried: dict[int, bool] = {}

    def fits(tokens: int) -> bool:
        if tokens not in tried:
            tried[tokens] = launch_peak(launch, tokens, settings).fits
        return tried[tokens]

    def boundary(low: int, high: int) -> int:
        """The last that fits before one that does not, between one that fits (or 0) and one that does not."""
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    high = 1
    while fits(high):  # what is asked for grows with tokens, so this ends
        high *= 2
    answer = boundary(high // 2, high)
    while answer:
        below = [t for t in _below(answer) if not fits(t)]
        if not below:
            break
        answer = boundary(0, min(below))
    return MemoryLimit(answer, len(tried), _played(launch, answer, settings).assumptions if answer else ())


def _below(answer: int) -> list[int]:
    """The numbers next below an answer, then ever smaller ones in steps that widen."""
    out = list(range(max(1, answer - _NEAR), answer))
    step = answer * _STEPS
    while step >= 1:
        out.append(int(step))
        step *= _STEPS
    return out


def _played(launch: Launch, tokens: int, settings: ReplaySettings) -> Replay:
    return replay(launch_trace(launch, tokens), settings, decisions=False, compiled=False)
