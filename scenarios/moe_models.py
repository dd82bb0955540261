"""Presets of scenarios: shapes of real models, cut to one rank."""

from __future__ import annotations

from fragscope.thresholds import shipped_models


def preset(name: str, tp: int, layers: int) -> dict[str, int]:
    """Values of a preset: one rank's shape, and how many layers are loaded."""
    model = shipped_models()[name].sharded(tp)
    return {
        "experts": model.experts,
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "layers": layers,
    }


def launched(name: str, tokens: int) -> dict[str, int]:
    """Values of a preset: a whole layer, as expert parallelism leaves it, and the tokens that it is given."""
    model = shipped_models()[name]
    return {
        "experts": model.experts,
        "top_k": model.top_k,
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "tokens": tokens,
    }
