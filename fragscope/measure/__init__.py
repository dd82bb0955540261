"""Numbers from a Trace's decisions: counters at every event, the layout at one event, and levels of detail."""

from fragscope.measure.busy import Busy, busy
from fragscope.measure.decimate import decimate
from fragscope.measure.holders import Holder, holders_at, raw_holders_at
from fragscope.measure.layout import BlockLayout, SegmentLayout, layout_at
from fragscope.measure.lifetimes import BlockTable, Lifetimes, lifetimes
from fragscope.measure.non_torch import NonTorch, non_torch
from fragscope.measure.peaks import Peaks, peaks
from fragscope.measure.pools import Holds
from fragscope.measure.segments import PieceTable, SegmentTable
from fragscope.measure.timeline import Level, Timeline, measured_rows, timeline

__all__ = [
    "BlockLayout",
    "BlockTable",
    "Busy",
    "Holder",
    "Holds",
    "Level",
    "Lifetimes",
    "NonTorch",
    "Peaks",
    "PieceTable",
    "SegmentLayout",
    "SegmentTable",
    "Timeline",
    "busy",
    "decimate",
    "holders_at",
    "layout_at",
    "lifetimes",
    "measured_rows",
    "non_torch",
    "peaks",
    "raw_holders_at",
    "timeline",
]
