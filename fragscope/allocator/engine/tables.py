"""Making and growing the tables of an allocator's state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    LOGGED,
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


@dataclass(frozen=True, slots=True)
class Saved:
    """What a request for memory, or a release, can change of a state; made by ``saved``, for ``restore``.

    Attributes:
        t: the columns among which are all in use.
        n: single numbers.
        spare: of each stack of free columns, those among them.
        where: the entries of ``where`` that can change.
        start: first row of the log that it says something about.
        log: the log from there on.
    """

    t: Any
    n: Any
    spare: tuple[Any, ...]
    where: dict[int, int]
    start: int
    log: tuple[Any, ...]


def saved(s: State, ids: Iterable[int], start: int) -> Saved:
    """A copy of what can change, of a size that follows from what is held and not from the room there is.

    Args:
        s: the state.
        ids: allocations that can begin or end to live.
        start: row of the log from which on it can change.
    """
    used, n = _columns_used(s), s.n
    below = int(n[COLUMNS]) - used  # of each stack, where the other columns end
    spare = tuple(s.t[row][below : int(n[count])].copy() for row, count in _STACKS)
    where = {id_: int(s.where[id_]) for id_ in ids}
    log = tuple(row[start : int(n[LOGGED])].copy() for row in s.d)
    t = [row[:used] for row in s.t] if isinstance(s.t, list) else s.t[:, :used].copy()
    return Saved(t, n.copy(), spare, where, start, log)


def restore(s: State, before: Saved) -> None:
    """Be as it was when saved; room that was made since stays."""
    t, n = s.t, s.n
    columns, room, used = int(n[COLUMNS]), int(n[LOG_ROOM]), _columns_used(s)
    kept = len(before.t[0])
    for number, row in enumerate(before.t):
        t[number][:kept] = row
        if used > kept:
            t[number][kept:used] = _values(t, [NONE if number in _NONE_AT_FIRST else 0] * (used - kept))
    n[:] = before.n
    n[COLUMNS], n[LOG_ROOM] = columns, room
    for (row, count), spare in zip(_STACKS, before.spare, strict=True):
        held = columns - kept + len(spare)
        t[row][: columns - kept] = _downward(t, columns - 1, kept)
        t[row][columns - kept : held] = spare
        n[count] = held
    for id_, block in before.where.items():
        s.where[id_] = block
    for column, rows in zip(s.d, before.log, strict=True):
        column[before.start : before.start + len(rows)] = rows


def _columns_used(s: State) -> int:
    """How many columns, from the first on, hold all that is in use: each stack has the others as it first had them."""
    n = s.n
    columns = int(n[COLUMNS])
    used = max(SLOTS, 2 * int(n[POOLS]))
    for row, count in _STACKS:
        held = int(n[count])
        taken = np.flatnonzero(np.asarray(s.t[row][:held]) != np.arange(columns - 1, columns - 1 - held, -1))
        used = max(used, columns - (int(taken[0]) if len(taken) else held))
    return used


def grow(s: State) -> State:
    """Twice the room for blocks and what goes with them."""
    columns = int(s.n[COLUMNS])
    more = columns + _PAD
    t = _wider(s.t, more, columns)
    for row in _NONE_AT_FIRST:
        t[row][columns:] = _values(t, [NONE] * more)
    for row, count in _STACKS:  # the new columns are taken last
        held = int(s.n[count])
        t[row][more : more + held] = t[row][:held].copy()
        t[row][:more] = _downward(t, columns + more - 1, columns)
        s.n[count] = held + more
    s.n[COLUMNS] = columns + more
    return s._replace(t=t)


def grow_log(s: State) -> State:
    """Twice the room for decisions."""
    room = int(s.n[LOG_ROOM])
    s.n[LOG_ROOM] = 2 * room
    return s._replace(d=_wider(s.d, room, int(s.n[LOGGED])))


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


def _wider(table: Any, columns: int, used: int) -> Any:
    """Columns of zeros behind the others, of which only the first ``used`` hold anything."""
    if isinstance(table, list):
        for row in table:
            row.extend([0] * columns)
        return table
    out = np.zeros((len(table), len(table[0]) + columns), dtype=np.int64)  # takes memory as it is written
    out[:, :used] = table[:, :used]
    return out


def _values(like: Any, values: list[Any]) -> Any:
    return values if isinstance(like, list) else np.array(values, dtype=np.int64)


def _downward(like: Any, first: int, last: int) -> Any:
    return list(range(first, last - 1, -1)) if isinstance(like, list) else np.arange(first, last - 1, -1)
