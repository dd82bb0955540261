"""What a Trace was recorded under, as far as it says, and what follows from its decisions where it does not.

Snapshots hold neither the card nor a memory fraction. Where requests failed, the recording tells what was in force: a
failure although the driver had enough means a limit on reserved bytes, any other one tells how much there was in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fragscope.allocator.cards import CARDS, DEFAULT_CARD, Card, card_like, card_named
from fragscope.allocator.conf import Conf, parse_conf, recorded_conf
from fragscope.allocator.engine.sizes import page_bytes, segment_bytes
from fragscope.allocator.rules import NEWEST, ChosenRules, Rules, rules_for
from fragscope.errors import UsageError
from fragscope.trace import ASKING, DecisionKind, Decisions, RequestKind, Trace
from fragscope.trace.events import Column
from fragscope.trace.raw import raw_bytes


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
class StandIn:
    """A setting that the recording does not name, and what serves in its place.

    Attributes:
        code: stable identifier; ``assumptions`` says when it matters.
        of: the setting: ``torch``, ``conf``, ``card``, ``capacity`` or ``limit``.
        detail: one sentence for people.
    """

    code: str
    of: str
    detail: str


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
        stand_ins: what of this nobody named.
    """

    rules: ChosenRules
    card: Card
    capacity: int
    conf: Conf
    memory_fraction: float | None
    limits: Limits
    stand_ins: tuple[StandIn, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should name if it is otherwise, a sentence each."""
        return tuple(s.detail for s in self.stand_ins if s.code in _NOTED)


def estimates_of(card: Card) -> tuple[StandIn, ...]:
    """What of a card's memory nobody measured and stands in for the card that is meant."""
    out = []
    if "total" in card.estimated:
        detail = (
            f"that {card.name} has {card.total:,} bytes is what one driver reported ({card.source}); "
            "others differ by up to 0.5 %"
        )
        out.append(StandIn("total_estimated", "card", detail))
    if "free" in card.estimated:
        detail = (
            f"free memory estimated: {card.name} was not measured; {card.free:,} of its {card.total:,} bytes are taken "
            "to be free beside a CUDA context (--capacity)"
        )
        out.append(StandIn("free_estimated", "capacity", detail))
    return tuple(out)


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
    missing = []
    lost = {loss.code: loss.detail for loss in trace.lost}
    if rules is None:
        if trace.torch is None:
            detail = f"the file does not name its torch release; the rules of {NEWEST.release} decide (--torch)"
            missing.append(StandIn("release_assumed", "torch", detail))
        elif "torch_release" in lost:
            missing.append(StandIn("release_by_keys", "torch", lost["torch_release"]))
        rules = rules_for(trace.torch or NEWEST.release)
    if rules.assumed:
        detail = f"torch {rules.torch} is newer than the rules known; those of {rules.rules.release} decide"
        missing.append(StandIn("rules_assumed", "torch", detail))
    if "allocator_settings" in lost:
        missing.append(StandIn("conf_assumed", "conf", lost["allocator_settings"]))
    if card is None:
        if trace.card is None:
            detail = f"the file does not name its card; {DEFAULT_CARD} is assumed (--card)"
            missing.append(StandIn("card_assumed", "card", detail))
        card = card_of(trace)
    # A GPU tells its memory itself; on the virtual device, and where a file only names the card, the profile does.
    if trace.source == "virtual" or trace.device_total is None:
        by_virtual_card = trace.source == "virtual" and trace.settings.capacity == card.free
        missing += [s for s in estimates_of(card) if s.of == "card" or by_virtual_card]
    conf = conf_of(trace, rules.rules)
    limits = Limits()
    if trace.settings.memory_fraction is None:
        limits = limits_from_failures(trace, conf)
    capacity = trace.settings.capacity
    at_start, seen = capacity if trace.source == "cuda" else None, limits.capacity
    if at_start is not None and seen is not None and (seen := max(seen, most_held(trace) or 0)) < at_start:
        detail = (
            f"requests failed with {seen:,} bytes for segments in all, {at_start - seen:,} less than at the start: "
            "CUDA loads kernels into device memory as a program goes on (--capacity)"
        )
        missing.append(StandIn("capacity_inferred", "capacity", detail))
        capacity = seen
    elif capacity is None:
        capacity = limits.capacity
        if capacity is not None:
            detail = f"requests failed with {capacity:,} bytes for segments in all: that was there (--capacity)"
            missing.append(StandIn("capacity_inferred", "capacity", detail))
        else:
            detail = f"the file does not say how much was free; what a {card.name} usually has is assumed (--capacity)"
            missing.append(StandIn("capacity_assumed", "capacity", detail))
    if limits.limit is not None:
        detail = (
            f"requests failed although the driver had memory: a limit of {limits.limit:,} to "
            f"{(limits.limit_below or 0) - 1:,} reserved bytes was in force (--memory-fraction)"
        )
        missing.append(StandIn("limit_inferred", "limit", detail))
    elif not knows_fraction(trace):
        detail = "the file does not say whether a memory fraction was set; none is assumed (--memory-fraction)"
        missing.append(StandIn("fraction_assumed", "limit", detail))
    return Recorded(
        rules=rules,
        card=card,
        capacity=card.free if capacity is None else capacity,
        conf=conf,
        memory_fraction=trace.settings.memory_fraction,
        limits=limits,
        stand_ins=tuple(missing),
    )


_NOTED = {"release_assumed", "rules_assumed", "card_assumed", "capacity_inferred", "limit_inferred"}
"""Stand-ins that are said on every use; the others are shown where they can matter."""


def conf_of(trace: Trace, rules: Rules) -> Conf:
    """The conf that a Trace was recorded under, as a release reads it.

    Raises:
        UsageError: it is not such as the release has.
        UnmodelledError: the allocator model does not cover its settings.
    """
    return parse_conf(trace.settings.conf, rules) if trace.confs else recorded_conf(trace.settings, rules)


def knows_fraction(trace: Trace) -> bool:
    """Whether the Trace tells the memory fraction, or that none was set; recordings of a GPU do not."""
    return trace.settings.memory_fraction is not None or trace.source == "virtual"


def failed_rows(trace: Trace) -> Column:
    """Rows of the requests for memory that failed when recorded, ascending.

    Those that an allocator made no decision about count too: what is refused before the driver is asked
    (``throw_on_cudamalloc_oom``, impossible sizes) leaves none.
    """
    kind, d = trace.requests.kind, trace.decisions
    if d is None:
        return np.zeros(0, dtype=np.int64)
    asked = kind == RequestKind.ALLOC
    asked[d.request[d.kind == DecisionKind.ALLOC]] = False
    failed = d.request[d.kind == DecisionKind.OOM]
    asked[failed[kind[failed] == RequestKind.RAW_ALLOC]] = True
    return np.flatnonzero(asked)


def caught_of(trace: Trace, failed: Column) -> tuple[Column, int | None]:
    """Of requests that failed when recorded, those that the program got over, and the one it ended with.

    Returns:
        Rows of those after which the program asked for memory again, and the row of the last one if it did not.
    """
    asked = np.flatnonzero(np.isin(trace.requests.kind, ASKING))
    if len(failed) and int(asked[-1]) <= int(failed[-1]):
        return failed[:-1], int(failed[-1])
    return failed, None


def most_held(trace: Trace) -> int | None:
    """Most bytes that were held from the driver at once; the recording shows that so much was there.

    None for bare requests.
    """
    d = trace.decisions
    if d is None:
        return None
    reserved, raw = _reserved(d), raw_bytes(trace)
    after = np.append(0, reserved)[np.searchsorted(d.request, np.arange(len(raw)), side="right")]
    return max(int((after + raw).max(initial=0)), int((reserved + raw[d.request]).max(initial=0)))


def _reserved(d: Decisions) -> Column:
    """Reserved bytes after each decision."""
    signs = np.zeros(len(d), dtype=np.int64)
    signs[(d.kind == DecisionKind.SEGMENT_ALLOC) | (d.kind == DecisionKind.SEGMENT_MAP)] = 1
    signs[(d.kind == DecisionKind.SEGMENT_FREE) | (d.kind == DecisionKind.SEGMENT_UNMAP)] = -1
    return np.cumsum(signs * np.maximum(d.size, 0))


def card_of(trace: Trace) -> Card:
    """The Trace's card, which may be one that no profile describes; a stand-in where it names none.

    Raises:
        UsageError: it has no profile, and the Trace does not tell its memory.
    """
    if trace.card is None or trace.card in CARDS:
        return card_named(trace.card or DEFAULT_CARD)
    card = card_like(trace.card, trace.device_total)
    if card is not None:
        return card
    total, free = trace.device_total, trace.settings.capacity
    if total is None:
        raise UsageError(
            f"the trace names the card {trace.card!r}, which has no profile, and not its memory; use --card"
        )
    return Card(trace.card, trace.card, total, total if free is None else free, (0, 0), 0, 0, "the trace")


def total_of(trace: Trace) -> int | None:
    """Bytes of memory of the device that a Trace was recorded on, None where it does not tell."""
    if trace.device_total is not None:
        return trace.device_total
    return next((card.total for card in CARDS.values() if trace.card in (card.name, card.product)), None)


def limits_from_failures(trace: Trace, conf: Conf) -> Limits:
    """What the recorded failures say about the memory there was."""
    d = trace.decisions
    if d is None:
        return Limits()
    failed = np.flatnonzero(d.kind == DecisionKind.OOM)
    if not len(failed):
        return Limits()
    reserved, raw = _reserved(d), raw_bytes(trace)[d.request]
    most = int(reserved.max())
    limit_below, capacity = None, None
    for row in failed.tolist():
        rounded, free = int(d.size[row]), int(d.addr[row])
        there = int(reserved[row]) + int(raw[row]) + free
        if trace.requests.kind[d.request[row]] == RequestKind.RAW_ALLOC:  # no limit but the card's is held against it
            capacity = there if capacity is None else max(capacity, there)
            continue
        needed = segment_bytes(rounded, conf.large_segment_size)
        if conf.expandable_segments:
            # Pages are mapped for what is missing, which is not known; at most they are these.
            needed = max(needed, page_bytes(rounded, conf.large_segment_size))
        if free >= needed:
            above = int(reserved[row]) + needed
            limit_below = above if limit_below is None else min(limit_below, above)
        else:
            capacity = there if capacity is None else max(capacity, there)
    if limit_below is not None and limit_below <= most:
        limit_below = None  # no single limit explains these failures
    return Limits(most if limit_below is not None else None, limit_below, capacity)
