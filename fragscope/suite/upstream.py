"""The source of a function in an installed package, found without importing the package.

Importing an inference engine takes seconds, and needs much that a machine without a GPU does not have. Its files can be
read all the same.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

_DIGITS = 24  # as many as of a case's digest
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Source:
    """What is installed of a package, and of one function in it.

    Attributes:
        version: the release, ``"unknown"`` where the package has no metadata.
        file: where the function's module is; None where there is no such module.
        digest: of the function's source; None where the module does not define it, or cannot be read as Python.
    """

    version: str
    file: Path | None
    digest: str | None


def installed_source(package: str, function: str) -> Source | None:
    """What is installed of a function; None where its package is not there.

    Args:
        package: the distribution, such as ``"flashinfer-python"``.
        function: ``module:function``, ``module:Class`` or ``module:Class.method``.
    """
    module, _, name = function.partition(":")
    spec = _spec_of(module.partition(".")[0])
    if spec is None:
        return None
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        if spec.origin is None:  # any folder of that name on the path
            return None
        version = "unknown"
    file = _file_of(module)
    return Source(version, file, None if file is None else _digest_in(file, name))


def digest_of(source: str, name: str) -> str | None:
    """Digest of what a module's source defines under a name, as 24 hexadecimal digits.

    It is that of the syntax tree: comments, docstrings and formatting do not count, annotations and decorators do. What
    the function calls is not in it. Every definition of the name counts, in a class, a condition or a ``try`` too.

    Args:
        source: of the module.
        name: ``function``, ``Class`` or ``Class.method``.

    Returns:
        None where nothing defines it.

    Raises:
        SyntaxError, ValueError: this Python cannot read the source.
    """
    body: Sequence[ast.stmt] = ast.parse(source).body
    found: list[_Definition] = []
    for part in name.split("."):
        found = [d for d in _definitions(body) if d.name == part]
        body = [statement for d in found for statement in d.body]
    if not found:
        return None
    text = json.dumps([_plain(d) for d in found], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _file_of(module: str) -> Path | None:
    """The file of a module of a package that is there; None where the package has no such module."""
    top, *parts = module.split(".")
    spec = _spec_of(top)
    assert spec is not None
    if spec.submodule_search_locations is None:  # the package is a single file
        return Path(spec.origin) if spec.origin and not parts else None
    for folder in spec.submodule_search_locations:
        inside = Path(folder, *parts)
        for file in (inside / "__init__.py", inside.with_suffix(".py")):
            if file.is_file():
                return file
    return None


def _spec_of(top: str) -> ModuleSpec | None:
    """Where a top-level package is. Asking for one further down would import those above it."""
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):  # a finder that fails, or a module in sys.modules without a spec
        return None


def _digest_in(file: Path, name: str) -> str | None:
    try:
        return digest_of(file.read_text(encoding="utf-8"), name)
    except (OSError, SyntaxError, ValueError):
        return None


def _definitions(body: Sequence[ast.stmt]) -> Iterator[_Definition]:
    """Functions and classes that a body defines itself, those in conditions and the like included."""
    for statement in body:
        if isinstance(statement, _Definition):
            yield statement
            continue
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt):
                yield from _definitions([child])
            elif isinstance(child, ast.ExceptHandler | ast.match_case):
                yield from _definitions(child.body)


_LEFT_OUT = frozenset({"ctx", "kind", "type_comment"})  # follow from the rest, or are comments


def _plain(node: Any) -> Any:
    """A syntax tree as JSON holds it, the same for every Python that can read the source.

    What is empty is left out: newer Pythons have fields that older ones lack.
    """
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {
        name: _plain(value)
        for name, value in sorted(ast.iter_fields(node))
        if name not in _LEFT_OUT and value is not None and value != []
    }
    if isinstance(node, _Definition):
        rest = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        fields["body"] = [_plain(statement) for statement in rest]
    return {type(node).__name__: fields}
