"""Which folders a tree's code is imported from, and whether it was.

Both sides must run their own code. An editable install, a PYTHONPATH or a copy in site-packages leads every import to
one and the same place; then the comparison would be of that code with itself, and always find nothing.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlparse

import msgspec

import fragscope
from fragscope.errors import printable

_TOOL = Path(fragscope.__file__).resolve().parent  # the same on both sides


def folders_in_use(trees: Sequence[Path]) -> list[Path]:
    """Folders of a repository that this Python imports from by itself, relative to the tree they are in.

    These are what its import path has of the trees, and the projects in them that are installed as editable, in
    whatever way.

    Args:
        trees: the working trees of the repository; an install may lead to another one than that which is gated.
    """
    found = [Path(entry).resolve() for entry in sys.path if entry]
    for project in _editable_projects():
        found += [project / "src", project]
    folders = [f for f in found if f.is_dir() and not is_environment(f)]
    # Of trees that lie in each other, the innermost is meant.
    innermost = sorted(trees, key=lambda tree: -len(tree.parts))
    inside = [next((f.relative_to(tree) for tree in innermost if f.is_relative_to(tree)), None) for f in folders]
    return list(dict.fromkeys(f for f in inside if f is not None))


def own_names(root: Path) -> set[str]:
    """Distribution names of the project in a folder, as packaging compares them."""
    try:
        name = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {_normal(name)} - {_TOOL.name} if isinstance(name, str) else set()


class Foreign(msgspec.Struct, frozen=True):
    """A module that a side imported and that is not of its tree although it should be.

    Attributes:
        module: dotted name.
        file: where it was imported from.
        installed: it is a copy in site-packages.
    """

    module: str
    file: str
    installed: bool


def foreign_modules(
    modules: Mapping[str, ModuleType | None], top: Path, others: Iterable[Path], names: set[str]
) -> list[Foreign]:
    """The loaded modules that are the repository's and come from elsewhere than from this side's tree.

    Args:
        modules: ``sys.modules``.
        top: this side's tree.
        others: other trees of the same repository.
        names: distributions that are the repository's own.
    """
    files = {
        name: Path(file).resolve()
        for name, module in list(modules.items())
        if isinstance(file := getattr(module, "__file__", None), str)
    }
    own = installed_names(names)
    found = []
    for name, file in sorted(files.items()):
        if file.is_relative_to(_TOOL):
            continue
        outside = not file.is_relative_to(top) or is_environment(file)
        if (outside and name.partition(".")[0] in own) or is_of_another(file, top, others):
            found.append(Foreign(name, str(file), installed=is_environment(file)))
    return found


def is_of_another(file: Path, top: Path, others: Iterable[Path]) -> bool:
    """Whether a file is one of the repository's, but not of this tree."""
    if file.is_relative_to(top) or is_environment(file):
        return False
    return any(file.is_relative_to(other) for other in others)


def installed_names(names: set[str]) -> set[str]:
    """Top-level modules that distributions of these names bring along."""
    if not names:
        return set()
    return {
        module
        for module, distributions in metadata.packages_distributions().items()
        if any(_normal(d) in names for d in distributions)
    }


def dotted(file: Path) -> str:
    """The name that a file is imported by, as far as its folders tell."""
    parts = [] if file.name == "__init__.py" else [file.stem]
    for folder in file.parents:
        if not (folder / "__init__.py").exists():
            break
        parts.insert(0, folder.name)
    return ".".join(parts) or file.stem


def refusal(foreign: Foreign, which: str, top: Path) -> str:
    """Why the comparison would mean nothing, and what helps.

    Args:
        foreign: the module.
        which: the side as people know it.
        top: the tree that is checked out, which paths are shown relative to.
    """
    file, name = Path(foreign.file), printable(foreign.module, 100)
    shown = printable(str(file.relative_to(top)) if file.is_relative_to(top) else foreign.file, 200)
    how = "the copy that is installed" if foreign.installed else "another tree of the repository"
    package = name.partition(".")[0]
    return (
        f"{which} imports {name} from {how}, {shown}: both sides would run the same code; name the folder that "
        f"{package} lies in with import_paths = [...] in [tool.fragscope] of pyproject.toml"
        + (f", or uninstall {package}" if foreign.installed else "")
    )


def is_environment(path: Path) -> bool:
    """Whether a path belongs to an environment of Python, which may lie inside a repository."""
    if any(part in ("site-packages", "dist-packages") for part in path.parts):
        return True
    return any(path.is_relative_to(Path(sys.prefix).resolve() / part) for part in ("lib", "bin"))


def _editable_projects() -> list[Path]:
    """Folders of the projects that are installed as editable (PEP 610)."""
    found = []
    for distribution in metadata.distributions():
        text = distribution.read_text("direct_url.json")
        if text is None or "editable" not in text:
            continue
        try:
            origin = msgspec.json.decode(text, type=_Origin)
        except (msgspec.MsgspecError, RecursionError):
            continue
        if origin.dir_info.editable and origin.url.startswith("file://"):
            found.append(Path(unquote(urlparse(origin.url).path)).resolve())
    return sorted(found)


class _DirInfo(msgspec.Struct):
    editable: bool = False


class _Origin(msgspec.Struct):
    url: str = ""
    dir_info: _DirInfo = msgspec.field(default_factory=_DirInfo)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503
