"""The exact model of PyTorch's CUDA caching allocator: online, and as replay over a Trace."""

from fragscope.allocator.caching import BlockView, CachingAllocator, DriverCalls, OutOfMemoryError
from fragscope.allocator.cards import CARDS, DEFAULT_CARD, Card, card_named
from fragscope.allocator.conf import Conf, conf_from_environment, parse_conf, recorded_conf
from fragscope.allocator.counters import Counters, PeakWatch
from fragscope.allocator.recorded import Recorded, card_of, recorded_under
from fragscope.allocator.replay import (
    FRACTION_UNIT,
    Assumption,
    Oom,
    Replay,
    ReplaySettings,
    Span,
    SpanMeter,
    Tape,
    replay,
    settle,
    tape_of,
)
from fragscope.allocator.rules import NEWEST, RULES, ChosenRules, Rules, TieBreak, rules_for
from fragscope.allocator.verify import Difference, Verification

__all__ = [
    "CARDS",
    "DEFAULT_CARD",
    "FRACTION_UNIT",
    "NEWEST",
    "RULES",
    "Assumption",
    "BlockView",
    "CachingAllocator",
    "Card",
    "ChosenRules",
    "Conf",
    "Counters",
    "Difference",
    "DriverCalls",
    "Oom",
    "OutOfMemoryError",
    "PeakWatch",
    "Recorded",
    "Replay",
    "ReplaySettings",
    "Rules",
    "Span",
    "SpanMeter",
    "Tape",
    "TieBreak",
    "Verification",
    "card_named",
    "card_of",
    "conf_from_environment",
    "parse_conf",
    "recorded_conf",
    "recorded_under",
    "replay",
    "rules_for",
    "settle",
    "tape_of",
]
