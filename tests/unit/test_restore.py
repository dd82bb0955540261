"""A replay that begins with what stood already: it stays what it was, whatever the replay is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fragscope.allocator import CARDS, Replay, ReplaySettings, replay, rules_for, settle, tape_of
from fragscope.trace import DecisionKind, RequestKind, RequestLog, SegmentState, Trace

MIB, GIB = 2**20, 2**30
BASE = 0x3_0200_0000
CARD = CARDS["h100-80gb"]
SETTINGS = ReplaySettings(rules_for("2.11"), CARD.name, CARD.total, CARD.free, conf="expandable_segments:True")
UNMAP, MAP = DecisionKind.SEGMENT_UNMAP, DecisionKind.SEGMENT_MAP


def idle(addr: int, size: int, page: int) -> SegmentState:
    return SegmentState(addr, size, 0, 0, ((addr, size, "free"),), page)


def begun_with(*stood: SegmentState, then: RequestKind = RequestKind.EMPTY_CACHE, size: int = 0) -> Trace:
    """A recording on an H100 that began with idle memory and makes one request."""
    log = RequestLog()
    log.append(RequestKind.START)
    log.append(then, id=0 if then == RequestKind.ALLOC else -1, size=size)
    return Trace(log.finish(), initial=stood, card=CARD.name, device_total=CARD.total, placement="recorded")


def made(outcome: Replay, kind: DecisionKind) -> list[tuple[int, int]]:
    """Address and bytes of the decisions of one kind that the request led to."""
    d = outcome.trace.decisions
    assert d is not None
    rows = (d.kind == kind) & (d.request == 1)
    return list(zip(d.addr[rows].tolist(), d.size[rows].tolist(), strict=True))


@pytest.mark.parametrize("large", [12, 20, 32, 64])
def test_a_segment_keeps_its_pages_under_another_large_segment_size(large: int) -> None:
    """An ExpandableSegment is made with its segment size and keeps it (c10/cuda/CUDACachingAllocator.cpp)."""
    conf = f"expandable_segments:True,large_segment_size_mb:{large}"
    settings = ReplaySettings(SETTINGS.rules, CARD.name, CARD.total, CARD.free, conf=conf)
    trace = begun_with(idle(BASE, 60 * MIB, 20 * MIB))
    assert made(replay(trace, settings), UNMAP) == [(BASE, 60 * MIB)]
    grown = begun_with(idle(BASE, 60 * MIB, 20 * MIB), then=RequestKind.ALLOC, size=61 * MIB)
    assert made(replay(grown, settings), MAP) == [(BASE + 60 * MIB, 20 * MIB)]


@pytest.mark.parametrize("large", [12, 20])
def test_a_segment_keeps_its_size_class_under_another_large_segment_size(large: int) -> None:
    """24 MiB in pages of 2 MiB are the small pool's, though they are whole pages of 12 MiB too."""
    conf = f"expandable_segments:True,large_segment_size_mb:{large}"
    settings = ReplaySettings(SETTINGS.rules, CARD.name, CARD.total, CARD.free, conf=conf)
    large_request = begun_with(idle(BASE, 24 * MIB, 2 * MIB), then=RequestKind.ALLOC, size=6 * MIB)
    assert [size for _, size in made(replay(large_request, settings), MAP)] == [large * MIB]
    small_request = begun_with(idle(BASE, 24 * MIB, 2 * MIB), then=RequestKind.ALLOC, size=MIB)
    assert made(replay(small_request, settings), MAP) == []


def test_a_reservation_is_as_long_as_on_the_card_that_it_was_recorded_on() -> None:
    """40 GiB beyond its beginning a page is mapped; no reservation on a card of 16 GiB reaches as far."""
    parts = (idle(BASE, 20 * MIB, 20 * MIB), idle(BASE + 2000 * 20 * MIB, 20 * MIB, 20 * MIB))
    trace = begun_with(*parts, then=RequestKind.ALLOC, size=30 * GIB)
    smaller = ReplaySettings(SETTINGS.rules, "16 GiB", 16 * GIB, 64 * GIB, conf=SETTINGS.conf)
    assert made(replay(trace, smaller), MAP)[0] == (BASE + 20 * MIB, 1535 * 20 * MIB)


def test_the_card_of_a_settled_tape_is_the_one_that_it_was_settled_with() -> None:
    parts = (idle(BASE, 20 * MIB, 20 * MIB), idle(BASE + 2000 * 20 * MIB, 20 * MIB, 20 * MIB))
    trace = replace(begun_with(*parts, then=RequestKind.ALLOC, size=30 * GIB), card=None, device_total=None)
    smaller = ReplaySettings(SETTINGS.rules, "16 GiB", 16 * GIB, 64 * GIB, conf=SETTINGS.conf)
    settled = settle(tape_of(trace), SETTINGS)
    assert made(replay(settled, smaller), MAP)[0] == (BASE + 20 * MIB, 1535 * 20 * MIB)


def test_what_a_trace_began_with_is_kept_when_its_replay_is_replayed() -> None:
    """A replay's Trace names the conf and the card of the replay; what stood at the start is still the recorded."""
    conf = "expandable_segments:True,large_segment_size_mb:64"
    settings = ReplaySettings(SETTINGS.rules, CARD.name, CARD.total, CARD.free, conf=conf)
    trace = replay(begun_with(idle(BASE, 60 * MIB, 20 * MIB)), settings).trace
    assert made(replay(trace, settings), UNMAP) == [(BASE, 60 * MIB)]
