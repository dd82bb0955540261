"""The hot loop: requests in, decisions out."""

from __future__ import annotations

from typing import Any

from fragscope.allocator.engine.kinds import (
    NOTHING,
    REQUEST_ALLOC,
    REQUEST_EMPTY_CACHE,
    REQUEST_FREE,
    REQUEST_HELD,
    REQUEST_OBSERVATION,
    REQUEST_POOL_RELEASE,
    REQUEST_RAW_ALLOC,
    REQUEST_RAW_FREE,
    REQUEST_RECORD_STREAM,
    REQUEST_SCOPE_CLOSE,
    REQUEST_SCOPE_OPEN,
    REQUEST_USES_DONE,
)
from fragscope.allocator.engine.raw import give_raw, take_raw
from fragscope.allocator.engine.requests import (
    SERVED,
    close_scope,
    free,
    malloc,
    open_scope,
    record_stream,
    release_cached,
    release_pool,
    uses_done,
)
from fragscope.allocator.engine.state import (
    COLUMNS,
    LOG_ROOM,
    LOGGED,
    LOGGING,
    REQUEST,
    SPARE_BLOCKS,
    SPARE_USES,
    STOP_AT_OOM,
    State,
)

HEADROOM = 64


def is_full(s: State) -> bool:
    """Whether the next request might not find room in the tables."""
    return lacks_blocks(s) or lacks_log(s)


def lacks_blocks(s: State) -> bool:
    """Whether blocks might lack: a release makes at most two of each."""
    n = s.n
    return bool(n[SPARE_BLOCKS] < 2 * (n[COLUMNS] - n[SPARE_BLOCKS]) + HEADROOM or n[SPARE_USES] < 1)


def lacks_log(s: State) -> bool:
    """Whether room for decisions might lack: a request adds at most one or two for each block, and a few."""
    n = s.n
    return bool(n[LOGGING] and n[LOG_ROOM] - n[LOGGED] < 2 * (n[COLUMNS] - n[SPARE_BLOCKS]) + HEADROOM)


def decide(s: State, kind: Any, id: Any, size: Any, stream: Any, pool: Any, start: int, stop: int) -> int:
    """Serve requests from row ``start`` until ``stop``, the tables are full, or a row needs its caller.

    Those are the rows of other kinds than here, and with ``STOP_AT_OOM`` a request that failed.

    Args:
        s: the allocator.
        kind: a ``RequestKind`` or ``NOTHING`` per row.
        id: allocation, smaller than the length of ``s.where``.
        size: bytes.
        stream: raw stream handles.
        pool: numbers of pools, smaller than ``n[POOLS]``.
        start: first row.
        stop: row after the last.

    Returns:
        The row it stopped at.
    """
    n = s.n
    for row in range(start, stop):
        if is_full(s):
            return row
        n[REQUEST] = row
        k = kind[row]
        if k == REQUEST_ALLOC:
            if malloc(s, id[row], size[row], stream[row], pool[row]) != SERVED and n[STOP_AT_OOM]:
                return row
        elif k == REQUEST_FREE:
            free(s, id[row])
        elif k == REQUEST_RECORD_STREAM:
            record_stream(s, id[row], stream[row])
        elif k == REQUEST_USES_DONE:
            uses_done(s, id[row])
        elif k == REQUEST_EMPTY_CACHE:
            release_cached(s, pool[row])
        elif k == REQUEST_SCOPE_OPEN:
            open_scope(s, pool[row])
        elif k == REQUEST_SCOPE_CLOSE:
            close_scope(s)
        elif k == REQUEST_POOL_RELEASE:
            release_pool(s, pool[row])
        elif k == REQUEST_RAW_ALLOC:
            if not take_raw(s, id[row], size[row]) and n[STOP_AT_OOM]:
                return row
        elif k == REQUEST_RAW_FREE:
            give_raw(s, id[row], size[row])
        elif k not in (NOTHING, REQUEST_OBSERVATION, REQUEST_HELD):
            return row
    return stop
