"""The exact model of PyTorch's CUDA caching allocator: online, and as replay over a Trace."""

from fragscope.allocator.assumptions import OF_PROGRAM, Assumption, Effect, merged
from fragscope.allocator.caching import BlockView, CachingAllocator, DriverCalls, OutOfMemoryError
from fragscope.allocator.cards import CARDS, DEFAULT_CARD, Card, card_like, card_named
from fragscope.allocator.compiling import worth_compiling
from fragscope.allocator.conf import Conf, conf_from_environment, parse_conf, recorded_conf
from fragscope.allocator.counters import Counters, PeakWatch
from fragscope.allocator.recorded import Recorded, StandIn, card_of, caught_of, knows_fraction, recorded_under
from fragscope.allocator.replay import Oom, Replay, replay, settle
from fragscope.allocator.rules import NEWEST, RULES, ChosenRules, Rules, TieBreak, rules_for
from fragscope.allocator.settings import ReplaySettings
from fragscope.allocator.span import Span, SpanMeter
from fragscope.allocator.tape import Tape, tape_of
from fragscope.allocator.verify import Difference, Verification
from fragscope.trace import FRACTION_UNIT

__all__ = [
    "CARDS",
    "DEFAULT_CARD",
    "FRACTION_UNIT",
    "NEWEST",
    "OF_PROGRAM",
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
    "Effect",
    "Oom",
    "OutOfMemoryError",
    "PeakWatch",
    "Recorded",
    "Replay",
    "ReplaySettings",
    "Rules",
    "Span",
    "SpanMeter",
    "StandIn",
    "Tape",
    "TieBreak",
    "Verification",
    "card_like",
    "card_named",
    "card_of",
    "caught_of",
    "conf_from_environment",
    "knows_fraction",
    "merged",
    "parse_conf",
    "recorded_conf",
    "recorded_under",
    "replay",
    "rules_for",
    "settle",
    "tape_of",
    "worth_compiling",
]
