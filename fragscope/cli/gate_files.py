"""Which files the gate and the lock mean: by option, by pyproject.toml, or by their usual names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fragscope.errors import InputFileError, UsageError

if TYPE_CHECKING:
    from fragscope.config import Config

BUDGETS = Path("budgets.toml")
LOCK = Path("fragscope.lock")


def budgets_file(option: Path | None, config: Config) -> Path | None:
    """The budgets file; None where there is none and nobody named one.

    Raises:
        UsageError: the one that is named is not there.
    """
    return _existing(option, "--budgets", config.budgets, "budgets", BUDGETS)


def lock_to_hold(option: Path | None, config: Config) -> Path | None:
    """The lock that results are held against; None where there is none and nobody named one.

    Raises:
        UsageError: the one that is named is not there.
    """
    return _existing(option, "--lock", config.lock, "lock", LOCK)


def lock_file(option: Path | None, config: Config) -> Path:
    """Where the lock is written, whether it is there or not."""
    return option or config.lock or LOCK


def results_folder(option: Path | None, config: Config) -> Path:
    """The results, as a file or its folder.

    Raises:
        InputFileError: they are not there.
    """
    folder = option or config.out or Path(".fragscope")
    if not folder.exists():
        how = "is a link to what is not there" if folder.is_symlink() else "is not there"
        raise InputFileError(relative(folder), f"{how}; write results with 'fragscope run' first")
    if folder.is_dir() and not (folder / "results.json").exists():
        raise InputFileError(relative(folder), "holds no results.json; write results with 'fragscope run' first")
    return folder


def relative(path: Path) -> str:
    """The path as short as it can be said from here; absolute ones differ from machine to machine.

    A link is named by its own name, which is the one that people know.
    """
    try:
        return str((path.parent.resolve() / path.name).relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def _existing(option: Path | None, flag: str, configured: Path | None, key: str, usual: Path) -> Path | None:
    if option is not None:
        if not option.exists():
            raise UsageError(f"{flag} {option}: there is no such file")
        return option
    if configured is not None:
        if not configured.exists():
            raise UsageError(
                f"{relative(configured)}, named by '{key}' in [tool.fragscope] of pyproject.toml, is not there; "
                f"write it, correct the key, or pass {flag} FILE"
            )
        return configured
    return usual if usual.exists() or usual.is_symlink() else None  # a link that leads nowhere is a fault, not no file
