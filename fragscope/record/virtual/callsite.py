"""Whose line of code is running: Python stacks without the frames of torch and of the virtual device itself."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType

import torch

from fragscope.trace import Frame, Stack

_DEPTH = 32
_TORCH = str(Path(torch.__file__).parent) + "/"
_OURS = str(Path(__file__).parents[2]) + "/"
_HIDDEN = (_TORCH, _OURS, "<frozen")


class CallSites:
    """Captures stacks of user code; frames are shared between equal places.

    Args:
        root: paths below it are shown relative to it.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = f"{root}/" if root is not None else None
        self._frames: dict[tuple[CodeType, int], Frame | None] = {}
        self._hidden: dict[str, bool] = {}

    def stack(self) -> Stack:
        """The calling user code, innermost frame first."""
        out: list[Frame] = []
        frame: FrameType | None = sys._getframe(1)
        known = self._frames
        while frame is not None and len(out) < _DEPTH:
            key = (frame.f_code, frame.f_lineno)
            if key not in known:
                known[key] = self._describe(*key)
            shown = known[key]
            if shown is not None:
                out.append(shown)
            frame = frame.f_back
        return tuple(out)

    def where(self) -> str | None:
        """``file:line`` of the innermost frame of user code."""
        stack = self.stack()
        return f"{stack[0].file}:{stack[0].line}" if stack else None

    def line(self) -> tuple[str, int] | None:
        """File and line of the innermost frame of user code; cheaper than a stack."""
        frame: FrameType | None = sys._getframe(1)
        hidden = self._hidden
        while frame is not None:
            file = frame.f_code.co_filename
            if file not in hidden:
                hidden[file] = _is_hidden(file)
            if not hidden[file]:
                return self._shown(file), frame.f_lineno
            frame = frame.f_back
        return None

    def _describe(self, code: CodeType, line: int) -> Frame | None:
        file = code.co_filename
        return None if _is_hidden(file) else Frame(self._shown(file), line, code.co_qualname)

    def _shown(self, file: str) -> str:
        return file[len(self._root) :] if self._root is not None and file.startswith(self._root) else file


def _is_hidden(file: str) -> bool:
    between = "/multiprocessing/" in file or "/triton/runtime/" in file or file.endswith("/contextlib.py")
    return file.startswith(_HIDDEN) or between
