"""The books of a virtual card, without torch."""

from __future__ import annotations

import sys
import threading

import pytest

pytest.importorskip("torch")  # the package it lies in imports it

from fragscope.allocator import OutOfMemoryError, ReplaySettings, card_named, replay, rules_for
from fragscope.record.virtual.card_memory import CardMemory
from fragscope.trace import Frame, RequestKind

MIB = 2**20
HERE = (Frame("loader.py", 7, "load"),)
pytestmark = pytest.mark.torch  # the package of the module imports it


def memory(capacity: int = 1024 * MIB) -> CardMemory:
    profile = card_named("h100-80gb")
    return CardMemory(ReplaySettings(rules_for("2.11.0"), profile.name, profile.total, capacity))


def kinds(card: CardMemory) -> list[str]:
    return [RequestKind(k).name for k in card.requests.finish().kind]


def test_a_request_that_fails_stays_in_the_log():
    card = memory(capacity=64 * MIB)
    kept = card.alloc(40 * MIB, 0, HERE)
    with pytest.raises(OutOfMemoryError):
        card.alloc(40 * MIB, 0, HERE)
    assert kinds(card) == ["ALLOC", "ALLOC", "OBSERVATION"]
    assert [(o.what, o.where) for o in card.observations] == [("OutOfMemoryError", "loader.py:7")]
    assert card.live == 1
    assert card.address(kept) > 0


def test_phases_name_what_happens_in_them():
    card = memory()
    card.alloc(1, 0, HERE)
    card.begin_phase("measure")
    card.alloc(2, 0, HERE)
    card.end_phase()
    card.alloc(3, 0, HERE)
    trace = card.trace()
    at = {int(s): int(p) for s, p, k in zip(trace.requests.size, trace.requests.phase, trace.requests.kind, strict=True)
          if k == RequestKind.ALLOC}  # fmt: skip
    assert {size: trace.phases[phase] for size, phase in at.items()} == {1: "", 2: "measure", 3: ""}


def test_uses_on_the_own_stream_change_nothing():
    card = memory()
    own = card.alloc(MIB, 5, HERE)
    card.record_stream(own, 5)
    card.free(own)
    assert kinds(card) == ["ALLOC", "FREE"]


def test_a_deferred_free_waits_for_all_its_streams():
    card = memory()
    used = card.alloc(4 * MIB, 0, HERE)
    card.record_stream(used, 1)
    card.record_stream(used, 2)
    card.free(used)
    assert card.allocator.now.active == 4 * MIB
    card.finished(1)
    assert "USES_DONE" not in kinds(card)
    card.finished(2)
    assert kinds(card)[-1] == "USES_DONE"


def test_emptying_the_cache_waits_for_everything():
    card = memory()
    used = card.alloc(4 * MIB, 0, HERE)
    card.record_stream(used, 1)
    card.free(used)
    card.empty_cache()
    assert card.allocator.now.reserved == 0
    assert kinds(card)[-2:] == ["USES_DONE", "EMPTY_CACHE"]


def test_its_replay_makes_the_same_decisions():
    card = memory()
    ids = [card.alloc(size * MIB // 3, size % 2, HERE) for size in range(1, 40)]
    for id_ in ids[::3]:
        card.record_stream(id_, 7)
    for id_ in ids[::2]:
        card.free(id_)
    card.finished(7)
    card.begin_phase("measure")
    card.alloc(9 * MIB, 0, HERE)
    card.end_phase()
    result = replay(card.trace(), card.settings, verify=True)
    assert result.verify is not None
    assert result.verify.compared > 0
    assert result.verify.mismatches == 0


def test_threads_take_turns():
    card = memory()

    def load() -> None:
        for _ in range(300):
            card.free(card.alloc(MIB, 0, HERE))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert card.live == 0
    assert card.allocator.now.allocated == 0
    assert sorted(kinds(card)) == ["ALLOC"] * 1200 + ["FREE"] * 1200
    assert replay(card.trace(), card.settings, verify=True).verify.mismatches == 0


def test_frees_that_wait_are_looked_at_no_more_than_once() -> None:
    """Twice as many cost twice as much: what waits for one stream is left alone when another is done."""

    def lines(blocks: int) -> int:
        card, count = memory(), 0
        for _ in range(blocks):
            id_ = card.alloc(512, 0, ())
            card.record_stream(id_, 1)
            card.free(id_)

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()  # that of a measurement of coverage
        sys.settrace(trace)
        try:
            for _ in range(blocks):
                card.finished(2)
            card.finished(1)
        finally:
            sys.settrace(before)
        assert kinds(card).count("USES_DONE") == blocks
        return count

    few, many = lines(50), lines(100)
    assert many < 2.5 * few


def test_frees_that_wait_for_several_streams_are_over_in_their_order() -> None:
    card = memory()
    ids = [card.alloc(512, 0, ()) for _ in range(3)]
    for id_, streams in zip(ids, [(1, 2), (2,), (1,)], strict=True):
        for stream in streams:
            card.record_stream(id_, stream)
        card.free(id_)
    event = card.record_event(2)
    card.finished_event(event)
    card.finished()
    requests = card.requests.finish()
    assert requests.id[requests.kind == RequestKind.USES_DONE].tolist() == [ids[1], ids[0], ids[2]]
