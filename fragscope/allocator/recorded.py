"""What a Trace was recorded under, as far as it says, and what follows from its decisions where it does not.

Snapshots hold neither the card nor a memory fraction. Where requests failed, the recording tells what was in force: a
failure although the driver had enough means a limit on reserved bytes, any other one tells how much there was in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fragscope.allocator.cards import CARDS, DEFAULT_CARD, Card, card_named
from fragscope.allocator.conf import Conf, parse_conf, recorded_conf
from fragscope.allocator.engine.sizes import page_bytes, segment_bytes
from fragscope.allocator.rules import NEWEST, ChosenRules, rules_for
from fragscope.errors import UsageError
from fragscope.trace import DecisionKind, Trace


@dataclass(frozen=True, slots=True)
class Limits:
    """What recorded failures say about the memory there was; bytes.

    Attributes:
        limit: a memory limit that explains them (the smallest that does), None where none is needed.
        limit_below: all limits from ``limit`` up to but not including this one explain them as well.
        capacity: what segments could take together, None where no failure tells.
    """

    limit: int | None = None
    limit_below: int | None = None
    capacity: int | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a Trace was recorded under.

    Attributes:
        rules: of the release that recorded it.
        card: its card, or a stand-in.
        capacity: bytes that segments could take together.
        conf: settings in force at the start.
        memory_fraction: as recorded, None where unknown or never set.
        limits: what its failures tell beyond that.
        notes: what is assumed, for people.
    """

    rules: ChosenRules
    card: Card
    capacity: int
    conf: Conf
    memory_fraction: float | None
    limits: Limits
    notes: tuple[str, ...]


def recorded_under(trace: Trace, rules: ChosenRules | None = None, card: Card | None = None) -> Recorded:
    """What a Trace was recorded under.

    Args:
        trace: with decisions or without.
        rules: what the user says about the release; None to take the Trace's.
        card: what the user says about the card; None to take the Trace's.

    Raises:
        UsageError: its conf is not such as its release has, or its card is unknown and its memory not told.
        UnmodelledError: the allocator model does not cover its settings.
    """
    notes = []
    if rules is None:
        if trace.torch is None:
            notes.append(f"the file does not name its torch release; the rules of {NEWEST.release} decide (--torch)")
        rules = rules_for(trace.torch or NEWEST.release)
    if rules.assumed:
        notes.append(f"torch {rules.torch} is newer than the rules known; those of {rules.rules.release} decide")
    if card is None:
        if trace.card is None:
            notes.append(f"the file does not name its card; {DEFAULT_CARD} is assumed (--card)")
        card = card_of(trace)
    conf = (
        recorded_conf(trace.settings, rules.rules) if not trace.confs else parse_conf(trace.settings.conf, rules.rules)
    )
    limits = Limits()
    if trace.settings.memory_fraction is None:
        limits = limits_from_failures(trace, conf)
    capacity = trace.settings.capacity
    if capacity is None:
        capacity = limits.capacity
        if capacity is not None:
            notes.append(f"requests failed with {capacity:,} bytes for segments in all: that was there (--capacity)")
    if limits.limit is not None:
        notes.append(
            f"requests failed although the driver had memory: a limit of {limits.limit:,} to "
            f"{(limits.limit_below or 0) - 1:,} reserved bytes was in force (--memory-fraction)"
        )
    return Recorded(
        rules=rules,
        card=card,
        capacity=card.free if capacity is None else capacity,
        conf=conf,
        memory_fraction=trace.settings.memory_fraction,
        limits=limits,
        notes=tuple(notes),
    )


def card_of(trace: Trace) -> Card:
    """The Trace's card, which may be one that no profile describes; a stand-in where it names none.

    Raises:
        UsageError: it has no profile, and the Trace does not tell its memory.
    """
    if trace.card is None or trace.card in CARDS:
        return card_named(trace.card or DEFAULT_CARD)
    for card in CARDS.values():
        if card.product == trace.card and trace.device_total in (None, card.total):
            return card
    total, free = trace.device_total, trace.settings.capacity
    if total is None:
        raise UsageError(
            f"the trace names the card {trace.card!r}, which has no profile, and not its memory; use --card"
        )
    return Card(trace.card, trace.card, total, total if free is None else free, (0, 0), 0, 0, "the trace")


def limits_from_failures(trace: Trace, conf: Conf) -> Limits:
    """What the recorded failures say about the memory there was."""
    d = trace.decisions
    if d is None:
        return Limits()
    failed = np.flatnonzero(d.kind == DecisionKind.OOM)
    if not len(failed):
        return Limits()
    signs = np.zeros(len(d), dtype=np.int64)
    signs[(d.kind == DecisionKind.SEGMENT_ALLOC) | (d.kind == DecisionKind.SEGMENT_MAP)] = 1
    signs[(d.kind == DecisionKind.SEGMENT_FREE) | (d.kind == DecisionKind.SEGMENT_UNMAP)] = -1
    reserved = np.cumsum(signs * np.maximum(d.size, 0))
    most = int(reserved.max())
    limit_below, capacity = None, None
    for row in failed.tolist():
        rounded, free = int(d.size[row]), int(d.addr[row])
        needed = segment_bytes(rounded, conf.large_segment_size)
        if conf.expandable_segments:
            # Pages are mapped for what is missing, which is not known; at most they are these.
            needed = max(needed, page_bytes(rounded, conf.large_segment_size))
        if free >= needed:
            above = int(reserved[row]) + needed
            limit_below = above if limit_below is None else min(limit_below, above)
        else:
            there = int(reserved[row]) + free
            capacity = there if capacity is None else max(capacity, there)
    if limit_below is not None and limit_below <= most:
        limit_below = None  # no single limit explains these failures
    return Limits(most if limit_below is not None else None, limit_below, capacity)
