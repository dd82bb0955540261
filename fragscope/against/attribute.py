"""Which lines hold the difference between two recordings of one case.

Live memory is grouped by the stack that asked for it, on both sides, and stacks are matched although lines moved:
first whole stacks whose lines correspond, then those whose innermost line of the repository does, then by that line's
text. What is left was added or removed.

What is compared is the moment of the peak now with the moment before at which the program was at the same point
(points.py). A tensor that is kept too long makes the peak larger at a point where other tensors are; held against the
peak before, wherever that was, these would look guilty. For values that fell it is the other way round; values of the
end are compared at the end.

The line that a difference is told by is the innermost one of the repository that no unchanged stack shares: many
programs allocate in one function of their own, whose line says nothing about who calls it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fragscope.against.held import Recorded
from fragscope.against.lines import Alignment
from fragscope.against.places import OwnFrame, Tree
from fragscope.against.points import Points
from fragscope.against.touched import Edits
from fragscope.gate.verdict import CodePlace, StackChange, Touched
from fragscope.trace import Stack

_NEXT_TO_NOTHING = 100  # 1 %, from which on the gate takes a difference for one (gate/compare.py)
_TELLING = 6  # characters that a line must have to be known by its text alone
_TARGET = re.compile(r"^(?:return\s+|[\w.]+(?:\s*:[^=]*)?\s*=\s*(?!=))")
"""What takes the value of a line's expression, which renaming and extracting change."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Stacks that count as one place, in one tree.

    Attributes:
        stacks: all of them.
        asked: rows of their requests, in order.
        size: for how many bytes they asked in all.
    """

    stacks: tuple[Stack, ...]
    asked: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class _Held:
    """What a group held at a moment: bytes, blocks, what was asked for of them, and the stack that held most."""

    bytes: int = 0
    blocks: int = 0
    requested: int = 0
    stack: Stack = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a difference comes from.

    Attributes:
        stacks: which places hold it; of those that rose the changed ones first, then by size.
        touched: where to look, where the first of them was not changed.
    """

    stacks: tuple[StackChange, ...] = ()
    touched: Touched = field(default_factory=Touched)


class Attribution:
    """Compares recordings of one case in two trees.

    Args:
        before, after: the trees.
        was, now: the case's recordings there.
        imported: files of the tree after that the case imports, as its results name them.
    """

    def __init__(self, before: Tree, after: Tree, was: Recorded, now: Recorded, imported: Iterable[str] = ()) -> None:
        self._before, self._after = before, after
        self._was, self._now = was, now
        files = [
            {file for stack in r.trace.stacks for frame in stack if (file := tree.own(frame)) is not None}
            for tree, r in ((before, was), (after, now))
        ]
        self._lines = Alignment(before.sources, after.sources, *files)
        self._edits = Edits(before.sources, after.sources, self._lines)
        self._files = files[1] | {file for name in imported if (file := after.own_file(name)) is not None}
        self._pairs = list(self._matched([_group(was, s) for s in was.asked], [_group(now, s) for s in now.asked]))
        both = [(old, new) for old, new in self._pairs if old is not None and new is not None]
        self._points = Points(was, now, [(old.asked, new.asked) for old, new in both])
        self._place_of: tuple[dict[Stack, int], dict[Stack, int]] = (
            {stack: number for number, (old, _) in enumerate(both) for stack in old.stacks},
            {stack: number for number, (_, new) in enumerate(both) for stack in new.stacks},
        )

    def of_value(self, metric: str, *, fell: bool = False) -> Explanation:
        """What each place holds otherwise at the moment that a metric speaks of.

        Args:
            metric: whose moment is meant.
            fell: the value is smaller now.
        """
        was, now = self._was.row(metric), self._now.row(metric)
        if self._was.is_peak(metric):
            if fell:
                now = self._points.after(was, self._place_of[0].get(self._was.stack(was)), metric)
            else:
                was = self._points.before(now, self._place_of[1].get(self._now.stack(now)), metric)
        return self._changes(was, now, metric, fell=fell)

    def of_failure(self) -> Explanation:
        """What each place held otherwise when the request failed that did not before."""
        failed = self._now.failed
        if failed is None:
            return Explanation()
        was = self._points.before_failure(failed, self._place_of[1].get(self._now.stack(failed)))
        return self._changes(was, failed, "peak_allocated")

    def _changes(self, was: int, now: int, metric: str, *, fell: bool = False) -> Explanation:
        held = self._was.holders(was, metric), self._now.holders(now, metric)
        # What holds nothing at this moment tells nothing about who does: a line may be the same in set-up, say.
        same = [(old, new) for old, new in self._pairs if old and new and _unchanged(old, new, held)]
        shared = (
            _shared(self._before, (stack for old, _ in same for stack in old.stacks)),
            _shared(self._after, (stack for _, new in same for stack in new.stacks)),
        )
        found = []
        for old, new in self._pairs:
            had, has = _held(old, held[0]), _held(new, held[1])
            if had.bytes != has.bytes:
                why = _why((_asked(self._was, old, was), had), (_asked(self._now, new, now), has))
                found.append((self._change(old, new, (had, has), shared, why), has.stack))
        if fell:
            return Explanation(tuple(c for c, _ in sorted(found, key=lambda f: _by_size(f[0], sign=1))))
        most = max((c.after - c.before for c, _ in found), default=0)
        found.sort(key=lambda f: (not _leads(f[0], most), *_by_size(f[0], sign=-1)))
        stacks = tuple(change for change, _ in found)
        if stacks and _leads(stacks[0], most):
            return Explanation(stacks)
        ways = [self._after.frames(stack) for change, stack in found if change.after > change.before]
        if self._now.is_peak(metric):
            ways.append(self._after.frames(self._now.stack(now)))
        others = [self._after.frames(stack) for stack in self._now.asked]
        return Explanation(stacks, self._edits.to_look_at(self._files, ways, others))

    def failing(self) -> CodePlace | None:
        """The line of the request that failed."""
        if self._now.failed is None:
            return None
        frames = self._after.frames(self._now.stack(self._now.failed))
        return self._after.place(frames[_depth(self._after, self._now, frames)]) if frames else None

    def peaks(self, metric: str) -> tuple[CodePlace | None, CodePlace | None, bool]:
        """The lines at which a metric's peak was reached and is reached, and whether they are others.

        Of two stacks that have their innermost lines in common, the first that differ are meant.
        """
        if not self._was.is_peak(metric):
            return None, None, False
        old, new = (
            tree.frames(recorded.stack(recorded.row(metric)))
            for tree, recorded in ((self._before, self._was), (self._after, self._now))
        )
        if not old or not new:
            return None, None, bool(old) != bool(new)
        differ = next(
            (n for n, (left, right) in enumerate(zip(old, new, strict=False)) if self._differ(left, right)), None
        )
        at = [
            max(differ or 0, _depth(tree, recorded, frames))
            for tree, recorded, frames in ((self._before, self._was, old), (self._after, self._now, new))
        ]
        places = self._before.place(old[min(at[0], len(old) - 1)]), self._after.place(new[min(at[1], len(new) - 1)])
        return *places, differ is not None

    def _differ(self, old: OwnFrame, new: OwnFrame) -> bool:
        moved = self._lines.moved(*old[:2])
        if moved is not None:
            return (moved.file, moved.line) != new[:2]
        return old[2] != new[2] or self._before.code(*old[:2]) != self._after.code(*new[:2])

    # --- matching -------------------------------------------------------------------------------------------------

    def _matched(self, old: list[_Group], new: list[_Group]) -> Iterator[_Pair]:
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
                out.append((self._before.file(frame), frame.line))
                continue
            moved = self._lines.moved(file, frame.line)
            if moved is None:
                return None
            out.append((moved.file, moved.line))
        return tuple(out)

    def _whole_after(self, stack: Stack) -> Hashable:
        return tuple((self._after.file(frame), frame.line) for frame in stack)

    def _leaf_before(self, stack: Stack) -> Hashable:
        frames = self._before.frames(stack)
        moved = self._lines.moved(*frames[0][:2]) if frames else None
        return None if moved is None else (moved.file, moved.line)

    def _leaf_after(self, stack: Stack) -> Hashable:
        frames = self._after.frames(stack)
        return frames[0][:2] if frames else None

    # --- what is said ---------------------------------------------------------------------------------------------

    def _change(
        self,
        old: _Group | None,
        new: _Group | None,
        held: tuple[_Held, _Held],
        shared: tuple[_Shared, _Shared],
        why: _Why,
    ) -> StackChange:
        tree, stack, others = self._after, held[1].stack or (new.stacks[0] if new is not None else ()), shared[1]
        if new is None:
            tree, stack, others = self._before, held[0].stack, shared[0]
        frames = tree.frames(stack)
        named = _telling(frames, others) if frames else ("", 0, "")
        place = tree.place(named) if frames else CodePlace(file="", line=0, function="")
        before, after = held[0].bytes, held[1].bytes
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
            frames=tree.shown(stack),
            blocks_before=held[0].blocks,
            blocks_after=held[1].blocks,
            why=why if old is not None and new is not None else "",
            changed=new is not None and bool(place.file) and self._edits.at(*named[:2]),
        )


def _leads(change: StackChange, most: int) -> bool:
    """Whether a place goes first: it rose, the change touched it, and it is not next to nothing beside the others."""
    rose = change.after - change.before
    return change.changed and rose > 0 and rose * _NEXT_TO_NOTHING >= most


def _by_size(change: StackChange, *, sign: int) -> tuple[object, ...]:
    """First what made the value what it is: a place that holds less explains nothing of one that rose."""
    return sign * (change.after - change.before), change.file, change.line, change.frames


_Shared = set[tuple[tuple[str, int], ...]]
"""Beginnings of stacks, innermost lines first."""


def _shared(tree: Tree, stacks: Iterable[Stack]) -> _Shared:
    out: _Shared = set()
    for stack in stacks:
        lines = [frame[:2] for frame in tree.frames(stack)]
        out.update(tuple(lines[:n]) for n in range(1, len(lines) + 1))
    return out


def _telling(frames: list[OwnFrame], shared: _Shared) -> OwnFrame:
    """The innermost frame up to which no unchanged stack is the same; the innermost one where all are shared."""
    lines = tuple(frame[:2] for frame in frames)
    return next((frame for n, frame in enumerate(frames) if lines[: n + 1] not in shared), frames[0])


_Why = Literal["", "larger", "smaller", "more", "fewer", "longer", "shorter", "cut"]
_Pair = tuple[_Group | None, _Group | None]
_Holders = dict[Stack, tuple[int, int, int]]


def _group(recorded: Recorded, stack: Stack) -> _Group:
    return _Group((stack,), tuple(recorded.asked[stack]), recorded.sizes[stack])


def _held(group: _Group | None, holders: _Holders) -> _Held:
    if group is None:
        return _Held()
    found = [(*holders.get(stack, (0, 0, 0)), stack) for stack in group.stacks]
    most = max(found, key=lambda f: f[0])
    return _Held(sum(f[0] for f in found), sum(f[1] for f in found), sum(f[2] for f in found), most[3])


def _unchanged(old: _Group, new: _Group, held: tuple[_Holders, _Holders]) -> bool:
    if (len(old.asked), old.size) != (len(new.asked), new.size):
        return False
    return _held(old, held[0]).bytes == _held(new, held[1]).bytes > 0


def _depth(tree: Tree, recorded: Recorded, frames: list[OwnFrame]) -> int:
    """How many of a stack's innermost lines say little, since several functions of the repository lead to them."""
    for depth in range(len(frames) - 1):
        lines = [frame[:2] for frame in frames[: depth + 1]]
        callers = {
            (others[depth + 1][0], others[depth + 1][2])
            for stack in recorded.asked
            if len(others := tree.frames(stack)) > depth + 1 and [frame[:2] for frame in others[: depth + 1]] == lines
        }
        if len(callers) <= 1:
            return depth
    return max(len(frames) - 1, 0)


def _by_key(groups: list[_Group], key: Callable[[Stack], Hashable]) -> dict[Hashable, list[_Group]]:
    out: dict[Hashable, list[_Group]] = defaultdict(list)
    for group in groups:
        out[key(group.stacks[0])].append(group)
    return out


def _together(groups: list[_Group]) -> _Group:
    return _Group(
        tuple(stack for group in groups for stack in group.stacks),
        tuple(sorted(row for group in groups for row in group.asked)),
        sum(group.size for group in groups),
    )


def _text(tree: Tree, stack: Stack, *, named: bool) -> Hashable:
    """The innermost line of the repository by what it computes, with its function's name or alone."""
    frames = tree.frames(stack)
    if not frames:
        return None
    file, line, function = frames[0]
    text = _TARGET.sub("", tree.sources.line(file, line))
    if len(text) < _TELLING:
        return None
    return (function, text) if named else text


def _asked(recorded: Recorded, group: _Group | None, upto: int) -> tuple[int, int]:
    """How many requests of a group there were up to a row, and for how many bytes."""
    if group is None:
        return 0, 0
    count = bisect_right(group.asked, upto)
    if count == len(group.asked):
        return count, group.size
    return count, int(recorded.trace.requests.size[np.asarray(group.asked[:count], dtype=np.int64)].sum())


def _why(was: tuple[tuple[int, int], _Held], now: tuple[tuple[int, int], _Held]) -> _Why:
    """What makes the difference of a group, from what it had asked for up to the moments, and what of that it held.

    Only where it had asked for the same can it be that the same memory lives longer.
    """
    ((count_before, size_before), had), ((count_after, size_after), has) = was, now
    more = has.bytes > had.bytes
    if (had.blocks, had.requested) == (has.blocks, has.requested):
        return "cut"
    if (count_before, size_before) == (count_after, size_after):
        return "longer" if more else "shorter"
    if count_before == count_after and (size_after > size_before) == more:
        return "larger" if more else "smaller"
    if size_before * count_after == size_after * count_before and (count_after > count_before) == more:
        return "more" if more else "fewer"
    return ""
