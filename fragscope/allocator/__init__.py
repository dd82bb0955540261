"""The exact model of PyTorch's CUDA caching allocator: online, and as replay over a Trace."""

from fragscope.allocator.caching import CachingAllocator, DriverCalls, OutOfMemoryError
from fragscope.allocator.cards import CARDS, DEFAULT_CARD, Card, card_named
from fragscope.allocator.conf import Conf, parse_conf, recorded_conf
from fragscope.allocator.counters import Counters
from fragscope.allocator.driver import Device, RecordedPlacement, TopDownPlacement
from fragscope.allocator.replay import (
    FRACTION_UNIT,
    Assumption,
    Oom,
    Replay,
    ReplaySettings,
    Span,
    SpanMeter,
    replay,
)
from fragscope.allocator.rules import NEWEST, RULES, ChosenRules, Rules, TieBreak, rules_for
from fragscope.allocator.verify import Difference, Verification, final_state

__all__ = [
    "CARDS",
    "DEFAULT_CARD",
    "FRACTION_UNIT",
    "NEWEST",
    "RULES",
    "Assumption",
    "CachingAllocator",
    "Card",
    "ChosenRules",
    "Conf",
    "Counters",
    "Device",
    "Difference",
    "DriverCalls",
    "Oom",
    "OutOfMemoryError",
    "RecordedPlacement",
    "Replay",
    "ReplaySettings",
    "Rules",
    "Span",
    "SpanMeter",
    "TieBreak",
    "TopDownPlacement",
    "Verification",
    "card_named",
    "final_state",
    "parse_conf",
    "recorded_conf",
    "replay",
    "rules_for",
]
