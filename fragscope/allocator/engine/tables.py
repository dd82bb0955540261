"""Making and growing the tables of an allocator's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fragscope.allocator.engine.counters import SLOTS
from fragscope.allocator.engine.driver import ANY_TOP, RANGES
from fragscope.allocator.engine.state import (
    CAPACITY,
    COLUMNS,
    COUNT_TIES,
    FIELDS,
    FIRST_OOM,
    FIRST_WAITING,
    FRACTIONS,
    GIVEN_ADDR,
    GIVEN_MAP,
    GIVEN_MAPS,
    GIVEN_SEGMENTS,
    GIVEN_SIZE,
    HELD,
    LAST_WAITING,
    LIMIT,
    LOG_ROOM,
    MOVE_AT,
    NEXT_MAP,
    NEXT_RANGE,
    NEXT_SEGMENT,
    NONE,
    NUMBERS,
    POOL_STATE,
    POOLS,
    RANDOM,
    ROOT,
    SEG_FIRST,
    SPARE_BLOCK,
    SPARE_BLOCKS,
    SPARE_HOLE,
    SPARE_HOLES,
    SPARE_REGION,
    SPARE_REGIONS,
    SPARE_SEGMENT,
    SPARE_SEGMENTS,
    SPARE_USE,
    SPARE_USES,
    STALE_USES,
    TOP,
    TOTAL,
    UNMAPPED_ROOT,
    State,
)

LOG_COLUMNS = 7
# Rows are a cache line longer than a multiple of 4 KiB: were they such a multiple, all fields of a block would compete
# for one set of the processor's first cache.
_PAD = 8
_FIRST_COLUMNS = 512 + _PAD
_FIRST_LOG = 1024
_STACKS = (
    (SPARE_BLOCK, SPARE_BLOCKS),
    (SPARE_SEGMENT, SPARE_SEGMENTS),
    (SPARE_USE, SPARE_USES),
    (SPARE_REGION, SPARE_REGIONS),
    (SPARE_HOLE, SPARE_HOLES),
)
_NONE_AT_FIRST = (ROOT, UNMAPPED_ROOT, SEG_FIRST, STALE_USES)


def new_state(
    total: int, capacity: int, *, compiled: bool, pools: int = 1, allocations: int = 0, columns: int = _FIRST_COLUMNS
) -> State:
    """An allocator that holds nothing.

    Args:
        total: bytes of device memory in all.
        capacity: bytes that segments may take together.
        compiled: tables as arrays for compiled functions, or as lists for interpreted ones.
        pools: pools there will be, the default pool included.
        allocations: ids there will be.
        columns: room for blocks, segments and the like; more is made when needed.
    """
    columns = max(columns, _FIRST_COLUMNS, 2 * pools)
    t = [[0] * columns for _ in range(FIELDS)]
    n = [0] * NUMBERS
    for row in _NONE_AT_FIRST:
        t[row] = [NONE] * columns
    for row, count in _STACKS:
        t[row] = list(range(columns - 1, -1, -1))
        n[count] = columns
    t[POOL_STATE][0] = HELD
    n[COLUMNS] = columns
    n[POOLS] = pools
    n[TOTAL], n[CAPACITY] = total, capacity
    n[LIMIT] = n[FIRST_OOM] = n[FIRST_WAITING] = n[LAST_WAITING] = NONE
    n[NEXT_RANGE] = RANGES
    n[TOP] = ANY_TOP
    n[MOVE_AT] = NONE
    n[RANDOM] = 1
    n[COUNT_TIES] = 1
    n[LOG_ROOM] = _FIRST_LOG
    assert columns >= SLOTS
    d = [[0] * _FIRST_LOG for _ in range(LOG_COLUMNS)]
    lists = State(t, n, [0.0] * FRACTIONS, d, [[0], [0], [0]], [NONE] * allocations)
    return as_arrays(lists) if compiled else lists


def as_arrays(s: State) -> State:
    """The same state for compiled functions."""
    return State(
        np.array(s.t, dtype=np.int64), np.array(s.n, dtype=np.int64), np.array(s.f, dtype=np.float64),
        np.array(s.d, dtype=np.int64), np.array(s.g, dtype=np.int64), np.array(s.where, dtype=np.int64),
    )  # fmt: skip


def copied(s: State) -> State:
    """The same state, on its own."""
    if isinstance(s.n, list):
        t, d = [row[:] for row in s.t], [row[:] for row in s.d]
        return State(t, s.n[:], s.f[:], d, s.g, s.where[:])  # given addresses are never changed in place
    return State(s.t.copy(), s.n.copy(), s.f.copy(), s.d.copy(), s.g, s.where.copy())


def grow(s: State) -> State:
    """Twice the room for blocks and what goes with them."""
    columns = int(s.n[COLUMNS])
    more = columns + _PAD
    t = _wider(s.t, more)
    for row in _NONE_AT_FIRST:
        t[row][columns:] = _values(t, [NONE] * more)
    for row, count in _STACKS:
        held = int(s.n[count])
        t[row][held : held + more] = _values(t, list(range(columns + more - 1, columns - 1, -1)))
        s.n[count] = held + more
    s.n[COLUMNS] = columns + more
    return s._replace(t=t)


def grow_log(s: State) -> State:
    """Twice the room for decisions."""
    room = int(s.n[LOG_ROOM])
    s.n[LOG_ROOM] = 2 * room
    return s._replace(d=_wider(s.d, room))


def with_pools(s: State, pools: int) -> State:
    """Room for more pools."""
    while s.n[COLUMNS] < 2 * pools:
        s = grow(s)
    s.n[POOLS] = max(int(s.n[POOLS]), pools)
    return s


def with_given(s: State, segments: Sequence[tuple[int, int]], maps: Sequence[int]) -> State:
    """Addresses of segments and of mappings to come, replacing those given before."""
    width = max(len(segments), len(maps), 1)
    rows = [[0] * width for _ in range(3)]
    rows[GIVEN_ADDR][: len(segments)] = [addr for addr, _ in segments]
    rows[GIVEN_SIZE][: len(segments)] = [size for _, size in segments]
    rows[GIVEN_MAP][: len(maps)] = list(maps)
    s.n[GIVEN_SEGMENTS], s.n[GIVEN_MAPS] = len(segments), len(maps)
    s.n[NEXT_SEGMENT] = s.n[NEXT_MAP] = 0
    return s._replace(g=_values(s.g, rows))


def _wider(table: Any, columns: int) -> Any:
    if isinstance(table, list):
        for row in table:
            row.extend([0] * columns)
        return table
    return np.concatenate([table, np.zeros((len(table), columns), dtype=np.int64)], axis=1)


def _values(like: Any, values: list[Any]) -> Any:
    return values if isinstance(like, list) else np.array(values, dtype=np.int64)
