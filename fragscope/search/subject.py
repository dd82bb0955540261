"""What is asked about: a trace made ready for many replays, and the settings that those start from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fragscope.allocator import (
    ReplaySettings,
    Tape,
    card_named,
    caught_of,
    knows_fraction,
    recorded_under,
    rules_for,
    settle,
    tape_of,
)
from fragscope.errors import UsageError
from fragscope.trace import RequestKind, Requests, Trace, load_trace, with_sidecar


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
        sidecar: path of a JSON file that says what the recording leaves out.
    """

    torch: str | None = None
    card: str | None = None
    total: int | None = None
    capacity: int | None = None
    memory_fraction: float | None = None
    device: int | None = None
    sidecar: str | None = None


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
        given: what was said about it.
        notes: what is assumed about the recording, for people.
    """

    name: str
    tape: Tape
    trial: Tape
    settings: ReplaySettings
    given: Given
    notes: tuple[str, ...]


def load_subject(path: str, given: Given) -> Subject:
    """Open a file as a Subject.

    Raises:
        InputFileError: the file cannot be used.
        UsageError: what is given does not fit together or to the file, or its settings are not modelled.
    """
    trace = load_trace(path, given.device)
    if given.sidecar is not None:
        trace = with_sidecar(trace, Path(given.sidecar))
    return subject_of(trace, path, given)


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
    if fraction is not None and not knows_fraction(trace):
        own = own.with_fraction(fraction)
    settings = own if rules is None else own.with_rules(rules)
    if card is not None:
        settings = settings.with_card(card)
    if given.total is not None:
        settings = settings.with_total(given.total)
    if given.capacity is not None:
        settings = settings.with_capacity(given.capacity)
    if fraction is not None:
        settings = settings.with_fraction(fraction)
    tape = settle(tape_of(trace), own)
    caught, _ = caught_of(trace, tape.failed)
    return Subject(name, tape, _given_back(tape, caught) if len(caught) else tape, settings, given, recorded.notes)


def _given_back(tape: Tape, rows: Any) -> Tape:
    """The Tape with a free after each of these requests."""
    trace, r, d = tape.trace, tape.trace.requests, tape.trace.decisions
    after = np.asarray(rows, dtype=np.int64) + 1
    columns = {f.name: np.insert(getattr(r, f.name), after, getattr(r, f.name)[after - 1]) for f in fields(r)}
    added = after + np.arange(len(after))
    frees = np.where(r.kind[after - 1] == RequestKind.RAW_ALLOC, RequestKind.RAW_FREE, RequestKind.FREE)
    columns["kind"][added] = frees
    if d is not None:
        d = replace(d, request=d.request + np.searchsorted(after, d.request, side="right"))
    kind = np.insert(tape.kind, after, frees)
    event = np.insert(np.arange(len(r)), after, after - 1)
    made = tape_of(replace(trace, requests=Requests(**columns), decisions=d))
    return replace(made, kind=kind, settled=True, total=tape.total, event=event)
