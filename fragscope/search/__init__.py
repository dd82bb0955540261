"""Questions answered by many replays: the best conf, the smallest memory, and how little memory any allocator needs."""

from fragscope.search.bound import Bound, bound
from fragscope.search.failure import Failure, Idle, failure_of
from fragscope.search.fit import Fit, fit
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
    "Packed",
    "Packing",
    "Player",
    "Subject",
    "Trial",
    "Tuning",
    "best_fit",
    "bound",
    "failure_of",
    "first_fit",
    "fit",
    "load_subject",
    "pack",
    "play_one",
    "play_other_orders",
    "player",
    "subject_of",
    "tune",
]
