"""What a Trace's requests are decided under, and which of it stands in for what nobody said."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fragscope.allocator.cards import Card
from fragscope.allocator.recorded import Recorded, StandIn, estimates_of
from fragscope.allocator.rules import ChosenRules


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """What a Trace's requests are decided under.

    The ``with_…`` methods give what somebody names its value; what stood in for it is then taken for granted no longer.

    Attributes:
        rules: torch release.
        card: name for the output.
        total: bytes of device memory in all.
        capacity: bytes that segments may take together.
        conf: ``PYTORCH_ALLOC_CONF`` string.
        memory_fraction: per-process memory fraction, or None.
        limit: bytes that may be reserved, where that is known other than as a fraction.
        stand_ins: which of these nobody named.
    """

    rules: ChosenRules
    card: str
    total: int
    capacity: int
    conf: str = ""
    memory_fraction: float | None = None
    limit: int | None = None
    stand_ins: tuple[StandIn, ...] = ()

    @classmethod
    def of(cls, recorded: Recorded) -> ReplaySettings:
        """The settings that a Trace was recorded under."""
        return cls(
            rules=recorded.rules,
            card=recorded.card.name,
            total=recorded.card.total,
            capacity=recorded.capacity,
            conf=recorded.conf.text,
            memory_fraction=recorded.memory_fraction,
            limit=recorded.limits.limit,
            stand_ins=recorded.stand_ins,
        )

    @classmethod
    def on(cls, card: Card, rules: ChosenRules, conf: str = "", capacity: int | None = None) -> ReplaySettings:
        """A card that nothing else uses.

        Args:
            card: whose memory there is.
            rules: torch release.
            conf: ``PYTORCH_ALLOC_CONF`` string.
            capacity: bytes that segments may take together; None for what the card has free.
        """
        free = card.free if capacity is None else capacity
        settings = cls(rules, card.name, card.total, free, conf, stand_ins=estimates_of(card))
        return settings if capacity is None else settings.with_capacity(capacity)

    def with_conf(self, conf: str) -> ReplaySettings:
        """The same under a conf."""
        return replace(self, conf=conf, stand_ins=self._without("conf"))

    def with_rules(self, rules: ChosenRules) -> ReplaySettings:
        """The same under the rules of a release."""
        return replace(self, rules=rules, stand_ins=self._without("torch"))

    def with_card(self, card: Card) -> ReplaySettings:
        """The same on a card; another one has memory of its own, and no limit that was inferred."""
        estimates = estimates_of(card)
        if card.name == self.card:
            left = (*self._without("card"), *(s for s in estimates if s.of == "card"))
            return replace(self, total=card.total, stand_ins=left)
        left = (*self._without("card", "capacity", "limit"), *estimates)
        return replace(self, card=card.name, total=card.total, capacity=card.free, limit=None, stand_ins=left)

    def alone_on(self, card: Card, other: int = 0) -> ReplaySettings:
        """The same on such a card of which ``other`` bytes are taken, without any limit but its memory."""
        left = (*self._without("card", "capacity", "limit"), *estimates_of(card))
        free = max(0, card.free - other)
        return replace(
            self,
            card=card.name,
            total=card.total,
            capacity=free,
            memory_fraction=None,
            limit=None,
            stand_ins=left,
        )

    def with_total(self, total: int) -> ReplaySettings:
        """The same with so much device memory in all; bytes."""
        return replace(self, total=total, stand_ins=self._without("card"))

    def with_capacity(self, capacity: int) -> ReplaySettings:
        """The same with so much that segments may take; bytes."""
        return replace(self, capacity=capacity, stand_ins=self._without("capacity"))

    def with_fraction(self, fraction: float) -> ReplaySettings:
        """The same with a memory fraction, which takes the place of any limit."""
        return replace(self, memory_fraction=fraction, limit=None, stand_ins=self._without("limit"))

    def with_limit(self, limit: int) -> ReplaySettings:
        """The same with a limit on reserved bytes, which takes the place of any fraction."""
        return replace(self, memory_fraction=None, limit=limit, stand_ins=self._without("limit"))

    def _without(self, *what: str) -> tuple[StandIn, ...]:
        return tuple(s for s in self.stand_ins if s.of not in what)
