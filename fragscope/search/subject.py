"""What is asked about: a trace made ready for many replays, and the settings that those start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from fragscope.allocator import (
    Assumption,
    Replay,
    ReplaySettings,
    Tape,
    card_named,
    recorded_under,
    rules_for,
    settle,
    tape_of,
)
from fragscope.errors import UsageError
from fragscope.trace import DecisionKind, RequestKind, Requests, Trace, load_trace


@dataclass(frozen=True, slots=True)
class Given:
    """What the user says about the recordings or wants instead of what they say; None leaves it to them.

    Attributes:
        torch: release whose rules decide.
        card: name of a device profile.
        total: bytes of device memory in all.
        capacity: bytes that segments may take together.
        memory_fraction: per-process memory fraction.
        device: CUDA device index, where a snapshot holds several.
    """

    torch: str | None = None
    card: str | None = None
    total: int | None = None
    capacity: int | None = None
    memory_fraction: float | None = None
    device: int | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """A trace ready for many replays.

    Attributes:
        name: as the user named it.
        tape: its requests, with the releases it shows told apart.
        trial: the same for trials under other settings: a request that failed when recorded, and that the program got
            over, is given back at once where it is served. The program does not free what it never had, and would hold
            ever more in the trial.
        settings: the recorded conf under the rules, card and memory that are wanted.
        notes: what is assumed about the recording, for people.
    """

    name: str
    tape: Tape
    trial: Tape
    settings: ReplaySettings
    notes: tuple[str, ...]


def load_subject(path: str, given: Given) -> Subject:
    """Open a file as a Subject.

    Raises:
        InputFileError: the file cannot be used.
        UsageError: what is given does not fit together or to the file, or its settings are not modelled.
    """
    return subject_of(load_trace(path, given.device), path, given)


def subject_of(trace: Trace, name: str, given: Given | None = None) -> Subject:
    """A Trace as a Subject.

    Where a file lacks its release, card or memory fraction, what is given counts as what it was recorded under.

    Raises:
        UsageError: what is given does not fit together or to the trace, or its settings are not modelled.
    """
    given = given or Given()
    fraction = given.memory_fraction
    if fraction is not None and not 0.0 <= fraction <= 1.0:
        raise UsageError(f"--memory-fraction: {fraction} is not between 0 and 1")
    rules = None if given.torch is None else rules_for(given.torch)
    card = None if given.card is None else card_named(given.card)
    recorded = recorded_under(trace, rules if trace.torch is None else None, card if trace.card is None else None)
    own = ReplaySettings.of(recorded)
    if fraction is not None and trace.settings.memory_fraction is None:
        own = replace(own, memory_fraction=fraction, limit=None)
    settings = own if rules is None else replace(own, rules=rules)
    if card is not None and card.name != own.card:
        settings = replace(settings, card=card.name, total=card.total, capacity=card.free, limit=None)
    if given.total is not None:
        settings = replace(settings, total=given.total)
    if given.capacity is not None:
        settings = replace(settings, capacity=given.capacity)
    if fraction is not None:
        settings = replace(settings, memory_fraction=fraction, limit=None)
    tape = settle(tape_of(trace), own)
    caught, _ = failed_requests(trace)
    return Subject(name, tape, _given_back(tape, caught) if caught else tape, settings, recorded.notes)


def _given_back(tape: Tape, rows: Sequence[int]) -> Tape:
    """The Tape with a free after each of these requests."""
    trace, r, d = tape.trace, tape.trace.requests, tape.trace.decisions
    after = np.asarray(rows, dtype=np.int64) + 1
    columns = {f.name: np.insert(getattr(r, f.name), after, getattr(r, f.name)[after - 1]) for f in fields(r)}
    added = after + np.arange(len(after))
    columns["kind"][added] = RequestKind.FREE
    if d is not None:
        d = replace(d, request=d.request + np.searchsorted(after, d.request, side="right"))
    kind = np.insert(tape.kind, after, int(RequestKind.FREE))
    made = tape_of(replace(trace, requests=Requests(**columns), decisions=d))
    return replace(made, kind=kind, settled=True)


def assumptions_of(replayed: Replay, trace: Trace) -> tuple[Assumption, ...]:
    """What a replay takes for granted, with what a recording leaves open.

    Args:
        replayed: the replay.
        trace: as recorded.
    """
    out = list(replayed.assumptions)
    caught, _ = failed_requests(trace)
    if caught:
        detail = "the program caught OOMs; what failed then is given back at once where it is served"
        out = [a for a in out if a.code != "late_start"] if not _late_start(trace) else out
        out.append(Assumption("ooms_caught", "unknown", len(caught), detail))
    shown = trace.count(RequestKind.RELEASE_SEEN)
    if shown:
        detail = "why memory went back is inferred; calls of empty_cache() that returned nothing are not recorded"
        out.append(Assumption("inferred_releases", "unknown", shown, detail))
    return tuple(out)


def _late_start(trace: Trace) -> bool:
    """Whether something is freed that was never asked for."""
    r = trace.requests
    begun = r.id[(r.kind == RequestKind.ALLOC) | (r.kind == RequestKind.HELD)]
    return bool(np.any(~np.isin(r.id[r.kind == RequestKind.FREE], begun)))


def failed_requests(trace: Trace) -> tuple[Sequence[int], int | None]:
    """Requests that failed when recorded.

    Returns:
        Rows of those after which the program asked for memory again, and the row of the one it ended with, if any.
    """
    if trace.decisions is None:
        return (), None
    rows = np.unique(trace.decisions.request[trace.decisions.kind == DecisionKind.OOM]).tolist()
    asked = np.flatnonzero(trace.requests.kind == RequestKind.ALLOC)
    if rows and len(asked) and int(asked[-1]) <= rows[-1]:
        return rows[:-1], rows[-1]
    return rows, None
