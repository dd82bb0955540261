"""The function that a scenario is to run, found in its source without importing it."""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fragscope.errors import UsageError, printable
from fragscope.starter.repository import Repository

Kind = Literal["tensor", "tensors", "size", "number", "flag", "text", "device", "dtype", "module", "other"]
_LARGEST = 16 << 20  # bytes of a module


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter without a default.

    Attributes:
        name: its name.
        kind: what a scenario can make for it, by its annotation; ``other`` where that tells nothing.
        annotation: as written, ``""`` for none.
        by_name: whether it is passed by its name.
    """

    name: str
    kind: Kind
    annotation: str
    by_name: bool


@dataclass(frozen=True, slots=True)
class Loader:
    """A function of the repository.

    Attributes:
        module: dotted name to import it from.
        function: its name there.
        file: where it stands, relative to the root.
        line: of its definition.
        parameters: those that a call must give, in order.
    """

    module: str
    function: str
    file: str
    line: int
    parameters: tuple[Parameter, ...]


def find_loader(repository: Repository, named: str) -> Loader:
    """The function ``module:function`` of a repository.

    Raises:
        UsageError: there is no such module or function, or a call of it loads nothing; says what comes near.
    """
    module, colon, name = named.partition(":")
    shown = printable(named, 120)
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise UsageError(f"--loader {shown}: write MODULE:FUNCTION, such as mypackage.loader:process_weights")
    file = _module_file(repository, module)
    if file is None:
        known = f"; packages here are {', '.join(repository.packages)}" if repository.packages else ""
        place = f"{repository.source}/" if repository.source else ""
        path = f"{place}{module.replace('.', '/')}"
        raise UsageError(f"--loader {shown}: there is neither {path}.py nor {path}/__init__.py{known}")
    relative = str(file.relative_to(repository.root))
    tree = _parsed(file, relative)
    named_here = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    function = named_here.get(name)
    if function is None:
        raise UsageError(f"--loader {shown}: {_why_not(tree, name, relative, tuple(named_here))}")
    if _yields(function):
        raise UsageError(
            f"--loader {shown}: {name} in {printable(relative)}, line {function.lineno}, is a generator, and a call "
            "alone runs nothing of it; name a function that consumes it"
        )
    return Loader(module, name, relative, function.lineno, tuple(_parameters(function)))


def _module_file(repository: Repository, module: str) -> Path | None:
    base = (repository.root / repository.source).joinpath(*module.split("."))
    for file in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
        if file.is_file() and file.resolve().is_relative_to(repository.root):
            return file
    return None


def _parsed(file: Path, shown: str) -> ast.Module:
    try:
        raw = file.read_bytes() if file.stat().st_size <= _LARGEST else None
        if raw is None:
            raise UsageError(f"--loader: {printable(shown)} is larger than any module")
        return ast.parse(raw)
    except OSError as e:
        raise UsageError(f"--loader: {printable(shown)} cannot be read ({(e.strerror or '').lower()})") from None
    except SyntaxError as e:
        where = f"line {e.lineno}: " if e.lineno else ""
        raise UsageError(f"--loader: {printable(shown)}: {where}is not Python: {printable(e.msg, 200)}") from None
    except (ValueError, RecursionError, MemoryError):
        raise UsageError(f"--loader: {printable(shown)} is not Python that can be read") from None


def _yields(function: ast.FunctionDef) -> bool:
    """Whether a function is a generator: it yields itself, and not only a function in it does."""
    within: list[ast.AST] = list(function.body)
    while within:
        node = within.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            within += ast.iter_child_nodes(node)
    return False


def _why_not(tree: ast.Module, name: str, file: str, functions: tuple[str, ...]) -> str:
    owner, method, _ = name.partition(".")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and method and node.name == owner:
            return f"{owner} in {printable(file)}, line {node.lineno}, is a class; name a function that calls {name}"
        if isinstance(node, ast.ClassDef | ast.AsyncFunctionDef) and node.name == name:
            what = "a class" if isinstance(node, ast.ClassDef) else "asynchronous"
            return f"{name} in {printable(file)}, line {node.lineno}, is {what}; name a function that calls it"
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            origin = node.module or "another module"
            return f"{printable(file)}, line {node.lineno}, imports {name} from {origin}; name it there"
    near = difflib.get_close_matches(name, functions, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"functions there: {', '.join(functions) or 'none'}"
    return f"{printable(file)} defines no function {name}; {printable(hint, 300)}"


def _parameters(function: ast.FunctionDef) -> list[Parameter]:
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    needed = positional[: len(positional) - len(spec.defaults)]
    named = [arg for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if default is None]
    return [
        *(_parameter(arg, by_name=False) for arg in needed),
        *(_parameter(arg, by_name=True) for arg in named),
    ]


def _parameter(arg: ast.arg, *, by_name: bool) -> Parameter:
    annotation = "" if arg.annotation is None else ast.unparse(arg.annotation).strip("'\"")
    return Parameter(arg.arg, _kind(arg.arg, annotation), annotation, by_name)


_KINDS: dict[str, Kind] = {
    "Tensor": "tensor", "Parameter": "tensor", "int": "size", "float": "number", "bool": "flag", "str": "text",
    "device": "device", "dtype": "dtype", "Module": "module",
}  # fmt: skip
_NAMES: dict[str, Kind] = {"device": "device", "dtype": "dtype"}
_SEQUENCES = ("list[", "List[", "Sequence[", "Iterable[", "tuple[", "Tuple[")


def _kind(name: str, annotation: str) -> Kind:
    if name in _NAMES:
        return _NAMES[name]
    if not annotation:
        return "tensor"
    alternatives = [part.strip().rpartition(".")[2] for part in annotation.split("|")]
    for alternative in alternatives:
        if alternative in _KINDS:
            return _KINDS[alternative]
    word = annotation.rpartition(".")[2] if "[" not in annotation else annotation
    sequence = any(start in word for start in _SEQUENCES)
    return "tensors" if sequence and "Tensor" in annotation else "other"
