"""Who holds memory: block bytes by call stack, at the moment asked about."""

from __future__ import annotations

from fragscope.allocator import ReplaySettings, replay, rules_for
from fragscope.measure import Holder, holders_at, raw_holders_at
from fragscope.trace import Frame, RequestKind, RequestLog, StackTable, Trace

MIB = 2**20
SETTINGS = ReplaySettings(rules_for("2.13.0"), "any", 2**50, 2**50)
LOADER = (Frame("loader.py", 3, "load"), Frame("main.py", 9, "main"))
CACHE = (Frame("cache.py", 5, "grow"),)


def decided() -> Trace:
    stacks = StackTable()
    log = RequestLog()
    log.append(RequestKind.ALLOC, id=40, size=1000, stack=stacks.add(CACHE))
    log.append(RequestKind.ALLOC, id=7, size=12 * MIB, stack=stacks.add(LOADER))
    log.append(RequestKind.ALLOC, id=8, size=14 * MIB, stack=stacks.add(LOADER))
    log.append(RequestKind.ALLOC, id=9, size=2 * MIB)
    log.append(RequestKind.RECORD_STREAM, id=7, stream=5)
    log.append(RequestKind.FREE, id=7)
    log.append(RequestKind.FREE, id=40)
    return replay(Trace(log.finish(), stacks=stacks, torch="2.13.0"), SETTINGS).trace


def test_blocks_count_whole_by_the_stack_that_asked_for_them():
    assert holders_at(decided(), 4) == (
        Holder(LOADER, 26 * MIB, 2, 26 * MIB),
        Holder((), 2 * MIB, 1, 2 * MIB),
        Holder(CACHE, 1024, 1, 1000),  # rounded up to 512 bytes
    )


def test_a_freed_block_is_held_no_more_even_while_another_stream_uses_it():
    left = (Holder(LOADER, 14 * MIB, 1, 14 * MIB), Holder((), 2 * MIB, 1, 2 * MIB))
    assert holders_at(decided(), 5) == (*left, Holder(CACHE, 1024, 1, 1000))
    assert holders_at(decided(), 6) == left


def test_memory_past_the_allocator_is_held_in_whole_pages_until_it_is_given_back():
    stacks, log = StackTable(), RequestLog()
    log.append(RequestKind.RAW_ALLOC, id=1, size=3 * MIB, stack=stacks.add(CACHE))
    log.append(RequestKind.RAW_ALLOC, id=2, size=2 * MIB, stack=stacks.add(CACHE))
    log.append(RequestKind.RAW_FREE, id=2, size=2 * MIB)
    trace = replay(Trace(log.finish(), stacks=stacks, torch="2.13.0"), SETTINGS).trace
    assert raw_holders_at(trace, 1) == (Holder(CACHE, 6 * MIB, 2, 5 * MIB),)
    assert raw_holders_at(trace, 2) == (Holder(CACHE, 4 * MIB, 1, 3 * MIB),)


def test_of_equal_ones_who_asked_first_comes_first():
    stacks, log = StackTable(), RequestLog()
    log.append(RequestKind.ALLOC, id=1, size=2 * MIB, stack=stacks.add(CACHE))
    log.append(RequestKind.ALLOC, id=0, size=2 * MIB, stack=stacks.add(LOADER))
    trace = replay(Trace(log.finish(), stacks=stacks, torch="2.13.0"), SETTINGS).trace
    assert [h.stack for h in holders_at(trace, 0)] == [CACHE]
    assert [h.stack for h in holders_at(trace, 1)] == [CACHE, LOADER]
