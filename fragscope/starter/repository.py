"""What a repository is made of, as its files tell; nothing of it is imported or run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fragscope.config import Config, load_config
from fragscope.errors import UsageError, printable
from fragscope.toml import read_toml

_NO_PACKAGES = {
    "tests",
    "test",
    "testing",
    "docs",
    "doc",
    "examples",
    "scenarios",
    "benchmarks",
    "scripts",
    "build",
    "dist",
}
_NO_MODULES = {"setup", "conftest", "noxfile", "tasks", "fabfile", "manage"}
_LARGEST = 1 << 20  # bytes of a file that is searched for a word


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository.

    Attributes:
        root: its folder.
        pyproject: its pyproject.toml; None where there is none.
        config: what [tool.fragscope] sets there.
        has_table: whether pyproject.toml has that table.
        source: folder that its packages are imported from, relative to the root: ``""`` or ``"src"``.
        packages: importable names, the one that the project is called by first.
        tests: folder of its tests, relative to the root; ``""`` where there is none.
        pytest, nox, tox: whether it uses them.
        git: whether this is the root of a git repository.
        github: whether that says it lies on GitHub.
        scenarios: scenario files that are there already, relative to the root.
    """

    root: Path
    pyproject: Path | None
    config: Config
    has_table: bool
    source: str
    packages: tuple[str, ...]
    tests: str
    pytest: bool
    nox: bool
    tox: bool
    git: bool
    github: bool
    scenarios: tuple[str, ...]

    @property
    def found(self) -> str:
        """What was found, in one line for people."""
        names = ", ".join(self.packages) or "no package"
        where = f" in {self.source}/" if self.source and self.packages else ""
        uses = [name for name, there in (("pytest", self.pytest), ("nox", self.nox), ("tox", self.tox)) if there]
        place = "GitHub" if self.github else "git" if self.git else "no git"
        return f"{names}{where}; {', '.join(uses) or 'no pytest, nox or tox'}; {place}"


def look_at(root: Path) -> Repository:
    """What the repository in a folder is made of.

    Raises:
        UsageError: there is no such folder, or [tool.fragscope] says what means nothing.
        InputFileError: its pyproject.toml cannot be read, or is not TOML.
    """
    if not root.is_dir():
        raise UsageError(f"{printable(str(root), 200)}: there is no such folder")
    root = root.resolve()
    file = root / "pyproject.toml"
    content: dict[str, Any] = {}
    if file.is_file():
        content = read_toml(file, "pyproject.toml", "project").content
    tool = content.get("tool")
    tool = tool if isinstance(tool, dict) else {}
    source, packages = _packages(root, _project_name(root, content))
    tests = next((name for name in ("tests", "test") if (root / name).is_dir()), "")
    git = (root / ".git").exists()
    return Repository(
        root=root,
        pyproject=file if file.is_file() else None,
        config=load_config(root) if file.is_file() else Config(),
        has_table="fragscope" in tool,
        source=source,
        packages=packages,
        tests=tests,
        pytest="pytest" in tool or _has_pytest(root, tests),
        nox=(root / "noxfile.py").is_file(),
        tox="tox" in tool or (root / "tox.ini").is_file(),
        git=git,
        github=git and ((root / ".github").is_dir() or "github.com" in _text(root / ".git" / "config")),
        scenarios=_scenarios(root, tests),
    )


def _project_name(root: Path, content: dict[str, Any]) -> str:
    project = content.get("project")
    name = project.get("name") if isinstance(project, dict) else None
    return name if isinstance(name, str) else root.name


def _packages(root: Path, project: str) -> tuple[str, tuple[str, ...]]:
    """Where packages lie and what they are called; in ``src`` if any are there."""
    wanted = re.sub(r"[-_.]+", "_", project).lower()
    for source in ("src", ""):
        folder = root / source
        found = [
            p.name
            for p in _entries(folder)
            if p.name.isidentifier() and p.name not in _NO_PACKAGES and (p / "__init__.py").is_file()
        ]
        if not found:
            # Without __init__.py a folder with modules is a package, too; and a project may be one module.
            found = [
                p.stem
                for p in _entries(folder)
                if p.stem.isidentifier()
                and p.name not in _NO_PACKAGES
                and p.stem not in _NO_MODULES
                and (_is_module(p) or (p.is_dir() and any(map(_is_module, _entries(p)))))
            ]
        if found:
            return source, tuple(sorted(found, key=lambda name: (name.lower() != wanted, name)))
    return "", ()


def _is_module(path: Path) -> bool:
    return path.suffix == ".py" and path.is_file() and not path.stem.startswith(("scenario_", "test_"))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _has_pytest(root: Path, tests: str) -> bool:
    if (root / "pytest.ini").is_file() or (root / "conftest.py").is_file():
        return True
    if "[tool:pytest]" in _text(root / "setup.cfg") or "[pytest]" in _text(root / "tox.ini"):
        return True
    return bool(tests) and any(p.name.startswith("test_") or p.name == "conftest.py" for p in _entries(root / tests))


def _scenarios(root: Path, tests: str) -> tuple[str, ...]:
    places = dict.fromkeys(root / name for name in ("", tests, "scenarios"))
    files = [p for place in places for p in _entries(place) if p.name.startswith("scenario_") and p.suffix == ".py"]
    return tuple(str(p.relative_to(root)) for p in files)


def _text(file: Path) -> str:
    """The beginning of a file, or nothing."""
    try:
        with file.open("rb") as f:
            return f.read(_LARGEST).decode(errors="replace")
    except OSError:
        return ""
