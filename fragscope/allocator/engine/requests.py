"""What a program asks of the allocator: malloc, free, uses by other streams, releases, pools.

Each function follows the one of the same purpose in c10/cuda/CUDACachingAllocator.cpp; the order of steps is the
behaviour. What other streams have finished is told from outside (``uses_done``), because only the GPU knows.
"""

from __future__ import annotations

from fragscope.allocator.engine.blocks import (
    change_active,
    is_expandable,
    is_split,
    link,
    log,
    merge,
    new_block,
    put_idle,
    take_idle,
    whole_pages,
)
from fragscope.allocator.engine.counters import (
    ACTIVE,
    ACTIVE_BYTES,
    ALLOCATED_BYTES,
    ALLOCATION,
    INACTIVE_SPLIT,
    INACTIVE_SPLIT_BYTES,
    LIVE_REQUESTED,
    OVERSIZE_ALLOCATIONS,
    POOL_IDLE,
    REQUESTED_BYTES,
    STRANDED,
    change_class,
    count_down,
    count_up,
    down,
    down_class,
    note_peak,
    up,
    up_class,
)
from fragscope.allocator.engine.free_lists import first, first_from, following, last_before
from fragscope.allocator.engine.kinds import (
    DECISION_ALLOC,
    DECISION_FREE_COMPLETED,
    DECISION_FREE_REQUESTED,
    DECISION_OOM,
)
from fragscope.allocator.engine.memory import (
    REJECTED,
    collect_garbage,
    new_memory,
    release_idle,
    release_oversize,
)
from fragscope.allocator.engine.sizes import MIN_BLOCK, SMALL_SIZE, TOO_LARGE, round_size
from fragscope.allocator.engine.state import (
    ABSENT,
    ADDR,
    ALLOCATED,
    ALLOCS,
    BY_ADDRESS,
    CAPACITY,
    CAPTURES,
    COLUMNS,
    COUNT_TIES,
    DEFERRED,
    DEFERRED_COUNT,
    DEPARTED,
    DONE,
    DONE_COUNT,
    EXPANDABLE,
    FAILED,
    FAILED_SIZE,
    FIRST_OOM,
    FIRST_WAITING,
    GC_THRESHOLD,
    HELD,
    ID,
    IDLE,
    IS_DONE,
    KEY_SIZE,
    KEY_STREAM,
    LAST_WAITING,
    LENDS_FIRST,
    LIMIT,
    LIST,
    LOST_FREES,
    MAX_SPLIT,
    NEXT,
    NO_SPLIT,
    NON_SPLIT_ROUNDING,
    NONE,
    ON_OOM,
    OOMS,
    POOL_STATE,
    POOLS,
    PREV,
    RELEASED,
    REQUEST,
    REQUESTED,
    ROOT,
    SCOPES,
    SCOPES_COUNT,
    SEARCHES,
    SEG_ACTIVE,
    SEG_FIRST,
    SEG_LIST,
    SEG_PAGE,
    SEG_STREAM,
    SEGMENT,
    SEGMENTS,
    SIZE,
    SPARE_USE,
    SPARE_USES,
    STALE_USES,
    STATE,
    STATISTICS,
    SYNCS,
    TIE,
    TIE_BREAK,
    TIES,
    UNMAPPED,
    USE_NEXT,
    USE_SCOPED,
    USE_STREAM,
    USED,
    USERS,
    USES,
    WAIT_NEXT,
    WAIT_PREV,
    WAITING,
    State,
)

SERVED = 0
OUT_OF_MEMORY = 1
REFUSED = 2  # by throw_on_cudamalloc_oom
IMPOSSIBLE = 3  # beyond what any device has; the allocator is not asked


def is_looking_away(s: State) -> bool:
    """Whether finished work of other streams is not looked at and nothing is released to avoid an OOM.

    Up to 2.12 while any allocation scope is open, a ``use_mem_pool`` too; from 2.13 on only while a stream is captured.
    """
    n = s.n
    return bool(n[CAPTURES] > 0 or (n[SCOPES_COUNT] and n[SCOPES] > 0))


# --- malloc -------------------------------------------------------------------------------------------------------


def malloc(s: State, id: int, size: int, stream: int, pool: int) -> int:
    """Serve a request of ``size`` bytes from a pool; returns ``SERVED`` or why not."""
    t, n = s.t, s.n
    n[ALLOCS] += 1
    if size >= TOO_LARGE:
        note_failure(s)
        s.where[id] = FAILED
        n[FAILED_SIZE] = size
        return IMPOSSIBLE
    if not is_looking_away(s):
        process_events(s)
    if pool > 0 and t[POOL_STATE][pool] == ABSENT:
        create_pool(s, pool)
    rounded = round_size(s, size)
    is_large = 0 if rounded <= SMALL_SIZE else 1
    which = 2 * pool + is_large
    expandable = n[EXPANDABLE] == 1
    block = search(s, which, rounded, stream, expandable)
    if block < 0:
        if n[LIMIT] >= 0 and s.f[GC_THRESHOLD] > 0.0:
            collect_garbage(s)
        block = new_memory(s, which, rounded, stream, expandable, False)
        if block == NONE:
            lends_first = n[LENDS_FIRST] == 1
            if pool == 0 and lends_first:
                block = _search_lenders(s, is_large, rounded, stream)
            if block < 0 and _may_release_oversize(s) and release_oversize(s, which, rounded, stream):
                block = new_memory(s, which, rounded, stream, expandable, False)
            if block < 0 and not is_looking_away(s):
                release_cached(s, 0)
                block = new_memory(s, which, rounded, stream, expandable, True)
            if block < 0 and pool == 0 and not lends_first:
                block = _search_lenders(s, is_large, rounded, stream)
            if block >= 0 and t[LIST][block] != which:  # lent
                expandable = False
                which = t[LIST][block]
    if block == REJECTED:
        note_failure(s)
        s.where[id] = FAILED
        n[FAILED_SIZE] = rounded
        return REFUSED
    if block < 0:
        n[OOMS] += 1
        note_peak(s, POOL_IDLE)  # of pages that were mapped before memory ran out
        note_failure(s)
        n[FAILED_SIZE] = rounded
        s.where[id] = FAILED
        log(s, DECISION_OOM, id, n[CAPACITY] - n[USED], rounded, stream, pool)
        return OUT_OF_MEMORY
    _hand_out(s, which, block, rounded, size, id, _should_split(s, which, block, rounded, expandable))
    return SERVED


def note_failure(s: State) -> None:
    """Remember the first request that was not served, for whatever reason."""
    if s.n[FIRST_OOM] < 0:
        s.n[FIRST_OOM] = s.n[REQUEST]


def _may_release_oversize(s: State) -> bool:
    """From 2.13 on not while a stream is captured; before, always."""
    return bool(s.n[CAPTURES] == 0 or s.n[SCOPES_COUNT] == 1)


def search(s: State, which: int, rounded: int, stream: int, expandable: bool) -> int:
    """The cached block that serves a request, taken out of its free list, or -1 (``get_free_block``)."""
    n = s.n
    if n[LIMIT] >= 0 and s.f[GC_THRESHOLD] > 0.0:
        s.t[SEARCHES][which] += 1
    block = candidate(s, which, rounded, stream, expandable)
    if block >= 0:
        is_asked = n[DEPARTED] == 1 or n[COUNT_TIES] == 1
        if is_asked and n[TIE_BREAK] == BY_ADDRESS and _is_tied(s, which, block):
            n[TIES] += 1
        take_idle(s, block)
    return block


def candidate(s: State, which: int, rounded: int, stream: int, expandable: bool) -> int:
    """The one block that is tested for a request, if the rules for large blocks let it serve; else -1."""
    t, n = s.t, s.n
    block = first_from(s, ROOT, which, stream, rounded, -1, -1)
    if block < 0 or t[KEY_STREAM][block] != stream:
        return -1
    if is_expandable(s, block):
        if expandable:
            # Of expandable blocks in search order, the last before the room to grow into stops shrinking.
            later = following(s, block)
            while (
                is_expandable(s, block)
                and later >= 0
                and t[KEY_STREAM][later] == stream
                and _room(s, later) < _room(s, block)
            ):
                block = later
                later = following(s, block)
        else:
            while block >= 0 and t[KEY_STREAM][block] == stream and is_expandable(s, block):
                block = following(s, block)
            if block < 0 or t[KEY_STREAM][block] != stream:
                return -1
    size = t[SIZE][block]
    if rounded < n[MAX_SPLIT]:
        if size >= n[MAX_SPLIT]:
            return -1
    elif size >= rounded + n[NON_SPLIT_ROUNDING]:
        return -1
    return block


def _room(s: State, block: int) -> int:
    """Bytes of a block and of the unmapped one after it."""
    t = s.t
    later = t[NEXT][block]
    room: int = t[SIZE][block]
    if later >= 0 and t[STATE][later] == UNMAPPED:
        room += t[SIZE][later]
    return room


def _search_lenders(s: State, is_large: int, rounded: int, stream: int) -> int:
    """A block of a pool that helps out before an OOM (``MemPool(use_on_oom=True)``)."""
    t = s.t
    for pool in range(1, s.n[POOLS]):
        if t[POOL_STATE][pool] == ABSENT:
            continue
        if t[ON_OOM][pool]:
            block = search(s, 2 * pool + is_large, rounded, stream, False)
            if block >= 0:
                return block
    return -1


def _is_tied(s: State, which: int, block: int) -> bool:
    """Whether choosing this block over others of its size came down to where the driver put their segments.

    Blocks of one segment are ordered by their offsets, and whole idle segments of one size are interchangeable;
    anything else makes a different layout.
    """
    t = s.t
    stream, size = t[KEY_STREAM][block], t[KEY_SIZE][block]
    other = following(s, block)
    if other < 0 or t[KEY_STREAM][other] != stream or t[KEY_SIZE][other] != size:
        return False
    # ``block`` is the lowest: if the highest lies in the same segment, so do all between them.
    highest = last_before(s, ROOT, which, stream, size + 1, -1, -1)
    if t[SEGMENT][highest] == t[SEGMENT][block]:
        return False
    if is_split(s, block):
        return True
    while other >= 0 and t[KEY_STREAM][other] == stream and t[KEY_SIZE][other] == size:
        if is_split(s, other):
            return True
        other = following(s, other)
    return False


def _should_split(s: State, which: int, block: int, rounded: int, expandable: bool) -> bool:
    """Whether the rest of a block becomes a block of its own."""
    if s.t[NO_SPLIT][which // 2]:
        return False
    remaining = s.t[SIZE][block] - rounded
    if which % 2 == 0 or expandable:
        return bool(remaining >= MIN_BLOCK)
    return bool(rounded < s.n[MAX_SPLIT] and remaining > SMALL_SIZE)


def _hand_out(s: State, which: int, block: int, rounded: int, requested: int, id: int, split: bool) -> None:
    """Give the block, or its front part, to the program (``alloc_found_block``)."""
    t = s.t
    segment = t[SEGMENT][block]
    was_split = is_split(s, block)
    is_ordinary = t[SEG_PAGE][segment] == 0
    if split:
        rest = block
        block = new_block(s, segment, t[ADDR][rest], rounded, ALLOCATED, t[TIE][rest])
        link(s, t[PREV][rest], block, rest)
        t[ADDR][rest] += rounded
        t[SIZE][rest] -= rounded
        put_idle(s, rest)
        if is_ordinary and was_split:
            down_class(s, INACTIVE_SPLIT_BYTES, which, rounded)
        elif is_ordinary:
            up_class(s, INACTIVE_SPLIT_BYTES, which, t[SIZE][rest])
            count_up(s, INACTIVE_SPLIT, which, 1)
    elif is_ordinary and was_split:
        down_class(s, INACTIVE_SPLIT_BYTES, which, t[SIZE][block])
        count_down(s, INACTIVE_SPLIT, which, 1)
    size = t[SIZE][block]
    t[STATE][block] = ALLOCATED
    t[REQUESTED][block] = requested
    t[ID][block] = id
    s.where[id] = block
    change_active(s, segment, size)
    note_peak(s, POOL_IDLE)
    log(s, DECISION_ALLOC, id, t[ADDR][block], size, t[SEG_STREAM][segment], which // 2)
    count_up(s, ALLOCATION, which, 1)
    up_class(s, ALLOCATED_BYTES, which, size)
    count_up(s, ACTIVE, which, 1)
    up_class(s, ACTIVE_BYTES, which, size)
    count_up(s, REQUESTED_BYTES, which, requested)
    up(s, LIVE_REQUESTED, requested)
    if size >= s.n[MAX_SPLIT]:
        up(s, OVERSIZE_ALLOCATIONS, 1)


# --- free ---------------------------------------------------------------------------------------------------------


def free(s: State, id: int) -> None:
    """The program lets go of an allocation; if other streams use it, its free waits until they are done."""
    t, n = s.t, s.n
    block = s.where[id]
    if block < 0 or t[STATE][block] != ALLOCATED:
        if block != FAILED:
            n[LOST_FREES] += 1
        return
    which, size = t[LIST][block], t[SIZE][block]
    count_down(s, ALLOCATION, which, 1)
    down_class(s, ALLOCATED_BYTES, which, size)
    down(s, LIVE_REQUESTED, t[REQUESTED][block])
    log(s, DECISION_FREE_REQUESTED, id, t[ADDR][block], size, t[SEG_STREAM][t[SEGMENT][block]], which // 2)
    if size >= n[MAX_SPLIT]:
        down(s, OVERSIZE_ALLOCATIONS, 1)
    if t[USES][block] < 0:
        _free_block(s, block)
        return
    if is_looking_away(s):
        t[STATE][block] = DEFERRED
        n[DEFERRED_COUNT] += 1
    else:
        t[STATE][block] = WAITING
        _make_stale(s, block)
    earlier = n[LAST_WAITING]
    t[WAIT_PREV][block] = earlier
    t[WAIT_NEXT][block] = -1
    if earlier >= 0:
        t[WAIT_NEXT][earlier] = block
    else:
        n[FIRST_WAITING] = block
    n[LAST_WAITING] = block


def _free_block(s: State, block: int) -> None:
    """The block becomes idle and merges with idle neighbours (``free_block``)."""
    t = s.t
    which, size, segment = t[LIST][block], t[SIZE][block], t[SEGMENT][block]
    requested, id = t[REQUESTED][block], t[ID][block]
    log(s, DECISION_FREE_COMPLETED, id, t[ADDR][block], size, t[SEG_STREAM][segment], which // 2)
    s.where[id] = NONE
    t[STATE][block] = IDLE
    t[ID][block] = -1
    count, change = 0, 0
    earlier, later = t[PREV][block], t[NEXT][block]
    gained = merge(s, block, earlier)
    if gained > 0:
        count -= 1
        change -= gained
    gained = merge(s, block, later)
    if gained > 0:
        count -= 1
        change -= gained
    put_idle(s, block)
    if is_split(s, block):
        count += 1
        change += t[SIZE][block]
    if t[SEG_PAGE][segment] == 0:
        if s.n[STATISTICS]:
            change_class(s, INACTIVE_SPLIT, which, count)
        change_class(s, INACTIVE_SPLIT_BYTES, which, change)
    change_active(s, segment, -size)
    note_peak(s, POOL_IDLE)
    count_down(s, ACTIVE, which, 1)
    down_class(s, ACTIVE_BYTES, which, size)
    count_down(s, REQUESTED_BYTES, which, requested)


# --- other streams ------------------------------------------------------------------------------------------------


def record_stream(s: State, id: int, stream: int) -> None:
    """Another stream uses the allocation; uses on its own stream change nothing."""
    t, n = s.t, s.n
    block = s.where[id]
    if block < 0 or t[STATE][block] != ALLOCATED or stream == t[SEG_STREAM][t[SEGMENT][block]]:
        return
    is_scoped = 1 if is_looking_away(s) else 0
    use = t[USES][block]
    while use >= 0:
        if t[USE_STREAM][use] == stream:
            if is_scoped:
                t[USE_SCOPED][use] = 1
            return
        use = t[USE_NEXT][use]
    n[SPARE_USES] -= 1
    use = t[SPARE_USE][n[SPARE_USES]]
    t[USE_STREAM][use] = stream
    t[USE_SCOPED][use] = is_scoped
    t[USE_NEXT][use] = t[USES][block]
    t[USES][block] = use


def _drop_uses(s: State, block: int, only_scoped: bool) -> None:
    """Forget the other streams of a block, or those noted while a scope was open."""
    t, n = s.t, s.n
    kept = -1
    use = t[USES][block]
    while use >= 0:
        later = t[USE_NEXT][use]
        if only_scoped and t[USE_SCOPED][use] == 0 and not _is_stale(s, block, t[USE_STREAM][use]):
            t[USE_NEXT][use] = kept
            kept = use
        else:
            t[SPARE_USE][n[SPARE_USES]] = use
            n[SPARE_USES] += 1
        use = later
    t[USES][block] = kept


def _make_stale(s: State, block: int) -> None:
    """Keep in mind which streams were noted in a scope, and forget the others.

    The allocator looks after streams noted in a scope only where a free is deferred by one. Where it is not, they stay
    noted for the block, and a later deferred free takes them for its own (up to 2.12).
    """
    t, n = s.t, s.n
    use = t[USES][block]
    t[USES][block] = -1
    while use >= 0:
        later = t[USE_NEXT][use]
        if t[USE_SCOPED][use]:
            t[USE_NEXT][use] = t[STALE_USES][block]
            t[STALE_USES][block] = use
        else:
            t[SPARE_USE][n[SPARE_USES]] = use
            n[SPARE_USES] += 1
        use = later


def _is_stale(s: State, block: int, stream: int) -> bool:
    t = s.t
    use = t[STALE_USES][block]
    while use >= 0:
        if t[USE_STREAM][use] == stream:
            return True
        use = t[USE_NEXT][use]
    return False


def _forget_stale(s: State, block: int) -> None:
    t, n = s.t, s.n
    use = t[STALE_USES][block]
    t[STALE_USES][block] = -1
    while use >= 0:
        t[SPARE_USE][n[SPARE_USES]] = use
        n[SPARE_USES] += 1
        use = t[USE_NEXT][use]


def uses_done(s: State, id: int) -> None:
    """Other streams are done with a freed block; the next look at them will notice."""
    t, n = s.t, s.n
    block = s.where[id]
    if block < 0 or t[IS_DONE][block] or (t[STATE][block] != WAITING and t[STATE][block] != DEFERRED):
        return
    t[IS_DONE][block] = 1
    t[DONE][n[DONE_COUNT]] = block
    n[DONE_COUNT] += 1


def _end_waiting(s: State, block: int) -> None:
    """Complete a free that waited."""
    t, n = s.t, s.n
    earlier, later = t[WAIT_PREV][block], t[WAIT_NEXT][block]
    if earlier >= 0:
        t[WAIT_NEXT][earlier] = later
    else:
        n[FIRST_WAITING] = later
    if later >= 0:
        t[WAIT_PREV][later] = earlier
    else:
        n[LAST_WAITING] = earlier
    t[IS_DONE][block] = 0
    _free_block(s, block)


def _take_up_deferred(s: State) -> None:
    """Uses noted while a scope was open need no waiting for; the others are waited for from now on."""
    t, n = s.t, s.n
    if n[DEFERRED_COUNT] == 0:
        return
    n[DEFERRED_COUNT] = 0
    block = n[FIRST_WAITING]
    while block >= 0:
        later = t[WAIT_NEXT][block]
        if t[STATE][block] == DEFERRED:
            t[STATE][block] = WAITING
            _drop_uses(s, block, True)
            _forget_stale(s, block)
            if t[USES][block] < 0:
                _end_waiting(s, block)
            else:
                _drop_uses(s, block, False)
        block = later
    _forget_done(s)


def _forget_done(s: State) -> None:
    """Of the blocks known to be done, those whose frees were completed otherwise are no longer of interest."""
    t, n = s.t, s.n
    kept = 0
    for i in range(n[DONE_COUNT]):
        if t[IS_DONE][t[DONE][i]]:
            t[DONE][kept] = t[DONE][i]
            kept += 1
    n[DONE_COUNT] = kept


def process_events(s: State) -> None:
    """Complete the frees whose streams are known to be done."""
    t, n = s.t, s.n
    _take_up_deferred(s)
    count = n[DONE_COUNT]
    n[DONE_COUNT] = 0
    for i in range(count):
        _end_waiting(s, t[DONE][i])


def synchronize(s: State, pool: int) -> None:
    """Wait for other streams and complete the frees that waited for them, of one private pool or (0) of all."""
    t, n = s.t, s.n
    n[SYNCS] += 1
    _take_up_deferred(s)
    if pool == 0:
        process_events(s)
    block = n[FIRST_WAITING]
    while block >= 0:
        later = t[WAIT_NEXT][block]
        if pool == 0 or t[LIST][block] // 2 == pool:
            _end_waiting(s, block)
        block = later
    _forget_done(s)


# --- releases and pools -------------------------------------------------------------------------------------------


def release_cached(s: State, pool: int) -> None:
    """``emptyCache``: wait for all streams and return what is idle, then what is idle in pools without users.

    With a private pool only that one, if it has no users (``release_cached_blocks``).
    """
    t = s.t
    if pool == 0 and not is_looking_away(s):
        synchronize(s, 0)
        release_idle(s, 1)
        release_idle(s, 0)
    for released in range(1, s.n[POOLS]):
        if t[POOL_STATE][released] != RELEASED or (pool > 0 and released != pool):
            continue
        if pool > 0:
            synchronize(s, pool)
        release_idle(s, 2 * released)
        release_idle(s, 2 * released + 1)
        if _is_empty(s, released):
            t[POOL_STATE][released] = ABSENT


def _is_empty(s: State, pool: int) -> bool:
    """Whether nothing of a pool is left.

    The allocator counts segments and forgets some of them where expandable segments are used in private pools
    (``cudaMalloc_count``), so that it may give up a pool that is still in use; here it stays.
    """
    t = s.t
    if t[SEGMENTS][pool] > 0:
        return False
    for segment in range(s.n[COLUMNS]):
        if t[SEG_FIRST][segment] >= 0 and t[SEG_LIST][segment] // 2 == pool and t[SEG_ACTIVE][segment] > 0:
            return False
    return True


def create_pool(s: State, pool: int) -> None:
    """A private pool with one user, or one user more."""
    t = s.t
    if t[POOL_STATE][pool] == ABSENT:
        t[USERS][pool] = 0
        t[SEGMENTS][pool] = 0
    t[USERS][pool] += 1
    _set_pool_state(s, pool, HELD)


def open_scope(s: State, pool: int) -> None:
    """Requests go to a pool from here on (``beginAllocateToPool``)."""
    create_pool(s, pool)
    s.n[SCOPES] += 1


def close_scope(s: State) -> None:
    """They no longer do (``endAllocateToPool``); the user that the scope was stays until it is released."""
    s.n[SCOPES] -= 1


def release_pool(s: State, pool: int) -> None:
    """One user less; without users its idle memory goes back to the driver at the next release."""
    t = s.t
    t[USERS][pool] -= 1
    if t[USERS][pool] == 0:
        _set_pool_state(s, pool, RELEASED)


def _set_pool_state(s: State, pool: int, state: int) -> None:
    """What is idle in the pool counts as kept by it while it has users, and as cached when it has none."""
    t = s.t
    if t[POOL_STATE][pool] == state:
        return
    t[POOL_STATE][pool] = state
    for which in (2 * pool, 2 * pool + 1):
        block = first(s, ROOT, which)
        while block >= 0:
            size, stranded = t[SIZE][block], 0
            segment = t[SEGMENT][block]
            if t[SEG_PAGE][segment] > 0:
                stranded = size - whole_pages(s, block)
            elif t[SEG_ACTIVE][segment] > 0:
                stranded = size
            if state == HELD:
                up(s, POOL_IDLE, size)
                down(s, STRANDED, stranded)
            else:
                down(s, POOL_IDLE, size)
                up(s, STRANDED, stranded)
            block = following(s, block)
