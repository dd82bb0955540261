"""Which folders a tree's code is imported from, and whether it was.

Both sides must run their own code. An editable install, a PYTHONPATH or a copy in site-packages leads every import to
one and the same place; then the comparison would be of that code with itself, and always find nothing.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlparse

import msgspec

import fragscope
from fragscope.errors import printable

_PYTHON = [Path(sys.prefix).resolve() / part for part in ("lib", "bin")]
_PYTHON += [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
_TOOL = Path(fragscope.__file__).resolve().parent  # the same on both sides


def folders_in_use(trees: Sequence[Path]) -> list[Path]:
    """Folders of a repository that this Python imports from by itself, relative to the tree they are in.

    These are what its import path has of the trees, and the projects in them that are installed as editable, in
    whatever way.

    Args:
        trees: the working trees of the repository; an install may lead to another one than that which is gated.
    """
    found: list[Path] = []
    for project, modules in _editable_projects():
        found += [*filter(None, map(_import_folder, modules)), project / "src", project]
    # After these, since an editable install may put a folder of links there, and the files themselves are meant.
    found += [Path(entry).resolve() for entry in sys.path if entry]
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


class Own(msgspec.Struct, frozen=True, kw_only=True):
    """What is the repository's, and where one side must have it from.

    Attributes:
        top: the side's tree.
        others: other trees of the repository.
        distributions: names under which it may be installed.
        packages: top-level packages that its tree holds.
    """

    top: str
    others: list[str]
    distributions: list[str]
    packages: list[str]

    def is_elsewhere(self, module: str, file: Path, installed: set[Path]) -> bool:
        """Whether a module is the repository's, but not of this side's tree.

        Args:
            module: dotted name.
            file: it comes from, resolved.
            installed: what the repository's distributions have copied into this Python, see ``installed_files``.
        """
        if file.is_relative_to(_TOOL):
            return False
        if is_environment(file):
            return file in installed or not installed.isdisjoint(file.parents)
        if file.is_relative_to(self.top):
            return False
        # A clone of the repository is none of its trees, and may be what is installed as editable all the same.
        first = module.partition(".")[0]
        return first in self.packages or any(file.is_relative_to(other) for other in self.others)

    def is_others(self, path: Path) -> bool:
        """Whether a folder or a file is another tree's: not this one's, which may lie in it, nor an environment's."""
        path = path.resolve()
        if is_environment(path) or path.is_relative_to(self.top):
            return False
        return any(path.is_relative_to(other) for other in self.others)

    def foreign(self, modules: Mapping[str, ModuleType | None]) -> list[Foreign]:
        """The modules of ``sys.modules`` that are elsewhere."""
        installed = installed_files(set(self.distributions))
        found = []
        for name, module in sorted(modules.items()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and self.is_elsewhere(name, path := Path(file).resolve(), installed):
                found.append(Foreign(name, str(path), installed=is_environment(path)))
        return found


def packages_of(files: Iterable[Path]) -> list[str]:
    """The top-level packages among a tree's files; no import statement can name one that is not UTF-8."""
    folders = {file.parent for file in files if file.name == "__init__.py" and is_utf8(file)}
    return sorted({folder.name for folder in folders if folder.parent not in folders and folder.name})


def is_utf8(path: Path) -> bool:
    """Whether a path can be written into a file or a message as it is."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def installed_files(names: set[str]) -> set[Path]:
    """What distributions of these names have copied into this Python; not what editable ones lead to it by.

    A top-level name alone says little: of a namespace package, others may have other parts.

    Returns:
        Files; of a distribution that does not list its files, the folders and modules that it says it has.
    """
    found: set[Path] = set()
    for distribution in metadata.distributions() if names else ():
        if _name(distribution) not in names or _editable_from(distribution) is not None:
            continue
        files = distribution.files
        if files is None:
            modules = (distribution.read_text("top_level.txt") or "").split()
            found.update(Path(str(distribution.locate_file(m + end))).resolve() for m in modules for end in ("", ".py"))
        else:
            found.update(Path(str(distribution.locate_file(file))).resolve() for file in files)
    return found


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
    return any(path.is_relative_to(folder) for folder in _PYTHON)


def _editable_projects() -> list[tuple[Path, list[str]]]:
    """Folders of the projects that are installed as editable (PEP 610), and the modules that they say they have."""
    found = []
    for distribution in metadata.distributions():
        origin = _editable_from(distribution)
        if origin is not None and origin.startswith("file://"):
            modules = (distribution.read_text("top_level.txt") or "").split()
            found.append((Path(unquote(urlparse(origin).path)).resolve(), modules))
    return sorted(found)


def _name(distribution: metadata.Distribution) -> str:
    """A distribution's name, as packaging compares it; ``""`` for what is left of one that was removed."""
    texts = (distribution.read_text(file) for file in ("METADATA", "PKG-INFO", ""))
    found = re.search(r"^Name:[ \t]*(\S+)", next(filter(None, texts), ""), re.MULTILINE)
    return _normal(found[1]) if found else ""


def _editable_from(distribution: metadata.Distribution) -> str | None:
    """The URL that a distribution is installed from as editable; None for any other."""
    text = distribution.read_text("direct_url.json")
    if text is None or "editable" not in text:
        return None
    try:
        origin = msgspec.json.decode(text, type=_Origin)
    except (msgspec.MsgspecError, RecursionError):
        return None
    return origin.url if origin.dir_info.editable else None


def _import_folder(module: str) -> Path | None:
    """Where a finder that an editable install has put into this Python gets a module from."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).resolve()
    return file.parents[1] if file.name == "__init__.py" else file.parent


class _DirInfo(msgspec.Struct):
    editable: bool = False


class _Origin(msgspec.Struct):
    url: str = ""
    dir_info: _DirInfo = msgspec.field(default_factory=_DirInfo)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503
