"""What a replay did, and how it was set otherwise than its recording: all that its assumptions depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fragscope.allocator.conf import Conf, parse_conf
from fragscope.allocator.recorded import card_of, conf_of, knows_fraction
from fragscope.allocator.rules import Rules, rules_for
from fragscope.allocator.settings import ReplaySettings
from fragscope.allocator.tape import Tape
from fragscope.errors import UsageError
from fragscope.trace import RequestKind, Trace
from fragscope.trace.events import Column


@dataclass(frozen=True)
class Facts:
    """What a replay did, as far as its assumptions depend on it.

    Attributes:
        tape: what was played.
        settings: what it was decided under.
        conf: those of the conf.
        failed: rows of requests that failed.
        retries: requests that released everything cached.
        reserved: peak of reserved bytes.
        held: peak of what was held from the driver, past the allocator too.
        ties: choices between equal blocks that came down to addresses of segments.
        addresses: where those come from: a driver, or a model of it and what is said for that.
        defects: times that the real allocator would have misused the driver.
        lost_frees: frees of what was not held.
        verified: whether a comparison with the recorded decisions found no difference.
    """

    tape: Tape
    settings: ReplaySettings
    conf: Conf
    failed: Column
    retries: int
    reserved: int
    held: int
    ties: int
    addresses: str | None
    defects: int
    lost_frees: int
    verified: bool

    @property
    def trace(self) -> Trace:
        """As recorded."""
        return self.tape.trace

    @cached_property
    def is_confirmed(self) -> bool:
        """Whether a real allocator decided likewise; one that the model recorded proves nothing about inferences."""
        return self.verified and self.trace.final is not None

    @cached_property
    def recorded_conf(self) -> Conf | None:
        """What the recorded conf means under the rules; None where these refuse it."""
        return _meaning(self.trace, self.settings.rules.rules)

    @cached_property
    def has_other_conf(self) -> bool:
        """Whether the conf is not the one that was recorded, whatever its spelling."""
        return has_other_conf(self.trace, self.settings)

    @cached_property
    def is_changed(self) -> bool:
        """Whether anything is set otherwise than it was recorded, as far as that is known."""
        trace, s = self.trace, self.settings
        named = trace.settings.capacity
        return (
            self.has_other_conf
            or _has_other_rules(trace, s)
            or (trace.card is not None and _card_name(trace) != s.card)
            or (trace.device_total is not None and trace.device_total != s.total)
            or (named is not None and named != s.capacity)
            or (knows_fraction(trace) and trace.settings.memory_fraction != s.memory_fraction)
        )

    @cached_property
    def was_short(self) -> bool:
        """Whether memory was short at any time."""
        return bool(self.retries or len(self.failed))

    @cached_property
    def depends_on_memory(self) -> bool:
        """Whether the figures may depend on how much memory there was.

        They do where it was short, where old segments are collected before it is, and where more is held than the
        recording shows to have been there.
        """
        shown = self.tape.held
        grew = shown is not None and self.held > shown
        return self.was_short or self.conf.garbage_collection_threshold > 0 or grew

    @cached_property
    def depends_on_total(self) -> bool:
        """Whether the figures may depend on the device's memory in all.

        A memory fraction is a share of it, and expandable segments reserve addresses by it.
        """
        is_limited = (
            self.settings.memory_fraction is not None
            or self.conf.per_process_memory_fraction != 1.0
            or bool(self.trace.count(RequestKind.MEMORY_FRACTION))
        )
        return is_limited or (self.conf.expandable_segments and self.reserved > self.settings.total)

    @cached_property
    def newly_failed(self) -> Column:
        """Rows of requests that failed here and not when recorded."""
        return np.setdiff1d(self.failed, self.tape.failed, assume_unique=True)

    @cached_property
    def newly_served(self) -> Column:
        """Rows of requests that failed when recorded and did not here: served, or left out."""
        return np.setdiff1d(self.tape.failed, self.failed, assume_unique=True)

    @cached_property
    def late_frees(self) -> int:
        """Frees of what was never asked for, or was freed before; a request that failed may be freed any time."""
        if not self.lost_frees:
            return 0
        r = self.trace.requests
        begins = (r.kind == RequestKind.ALLOC) | (r.kind == RequestKind.HELD)
        ids = r.id[(r.kind == RequestKind.FREE) & ~np.isin(r.id, r.id[self.tape.failed])]
        known = np.isin(ids, r.id[begins])
        return len(ids) - len(np.unique(ids[known]))


def has_other_conf(trace: Trace, settings: ReplaySettings) -> bool:
    """Whether settings have another conf than a Trace was recorded under: one that means something else."""
    rules = settings.rules.rules
    recorded = _meaning(trace, rules)
    return recorded is None or replace(recorded, text="") != replace(parse_conf(settings.conf, rules), text="")


def _meaning(trace: Trace, rules: Rules) -> Conf | None:
    try:
        return conf_of(trace, rules)
    except UsageError:
        return None


def _has_other_rules(trace: Trace, settings: ReplaySettings) -> bool:
    if trace.torch is None:
        return False
    try:
        chosen = rules_for(trace.torch)
    except UsageError:
        return True
    return (chosen.rules.release, chosen.assumed) != (settings.rules.rules.release, settings.rules.assumed)


def _card_name(trace: Trace) -> str:
    try:
        return card_of(trace).name
    except UsageError:
        return str(trace.card)
