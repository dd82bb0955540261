"""The state of one device's allocator, as tables of integers.

Everything the allocator knows stands in a few tables, so that the same functions run interpreted over Python lists and
compiled over numpy arrays (``compiled.py``):

* ``t``: one row per field, one column per block, segment, region, ... (each kind of thing has its own fields);
* ``n``: single numbers, settings and counters;
* ``f``: the two settings that are fractions;
* ``d``: the log of decisions, one row per column of ``Decisions``;
* ``g``: where a recording says that segments and mappings were put;
* ``where``: the block of each allocation.

A thing is referred to by its column; -1 is "none".
"""

from __future__ import annotations

from itertools import count
from typing import Any, NamedTuple

NONE = -1
FAILED = -2  # in ``where``: the request failed, so its free is nothing
RAW = -3  # in ``where``: taken of the driver itself, so that there is no block


class State(NamedTuple):
    """The tables; see the module's docstring. Lists of ints, or int64 arrays (``f``: floats)."""

    t: Any
    n: Any
    f: Any
    d: Any
    g: Any
    where: Any


_field = count()

# Blocks: a contiguous part of a segment.
ADDR = next(_field)  # first byte
SIZE = next(_field)  # bytes
STATE = next(_field)  # one of the states below
REQUESTED = next(_field)  # bytes asked for, while not idle
ID = next(_field)  # allocation, while not idle
PREV = next(_field)  # neighbours inside the segment
NEXT = next(_field)
SEGMENT = next(_field)
LIST = next(_field)  # free list that it belongs to: 2 * pool, + 1 for large
TIE = next(_field)  # what orders equal-size blocks before the address
AGE_BASE = next(_field)  # searches of its free list when it was put there
USES = next(_field)  # first of the other streams that use it
IS_DONE = next(_field)  # freed, and those streams are known to be done
# A free list is a search tree over blocks (treap): children and heap priority of each, and its sort key.
LEFT = next(_field)
RIGHT = next(_field)
PARENT = next(_field)
PRIORITY = next(_field)
KEY_STREAM = next(_field)
KEY_SIZE = next(_field)
KEY_TIE = next(_field)
# Freed blocks that wait for other streams, in the order of their frees.
WAIT_PREV = next(_field)
WAIT_NEXT = next(_field)
# Of those, the ones whose streams are done, in the order in which that became known.
DONE = next(_field)
# Blocks to unmap in a release, and free columns.
SCRATCH = next(_field)
SPARE_BLOCK = next(_field)

# Segments: memory of one cudaMalloc, or an expandable segment's reserved address range.
SEG_ADDR = next(_field)
SEG_SIZE = next(_field)  # bytes; of an expandable segment, of its address range
SEG_STREAM = next(_field)
SEG_LIST = next(_field)
SEG_ACTIVE = next(_field)  # bytes in blocks that are not idle
SEG_PAGE = next(_field)  # bytes that an expandable segment maps at a time; 0 for an ordinary one
SEG_FIRST = next(_field)  # its block at the lowest address; -1 while the column is unused
SPARE_SEGMENT = next(_field)

# Uses of a block by other streams.
USE_STREAM = next(_field)
USE_NEXT = next(_field)
USE_SCOPED = next(_field)  # noted while an allocation scope was open
SPARE_USE = next(_field)
STALE_USES = next(_field)  # first of a block's streams noted in a scope, if it was then freed outside of any

# Free lists.
ROOT = next(_field)  # tree of idle blocks
UNMAPPED_ROOT = next(_field)  # tree of unmapped blocks
SEARCHES = next(_field)  # how often it was searched while garbage collection was possible

# Pools; 0 is the default pool.
USERS = next(_field)
SEGMENTS = next(_field)  # cudaMalloc_count
POOL_STATE = next(_field)  # ABSENT, HELD or RELEASED
NO_SPLIT = next(_field)
ON_OOM = next(_field)  # other requests may use it when nothing else is left

# Statistics: one column per slot (``counters.py``).
UP = next(_field)  # sum of increases
DOWN = next(_field)  # sum of decreases
PEAK = next(_field)  # largest difference of the two since the last reset

# The driver's address space: regions and the holes in them.
REGION_ADDR = next(_field)
REGION_SIZE = next(_field)
REGION_USED = next(_field)
REGION_HOLE = next(_field)  # its first hole
BY_AGE = next(_field)  # regions, oldest first
BY_ADDR = next(_field)  # regions, lowest first
SPARE_REGION = next(_field)
HOLE_ADDR = next(_field)
HOLE_SIZE = next(_field)
HOLE_NEXT = next(_field)
SPARE_HOLE = next(_field)

FIELDS = next(_field)

# States of a block.
IDLE = 0
ALLOCATED = 1
WAITING = 2  # freed by the program, used by other streams
UNMAPPED = 3
DEFERRED = 4  # freed while a scope was open that keeps events from being recorded

# States of a pool.
ABSENT = 0
HELD = 1
RELEASED = 2  # without users: what is idle goes back to the driver at the next release

_number = count()

# Settings.
TIE_BREAK = next(_number)  # one of the values below
SCOPES_COUNT = next(_number)  # 1: an open scope keeps events and releases from being looked at (up to 2.12)
LENDS_FIRST = next(_number)  # 1: pools with use_on_oom help before cached memory is released, 0: after it
MAX_SPLIT = next(_number)
NON_SPLIT_ROUNDING = next(_number)
LARGE_SEGMENT = next(_number)
EXPANDABLE = next(_number)
THROW = next(_number)  # throw_on_cudamalloc_oom
REFUSE_ABOVE = next(_number)  # with it: reserved bytes beyond which requests are refused
LIMIT = next(_number)  # memory fraction in bytes; -1 is none
DIVISIONS = next(_number)  # 16 numbers from here: roundup_power2_divisions
_number = count(DIVISIONS + 16)
LOGGING = next(_number)  # 1: decisions are written to ``d``
STATISTICS = next(_number)  # 1: all of torch's statistics are kept, not only those that fragscope reports
STOP_AT_OOM = next(_number)
# The device.
TOTAL = next(_number)
CAPACITY = next(_number)
USED = next(_number)  # bytes taken, in the driver's pages
GIVEN_SEGMENTS = next(_number)  # how many addresses are given
GIVEN_MAPS = next(_number)
NEXT_SEGMENT = next(_number)  # which one is next
NEXT_MAP = next(_number)
DEPARTED = next(_number)  # 1: an address was needed that was not given
EXPANDABLE_SEGMENTS = next(_number)  # how many stand
NEXT_RANGE = next(_number)  # where the next modelled address range begins
TOP = next(_number)  # nothing is free above this address
MOVE_AT = next(_number)  # requests for memory after which the driver moves its own block; -1: it does not
OWN_BLOCK = next(_number)  # address of that block, until it moves
REGIONS = next(_number)
# The process.
RESERVED = next(_number)  # total_allocated_memory
CREATED = next(_number)  # blocks or segments made, for ties
SCOPES = next(_number)  # open allocation scopes
CAPTURES = next(_number)  # streams being captured
FIRST_WAITING = next(_number)
LAST_WAITING = next(_number)
DONE_COUNT = next(_number)
DEFERRED_COUNT = next(_number)
RANDOM = next(_number)
# Free columns: how many are on each stack.
SPARE_BLOCKS = next(_number)
SPARE_SEGMENTS = next(_number)
SPARE_USES = next(_number)
SPARE_REGIONS = next(_number)
SPARE_HOLES = next(_number)
COLUMNS = next(_number)
POOLS = next(_number)
# What happened.
REQUEST = next(_number)  # row being served
LOGGED = next(_number)  # decisions in the log
LOG_ROOM = next(_number)
ALLOCS = next(_number)
RETRIES = next(_number)
OOMS = next(_number)
FIRST_OOM = next(_number)
REJECTIONS = next(_number)
SYNCS = next(_number)
DRIVER_ALLOCS = next(_number)
DRIVER_FREES = next(_number)
TIES = next(_number)
COUNT_TIES = next(_number)  # 0: ties between recorded addresses are not of interest
LOST_FREES = next(_number)
DEFECTS = next(_number)  # times that the real allocator would have misused the driver
FAILED_SIZE = next(_number)  # rounded bytes of the last request that failed

NUMBERS = next(_number)

# Values of TIE_BREAK.
BY_ADDRESS = 0
BY_BLOCK = 1
BY_SEGMENT = 2

# Fractions in ``f``.
GC_THRESHOLD = 0
FRACTIONS = 1

# Columns of the log.
LOG_KIND, LOG_REQUEST, LOG_ID, LOG_ADDR, LOG_SIZE, LOG_STREAM, LOG_POOL = range(7)

# Rows of the given addresses.
GIVEN_ADDR, GIVEN_SIZE, GIVEN_MAP = range(3)
