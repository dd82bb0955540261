"""Taking segments from the driver and returning them: new memory, garbage collection, releases, and their order."""

from __future__ import annotations

from fragscope.allocator.engine.blocks import (
    drop_block,
    drop_segment,
    is_expandable,
    is_held,
    is_split,
    link,
    log,
    new_block,
    new_segment,
    take_idle,
)
from fragscope.allocator.engine.counters import (
    OVERSIZE_SEGMENTS,
    POOL_IDLE,
    SEGMENT_COUNT,
    down,
    down_class,
    down_reserved,
    up,
    up_class,
    up_idle,
    up_reserved,
)
from fragscope.allocator.engine.driver import give_memory, place_segment, remove_segment, take_memory
from fragscope.allocator.engine.expandable import map_for, unmap
from fragscope.allocator.engine.free_lists import first, first_from, following, last, preceding
from fragscope.allocator.engine.kinds import (
    DECISION_SEGMENT_ALLOC,
    DECISION_SEGMENT_FREE,
)
from fragscope.allocator.engine.sizes import segment_size
from fragscope.allocator.engine.state import (
    AGE_BASE,
    DEFECTS,
    DRIVER_ALLOCS,
    DRIVER_FREES,
    GC_THRESHOLD,
    IDLE,
    KEY_SIZE,
    KEY_STREAM,
    LIMIT,
    LIST,
    MAX_SPLIT,
    REFUSE_ABOVE,
    REJECTIONS,
    RESERVED,
    RETRIES,
    ROOT,
    SCRATCH,
    SEARCHES,
    SEG_ADDR,
    SEG_STREAM,
    SEGMENT,
    SEGMENTS,
    SIZE,
    THROW,
    State,
)

UNLIMITED = 2**63 - 1
REJECTED = -2  # throw_on_cudamalloc_oom refused the request
LARGE_DEFAULT = 1  # free list of the default pool's large blocks


def new_memory(s: State, which: int, rounded: int, stream: int, expandable: bool, is_retry: bool) -> int:
    """A block from the driver, in no free list; -1 if there is no memory, ``REJECTED`` if asking is not allowed.

    ``alloc_block``: limits are held against the size of an ordinary segment even where only pages are mapped.
    """
    t, n = s.t, s.n
    size = segment_size(s, rounded)
    if is_retry:
        n[RETRIES] += 1
    if n[LIMIT] >= 0 and n[RESERVED] + size > n[LIMIT]:
        return -1
    if n[THROW] and n[RESERVED] + size > n[REFUSE_ABOVE]:
        n[REJECTIONS] += 1
        return REJECTED
    pool = which // 2
    if expandable:
        block = map_for(s, which, rounded, stream)
        if block >= 0:
            t[SEGMENTS][pool] += 1
        return block
    if not take_memory(s, size):
        return -1
    segment = new_segment(s, size, stream, which, 0)
    addr = place_segment(s, size)
    t[SEG_ADDR][segment] = addr
    t[SEGMENTS][pool] += 1
    n[RESERVED] += size
    block = new_block(s, segment, addr, size, IDLE, -1)
    link(s, -1, block, -1)
    up_class(s, SEGMENT_COUNT, which, 1)
    up_reserved(s, which, size)
    if is_held(s, which):
        up_idle(s, POOL_IDLE, size)
    if size >= n[MAX_SPLIT]:
        up(s, OVERSIZE_SEGMENTS, 1)
    n[DRIVER_ALLOCS] += 1
    log(s, DECISION_SEGMENT_ALLOC, -1, addr, size, stream, pool)
    return block


def release_segment(s: State, block: int) -> None:
    """Return an ordinary segment that is one idle block in its free list (``release_block``)."""
    t, n = s.t, s.n
    segment = t[SEGMENT][block]
    which, size = t[LIST][block], t[SIZE][block]
    take_idle(s, block)
    n[DRIVER_FREES] += 1
    log(s, DECISION_SEGMENT_FREE, -1, t[SEG_ADDR][segment], size, t[SEG_STREAM][segment], which // 2)
    remove_segment(s, segment)
    give_memory(s, size)
    n[RESERVED] -= size
    t[SEGMENTS][which // 2] -= 1
    down_class(s, SEGMENT_COUNT, which, 1)
    down_reserved(s, which, size)
    if is_held(s, which):
        down(s, POOL_IDLE, size)
    if size >= n[MAX_SPLIT]:
        down(s, OVERSIZE_SEGMENTS, 1)
    drop_segment(s, segment)
    drop_block(s, block)


def release_idle(s: State, which: int) -> None:
    """Return what is idle in a free list: whole segments first, then whole pages (``release_blocks``)."""
    t = s.t
    collected = 0
    block = first(s, ROOT, which)
    while block >= 0:
        later = following(s, block)
        if is_expandable(s, block):
            t[SCRATCH][collected] = block
            collected += 1
        elif not is_split(s, block):
            release_segment(s, block)
        block = later
    for i in range(collected):
        unmap(s, t[SCRATCH][i])


def release_oversize(s: State, which: int, rounded: int, stream: int) -> bool:
    """Return cached segments of ``max_split_size`` and more, just enough for a request that they may not serve.

    Only with a ``max_split_size`` (``release_available_cached_blocks``). True if as much was returned as is needed.

    The allocator takes it that such a block is a whole segment. Where the limit was lowered, or expandable segments
    were on for a while, it may be a part of one: then the real allocator hands the driver an address inside a segment,
    which is an error there; here the part stays, and the defect is counted.
    """
    t, n = s.t, s.n
    max_split = n[MAX_SPLIT]
    if max_split == UNLIMITED:
        return False
    wanted = max(rounded, max_split)
    block = first_from(s, ROOT, which, stream, wanted, -1, -1)
    if block >= 0 and t[KEY_STREAM][block] == stream and not is_expandable(s, block):
        if is_split(s, block):
            n[DEFECTS] += 1
            return False
        release_segment(s, block)
        return True
    # None is large enough alone: the largest first, as many as it takes.
    block = preceding(s, block) if block >= 0 else last(s, ROOT, which)
    released = 0
    while block >= 0 and released < wanted and t[KEY_SIZE][block] >= max_split and t[KEY_STREAM][block] == stream:
        larger = block
        block = preceding(s, block)
        if is_split(s, larger) and not is_expandable(s, larger):
            n[DEFECTS] += 1
        elif not is_expandable(s, larger):
            released += t[SIZE][larger]
            release_segment(s, larger)
    return bool(released >= wanted)


def collect_garbage(s: State) -> None:
    """Return idle segments older than the average until reserved bytes are below the threshold.

    Only the default pool's large segments; ages are counted in searches of that free list. A pass is not cut short
    when enough is returned (``garbage_collect_cached_blocks``).
    """
    t, n = s.t, s.n
    allowed = int(s.f[GC_THRESHOLD] * n[LIMIT])
    if n[RESERVED] <= allowed:
        return
    target = n[RESERVED] - allowed
    searches = t[SEARCHES][LARGE_DEFAULT]
    total_age, count = 0, 0
    block = first(s, ROOT, LARGE_DEFAULT)
    while block >= 0:
        if not is_split(s, block):
            total_age += searches - t[AGE_BASE][block]
            count += 1
        block = following(s, block)
    reclaimed = 0
    found = True
    while reclaimed < target and found and count > 0:
        found = False
        threshold = total_age / count
        block = first(s, ROOT, LARGE_DEFAULT)
        while block >= 0:
            later = following(s, block)
            age = searches - t[AGE_BASE][block]
            if not is_split(s, block) and not is_expandable(s, block) and age >= threshold:
                found = True
                reclaimed += t[SIZE][block]
                total_age -= age
                count -= 1
                release_segment(s, block)
            block = later
