"""How many tokens one launch of a mixture-of-experts kernel may have: by its grid, by memory, and by experience."""

from fragscope.thresholds.launch_grid import MAX_GRID_Y, TILES, ctas, most_tokens
from fragscope.thresholds.launch_memory import FREED, Buffer, Launch
from fragscope.thresholds.launch_peak import LaunchPeak, MemoryLimit, launch_peak, launch_trace, memory_limit
from fragscope.thresholds.models import MoeModel, chosen, load_models, shipped_models
from fragscope.thresholds.recommend import (
    PADDING,
    UPSTREAM_CAP,
    Thresholds,
    enough,
    recommended_chunk,
    thresholds,
    upstream_chunk,
)

__all__ = [
    "FREED",
    "MAX_GRID_Y",
    "PADDING",
    "TILES",
    "UPSTREAM_CAP",
    "Buffer",
    "Launch",
    "LaunchPeak",
    "MemoryLimit",
    "MoeModel",
    "Thresholds",
    "chosen",
    "ctas",
    "enough",
    "launch_peak",
    "launch_trace",
    "load_models",
    "memory_limit",
    "most_tokens",
    "recommended_chunk",
    "shipped_models",
    "thresholds",
    "upstream_chunk",
]
