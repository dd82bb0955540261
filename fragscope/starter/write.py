"""Writing all files or none, and nothing over anything."""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from fragscope.errors import FragscopeError, UsageError, printable


def write_all(root: Path, files: Mapping[str, str], table: str = "") -> None:
    """Write new files, and a table at the end of pyproject.toml.

    Args:
        root: folder of the repository.
        files: content by path relative to it.
        table: TOML to add; empty for none.

    Raises:
        UsageError: a file is there already, or its folder is not in the repository; nothing was written.
        FragscopeError: the disk refused; what had been written is gone again.
    """
    refuse_existing(root, files)
    pyproject = root / "pyproject.toml"
    extended = _with_table(pyproject, table) if table else None
    made: list[Path] = []
    folders: list[Path] = []
    try:
        for name, content in files.items():
            file = root / name
            _make_folders(file.parent, folders)
            with file.open("x", encoding="utf-8", newline="\n") as f:
                made.append(file)
                f.write(content)
        if extended is not None:
            _replace(pyproject, extended)
    except BaseException as e:
        for file in reversed(made):
            with contextlib.suppress(OSError):
                file.unlink()
        for folder in reversed(folders):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(e, FileExistsError):  # made by somebody else meanwhile
            raise UsageError(f"{_shown(e.filename)} is there already; nothing was written") from None
        if isinstance(e, OSError):
            why = (e.strerror or type(e).__name__).lower()
            raise FragscopeError(f"{_shown(e.filename)} cannot be written ({why}); nothing was written") from None
        raise


def refuse_existing(root: Path, files: Mapping[str, str]) -> None:
    """Make sure that nothing stands where files are to go.

    Raises:
        UsageError: something does, or a folder on the way leads out of the repository.
    """
    there = [name for name in files if os.path.lexists(root / name)]
    if there:
        others = f" (and {', '.join(there[1:])})" if there[1:] else ""
        raise UsageError(
            f"{printable(there[0], 200)} is there already{printable(others, 300)}; nothing was written, and nothing is "
            "ever written over: move it away, or take what --dry-run shows"
        )
    for name in files:
        folder = (root / name).parent
        nearest = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
        if not nearest.is_dir():
            raise UsageError(f"{_shown(nearest)} is no folder; nothing was written")
        if not nearest.resolve().is_relative_to(root.resolve()):
            raise UsageError(f"{_shown(nearest)} leads out of the repository; nothing was written")


def _make_folders(folder: Path, made: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir()
        made.append(each)


def _with_table(pyproject: Path, table: str) -> str:
    """The text of pyproject.toml with the table at its end, which must still be TOML."""
    try:
        before = pyproject.read_bytes().decode() if pyproject.exists() else ""  # with its line ends as they are
    except OSError as e:
        raise FragscopeError(
            f"pyproject.toml cannot be read ({(e.strerror or '').lower()}); nothing was written"
        ) from None
    gap = "" if not before else "\n" if before.endswith("\n") else "\n\n"
    end = "\r\n" if before.partition("\n")[0].endswith("\r") else "\n"
    text = before + (gap + table).replace("\n", end)
    try:
        tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        raise UsageError(
            f"pyproject.toml: the table does not go at its end ({printable(str(e), 200)}); add it by hand"
        ) from None
    return text


def _replace(file: Path, text: str) -> None:
    """Put a text in a file's place at once, with the permissions that it had."""
    target = file.resolve()
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with beside.open("x", encoding="utf-8", newline="") as f:
            f.write(text)
        if target.exists():
            beside.chmod(target.stat().st_mode & 0o7777)
        beside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def _shown(path: object) -> str:
    return printable(str(path), 300)
