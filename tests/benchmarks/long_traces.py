"""Traces of any length, as columns: what a training run asks of the allocator, and how a recording would show it.

A step hands out activations, which are freed backwards, and between them temporaries that live for a few requests. One
size in ten differs from step to step, as with sequences of different lengths. Some blocks are used by a second stream.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fragscope.allocator import ReplaySettings, card_named, replay, rules_for
from fragscope.measure.segments import Ints
from fragscope.trace import DecisionKind, RequestKind, Requests, Trace
from fragscope.units import MIB

CARD = card_named("h100-80gb")
SETTINGS = ReplaySettings(rules_for("2.13.0"), CARD.name, CARD.total, CARD.free)
STEP = 4_000  # allocations
OTHER_STREAM = 0x5100


def long_trace(events: int, *, releases: int = 0, seed: int = 0) -> Trace:
    """A Trace of that many requests, without decisions.

    Args:
        events: requests.
        releases: how many of them are ``empty_cache()``, each directly before an allocation.
        seed: decides all sizes and lifetimes.
    """
    random = np.random.default_rng(seed)
    count = events // 2 + STEP  # allocations, some more than needed
    place = np.arange(count) % STEP
    usual = _sizes(random, STEP)[place]
    size = np.where(random.random(count) < 0.1, _sizes(random, count), usual)
    born = np.arange(count, dtype=np.float64)
    kept = (random.random(STEP) < 0.25)[place]  # activations
    died = born + np.where(kept, 2.0 * (STEP - place), random.geometric(0.1, count)) + 0.5
    shared = np.flatnonzero(random.random(count) < 0.02)
    ids = np.arange(count)
    released = random.choice(events // 2 - STEP, releases, replace=False)
    size[released] = 64 * MIB  # more than is left cached, so that a new segment is taken
    parts = [  # when, kind, id, bytes, stream
        _rows(born, RequestKind.ALLOC, ids, size),
        _rows(died, RequestKind.FREE, ids),
        _rows(born[shared] + 0.1, RequestKind.RECORD_STREAM, ids[shared], stream=OTHER_STREAM),
        _rows(died[shared] + 20.0, RequestKind.USES_DONE, ids[shared]),
        _rows(born[released] - 0.01, RequestKind.EMPTY_CACHE, np.full(releases, -1)),
    ]
    when, kind, id_, size, stream = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(when, kind="stable")[:events]
    none = np.zeros(events, dtype=np.int32)
    requests = Requests(
        kind[order].astype(np.uint8), id_[order], size[order], stream[order], none, none, none - 1, none
    )
    return Trace(requests)


def long_recording(events: int, *, releases: int = 0, seed: int = 0, settings: ReplaySettings = SETTINGS) -> Trace:
    """The same as a recording shows it: with decisions, without block sizes or a word on who released memory."""
    trace = replay(long_trace(events, releases=releases, seed=seed), settings, compiled=True).trace
    assert trace.decisions is not None
    d, kind = trace.decisions, trace.requests.kind.copy()
    of_request = (kind == RequestKind.EMPTY_CACHE)[d.request]
    gave = np.unique(d.request[of_request & (d.kind == DecisionKind.SEGMENT_FREE)])
    took = np.unique(d.request[d.kind == DecisionKind.SEGMENT_ALLOC])
    shown = gave[np.isin(gave + 1, took)]
    kind[shown] = RequestKind.RELEASE_SEEN
    request = d.request + np.isin(d.request, shown)
    size = np.where(d.kind == DecisionKind.ALLOC, -1, d.size)
    decisions = replace(d, request=request, size=size)
    return replace(trace, requests=replace(trace.requests, kind=kind), decisions=decisions, placement="recorded")


def _sizes(random: np.random.Generator, count: int) -> Ints:
    """Bytes: most tensors are small, most memory is in large ones."""
    exponent = random.choice([9.0, 16.0, 21.0, 23.0], count, p=[0.4, 0.3, 0.2, 0.1]) + 2 * random.random(count)
    return np.exp2(exponent).astype(np.int64)


def _rows(
    when: np.ndarray, kind: RequestKind, id: Ints, size: Ints | int = 0, stream: int = 0
) -> tuple[np.ndarray, ...]:
    count = len(when)
    return when, np.full(count, int(kind)), id, np.broadcast_to(size, count), np.full(count, stream)
