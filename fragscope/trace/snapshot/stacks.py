"""Call stacks of a snapshot's entries, each kept once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fragscope.trace.events import NO_STACK, Frame, StackTable
from fragscope.trace.snapshot.shape import MAX_INT, Checker


class Stacks:
    """Reads the stacks of entries into a table.

    Attributes:
        table: the stacks so far.
    """

    def __init__(self, check: Checker) -> None:
        self.table = StackTable()
        self._check = check
        self._frames: dict[int, Frame] = {}
        self._stacks: dict[int, int] = {}

    def of(self, entry: Mapping[str, Any], where: str) -> int:
        """The number of an entry's stack, ``NO_STACK`` where it has none."""
        frames = entry.get("frames")
        if not frames:
            return NO_STACK
        # A hostile file may refer to one long list from every event. Identities hold while the file's value lives.
        known_stack = self._stacks.get(id(frames))
        if known_stack is not None:
            return known_stack
        out = []
        for frame in self._check.sequence(frames, where):
            # Snapshots share one dict per distinct frame, so its identity is a good cache key while it lives.
            known = self._frames.get(id(frame))
            if known is None:
                f = self._check.mapping(frame, where)
                file, line, name = f.get("filename"), f.get("line"), f.get("name")
                known = self._frames[id(frame)] = Frame(
                    file if isinstance(file, str) else "",
                    line if isinstance(line, int) and abs(line) <= MAX_INT else 0,
                    name if isinstance(name, str) else "",
                )
            out.append(known)
        stack = self._stacks[id(frames)] = self.table.add(tuple(out))
        return stack
