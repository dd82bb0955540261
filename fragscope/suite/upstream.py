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
from functools import lru_cache
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from fragscope.units import MIB

_FILE_LIMIT = 16 * MIB  # the largest modules of engines are below 1 MiB
_DIGITS = 24  # as many as of a case's digest
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Source:
    """What is installed of a package, and of one function in it.

    Attributes:
        version: the release, ``"unknown"`` where the package has no metadata.
        file: where the function's module is; None where there is no such module.
        digest: of the function's source; None where the module does not define it, or cannot be read.
        unread: why the module cannot be read, in a few words; ``""`` where it can, and where there is none.
    """

    version: str
    file: Path | None
    digest: str | None
    unread: str = ""


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
    file = _file_of(module)
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        if spec.origin is None and file is None:  # any folder of that name on the path
            return None
        version = "unknown"
    if file is None:
        return Source(version, None, None)
    try:
        facts = file.stat()
        return Source(version, file, *_digest_in(file, name, facts.st_size, facts.st_mtime_ns))
    except OSError as e:
        return Source(version, file, None, e.strerror or type(e).__name__)


def digest_of(source: str | bytes, name: str) -> str | None:
    """Digest of what a module's source defines under a name, as 24 hexadecimal digits.

    It is that of the syntax tree: comments, docstrings and formatting do not count, annotations and decorators do. What
    the function calls is not in it. Every definition of the name counts, in a class, a condition or a ``try`` too.

    Args:
        source: of the module; bytes are read in the encoding that they declare.
        name: ``function``, ``Class`` or ``Class.method``.

    Returns:
        None where nothing defines it.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: this Python cannot read the source; the last two where it
            is nested too deeply.
    """
    body: Sequence[ast.stmt] = ast.parse(source).body
    found: list[_Definition] = []
    for part in name.split("."):
        found = [d for d in _definitions(body) if d.name == part]
        body = [statement for d in found for statement in d.body]
    if not found:
        return None
    return hashlib.sha256("".join(_text_of(found)).encode()).hexdigest()[:_DIGITS]


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


@lru_cache(maxsize=1024)
def _digest_in(file: Path, name: str, size: int, changed: int) -> tuple[str | None, str]:
    """Digest of a function in a file, and why the file cannot be read as Python, ``""`` where it can.

    Every task of a run asks, and to read a large module takes seconds. Its size in bytes, and when it was changed, say
    when to read it again.

    Raises:
        OSError: it cannot be read at all.
    """
    if size > _FILE_LIMIT:
        return None, f"it is larger than {_FILE_LIMIT // MIB} MiB"
    try:
        return digest_of(file.read_bytes(), name), ""
    except SyntaxError as e:
        return None, f"line {e.lineno}: {e.msg}" if e.lineno else e.msg
    except ValueError as e:
        return None, str(e)
    except (RecursionError, MemoryError):
        return None, "its code is nested too deeply"


def _definitions(body: Sequence[ast.stmt]) -> Iterator[_Definition]:
    """Functions and classes that a body defines itself, those in conditions and the like included."""
    rest: list[ast.AST] = [*reversed(body)]
    while rest:  # not recursive: each of a chain of `elif` is inside the one before
        node = rest.pop()
        if isinstance(node, _Definition):
            yield node
        else:
            inside = [
                n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.ExceptHandler | ast.match_case)
            ]
            rest += reversed(inside)


_LEFT_OUT = frozenset({"ctx", "kind", "type_comment"})  # follow from the rest, or are comments


def _text_of(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """A syntax tree as JSON, piece by piece, the same for every Python that can read the source.

    A node is an object with its class as the only key, which holds its fields in alphabetical order; anything else is
    the ``repr`` of it.
    """
    rest: list[Any] = [list(nodes)]
    while rest:  # not recursive: each term of a sum is inside the one after
        part = rest.pop()
        if isinstance(part, str):
            yield part
        else:
            rest += reversed(_list_parts(part) if isinstance(part, list) else _node_parts(part))


def _list_parts(items: list[Any]) -> list[Any]:
    """Text, and what is still to be turned into text, in the order of reading."""
    parts: list[Any] = ["["]
    for i, item in enumerate(items):
        parts += ["," if i else "", _part(item)]
    return [*parts, "]"]


def _node_parts(node: ast.AST) -> list[Any]:
    """As ``_list_parts``. What is empty is left out: newer Pythons have fields that older ones lack."""
    fields = {
        name: value
        for name, value in sorted(ast.iter_fields(node))
        if name not in _LEFT_OUT and value is not None and value != []
    }
    if isinstance(node, _Definition) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    parts: list[Any] = [f'{{"{type(node).__name__}":{{']
    for i, (name, value) in enumerate(fields.items()):
        parts += [f'{"," if i else ""}"{name}":', _part(value)]
    return [*parts, "}}"]


def _part(value: Any) -> Any:
    return value if isinstance(value, ast.AST | list) else json.dumps(repr(value))
