"""In which order an operator takes its results and its scratch on a card, and gives the scratch back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

RECORDED = (9, 0)
"""Compute capability of the card whose calls were recorded; what only a recording tells is estimated on others."""


@dataclass(slots=True)
class Plan:
    """What one call does, step by step.

    Attributes:
        steps: ``("out", n)`` takes the memory of result n, ``("take", bytes)`` scratch, ``("give", n)`` gives the nth
            scratch back. What is not given back by then goes at the end, the last first.
        why: why it may be otherwise; empty where it is known.
    """

    steps: list[tuple[str, int]] = field(default_factory=list)
    why: str = ""
    _taken: int = 0

    def out(self, *numbers: int) -> Plan:
        """Results, in the order given."""
        self.steps.extend(("out", n) for n in numbers)
        return self

    def take(self, *sizes: int) -> Plan:
        """Scratch; bytes."""
        self.steps.extend(("take", size) for size in sizes)
        self._taken += len(sizes)
        return self

    def hold(self, size: int) -> int:
        """Scratch of so many bytes; returns its number."""
        return self.take(size)._taken - 1

    def give(self, *numbers: int) -> Plan:
        """Scratch goes back, by its number; -1 is the last that was taken."""
        self.steps.extend(("give", n if n >= 0 else self._taken + n) for n in numbers)
        return self

    def pass_by(self, *sizes: int) -> Plan:
        """Scratch that is taken, and given back before anything else happens, the last first."""
        self.take(*sizes)
        return self.give(*range(-1, -len(sizes) - 1, -1))

    def call(self, inner: Plan, *results: int) -> int:
        """Another operator runs, whose results are scratch of this one.

        Args:
            inner: what it does.
            results: bytes of each of its results; 0 for one that is written into memory that is there.

        Returns:
            The number of its first result, as scratch.
        """
        made: dict[int, int] = {}
        held: dict[int, int] = {}
        count = 0
        for step, n in inner.steps:
            if step == "out":
                made[n] = self.hold(results[n])
            elif step == "take":
                held[count] = self.hold(n)
                count += 1
            else:
                self.give(held.pop(n))
        self.give(*reversed(held.values()))
        self.why = self.why or inner.why
        return made[0]

    def guessed(self, why: str) -> Plan:
        """May be otherwise."""
        self.why = why
        return self


def outputs_then(count: int, sizes: Iterable[int] = ()) -> Plan:
    """All results in order, then scratch to the end of the call."""
    return Plan().out(*range(count)).take(*sizes)
