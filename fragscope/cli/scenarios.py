"""Scenarios that a command's arguments ask for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fragscope.errors import NotMeasuredError, UsageError, printable

if TYPE_CHECKING:
    from fragscope.config import Config
    from fragscope.suite.discover import Selection


def selections_of(
    config: Config, what: tuple[str, ...], presets: tuple[str, ...], variants: tuple[str, ...]
) -> list[Selection]:
    """The cases that arguments ask for, from files and folders named there or configured.

    The repository's root, or else the working directory, becomes importable, and the folders of its own code:
    scenarios call the code that is there.
    """
    from fragscope.suite.discover import load_scenarios, scenario_files, select

    paths, names = _split(what)
    searched = paths or list(config.scenarios)
    if not searched:
        unknown = f"{printable(names[0], 100)} is no file or folder here, and " if names else ""
        raise UsageError(
            f"{unknown}no scenarios are configured: name a file or folder, "
            "or set scenarios = [...] in [tool.fragscope] of pyproject.toml"
        )
    for folder in reversed(config.import_folders(config.root or Path.cwd())):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    files = scenario_files(searched)
    if not files:
        where = ", ".join(str(p) for p in searched)
        raise NotMeasuredError(f"no scenario files in {where} (in a folder, they are named scenario_*.py)")
    return select([s for file in files for s in load_scenarios(file)], names, presets, variants)


def _split(what: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    """Arguments that are files or folders, and those that are names."""
    paths, names = [], []
    for item in what:
        path = Path(item)
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except OSError:  # such as a name too long for any file
            is_folder = is_file = False
        if is_folder or (is_file and item.endswith(".py")):
            paths.append(path)
        elif item.endswith(".py"):
            raise UsageError(f"{printable(item, 200)}: no such file")
        elif is_file:
            raise UsageError(f"{item}: is not a Python file")
        else:
            names.append(item)
    return paths, names
