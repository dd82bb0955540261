"""Numbers from a Trace's decisions: counters at every event, the layout at one event, and levels of detail."""

from fragscope.measure.decimate import decimate
from fragscope.measure.layout import BlockLayout, SegmentLayout, layout_at
from fragscope.measure.lifetimes import BlockTable, Lifetimes, SegmentTable, lifetimes
from fragscope.measure.timeline import Level, Timeline, measured_rows, timeline

__all__ = [
    "BlockLayout",
    "BlockTable",
    "Level",
    "Lifetimes",
    "SegmentLayout",
    "SegmentTable",
    "Timeline",
    "decimate",
    "layout_at",
    "lifetimes",
    "measured_rows",
    "timeline",
]
