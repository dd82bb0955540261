"""What a replay takes for granted, and whether that can change its figures: one table for all of it.

It comes from three sides: what a recording does not hold (``Loss``), settings that nobody named (``StandIn``), and what
the replay did that the recording cannot confirm. Each has an effect, ``none``, ``bounded`` or ``unknown``, that depends
on the settings asked for: a card that stands in for the true one changes nothing while memory is never short.

A comparison with the decisions of a real allocator in which nothing differs is evidence for all that was inferred from
the same recording, but not for what it never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fragscope.allocator.cards import CARDS
from fragscope.allocator.facts import Facts
from fragscope.allocator.recorded import card_of, caught_of
from fragscope.allocator.rules import NEWEST, RULES, TieBreak
from fragscope.allocator.tape import Tape
from fragscope.errors import UsageError
from fragscope.trace import DEFAULT_POOL, RequestKind
from fragscope.trace.sizes import DRIVER_PAGE
from fragscope.units import GIB

_ROOM = GIB
"""Bytes by which an estimate of a card's free memory may be wrong: about twice what contexts take, and what drivers
differ in."""

Effect = Literal["none", "bounded", "unknown"]
_WORSE: tuple[Effect, ...] = ("none", "bounded", "unknown")


@dataclass(frozen=True, slots=True)
class Assumption:
    """Something a replay takes for granted.

    Attributes:
        code: stable identifier.
        effect: ``none`` on the numbers, ``bounded``, or ``unknown``.
        events: how many events are concerned.
        detail: one sentence for people.
    """

    code: str
    effect: Effect
    events: int
    detail: str


# --- effects ------------------------------------------------------------------------------------------------------


def _always(f: Facts) -> Effect:
    return "unknown"


def _unless_confirmed(f: Facts) -> Effect:
    return "none" if f.is_confirmed else "unknown"


def _if_changed(f: Facts) -> Effect:
    return "unknown" if f.is_changed else "none"


def _of_memory(f: Facts) -> Effect:
    return "unknown" if f.depends_on_memory and not f.is_confirmed else "none"


def _of_total(f: Facts) -> Effect:
    return "unknown" if f.depends_on_total and not f.is_confirmed else "none"


def _of_capacity(f: Facts) -> Effect:
    return "bounded" if f.was_short and not f.is_confirmed else "none"


def _of_estimate(f: Facts) -> Effect:
    """As for memory that nobody named, and where less than ``_ROOM`` was left."""
    is_near = f.held + _ROOM > f.settings.capacity
    depends = f.was_short or f.conf.garbage_collection_threshold > 0 or is_near
    return "unknown" if depends and not f.is_confirmed else "none"


def _of_limit(f: Facts) -> Effect:
    collects = f.conf.garbage_collection_threshold > 0
    return "bounded" if (f.was_short or collects) and not f.is_confirmed else "none"


def _of_keys(f: Facts) -> Effect:
    """The oldest and the newest rules also stand in for releases that are older and newer and write the same keys."""
    is_last = f.settings.rules.rules.release in (RULES[0].release, NEWEST.release)
    return "unknown" if is_last and not f.is_confirmed else "none"


def _of_completions(f: Facts) -> Effect:
    """When other streams were done is what the recorded run took; the virtual device knows only the latest moment."""
    if f.trace.source == "virtual":
        return "bounded"
    return "bounded" if f.is_changed and not f.is_confirmed else "none"


def _of_rounding(f: Facts) -> Effect:
    """A size that was rounded is itself rounded to the same, by the same rounding."""
    recorded = f.recorded_conf
    is_same = recorded is not None and recorded.roundup_power2_divisions == f.conf.roundup_power2_divisions
    return "none" if f.is_confirmed or (is_same and not len(f.newly_served)) else "bounded"


def _of_start(f: Facts) -> Effect:
    return "none" if f.trace.initial and (f.is_confirmed or not _unknown_parts(f)) else "unknown"


EFFECTS: dict[str, Callable[[Facts], Effect]] = {
    # What a recording does not hold.
    "late_start": _always,  # whatever it held is in no figure
    "start_state": _of_start,
    "unknown_keys": _unless_confirmed,
    "inferred_releases": _unless_confirmed,
    "pool_ids": _unless_confirmed,
    "pool_scopes": _unless_confirmed,
    "settings_changes": _unless_confirmed,
    "oom_size": _of_rounding,
    "free_requested": _always,
    "free_completed": _always,
    "segments_taken": _always,
    "unknown_actions": _always,
    "gap": _always,
    "notes": _always,
    "deferred_frees": _of_completions,
    # What stands in for settings that nobody named.
    "release_assumed": _unless_confirmed,
    "release_by_keys": _of_keys,
    "rules_assumed": _unless_confirmed,
    "conf_assumed": _unless_confirmed,
    "card_assumed": _of_total,
    "capacity_assumed": _of_memory,
    "total_estimated": _of_total,
    "free_estimated": _of_estimate,
    "capacity_inferred": _of_capacity,
    "limit_inferred": _of_limit,
    "fraction_assumed": _of_memory,
    # What the replay did that no recording confirms.
    "raw_pages": _of_capacity,
    "tie_by_modelled_address": _always,
    "allocator_defect": _always,
    "settings_dropped": _always,
    "other_card": _always,
    "observations": _if_changed,
    "after_oom": _always,
    "ooms_caught": _always,
    "ends_with_oom": _always,
}
"""When an assumption can change the figures, by its code. A code that is not here has an unknown effect."""

LOSSES = {
    "late_start": "late_start",
    "start_state": "start_state",
    "unknown_keys": "unknown_keys",
    "empty_cache": "inferred_releases",
    "record_stream": "deferred_frees",
    "pool_ids": "pool_ids",
    "pool_scopes": "pool_scopes",
    "settings_changes": "settings_changes",
    "oom_size": "oom_size",
    "free_requested": "free_requested",
    "free_completed": "free_completed",
    "segments_taken": "segments_taken",
    "unknown_actions": "unknown_actions",
    "gap": "gap",
    "not_written": "gap",
    "notes": "notes",
    "unknown_notes": "notes",
    "stacks": None,
    "torn": None,  # what is there is whole
    "gave_way": None,
    "no_tracker": None,
    "non_torch": None,
    "non_torch_device_wide": None,
    "non_torch_samples": None,
    "torch_release": None,
    "allocator_settings": None,
}
"""The assumption that each loss makes; None where something else says it, or where no figure of a replay needs it."""

OF_PROGRAM = frozenset(
    {"observations", "observations_unseen", "other_card", "after_oom", "ooms_caught", "ends_with_oom"}
)
"""Codes of what is assumed about the program: that it would have asked for the same."""


# --- what applies to a replay -------------------------------------------------------------------------------------


def assumptions_of(facts: Facts) -> tuple[Assumption, ...]:
    """What a replay takes for granted, each code once, also where it has no effect."""
    found = (*_of_recording(facts), *_of_settings(facts), *_of_program(facts), *_of_losses(facts))
    return merged(
        [
            [Assumption(code, EFFECTS.get(code, _unless_confirmed)(facts), events, detail)]
            for code, events, detail in found
        ],
        max,
    )


def merged(found: Iterable[Sequence[Assumption]], events: Callable[[int, int], int]) -> tuple[Assumption, ...]:
    """The assumptions of several replays, each code once with its worst effect and what was said of that.

    Args:
        found: of each replay.
        events: how the events of two come together: ``max`` for replays of one trace, a sum for several traces.
    """
    out: dict[str, Assumption] = {}
    for a in (a for each in found for a in each):
        before = out.get(a.code)
        if before is None:
            out[a.code] = a
        else:
            worst = a if _WORSE.index(a.effect) > _WORSE.index(before.effect) else before
            out[a.code] = replace(worst, events=events(before.events, a.events))
    return tuple(out.values())


_Found = Iterator[tuple[str, int, str]]  # code, events, detail


def _of_recording(f: Facts) -> _Found:
    """What the rows of the recording make a replay assume."""
    trace = f.trace
    uses = max(trace.count(RequestKind.RECORD_STREAM), trace.count(RequestKind.USES_DONE))
    if uses and trace.source == "virtual":
        yield "deferred_frees", uses, "deferred frees complete at the next synchronisation; on a GPU, maybe earlier"
    elif uses:
        detail = "deferred frees complete when they did in the recorded run; under other settings, maybe at other times"
        yield "deferred_frees", uses, detail
    parts = int(np.count_nonzero(trace.requests.size[trace.requests.kind == RequestKind.RAW_ALLOC] % DRIVER_PAGE))
    if parts:
        detail = "memory past the allocator is counted in whole pages; a card may put several small requests into one"
        yield "raw_pages", parts, detail
    if f.late_frees:
        detail = "memory was freed that was never seen allocated; what it held is not in the figures"
        yield "late_start", f.late_frees, detail
    if trace.initial:
        unknown = "; ".join(_unknown_parts(f)) or "nothing that counts here"
        yield (
            "start_state",
            trace.count(RequestKind.HELD),
            f"of what stood when recording began is not known: {unknown}",
        )


def _unknown_parts(f: Facts) -> list[str]:
    """What recordings do not hold of the memory that they began with, as far as it may count here."""
    # A recorder takes a snapshot when it begins; otherwise what stood is found by undoing what happened.
    unknown = [] if f.trace.source == "cuda" else ["where blocks that were freed ended"]
    if f.conf.garbage_collection_threshold > 0.0:
        unknown.append("how long memory had been idle, which garbage collection goes by")
    if f.settings.rules.rules.tie_break is not TieBreak.ADDRESS:
        unknown.append("in which order it was made, which decides between equal blocks")
    return unknown


def _of_settings(f: Facts) -> _Found:
    """What the settings, and what the allocator did under them, make a replay assume."""
    trace, s = f.trace, f.settings
    if s.rules.assumed:
        detail = f"torch {s.rules.torch} is newer than the newest rules; those of {s.rules.rules.release} stand in"
        yield "rules_assumed", len(trace.requests), detail
    for stand_in in s.stand_ins:
        yield stand_in.code, len(trace.requests), stand_in.detail
    dropped = trace.count(RequestKind.SETTINGS)
    if dropped and f.has_other_conf:
        detail = "the program changed its settings on the way; under the conf asked for it is taken not to"
        yield "settings_dropped", dropped, detail
    if f.ties and f.addresses is not None:
        yield "tie_by_modelled_address", f.ties, f.addresses
    if f.defects:
        detail = "PyTorch itself fails here: parts of segments of max_split_size and more would go to the driver"
        yield "allocator_defect", f.defects, detail
    released = trace.count(RequestKind.POOL_RELEASE)
    if released and f.conf.expandable_segments and any(pool != DEFAULT_POOL for pool in trace.pools):
        detail = "PyTorch miscounts expandable segments of released private pools and may give up one that is in use"
        yield "allocator_defect", released, detail


def _of_program(f: Facts) -> _Found:
    """What a replay assumes about a program that learned of its memory."""
    trace, tape = f.trace, f.tape
    other = _other_card(f)
    if other:
        yield "other_card", len(trace.requests), other
    observed = trace.count(RequestKind.OBSERVATION)
    if observed:
        yield (
            "observations",
            observed,
            "the program read memory state; under other settings it might have acted otherwise",
        )
    if len(f.newly_failed):
        first = int(f.newly_failed[0])
        detail = (
            f"event {tape.event_of(first):,} fails, which did not fail when recorded; "
            "the program would not have gone on unchanged"
        )
        yield "after_oom", len(trace.requests) - first, detail
    caught, last = caught_of(trace, tape.failed)
    served = np.intersect1d(f.newly_served, caught, assume_unique=True)
    if len(served):
        first = int(served[0])
        yield (
            "ooms_caught",
            len(served),
            (f"the program caught OOMs; {_what_became(tape, first)}, the first at event {tape.event_of(first):,}"),
        )
    if last is not None and last in f.newly_served:
        detail = (
            f"event {tape.event_of(last):,} failed when recorded and ended the program; "
            "what it would have asked for then may need more"
        )
        yield "ends_with_oom", 1, detail


def _other_card(f: Facts) -> str:
    """What speaks of another card than the recorded one; ``""`` where that is not known, or only memory differs."""
    asked = CARDS.get(f.settings.card)
    if f.trace.card is None or asked is None:
        return ""
    try:
        recorded = card_of(f.trace)
    except UsageError:
        return ""
    here, there = (recorded.capability, recorded.multiprocessors), (asked.capability, asked.multiprocessors)
    if recorded.product == asked.product or here == there:  # drivers differ in the memory that they report
        return ""
    return (
        f"the requests are those made on {recorded.name}; on {asked.name} cuBLAS and kernels may take other "
        "workspaces, and a program that asks what the card is may go another way"
    )


def _of_losses(f: Facts) -> _Found:
    for loss in f.trace.lost:
        code = LOSSES.get(loss.code, loss.code)
        if code is not None:
            yield code, loss.events, loss.detail


def _what_became(tape: Tape, row: int) -> str:
    """What a tape makes of requests that failed when recorded and do not here."""
    if tape.kind[row] != RequestKind.ALLOC:
        return "the requests that failed are left out, the others are taken as they are"
    if row + 1 < len(tape.kind) and tape.kind[row + 1] == RequestKind.FREE and tape.id[row + 1] == tape.id[row]:
        return "what failed then is given back at once where it is served"
    return "what failed then and is served here is never freed"
