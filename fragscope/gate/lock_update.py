"""What writing a lock anew would change, and what stays of the one that is there."""

from __future__ import annotations

from dataclasses import dataclass

from fragscope.gate.budgets import METRICS
from fragscope.gate.lock import Lock, LockedCase
from fragscope.units import format_bytes


@dataclass(frozen=True, slots=True)
class Relock:
    """A lock to write, and how it differs from the one that is there.

    Attributes:
        lock: what would be written.
        added, dropped: ids of cases that only one of the two has.
        kept: ids of cases that these results lack and that stay as they are.
        changed: by id, what is otherwise: ``transient 2.00 MiB -> 4.00 MiB``.
        mixed: why it must not be written: kept cases were measured by other releases, so that it would be of neither;
            ``""`` where it may be.
    """

    lock: Lock
    added: tuple[str, ...]
    dropped: tuple[str, ...]
    kept: tuple[str, ...]
    changed: dict[str, tuple[str, ...]]
    mixed: str = ""

    @property
    def differs(self) -> bool:
        """Whether any case would change."""
        return bool(self.added or self.dropped or self.changed)


def relock(old: Lock | None, new: Lock, *, prune: bool) -> Relock:
    """What the lock becomes.

    Cases that the old lock has and these results lack stay: a run of one scenario must not delete the others.

    Args:
        old: the lock that is there.
        new: what the results lock.
        prune: drop the cases that these results lack.
    """
    before = {} if old is None else old.cases
    absent = tuple(sorted(before.keys() - new.cases.keys()))
    kept = () if prune else absent
    return Relock(
        lock=Lock(new.file, {**{id_: before[id_] for id_ in kept}, **new.cases}, new.fragscope, new.torch),
        added=tuple(sorted(new.cases.keys() - before.keys())),
        dropped=absent if prune else (),
        kept=kept,
        changed={
            id_: differences
            for id_ in sorted(before.keys() & new.cases.keys())
            if (differences := _differences(before[id_], new.cases[id_]))
        },
        mixed=_mixed(old, new, len(kept)) if old is not None and kept else "",
    )


def _mixed(old: Lock, new: Lock, kept: int) -> str:
    for name, then, now in (("fragscope", old.fragscope, new.fragscope), ("torch", old.torch, new.torch)):
        if then and then != now:
            return (
                f"{new.file} was made with {name} {then}, these results with {now or 'another'}, and {kept:,} of its "
                "cases are not among them; run everything that is locked, or drop those with --prune"
            )
    return ""


def _differences(old: LockedCase, new: LockedCase) -> tuple[str, ...]:
    found = [f"outcome {old.outcome} -> {new.outcome}"] if old.outcome != new.outcome else []
    for metric in METRICS:
        then, now = old.figures.get(metric), new.figures.get(metric)
        if then != now and (metric in old.stated or metric in new.stated):
            found.append(f"{metric} {_size(then)} -> {_size(now)}{_bytes(then, now)}")
    if old.estimated != new.estimated:
        found.append(f"{_certainty(old)} -> {_certainty(new)}")
    return tuple(found)


def _certainty(case: LockedCase) -> str:
    return f"estimated ({case.estimated})" if case.estimated else "exact"


def _size(value: int | None) -> str:
    return "none" if value is None else format_bytes(value)


def _bytes(then: int | None, now: int | None) -> str:
    if then is None or now is None:
        return ""
    return f" ({now - then:+,} B)"
