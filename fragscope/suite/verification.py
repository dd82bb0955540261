"""The allocator model held against a recording made on a card."""

from __future__ import annotations

import torch

from fragscope.allocator import (
    Card,
    ChosenRules,
    ReplaySettings,
    Span,
    Verification,
    recorded_under,
    replay,
    rules_for,
)
from fragscope.record.cuda import PhaseStatistics
from fragscope.results import VerifyRecord
from fragscope.trace import RequestKind, Trace


def installed_rules() -> ChosenRules:
    """The rules of the torch that runs here, whichever were asked for.

    Raises:
        UsageError: it is older than the oldest rules.
    """
    return rules_for(str(torch.__version__))


def verified_recording(trace: Trace, card: Card | None, statistics: PhaseStatistics | None) -> VerifyRecord:
    """The model against what the allocator of the card did, under the rules that ran and on the card it ran on.

    Those asked for may be others: then a difference would not mean that the model is wrong.

    Args:
        trace: as recorded, with decisions.
        card: the card at hand; None takes the Trace's.
        statistics: PyTorch's own figures of the measured phase.

    Raises:
        UsageError: the model does not cover what was recorded.
    """
    again = replay(trace, ReplaySettings.of(recorded_under(trace, installed_rules(), card)), verify=True)
    assert again.verify is not None
    deferred = trace.count(RequestKind.RECORD_STREAM) > 0
    return _with_statistics(again.verify, again.measured, statistics, deferred=deferred)


def _with_statistics(
    decisions: Verification, span: Span | None, statistics: PhaseStatistics | None, *, deferred: bool
) -> VerifyRecord:
    """The comparison with what PyTorch's own statistics say.

    Where frees are deferred, PyTorch's requested bytes go down when they complete, and fragscope's when the program
    lets go, so that those two are not held against each other.
    """
    compared, wrong = decisions.compared, decisions.mismatches
    first = None
    if decisions.first is not None:
        d = decisions.first
        where = f"event {d.event}" if d.event >= 0 else "at the end"
        first = f"{where}: recorded {d.recorded}, modelled {d.modelled}"
    if statistics is not None and span is not None:
        for what, theirs, ours in (("peak", statistics.peak, span.peak), ("end", statistics.end, span.end)):
            for name, value in theirs.items():
                if deferred and name == "requested":
                    continue
                compared += 1
                if getattr(ours, name) != value:
                    wrong += 1
                    first = first or f"{what} {name}: PyTorch says {value}, the model {getattr(ours, name)}"
    return VerifyRecord(compared, wrong, first)
