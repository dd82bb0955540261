"""Whether a case fits the card at hand: asked of the model, before anything of it runs on CUDA.

The case runs on the virtual device under the rules of the torch that is installed, on a card of the real one's total
and with as much free as the real one has now. Where the program ends in an out-of-memory error there, it does not fit.
How much it would take is then what it holds at most on a card with plenty.

What is free was read beside a CUDA context, and what a program takes is counted without one; so the context counts on
neither side. Memory that CUDA takes later, for kernels it loads above all, is not foreseen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec
import torch

from fragscope.allocator import Card, ReplaySettings, replay
from fragscope.errors import UsageError, printable
from fragscope.record.virtual import VirtualDevice
from fragscope.results import CAME_TO_ITS_END, Outcome, PrecheckRecord, Prediction
from fragscope.suite.process import enter, leave, log_path, report_path
from fragscope.suite.verification import installed_rules
from fragscope.suite.worker import Recording, Task, on_virtual, peak_of
from fragscope.trace.containers import write_atomically
from fragscope.units import MIB

PLENTY = 1 << 46  # bytes; more than any card has, and modelled addresses still lie above it
FAR = 2
"""An estimate this many times what is free keeps a case from running. What it leaves out would only make it larger,
unless the program caught an error and went another way."""
_SHOWN_OPS = 3
_COMPARABLE = (*CAME_TO_ITS_END, "overflow", "wrong")
"""Ends that a program comes to on a card as well; where memory ran out, it ran out elsewhere."""
_OWN_OOM = "OutOfMemoryError"


class Need(msgspec.Struct, frozen=True):
    """What a case takes of a card, as far as the virtual device can tell; bytes.

    Attributes:
        outcome, message: how it ended there.
        held: most that it held from the driver at once.
        limit: a memory fraction's limit that was in force at the end, None without one.
        unknown: what ``held`` leaves out, for people; ``""`` where it is all.
        looked: the program read memory state, so that on another card it may go another way.
        predictions: figures of the measured phase by the digests of cases, each under its own settings, where it came
            to its end; of cases under the rules that run here, since no others could be seen on the card.
    """

    outcome: Outcome
    message: str = ""
    held: int = 0
    limit: int | None = None
    unknown: str = ""
    looked: bool = False
    predictions: dict[str, Prediction] = {}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What follows for a case.

    Attributes:
        skip: why it is not run on the card, ``""`` where it is.
        record: what was known, for its result.
    """

    skip: str
    record: PrecheckRecord


def run_need(task: Task, plenty: bool, key: str) -> None:
    """Process entry: run the case on the virtual device and write what it needs."""
    enter(log_path(task.out, key), task.timeout)
    write_atomically(report_path(task.out, key), msgspec.json.encode(need_of(task, plenty=plenty)))
    leave()


def need_of(task: Task, *, plenty: bool) -> Need:
    """What a case takes of the card at hand, or of one like it with plenty of memory."""
    torch.set_num_threads(1)
    card = task.card
    assert card is not None
    try:
        settings = replace(
            task.cases[0].settings,
            rules=installed_rules(),
            card=card.name,
            total=PLENTY if plenty else card.total,
            capacity=PLENTY if plenty else card.free,
        )
        device = VirtualDevice(card, settings, task.root)
    except UsageError as e:  # such as a conf that the torch that is installed does not have
        return Need("unsupported", printable(str(e), 600))
    allocator = device.memory.allocator
    peaks = allocator.watch()
    ran = on_virtual(task, device)
    if ran.trace is not None:  # as a recording of the card names it, so that it is not taken for another one
        ran = replace(ran, trace=replace(ran.trace, card=card.product))
    seen = [o.what for o in device.memory.observations]
    if ran.outcome == "oom" and seen[-1:] == [_OWN_OOM]:
        del seen[-1]  # the one that ended it
    return Need(
        outcome=ran.outcome,
        message=ran.message,
        held=allocator.peaks(peaks).hbm,
        limit=allocator.limit,
        unknown=_listed([e.op for e in ran.estimated]),
        looked=bool(seen),
        predictions={
            wanted.digest: said
            for wanted in task.cases
            if wanted.settings.rules.rules == settings.rules.rules
            and (said := _prediction(ran, wanted.settings)) is not None
        },
    )


def _prediction(ran: Recording, settings: ReplaySettings) -> Prediction | None:
    if ran.trace is None or ran.outcome not in _COMPARABLE:
        return None
    decided = replay(ran.trace, settings)
    span = decided.measured
    if span is None:
        return None
    return Prediction(
        base=span.base.allocated,
        transient=span.transient,
        retained=span.retained,
        peak=peak_of(span.peak),
        end=peak_of(span.end),
        allocs=span.allocs,
        exact=decided.exact and not ran.estimated,
    )


def _listed(operators: list[str]) -> str:
    more = f" and {len(operators) - _SHOWN_OPS} more" if len(operators) > _SHOWN_OPS else ""
    return f"not known in full: {', '.join(operators[:_SHOWN_OPS])}{more}" if operators else ""


def asks_for_plenty(need: Need, card: Card) -> bool:
    """Whether a case does not fit, and only a card with plenty of memory can tell how much it needs."""
    return need.outcome == "oom" and not need.looked and not _limits_itself(need, card)


def judge(need: Need, card: Card, with_plenty: Need | None = None) -> Judgement:
    """Whether a case runs on the card.

    What is not known beforehand runs. What is known in part runs, too, unless that part alone is more than ``FAR``
    times what is free.

    Args:
        need: on the card at hand.
        card: that card.
        with_plenty: on a card with plenty of memory, where ``asks_for_plenty`` said so and it could be told.
    """

    def runs(needs: int | None, note: str = "") -> Judgement:
        return Judgement("", PrecheckRecord(needs, card.free, not need.unknown and not note, note))

    if need.outcome in CAME_TO_ITS_END:
        if not need.unknown:
            return runs(need.held)
        return runs(need.held, f"it was run on an estimate of {_up(need.held)} MiB ({need.unknown})")
    if need.outcome != "oom":
        why = f"{need.outcome} on the virtual device{f': {need.message}' if need.message else ''}"
        return runs(None, f"it was run without knowing what it needs: {why}")
    if _limits_itself(need, card):
        return runs(need.held, "it was run although it ends in an OOM, by a limit of its own and not the card's")
    has = f"card has {_down(card.free)}"
    if with_plenty is None:
        needs, words = card.free + 1, f"more than {_down(card.free)} MiB"
    else:
        needs = max(with_plenty.held, card.free + 1)
        known = with_plenty.outcome in CAME_TO_ITS_END and not with_plenty.unknown
        words = f"{'' if known else 'at least '}{_up(needs)} MiB"
    if not need.unknown:
        known = with_plenty is not None and not words.startswith("at least")
        return Judgement(f"needs {words}, {has}", PrecheckRecord(needs, card.free, known))
    if needs > FAR * card.free:
        skip = f"needs {words} by estimate, {has} ({need.unknown})"
        return Judgement(skip, PrecheckRecord(needs, card.free, False))
    return runs(needs, f"it was run although an estimate says it needs {words} and the {has} ({need.unknown})")


def _limits_itself(need: Need, card: Card) -> bool:
    return need.limit is not None and need.limit < card.free


def _up(count: int) -> str:
    """Whole MiB, rounded up, so that what does not fit never looks as if it did."""
    return f"{-(-count // MIB):,}"


def _down(count: int) -> str:
    return f"{count // MIB:,}"
