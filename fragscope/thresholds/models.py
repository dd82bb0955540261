"""Shapes of mixture-of-experts models: those that are shipped, and those of a user's file."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fragscope.errors import UsageError
from fragscope.toml import TomlFile, nearest, quoted, read_toml

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
_NUMBERS = {"experts": 1 << 16, "top_k": 1 << 10, "hidden": 1 << 20, "intermediate": 1 << 20, "layers": 1 << 12}
"""Keys that hold integers, and the largest accepted: far beyond any model."""
_NEEDED = ("experts", "top_k", "hidden", "intermediate")
_KEYS = (*_NUMBERS, "gated", "source")
_BLOCK = 16  # values that share one NVFP4 scale


@dataclass(frozen=True, slots=True)
class MoeModel:
    """One mixture-of-experts layer of a model, before tensor or expert parallelism.

    Attributes:
        name: what ``--model`` takes.
        experts: routed experts in a layer.
        top_k: experts a token goes to.
        hidden: hidden size the experts see.
        intermediate: width of one expert.
        gated: whether the first matrix holds gate and up projection, or the up projection only.
        source: where the shape was read.
        layers: layers with routed experts in the model; None where no source was found.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    gated: bool = True
    source: str = ""
    layers: int | None = None

    @property
    def w13_rows(self) -> int:
        """Rows of one expert's first matrix."""
        return self.intermediate * (2 if self.gated else 1)

    def sharded(self, tp: int) -> MoeModel:
        """The part of one rank under tensor parallelism: each expert's width is divided."""
        if self.intermediate % tp:
            raise ValueError(f"{self.name}: {self.intermediate} is not divisible by {tp}")
        return replace(self, intermediate=self.intermediate // tp)


@cache
def shipped_models() -> dict[str, MoeModel]:
    """The models that come with fragscope, by name."""
    return load_models(Path(__file__).with_name("models.toml"))


def load_models(path: Path) -> dict[str, MoeModel]:
    """Models of a file in the form of the shipped ``models.toml``, by name. It may come from strangers.

    Raises:
        InputFileError: unreadable, too large, not TOML, or with a table, key or value that means nothing; names the
            line and the key.
    """
    toml = read_toml(path, str(path), "models")
    if not toml.content:
        raise toml.error(
            (), "holds no model; write a table such as [my-model] with experts, top_k, hidden, intermediate"
        )
    return {name: _model(toml, name, table) for name, table in toml.content.items()}


def chosen(models: dict[str, MoeModel], names: tuple[str, ...]) -> list[MoeModel]:
    """The models of these names, in the order of the table; all of them where none is named.

    Raises:
        UsageError: there is none of a name; the nearest one is in the message.
    """
    for name in names:
        if name not in models:
            raise UsageError(f"--model: no model named {quoted(name)}; {nearest(name, tuple(models))}")
    return [model for model in models.values() if not names or model.name in names]


def _model(toml: TomlFile, name: str, table: Any) -> MoeModel:
    if not _NAME.fullmatch(name):
        raise toml.error((name,), f"{quoted(name)} names no model; use lower-case letters, digits, '.', '_' and '-'")
    if not isinstance(table, dict):
        raise toml.error((name,), f"{name} is not a table; write [{quoted(name)}] and its keys below")
    for key, value in table.items():
        if key not in _KEYS:
            raise toml.error((name, key), f"{name}: unknown key {quoted(key)}; {nearest(key, _KEYS)}")
        _check(toml, name, key, value)
    for key in _NEEDED:
        if key not in table:
            raise toml.error((name,), f"{name}: {key} is missing; a model needs {', '.join(_NEEDED)}")
    model = MoeModel(name=name, **table)
    if model.top_k > model.experts:
        raise toml.error((name, "top_k"), f"{name}: top_k is {model.top_k}, but there are {model.experts} experts")
    return model


def _check(toml: TomlFile, name: str, key: str, value: object) -> None:
    path = (name, key)
    if key in _NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _NUMBERS[key]:
            raise toml.error(path, f"{name}: {key} is {quoted(value)}; write an integer from 1 to {_NUMBERS[key]:,}")
        if key in ("hidden", "intermediate") and value % _BLOCK:
            raise toml.error(path, f"{name}: {key} is {value}; NVFP4 needs a multiple of {_BLOCK}")
    elif key == "gated" and not isinstance(value, bool):
        raise toml.error(path, f"{name}: gated is {quoted(value)}; write true or false")
    elif key == "source" and not (isinstance(value, str) and value.isprintable() and len(value) <= 200):
        raise toml.error(path, f"{name}: source is not one printable line of at most 200 characters")
