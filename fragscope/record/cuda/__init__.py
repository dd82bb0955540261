"""Recording real CUDA programs."""

from fragscope.record.cuda.active import phase
from fragscope.record.cuda.options import RecorderOptions, Stacks
from fragscope.record.cuda.recorder import PhaseStatistics, Recorder

__all__ = ["PhaseStatistics", "Recorder", "RecorderOptions", "Stacks", "phase"]
