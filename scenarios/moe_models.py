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


def gated_preset(name: str, tp: int, layers: int) -> dict[str, int | bool]:
    """As ``preset``, and whether the experts are gated, for code that serves both kinds."""
    return {**preset(name, tp, layers), "gated": shipped_models()[name].gated}


def whole_preset(name: str, tp: int) -> dict[str, int]:
    """As ``preset``, with all layers of the model that have experts.

    Raises:
        ValueError: models.toml does not say how many there are.
    """
    layers = shipped_models()[name].layers
    if layers is None:
        raise ValueError(f"{name}: models.toml has no number of layers")
    return preset(name, tp, layers)
