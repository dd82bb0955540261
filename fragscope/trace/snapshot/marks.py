"""Boundaries of the measured phase, which a recorder notes beside the entries of a snapshot."""

from __future__ import annotations

from dataclasses import dataclass

from fragscope.trace.events import RequestKind


@dataclass(frozen=True, slots=True)
class PhaseMark:
    """A phase boundary that the recorder noted.

    Attributes:
        position: how many events came before it.
        kind: ``PHASE_BEGIN`` or ``PHASE_END``.
        name: the phase's name.
    """

    position: int
    kind: RequestKind
    name: str
