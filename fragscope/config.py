"""What a repository sets once: the table ``[tool.fragscope]`` of the nearest pyproject.toml.

    [tool.fragscope]
    scenarios = ["scenarios"]     # files or folders that `fragscope run` collects
    budgets = "budgets.toml"      # what `fragscope gate` holds results against
    lock = "fragscope.lock"       # what `fragscope lock` writes, and the gate holds results against, too
    warn_only = true              # the gate says everything and ends with 0
    card = "h100-80gb"            # the default of --card
    torch = "2.11"                # the default of --torch
    out = ".fragscope"            # where results go
    import_paths = ["python"]     # folders that scenarios import the repository's code from; "src" by default
    tolerance = "64 MiB"          # of `fragscope gate --against`, for what moves by itself; or "2 %"

    [tool.fragscope.pytest]       # the pytest plugin
    card = "h100-80gb"            # the virtual card of tests that take fragscope_device
    require = true                # a marked test that cannot be measured fails
    budget = { peak_reserved = "8 GiB" }   # for every measured test; its own marker wins, metric by metric

Options on the command line win over every key here.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fragscope.errors import InputFileError, UsageError, printable
from fragscope.units import MIB, format_bytes

_FILE_LIMIT = 4 * MIB
_KEYS = ("scenarios", "budgets", "lock", "warn_only", "card", "torch", "out", "import_paths", "tolerance", "pytest")
_PYTEST_KEYS = ("card", "require", "budget")


@dataclass(frozen=True, slots=True)
class PytestConfig:
    """The table ``[tool.fragscope.pytest]``; None or empty where it sets nothing.

    Attributes:
        card: name of the virtual card.
        require: whether a marked test that cannot be measured fails.
        budget: limits of every measured test, as they are written.
    """

    card: str | None = None
    require: bool | None = None
    budget: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of a repository; None or empty where it sets nothing.

    Attributes:
        root: folder of the pyproject.toml that was read; None where there is none.
        scenarios: files or folders with scenarios, absolute.
        budgets: the budgets file, absolute.
        lock: the lock, absolute.
        warn_only: whether the gate only tells.
        card: name of the default card.
        torch: the torch release whose rules apply by default.
        out: folder for results, absolute.
        import_paths: folders with the repository's own code, absolute.
        tolerance: of comparisons, as it is written.
        pytest: what the pytest plugin goes by.
    """

    root: Path | None = None
    scenarios: tuple[Path, ...] = ()
    budgets: Path | None = None
    lock: Path | None = None
    warn_only: bool = False
    card: str | None = None
    torch: str | None = None
    out: Path | None = None
    import_paths: tuple[Path, ...] = ()
    tolerance: str | None = None
    pytest: PytestConfig = field(default_factory=PytestConfig)

    def import_folders(self, root: Path) -> list[Path]:
        """Where the code that scenarios call is imported from, first of all, in this order.

        Args:
            root: the project's folder.
        """
        return [root, *(self.import_paths or filter(Path.is_dir, (root / "src",)))]


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
    _check_keys(where, table, _KEYS)

    def text(value: Any, key: str) -> str:
        return _text(where, value, key)

    def path(key: str) -> Path | None:
        return file.parent / text(table[key], key) if key in table else None

    def paths(key: str, example: str) -> tuple[Path, ...]:
        values = table.get(key, [])
        if not isinstance(values, list):
            raise UsageError(
                f'{where} {key}: {printable(repr(values), 80)} is not a list of paths; write ["{example}"]'
            )
        return tuple(file.parent / text(value, f"{key}[{i}]") for i, value in enumerate(values))

    return Config(
        root=file.parent,
        scenarios=paths("scenarios", "scenarios"),
        budgets=path("budgets"),
        lock=path("lock"),
        warn_only=_flag(where, table.get("warn_only"), "warn_only") or False,
        card=text(table["card"], "card") if "card" in table else None,
        torch=text(table["torch"], "torch") if "torch" in table else None,
        out=path("out"),
        import_paths=paths("import_paths", "python"),
        tolerance=text(table["tolerance"], "tolerance") if "tolerance" in table else None,
        pytest=_pytest_config(f"{printable(str(file))}: [tool.fragscope.pytest]", table.get("pytest", {})),
    )


def _pytest_config(where: str, table: Any) -> PytestConfig:
    if not isinstance(table, dict):
        raise UsageError(f"{where} is not a table")
    _check_keys(where, table, _PYTEST_KEYS)
    require, budget = _flag(where, table.get("require"), "require"), table.get("budget", {})
    if not isinstance(budget, dict):
        raise UsageError(
            f'{where} budget: {printable(repr(budget), 80)} is not a table such as {{ peak_reserved = "8 GiB" }}'
        )
    return PytestConfig(_text(where, table["card"], "card") if "card" in table else None, require, budget)


def _check_keys(where: str, table: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise UsageError(f"{where} has no key {printable(repr(key), 80)}; {hint}")


def _flag(where: str, value: Any, key: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"{where} {key}: {printable(repr(value), 80)} is neither true nor false")
    return value


def _text(where: str, value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise UsageError(f"{where} {key}: {printable(repr(value), 80)} is not a non-empty string")
    return value
