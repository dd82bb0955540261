"""Which lines of a tree are the repository's own, and how they are shown."""

from __future__ import annotations

from pathlib import Path

from fragscope.against.imports import is_environment
from fragscope.against.lines import Sources
from fragscope.errors import printable
from fragscope.gate.verdict import CodePlace
from fragscope.trace import Frame, Stack

_SHOWN_FRAMES = 8
CODE_LIMIT = 200

OwnFrame = tuple[str, int, str]
"""File relative to the tree, line, function."""


class Tree:
    """A tree whose recordings are compared.

    Args:
        top: the tree.
        root: the project's folder in it, which file names in stacks are relative to.
    """

    def __init__(self, top: Path, root: Path) -> None:
        self.top = top
        self.sources = Sources(top)
        self._root = root.absolute()
        self._own: dict[str, str | None] = {}

    def own(self, frame: Frame) -> str | None:
        """The file of a frame relative to the tree; None where it is not the repository's."""
        return self.own_file(frame.file)

    def own_file(self, name: str) -> str | None:
        """A file as stacks and results name it, relative to the tree; None where it is not the repository's."""
        if name not in self._own:
            path = self._root / name
            ours = path.is_relative_to(self.top) and not is_environment(path)
            self._own[name] = str(path.relative_to(self.top)) if ours else None
        return self._own[name]

    def file(self, frame: Frame) -> str:
        """The file of a frame as any tree calls it: relative to the tree, absolute where it is not the repository's.

        An environment in the project's folder is relative in stacks of the one tree and absolute in those of another.
        """
        return self.own(frame) or str(self._root / frame.file)

    def frames(self, stack: Stack) -> list[OwnFrame]:
        """The frames of the repository, innermost first."""
        return [(file, frame.line, frame.function) for frame in stack if (file := self.own(frame)) is not None]

    def place(self, frame: OwnFrame) -> CodePlace:
        """A line of the repository, as it can be shown."""
        file, line, function = frame
        return CodePlace(file=printable(file), line=line, function=printable(function), code=self.code(file, line))

    def code(self, file: str, line: int) -> str:
        """The text of a line, as it can be shown."""
        return printable(self.sources.line(file, line), CODE_LIMIT)

    def shown(self, stack: Stack) -> list[str]:
        """Frames for people, innermost first."""
        out = []
        for frame in stack[:_SHOWN_FRAMES]:
            file = self.own(frame) or frame.file.rpartition("-packages/")[2]
            out.append(printable(f"{file}:{frame.line} {frame.function}"))
        return out
