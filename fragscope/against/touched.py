"""What a change touched, statement by statement.

Of code that asks for memory the statement counts, since a call may stand on several lines of which stacks name one.
Blanks around lines, comments, docstrings and imports are no statements here: none of them keeps or takes memory. What
cannot be parsed has no statements; then a line stands for itself.
"""

from __future__ import annotations

import ast
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fragscope.against.lines import Alignment, Sources
from fragscope.against.places import CODE_LIMIT, OwnFrame
from fragscope.errors import printable
from fragscope.gate.verdict import Touched, TouchedLine

_MOST_LINES = 20  # of a verdict; there is one list for each value that regressed


@dataclass(frozen=True, slots=True, order=True)
class Statement:
    """A simple statement, or the head of one that holds others.

    Attributes:
        first, last: its lines, counted from 1.
        function: the first line of the function that it is in, 0 outside of functions.
        name: of that function.
    """

    first: int
    last: int
    function: int
    name: str


@dataclass(frozen=True, slots=True, order=True)
class Edit:
    """What a change touched.

    Attributes:
        file_now: relative to the tree after.
        file: the same; where it was removed, as it was called before.
        function: the first line of the function that it is in, in the tree after; 0 outside of functions.
        statement: in the tree after; where it was removed, in the tree before.
        removed: it is no more.
    """

    file_now: str
    file: str
    function: int
    statement: Statement
    removed: bool = False


class Edits:
    """Says which statements of the tree after a change touched.

    Args:
        before, after: the trees' text.
        lines: which line is which.
    """

    def __init__(self, before: Sources, after: Sources, lines: Alignment) -> None:
        self._before, self._after, self._lines = before, after, lines
        self._statements: dict[tuple[int, str], list[Statement]] = {}
        self._unchanged: dict[str, set[int]] = {}

    def at(self, file: str, line: int) -> bool:
        """Whether the statement on a line of the tree after is new or was edited."""
        if not self._is_changed(file):
            return False
        statement = self._at(file, line)
        span = range(statement.first, statement.last + 1) if statement is not None else (line,)
        return any(number not in self._same(file) for number in span)

    def function(self, file: str, line: int) -> int:
        """The first line of the function that a line of the tree after is in; 0 outside of functions."""
        statement = self._at(file, line)
        return statement.function if statement is not None else 0

    def of(self, file: str) -> list[Edit]:
        """What was touched in a file of the tree after.

        Removed statements are named only where nothing else of their function was touched.
        """
        if not self._is_changed(file):
            return []
        found = [Edit(file, file, s.function, s) for s in self._all(file) if self.at(file, s.first)]
        touched = {edit.function for edit in found}
        old = self._lines.was_called(file)
        for statement in self._all(old, side=0):
            if all(self._lines.moved(old, n) is None for n in range(statement.first, statement.last + 1)):
                head = self._lines.moved(old, statement.function)
                own = self.function(file, head.line) if head is not None else 0
                if own not in touched:
                    found.append(Edit(file, old, own, statement, removed=True))
        return found

    def to_look_at(
        self, files: Iterable[str], ways: Sequence[Sequence[OwnFrame]], others: Sequence[Sequence[OwnFrame]]
    ) -> Touched:
        """What was touched of some files: first what is on the way, then what is in functions that asked for memory.

        Files that did not ask for any are named only where no other was touched: a case may import much besides.

        Args:
            files: relative to the tree after.
            ways: frames of stacks that tell where to look, the most telling first.
            others: frames of all stacks.
        """
        found = [edit for file in sorted(files) for edit in self.of(file)]
        if not found:
            return Touched()
        edited = {edit.file_now for edit in found}
        order: dict[tuple[str, int], int] = {}
        for own in self._functions(ways, edited):
            order.setdefault(own, len(order))
        ran = set(self._functions(others, edited))
        used = {file for file, _ in ran}

        def rank(edit: Edit) -> tuple[object, ...]:
            own = edit.file_now, edit.function
            return order.get(own, len(order)), own not in ran, edit

        named = sorted((edit for edit in found if edit.file_now in used), key=rank) or found
        lines = []
        for edit in named[:_MOST_LINES]:
            text = (self._before if edit.removed else self._after).line(edit.file, edit.statement.first)
            lines.append(
                TouchedLine(
                    file=printable(edit.file),
                    line=edit.statement.first,
                    function=printable(edit.statement.name),
                    code=printable(text, CODE_LIMIT),
                    removed=edit.removed,
                    on_the_way=(edit.file_now, edit.function) in order,
                )
            )
        return Touched(lines=lines, more=len(found) - len(lines))

    def _functions(self, stacks: Sequence[Sequence[OwnFrame]], files: set[str]) -> Iterator[tuple[str, int]]:
        """The functions of some files that frames are in, by their first lines."""
        return ((file, self.function(file, line)) for frames in stacks for file, line, _ in frames if file in files)

    def _is_changed(self, file: str) -> bool:
        return self._before.lines(self._lines.was_called(file)) != self._after.lines(file)

    def _same(self, file: str) -> set[int]:
        if file not in self._unchanged:
            self._unchanged[file] = self._lines.unchanged(file)
        return self._unchanged[file]

    def _at(self, file: str, line: int) -> Statement | None:
        statements = self._all(file)
        number = bisect_right(statements, line, key=lambda s: s.first) - 1
        return statements[number] if number >= 0 and line <= statements[number].last else None

    def _all(self, file: str, side: int = 1) -> list[Statement]:
        if (side, file) not in self._statements:
            try:
                with warnings.catch_warnings(action="ignore"):  # of escapes that are none
                    module = ast.parse((self._before, self._after)[side].text(file))
                found = sorted(_statements(module.body, 0, ""), key=lambda s: (s.first, s.last))
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                found = []
            self._statements[side, file] = found
        return self._statements[side, file]


def _statements(body: list[ast.stmt], function: int, name: str) -> Iterator[Statement]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_text(node):
            continue
        inner, called = function, name
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner, called = first, node.name
        yield Statement(first, _head_end(node), inner, called)
        yield from _held(node, inner, called)


def _held(node: ast.AST, function: int, name: str) -> Iterator[Statement]:
    """The statements that another holds."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ExceptHandler | ast.match_case):
            yield from _statements(child.body, function, name)
        elif isinstance(child, ast.stmt):
            yield from _statements([child], function, name)


def _head_end(node: ast.AST) -> int:
    """The last line of a statement without the statements that it holds."""
    ends = [getattr(node, "lineno", 0)]
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            ends.append(getattr(child, "end_lineno", None) or _head_end(child))
    return max(ends)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
