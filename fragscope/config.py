"""What a repository sets once: the table ``[tool.fragscope]`` of the nearest pyproject.toml.

    [tool.fragscope]
    scenarios = ["scenarios"]     # files or folders that `fragscope run` collects
    budgets = "budgets.toml"      # what `fragscope gate` holds results against
    card = "h100-80gb"            # the default of --card
    torch = "2.11"                # the default of --torch
    out = ".fragscope"            # where results go

Options on the command line win over every key here.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fragscope.errors import InputFileError, UsageError, printable
from fragscope.units import MIB, format_bytes

_FILE_LIMIT = 4 * MIB
_KEYS = ("scenarios", "budgets", "card", "torch", "out")


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of a repository; None or empty where it sets nothing.

    Attributes:
        root: folder of the pyproject.toml that was read; None where there is none.
        scenarios: files or folders with scenarios, absolute.
        budgets: the budgets file, absolute.
        card: name of the default card.
        torch: the torch release whose rules apply by default.
        out: folder for results, absolute.
    """

    root: Path | None = None
    scenarios: tuple[Path, ...] = ()
    budgets: Path | None = None
    card: str | None = None
    torch: str | None = None
    out: Path | None = None


def load_config(start: Path | None = None) -> Config:
    """The settings of the nearest pyproject.toml at or above a folder; paths are resolved against that file.

    A pyproject.toml without the table ends the search too: the nearest one says what the repository is.

    Args:
        start: folder to begin at; the working directory where None.

    Raises:
        UsageError: an unknown key (with the nearest known one) or a value of the wrong type.
        InputFileError: the file cannot be read, or is not TOML.
    """
    folder = (Path.cwd() if start is None else start).resolve()
    for root in (folder, *folder.parents):
        file = root / "pyproject.toml"
        if file.is_file():
            return _config(file, _table(file))
    return Config()


def _table(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as f:
            raw = f.read(_FILE_LIMIT + 1)
    except OSError as e:
        raise InputFileError(file, (e.strerror or type(e).__name__).lower()) from None
    if len(raw) > _FILE_LIMIT:
        raise InputFileError(file, f"holds more than {format_bytes(_FILE_LIMIT)}; that is not a project file")
    try:
        content = tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:  # ValueError: bad UTF-8, bad TOML, or an integer of absurd length
        raise InputFileError(file, f"is not TOML: {e}") from None
    tool = content.get("tool", {})
    table = tool.get("fragscope", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise UsageError(f"{printable(str(file))}: [tool.fragscope] is not a table")
    return table


def _config(file: Path, table: dict[str, Any]) -> Config:
    where = f"{printable(str(file))}: [tool.fragscope]"
    for key in table:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(_KEYS)}"
            raise UsageError(f"{where} has no key {printable(repr(key), 80)}; {hint}")

    def text(value: Any, key: str) -> str:
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise UsageError(f"{where} {key}: {printable(repr(value), 80)} is not a non-empty string")
        return value

    def path(key: str) -> Path | None:
        return file.parent / text(table[key], key) if key in table else None

    scenarios = table.get("scenarios", [])
    if not isinstance(scenarios, list):
        raise UsageError(
            f'{where} scenarios: {printable(repr(scenarios), 80)} is not a list of paths; write ["scenarios"]'
        )
    return Config(
        root=file.parent,
        scenarios=tuple(file.parent / text(value, f"scenarios[{i}]") for i, value in enumerate(scenarios)),
        budgets=path("budgets"),
        card=text(table["card"], "card") if "card" in table else None,
        torch=text(table["torch"], "torch") if "torch" in table else None,
        out=path("out"),
    )
