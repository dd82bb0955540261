"""Device memory that a program takes of the driver itself, past the allocator: ``cuMemCreate``, ``cudaMalloc``.

It leaves less for segments. Where the driver has too little it fails at once: nobody asks the allocator to return what
it holds idle.
"""

from __future__ import annotations

from fragscope.allocator.engine.blocks import log
from fragscope.allocator.engine.counters import HBM_BYTES, RAW_BYTES, down, up
from fragscope.allocator.engine.driver import give_memory, take_memory
from fragscope.allocator.engine.kinds import DECISION_OOM
from fragscope.allocator.engine.requests import note_failure
from fragscope.allocator.engine.state import CAPACITY, FAILED, NONE, OOMS, RAW, USED, State
from fragscope.trace.sizes import driver_pages


def take_raw(s: State, id: int, size: int) -> bool:
    """Take ``size`` bytes, in the driver's pages; False where they are not there."""
    n = s.n
    if not take_memory(s, size):
        n[OOMS] += 1
        note_failure(s)
        s.where[id] = FAILED
        log(s, DECISION_OOM, id, n[CAPACITY] - n[USED], size, 0, 0)
        return False
    s.where[id] = RAW
    up(s, RAW_BYTES, driver_pages(size))
    up(s, HBM_BYTES, driver_pages(size))
    return True


def give_raw(s: State, id: int, size: int) -> None:
    """Give the same ``size`` bytes back; nothing where they were asked for in vain."""
    if s.where[id] != RAW:
        return
    s.where[id] = NONE
    give_memory(s, size)
    down(s, RAW_BYTES, driver_pages(size))
    down(s, HBM_BYTES, driver_pages(size))
