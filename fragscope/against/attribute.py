"""Which lines hold the difference between two recordings of one case.

Live memory is grouped by the stack that asked for it, on both sides, and stacks are matched although lines moved: first
whole stacks whose lines correspond, then those whose innermost line of the repository does, then by that line's text. What
is left was added or removed. The sums are whole: what all places hold more is what the program holds more.

The line that a difference is told by is the innermost one of the repository that no unchanged stack shares: many programs
allocate in one function of their own, whose line says nothing about who calls it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fragscope.against.held import Moment, Recorded
from fragscope.against.imports import is_environment
from fragscope.against.lines import Alignment, Sources
from fragscope.errors import printable
from fragscope.gate.verdict import CodePlace, StackChange
from fragscope.trace import Frame, Stack

_SHOWN_FRAMES = 8
_CODE_LIMIT = 200
_TELLING = 6  # characters that a line must have to be known by its text alone


_OwnFrame = tuple[str, int, str]
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
        self._root = root

    def own(self, frame: Frame) -> str | None:
        """The file of a frame relative to the tree; None where it is not the repository's."""
        path = self._root / frame.file
        if is_environment(path) or not path.is_relative_to(self.top):
            return None
        return str(path.relative_to(self.top))

    def frames(self, stack: Stack) -> list[_OwnFrame]:
        """The frames of the repository, innermost first."""
        return [(file, frame.line, frame.function) for frame in stack if (file := self.own(frame)) is not None]

    def place(self, frame: _OwnFrame) -> CodePlace:
        """A line of the repository, as it can be shown."""
        file, line, function = frame
        return CodePlace(file=printable(file), line=line, function=printable(function), code=self.code(file, line))

    def code(self, file: str, line: int) -> str:
        """The text of a line, as it can be shown."""
        return printable(self.sources.line(file, line), _CODE_LIMIT)

    def shown(self, stack: Stack) -> list[str]:
        """Frames for people, innermost first."""
        out = []
        for frame in stack[:_SHOWN_FRAMES]:
            file = self.own(frame) or frame.file.rpartition("-packages/")[2]
            out.append(printable(f"{file}:{frame.line} {frame.function}"))
        return out


@dataclass(slots=True)
class _Group:
    """What one stack, or several that count as one, held and asked for.

    Attributes:
        stack: that held most.
        stacks: all of them.
        held, blocks: at the moment; bytes.
        requests, asked: in the whole run; asked in bytes.
    """

    stack: Stack = ()
    held: int = 0
    blocks: int = 0
    requests: int = 0
    asked: int = 0
    stacks: list[Stack] = field(default_factory=list)
    most: int = -1

    def add(self, other: _Group) -> None:
        if other.held > self.most:
            self.stack, self.most = other.stack, other.held
        self.stacks.append(other.stack)
        self.held += other.held
        self.blocks += other.blocks
        self.requests += other.requests
        self.asked += other.asked


class Attribution:
    """Compares recordings of one case in two trees.

    Args:
        before, after: the trees.
        was, now: the case's recordings there.
    """

    def __init__(self, before: Tree, after: Tree, was: Recorded, now: Recorded) -> None:
        self._before, self._after = before, after
        self._was, self._now = was, now
        files = [
            {file for stack in r.trace.stacks for frame in stack if (file := tree.own(frame)) is not None}
            for tree, r in ((before, was), (after, now))
        ]
        self._lines = Alignment(before.sources, after.sources, *files)

    def changes(self, was: Moment, now: Moment) -> list[StackChange]:
        """What each place held at a moment of either recording, where that differs; largest difference first."""
        pairs = list(self._matched(_groups(was, self._was), _groups(now, self._now)))
        same = [(old, new) for old, new in pairs if old is not None and new is not None and _unchanged(old, new)]
        others = (
            _shared(self._before, (stack for old, _ in same for stack in old.stacks)),
            _shared(self._after, (stack for _, new in same for stack in new.stacks)),
        )
        found = [self._change(old, new, others) for old, new in pairs if _held(old) != _held(new)]
        return sorted(found, key=lambda c: (-abs(c.after - c.before), c.file, c.line, c.frames))

    def peaks(self, was: Stack, now: Stack) -> tuple[CodePlace | None, CodePlace | None, bool]:
        """The lines at which peaks were reached, and whether they are others.

        Of two stacks that have their innermost lines in common, the first that differ are meant.
        """
        old, new = self._before.frames(was), self._after.frames(now)
        if not old or not new:
            return None, None, bool(old) != bool(new)
        for left, right in zip(old, new, strict=False):
            moved = self._lines.moved(left[0], left[1])
            if moved is None or (moved.file, moved.line) != right[:2]:
                same_text = left[2] == right[2] and self._before.code(*left[:2]) == self._after.code(*right[:2])
                if moved is not None or not same_text:
                    return self._before.place(left), self._after.place(right), True
        return self._before.place(old[0]), self._after.place(new[0]), False

    # --- matching -------------------------------------------------------------------------------------------------

    def _matched(self, old: list[_Group], new: list[_Group]) -> Iterable[tuple[_Group | None, _Group | None]]:
        stages: Sequence[tuple[Callable[[Stack], Hashable], Callable[[Stack], Hashable]]] = (
            (self._whole_before, self._whole_after),
            (self._leaf_before, self._leaf_after),
            (lambda s: _text(self._before, s, named=True), lambda s: _text(self._after, s, named=True)),
            (lambda s: _text(self._before, s, named=False), lambda s: _text(self._after, s, named=False)),
        )
        for key_before, key_after in stages:
            left, right = _by_key(old, key_before), _by_key(new, key_after)
            both = [key for key in left if key is not None and key in right]
            for key in both:
                yield _together(left[key]), _together(right[key])
            taken = set(both)
            old = [g for key, groups in left.items() if key not in taken for g in groups]
            new = [g for key, groups in right.items() if key not in taken for g in groups]
        yield from ((group, None) for group in old)
        yield from ((None, group) for group in new)

    def _whole_before(self, stack: Stack) -> Hashable:
        out = []
        for frame in stack:
            file = self._before.own(frame)
            if file is None:
                out.append((frame.file, frame.line))
                continue
            moved = self._lines.moved(file, frame.line)
            if moved is None:
                return None
            out.append((moved.file, moved.line))
        return tuple(out)

    def _whole_after(self, stack: Stack) -> Hashable:
        return tuple((self._after.own(frame) or frame.file, frame.line) for frame in stack)

    def _leaf_before(self, stack: Stack) -> Hashable:
        frames = self._before.frames(stack)
        moved = self._lines.moved(*frames[0][:2]) if frames else None
        return None if moved is None else (moved.file, moved.line)

    def _leaf_after(self, stack: Stack) -> Hashable:
        frames = self._after.frames(stack)
        return frames[0][:2] if frames else None

    # --- what is said ---------------------------------------------------------------------------------------------

    def _change(self, old: _Group | None, new: _Group | None, others: tuple[_Shared, _Shared]) -> StackChange:
        tree, group, shared = (
            (self._before, old, others[0]) if new is None else (self._after, new, others[1])
        )
        assert group is not None
        frames = tree.frames(group.stack)
        place = tree.place(_telling(frames, shared)) if frames else CodePlace(file="", line=0, function="")
        before, after = _held(old), _held(new)
        kind: Literal["new", "grown", "shrunk", "gone"] = "grown" if after > before else "shrunk"
        if old is None or new is None:
            kind = "new" if old is None else "gone"
        return StackChange(
            kind=kind,
            before=before,
            after=after,
            file=place.file,
            line=place.line,
            function=place.function,
            code=place.code,
            frames=tree.shown(group.stack),
            blocks_before=old.blocks if old is not None else 0,
            blocks_after=new.blocks if new is not None else 0,
            why=_why(old, new) if old is not None and new is not None else "",
        )


_Shared = set[tuple[tuple[str, int], ...]]
"""Beginnings of stacks, innermost lines first."""


def _shared(tree: Tree, stacks: Iterable[Stack]) -> _Shared:
    out: _Shared = set()
    for stack in stacks:
        lines = [frame[:2] for frame in tree.frames(stack)]
        out.update(tuple(lines[:n]) for n in range(1, len(lines) + 1))
    return out


def _telling(frames: list[_OwnFrame], shared: _Shared) -> _OwnFrame:
    """The innermost frame up to which no unchanged stack is the same; the innermost one where all are shared."""
    lines = tuple(frame[:2] for frame in frames)
    return next((frame for n, frame in enumerate(frames) if lines[: n + 1] not in shared), frames[0])


def _unchanged(old: _Group, new: _Group) -> bool:
    return (old.held, old.requests, old.asked) == (new.held, new.requests, new.asked)


def _groups(moment: Moment, recorded: Recorded) -> list[_Group]:
    """Every stack that asked for memory, whether or not it held any at that moment."""
    found = {
        stack: _Group(stack, requests=requests, asked=asked) for stack, (requests, asked) in recorded.asked.items()
    }
    for holder in moment.holders:
        group = found.setdefault(holder.stack, _Group(holder.stack))
        group.held += holder.requested if moment.requested else holder.bytes
        group.blocks += holder.blocks
    return list(found.values())


def _by_key(groups: list[_Group], key: Callable[[Stack], Hashable]) -> dict[Hashable, list[_Group]]:
    out: dict[Hashable, list[_Group]] = defaultdict(list)
    for group in groups:
        out[key(group.stack)].append(group)
    return out


def _together(groups: list[_Group]) -> _Group:
    out = _Group()
    for group in groups:
        out.add(group)
    return out


def _text(tree: Tree, stack: Stack, *, named: bool) -> Hashable:
    """The innermost line of the repository by its text, with its function's name or alone."""
    frames = tree.frames(stack)
    if not frames:
        return None
    file, line, function = frames[0]
    text = tree.sources.line(file, line)
    if len(text) < _TELLING:
        return None
    return (function, text) if named else text


def _held(group: _Group | None) -> int:
    return 0 if group is None else group.held


def _why(old: _Group, new: _Group) -> Literal["", "larger", "smaller", "more", "fewer", "longer", "shorter"]:
    more = new.held > old.held
    if (old.requests, old.asked) == (new.requests, new.asked):
        return "longer" if more else "shorter"
    if old.requests == new.requests and (new.asked > old.asked) == more:
        return "larger" if more else "smaller"
    if old.asked * new.requests == new.asked * old.requests and (new.requests > old.requests) == more:
        return "more" if more else "fewer"
    return ""
