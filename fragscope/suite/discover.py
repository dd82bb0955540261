"""Finding scenario files and choosing cases from them.

Like pytest: at the paths given or configured, in folders the files named ``scenario_*.py``; a file given by name
always.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.machinery import SourceFileLoader
from pathlib import Path

from fragscope.errors import FragscopeError, UsageError, printable
from fragscope.suite.scenario import Scenario, collecting

PATTERN = "scenario_*.py"
MODULE_PREFIX = "fragscope_scenarios."
"""Scenario files are modules below this name, so that none hides another or an installed package."""

_folders: set[str] = set()


@dataclass(frozen=True, slots=True)
class Selection:
    """One scenario × preset × variant that was asked for."""

    scenario: Scenario
    preset: str
    variant: str

    @property
    def name(self) -> str:
        """``scenario/preset/variant``."""
        return f"{self.scenario.name}/{self.preset}/{self.variant}"

    @property
    def of(self) -> str:
        """``scenario/variant``."""
        return f"{self.scenario.name}/{self.variant}"


def scenario_files(paths: Iterable[Path]) -> list[Path]:
    """The scenario files at the given files and folders, sorted, each once.

    Raises:
        UsageError: a path does not exist.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob(PATTERN)):
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
                    files[file.resolve()] = None
        elif path.is_file():
            files[path.resolve()] = None
        else:
            raise UsageError(f"{path}: no such file or folder")
    return list(files)


def load_scenarios(file: Path) -> list[Scenario]:
    """Import a scenario file and return what it defines. Its folder becomes importable, as with pytest.

    Raises:
        UsageError: the file cannot be imported, or defines nothing.
    """
    file = file.resolve()
    _enter_folder(str(file.parent))
    name = f"{MODULE_PREFIX}{hashlib.sha256(str(file).encode('utf-8', 'surrogateescape')).hexdigest()[:12]}.{file.stem}"
    known = sys.modules.get(name)
    if known is not None:
        return list(known.__dict__["__fragscope_scenarios__"])
    spec = importlib.util.spec_from_file_location(name, file, loader=_SourceLoader(name, str(file)))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with collecting() as registry, _card_in_sight():
        try:
            _SourceLoader(name, str(file)).exec_module(module)
        except BaseException as e:
            del sys.modules[name]
            if isinstance(e, FragscopeError):
                raise UsageError(f"{file}: {_where(e, file)}{e}") from None
            if isinstance(e, Exception | SystemExit):
                what = f"{type(e).__name__}: {printable(str(e))}"
                raise UsageError(f"{file}: cannot be imported: {_where(e, file)}{what}") from e
            raise
    # Scenarios that an import brought along belong to their own file.
    found = [s for s in registry.found if s.file == file]
    if not found:
        del sys.modules[name]
        raise UsageError(f"{file}: defines no scenario (decorate a function with @fragscope.scenario)")
    module.__dict__["__fragscope_scenarios__"] = found
    return found


def _card_in_sight() -> AbstractContextManager[None]:
    """Where cases are run, which is where torch is loaded, a file that asks for CUDA finds a card."""
    if "torch" not in sys.modules:
        return nullcontext()
    from fragscope.record.virtual.loading import card_in_sight  # noqa: PLC0415 - imports torch

    return card_in_sight()


class _SourceLoader(SourceFileLoader):
    """Compiles the file each time: bytecode is matched by whole seconds and size, and an edit can keep both."""

    def path_stats(self, path: str) -> Mapping[str, int]:
        raise OSError


def _enter_folder(folder: str) -> None:
    """Make a folder the first to import from, for a scenario file in it.

    Two scenario files in different folders may each have a ``shapes.py`` beside them; each gets its own.
    """
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    _folders.add(folder)
    loaded = [(n, getattr(m, "__file__", None)) for n, m in list(sys.modules.items()) if "." not in n]
    hidden = {name for name, file in loaded if _is_hidden(name, file, folder)}
    for name in list(sys.modules):
        if name.partition(".")[0] in hidden:
            del sys.modules[name]


def _is_hidden(name: str, file: str | None, folder: str) -> bool:
    """Whether a loaded module lies beside another scenario file, while this folder has one of its name."""
    if file is None:
        return False
    path = Path(file)
    home = str(path.parent.parent if path.name == "__init__.py" else path.parent)
    if home == folder or home not in _folders:
        return False
    return (Path(folder) / f"{name}.py").is_file() or (Path(folder) / name / "__init__.py").is_file()


def _where(error: BaseException, file: Path) -> str:
    line = None
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(file):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f"line {line}: " if line else ""


def select(
    scenarios: Sequence[Scenario], names: Sequence[str], presets: Sequence[str], variants: Sequence[str]
) -> list[Selection]:
    """The cases asked for, in definition order.

    Args:
        scenarios: everything found.
        names: ``NAME``, ``NAME/PRESET`` or ``NAME/PRESET/VARIANT``, each part a glob; none means all.
        presets: globs; none means all.
        variants: globs; none means all.

    Raises:
        UsageError: two scenarios share a name, or something asked for matches nothing; names the nearest.
    """
    by_name: dict[str, Scenario] = {}
    for scenario in scenarios:
        other = by_name.setdefault(scenario.name, scenario)
        if other is not scenario:
            raise UsageError(f"scenario {scenario.name!r} is defined twice: in {other.file} and in {scenario.file}")
    every = [Selection(s, p, v) for s in scenarios for p in s.presets for v in s.variants]
    chosen: dict[str, Selection] = {}
    for name in names or ["*"]:
        parts = name.split("/")
        if len(parts) > 3:
            raise UsageError(f"{name}: write NAME, NAME/PRESET or NAME/PRESET/VARIANT")
        pattern = parts + ["*"] * (3 - len(parts))
        found = [s for s in every if all(map(fnmatchcase, s.name.split("/"), pattern))]
        if not found:
            raise UsageError(_nearest(name, parts, every))
        chosen.update({s.name: s for s in found})
    for option, globs, part in (("--preset", presets, 1), ("--variant", variants, 2)):
        for glob in globs:
            if not any(fnmatchcase(s.name.split("/")[part], glob) for s in chosen.values()):
                known = sorted({s.name.split("/")[part] for s in chosen.values()})
                raise UsageError(f"{option} {glob}: nothing matches; {_suggest(glob, known)}")
        if globs:
            chosen = {n: s for n, s in chosen.items() if any(fnmatchcase(n.split("/")[part], glob) for glob in globs)}
    if not chosen:
        raise UsageError("nothing matches all of the given names, --preset and --variant together")
    return [s for s in every if s.name in chosen]


def _nearest(name: str, parts: Sequence[str], every: Sequence[Selection]) -> str:
    """Say which part of a name is unknown, and what comes near."""
    pool = list(every)
    for position, what in enumerate(("scenario", "preset", "variant")[: len(parts)]):
        known = sorted({s.name.split("/")[position] for s in pool})
        pool = [s for s in pool if fnmatchcase(s.name.split("/")[position], parts[position])]
        if not pool:
            return f"{name}: no {what} named {parts[position]!r}; {_suggest(parts[position], known)}"
    return f"{name}: no such scenario"


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known are {', '.join(known[:12])}{', …' if len(known) > 12 else ''}"
