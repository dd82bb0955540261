"""Shapes of real models, cut to one rank."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MoeModel:
    """One mixture-of-experts layer of a model; see models.toml for the meaning of each field."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    gated: bool
    source: str
    layers: int | None = None

    @property
    def w13_rows(self) -> int:
        """Rows of one expert's first matrix."""
        return self.intermediate * (2 if self.gated else 1)

    def sharded(self, tp: int) -> MoeModel:
        """The part of one rank under tensor parallelism: each expert's width is divided."""
        if self.intermediate % tp:
            raise ValueError(f"{self.name}: {self.intermediate} is not divisible by {tp}")
        return MoeModel(
            self.name,
            self.experts,
            self.top_k,
            self.hidden,
            self.intermediate // tp,
            self.gated,
            self.source,
            self.layers,
        )


@cache
def models() -> dict[str, MoeModel]:
    """All models of models.toml by name."""
    with Path(__file__).with_name("models.toml").open("rb") as f:
        return {name: MoeModel(name=name, **fields) for name, fields in tomllib.load(f).items()}


def preset(name: str, tp: int, layers: int) -> dict[str, int]:
    """Values of a scenario's preset: one rank's shape, and how many layers are loaded."""
    model = models()[name].sharded(tp)
    return {
        "experts": model.experts,
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "layers": layers,
    }


def gated_preset(name: str, tp: int, layers: int) -> dict[str, int | bool]:
    """As ``preset``, and whether the experts are gated, for code that serves both kinds."""
    return {**preset(name, tp, layers), "gated": models()[name].gated}


def whole_preset(name: str, tp: int) -> dict[str, int]:
    """As ``preset``, with all layers of the model that have experts.

    Raises:
        ValueError: models.toml does not say how many there are.
    """
    layers = models()[name].layers
    if layers is None:
        raise ValueError(f"{name}: models.toml has no number of layers")
    return preset(name, tp, layers)
