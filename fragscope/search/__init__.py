"""Questions answered by many replays: the best conf, the smallest memory, and how little memory any allocator needs."""

from fragscope.search.bound import Bound, bound
from fragscope.search.failure import Failure, Idle, failure_of
from fragscope.search.fit import Fit, fit
from fragscope.search.on_cards import OnCard, UnderConf, on_cards
from fragscope.search.packing import Lives, Packed, Packing, best_fit, first_fit, pack
from fragscope.search.play import play_one, play_other_orders, player
from fragscope.search.subject import Given, Subject, load_subject, subject_of
from fragscope.search.tune import Figures, Goal, Player, Trial, Tuning, tune

__all__ = [
    "Bound",
    "Failure",
    "Figures",
    "Fit",
    "Given",
    "Goal",
    "Idle",
    "Lives",
    "OnCard",
    "Packed",
    "Packing",
    "Player",
    "Subject",
    "Trial",
    "Tuning",
    "UnderConf",
    "best_fit",
    "bound",
    "failure_of",
    "first_fit",
    "fit",
    "load_subject",
    "on_cards",
    "pack",
    "play_one",
    "play_other_orders",
    "player",
    "subject_of",
    "tune",
]
