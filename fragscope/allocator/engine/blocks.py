"""Blocks and segments: made, linked, merged, put into free lists, and the idle bytes that follow from it."""

from __future__ import annotations

from fragscope.allocator.engine.counters import POOL_IDLE, STRANDED, down, up, up_idle
from fragscope.allocator.engine.free_lists import insert, remove
from fragscope.allocator.engine.state import (
    ADDR,
    AGE_BASE,
    BY_BLOCK,
    BY_SEGMENT,
    CREATED,
    EXPANDABLE_SEGMENTS,
    HELD,
    ID,
    IDLE,
    IS_DONE,
    LIST,
    LOG_ADDR,
    LOG_ID,
    LOG_KIND,
    LOG_POOL,
    LOG_REQUEST,
    LOG_SIZE,
    LOG_STREAM,
    LOGGED,
    LOGGING,
    NEXT,
    POOL_STATE,
    PREV,
    PRIORITY,
    RANDOM,
    REQUEST,
    REQUESTED,
    ROOT,
    SEARCHES,
    SEG_ACTIVE,
    SEG_ADDR,
    SEG_FIRST,
    SEG_LIST,
    SEG_PAGE,
    SEG_SIZE,
    SEG_STREAM,
    SEGMENT,
    SIZE,
    SPARE_BLOCK,
    SPARE_BLOCKS,
    SPARE_SEGMENT,
    SPARE_SEGMENTS,
    SPARE_USE,
    SPARE_USES,
    STALE_USES,
    STATE,
    TIE,
    TIE_BREAK,
    UNMAPPED,
    UNMAPPED_ROOT,
    USE_NEXT,
    USES,
    State,
)


def log(s: State, kind: int, id: int, addr: int, size: int, stream: int, pool: int) -> None:
    """Write a decision (``DecisionKind``) made for the request being served."""
    n, d = s.n, s.d
    if n[LOGGING]:
        at = n[LOGGED]
        d[LOG_KIND][at] = kind
        d[LOG_REQUEST][at] = n[REQUEST]
        d[LOG_ID][at] = id
        d[LOG_ADDR][at] = addr
        d[LOG_SIZE][at] = size
        d[LOG_STREAM][at] = stream
        d[LOG_POOL][at] = pool
        n[LOGGED] = at + 1


def new_segment(s: State, size: int, stream: int, which: int, page: int) -> int:
    """A segment without an address; ``page`` is 0 for an ordinary one."""
    t, n = s.t, s.n
    n[SPARE_SEGMENTS] -= 1
    segment: int = t[SPARE_SEGMENT][n[SPARE_SEGMENTS]]
    t[SEG_SIZE][segment] = size
    t[SEG_STREAM][segment] = stream
    t[SEG_LIST][segment] = which
    t[SEG_ACTIVE][segment] = 0
    t[SEG_PAGE][segment] = page
    n[EXPANDABLE_SEGMENTS] += int(page > 0)
    return segment


def drop_segment(s: State, segment: int) -> None:
    """Give the column back."""
    s.t[SEG_FIRST][segment] = -1
    s.n[EXPANDABLE_SEGMENTS] -= int(s.t[SEG_PAGE][segment] > 0)
    s.t[SPARE_SEGMENT][s.n[SPARE_SEGMENTS]] = segment
    s.n[SPARE_SEGMENTS] += 1


def new_block(s: State, segment: int, addr: int, size: int, state: int, tie: int) -> int:
    """A block of a segment, not linked to its neighbours; ``tie`` is that of the block it is split from, or -1."""
    t, n = s.t, s.n
    n[SPARE_BLOCKS] -= 1
    block: int = t[SPARE_BLOCK][n[SPARE_BLOCKS]]
    t[ADDR][block] = addr
    t[SIZE][block] = size
    t[STATE][block] = state
    t[REQUESTED][block] = 0
    t[ID][block] = -1
    t[PREV][block] = -1
    t[NEXT][block] = -1
    t[SEGMENT][block] = segment
    t[LIST][block] = t[SEG_LIST][segment]
    t[USES][block] = -1
    t[STALE_USES][block] = -1
    t[IS_DONE][block] = 0
    # Any spread of priorities keeps the trees low; this is the generator of Park and Miller.
    n[RANDOM] = n[RANDOM] * 48271 % 2147483647
    t[PRIORITY][block] = n[RANDOM]
    if n[TIE_BREAK] == BY_BLOCK or (n[TIE_BREAK] == BY_SEGMENT and tie < 0):
        n[CREATED] += 1
        t[TIE][block] = n[CREATED]
    else:
        t[TIE][block] = max(tie, 0)
    return block


def drop_block(s: State, block: int) -> None:
    """Give the column back, and what it still has in mind (``requests._make_stale``)."""
    t, n = s.t, s.n
    use = t[STALE_USES][block]
    while use >= 0:
        t[SPARE_USE][n[SPARE_USES]] = use
        n[SPARE_USES] += 1
        use = t[USE_NEXT][use]
    t[STALE_USES][block] = -1
    t[SPARE_BLOCK][n[SPARE_BLOCKS]] = block
    n[SPARE_BLOCKS] += 1


def link(s: State, earlier: int, block: int, later: int) -> None:
    """Put a block between two neighbours, either of which may be missing."""
    t = s.t
    t[PREV][block] = earlier
    t[NEXT][block] = later
    if earlier >= 0:
        t[NEXT][earlier] = block
    else:
        t[SEG_FIRST][t[SEGMENT][block]] = block
    if later >= 0:
        t[PREV][later] = block


def is_split(s: State, block: int) -> bool:
    """Whether the segment holds other blocks too."""
    return bool(s.t[PREV][block] >= 0 or s.t[NEXT][block] >= 0)


def is_expandable(s: State, block: int) -> bool:
    """Whether the block lies in an expandable segment."""
    return bool(s.t[SEG_PAGE][s.t[SEGMENT][block]] > 0)


def put_idle(s: State, block: int) -> None:
    """Put an idle block into its free list."""
    t = s.t
    which = t[LIST][block]
    t[AGE_BASE][block] = t[SEARCHES][which]
    insert(s, ROOT, which, block, t[SEG_STREAM][t[SEGMENT][block]], t[SIZE][block], t[TIE][block])
    if is_expandable(s, block):
        if is_held(s, which):
            up_idle(s, POOL_IDLE, t[SIZE][block])
        else:
            up(s, STRANDED, t[SIZE][block] - whole_pages(s, block))


def take_idle(s: State, block: int) -> None:
    """Take an idle block out of its free list."""
    t = s.t
    which = t[LIST][block]
    remove(s, ROOT, which, block)
    if is_expandable(s, block):
        if is_held(s, which):
            down(s, POOL_IDLE, t[SIZE][block])
        else:
            down(s, STRANDED, t[SIZE][block] - whole_pages(s, block))


def put_unmapped(s: State, block: int) -> None:
    """Put an unmapped block among those of its free list."""
    insert(s, UNMAPPED_ROOT, s.t[LIST][block], block, s.t[SEG_STREAM][s.t[SEGMENT][block]], 0, 0)


def take_unmapped(s: State, block: int) -> None:
    """Take it out again."""
    remove(s, UNMAPPED_ROOT, s.t[LIST][block], block)


def is_held(s: State, which: int) -> bool:
    """Whether a free list belongs to a private pool that has users, so that nothing of it is ever returned."""
    pool = which // 2
    return bool(pool > 0 and s.t[POOL_STATE][pool] == HELD)


def whole_pages(s: State, block: int) -> int:
    """Bytes of the pages of an expandable segment that lie wholly inside the block."""
    t = s.t
    segment = t[SEGMENT][block]
    page = t[SEG_PAGE][segment]
    start = t[ADDR][block] - t[SEG_ADDR][segment]
    first = (start + page - 1) // page
    stop = (start + t[SIZE][block]) // page
    whole: int = (stop - first) * page if stop > first else 0
    return whole


def change_active(s: State, segment: int, change: int) -> None:
    """Blocks of a segment were handed out or came back; what is idle beside them is stranded."""
    t = s.t
    if t[SEG_PAGE][segment] == 0:
        active = t[SEG_ACTIVE][segment]
        size = t[SEG_SIZE][segment]
        if is_held(s, t[SEG_LIST][segment]):
            if change > 0:
                down(s, POOL_IDLE, change)
            else:
                up_idle(s, POOL_IDLE, -change)
        else:
            earlier = size - active if active > 0 else 0
            later = size - active - change if active + change > 0 else 0
            if later > earlier:
                up(s, STRANDED, later - earlier)
            else:
                down(s, STRANDED, earlier - later)
    t[SEG_ACTIVE][segment] += change


def merge(s: State, block: int, neighbour: int) -> int:
    """``block`` takes over an idle neighbour, or an unmapped one if it is itself unmapped; returns the bytes gained.

    ``block`` is in no list. The object of the block that is being freed survives, which decides ties in 2.12.
    """
    t = s.t
    if neighbour < 0:
        return 0
    unmapped = t[STATE][block] == UNMAPPED
    if t[STATE][neighbour] != (UNMAPPED if unmapped else IDLE):
        return 0
    if unmapped:
        take_unmapped(s, neighbour)
    else:
        take_idle(s, neighbour)
    gained: int = t[SIZE][neighbour]
    if t[PREV][block] == neighbour:
        t[ADDR][block] = t[ADDR][neighbour]
        link(s, t[PREV][neighbour], block, t[NEXT][block])
    else:
        link(s, t[PREV][block], block, t[NEXT][neighbour])
    t[SIZE][block] += gained
    drop_block(s, neighbour)
    return gained
