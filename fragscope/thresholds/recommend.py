"""How many tokens a launch should have: what the grid, upstream's experience and memory allow, and what is enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from fragscope.allocator import Assumption, ReplaySettings
from fragscope.thresholds.launch_grid import TILES, most_tokens
from fragscope.thresholds.launch_memory import Launch
from fragscope.thresholds.launch_peak import LaunchPeak, launch_peak, memory_limit
from fragscope.thresholds.models import MoeModel
from fragscope.units import MOST_MEMORY

UPSTREAM_CAP = 300_000
"""Tokens in a launch at most, as vLLM measured: from 305,000 on, Nemotron 3 Super's kernels made illegal accesses;
nobody found the cause. Source: vLLM 0.22.0, ``trtllm_nvfp4_moe.py``, ``_get_chunk_size`` (#43599)."""

PADDING = 10
"""Rows of work for each row of padding, at least, in the recommended chunk under the worst routing: the smallest chunk
that keeps this is enough. A launch pads up to ``tile - 1`` rows for each expert, whatever its tokens; smaller chunks
also read all weights more often. How long either takes was not measured here."""

Limit = Literal["launch grid", "upstream cap", "memory"]
_POINTS = 48  # of a curve


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The limits of one model's launch, at one tile size.

    Attributes:
        model: the layer.
        tile: rows of a tile.
        grid: tokens that the launch's grid has room for, by tile size.
        memory: tokens whose launch fits into memory; an upper bound.
        largest: tokens of the largest launch that all limits allow.
        binds: the limit that makes it so.
        chunk: the recommended chunk; never more than the largest.
        at_largest: what a launch of the largest needs.
        at_chunk: what a launch of the recommended chunk needs.
        curve: what launches need, by ascending tokens, with as much memory as they want.
        assumptions: what the memory limit takes for granted.
    """

    model: MoeModel
    tile: int
    grid: dict[int, int]
    memory: int
    largest: int
    binds: Limit
    chunk: int
    at_largest: LaunchPeak
    at_chunk: LaunchPeak
    curve: tuple[LaunchPeak, ...]
    assumptions: tuple[Assumption, ...]


def upstream_chunk(launch: Launch) -> int:
    """The rule of vLLM 0.22.0: its cap, or what the grid has room for. Memory plays no part in it."""
    return min(UPSTREAM_CAP, launch.most_tokens())


def enough(launch: Launch) -> int:
    """The smallest number of tokens of which a launch pads at most one row in ``PADDING`` under the worst routing."""
    return -(-PADDING * launch.experts * (launch.tile - 1) // launch.top_k)


def recommended_chunk(launch: Launch, settings: ReplaySettings) -> int:
    """Tokens of a launch that is large enough and keeps all limits; 0 where no launch fits into memory."""
    wanted = min(enough(launch), upstream_chunk(launch))
    if launch_peak(launch, wanted, settings).fits:
        return wanted
    return min(wanted, memory_limit(launch, settings).tokens)


def thresholds(model: MoeModel, tile: int, settings: ReplaySettings) -> Thresholds:
    """All limits of a model's launch.

    Args:
        model: the layer on one rank.
        tile: rows of a tile.
        settings: conf, rules and card; ``capacity`` is what launches may take from the driver.
    """
    launch = Launch.of(model, tile)
    memory = memory_limit(launch, settings)
    limits: dict[Limit, int] = {
        "launch grid": launch.most_tokens(),
        "upstream cap": UPSTREAM_CAP,
        "memory": memory.tokens,
    }
    binds = min(limits, key=lambda name: limits[name])
    largest = limits[binds]
    chunk = min(enough(launch), largest)
    plenty = replace(settings.with_capacity(MOST_MEMORY), total=MOST_MEMORY)

    def peak(tokens: int) -> LaunchPeak:
        if tokens == 0:  # nothing is launched
            return LaunchPeak(0, 0, 0, 0, 0, fits=True)
        return launch_peak(launch, tokens, plenty)

    return Thresholds(
        model=model,
        tile=tile,
        grid={t: most_tokens(model.top_k, model.experts, t) for t in sorted({*TILES, tile})},
        memory=memory.tokens,
        largest=largest,
        binds=binds,
        chunk=chunk,
        at_largest=peak(largest),
        at_chunk=peak(chunk),
        curve=_curve(launch, (largest, chunk, *limits.values()), peak),
        assumptions=memory.assumptions,
    )


def _curve(launch: Launch, marked: tuple[int, ...], peak: Callable[[int], LaunchPeak]) -> tuple[LaunchPeak, ...]:
    """Peaks at even steps up to the grid's limit, and at the tokens that are marked."""
    last = max(launch.most_tokens(), UPSTREAM_CAP)
    steps = {last * i // _POINTS for i in range(1, _POINTS + 1)}
    return tuple(peak(t) for t in sorted({1, *steps, *(m for m in marked if 0 < m <= last)}))
