"""Programs for an allocator: a device, a conf and a list of operations; plain data, so that they can be kept as JSON.

Operations (sizes in bytes, streams as raw handles, ids chosen by the program, pools numbered from 1):

    ["alloc", id, size, stream]     from the pool that the open scopes select
    ["free", id]                    nothing, if that allocation was refused
    ["use", id, stream]             record_stream; nothing, if that allocation was refused
    ["done", stream]                the stream has finished everything that was put on it so far
    ["empty"]                       empty_cache
    ["fraction", f]                 set_per_process_memory_fraction
    ["conf", "..."]                 settings changed at run time
    ["pool_create", pool, use_on_oom, no_split]
    ["pool_begin", pool]            a scope is opened: use_mem_pool
    ["pool_end", pool]              the scope is closed
    ["pool_release", pool]          one user less: an owner lets go, or after a scope
    ["empty_pool", pool]            what is idle in a pool without users is returned
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

Op = list[Any]
OPERATIONS = (
    "alloc", "free", "use", "done", "empty", "fraction", "conf",
    "pool_create", "pool_begin", "pool_end", "pool_release", "empty_pool",
)  # fmt: skip


def version(release: str) -> tuple[int, ...]:
    """``(2, 11)`` for ``"2.11.0"``: behaviour changes between minor releases only."""
    return tuple(int(part) for part in release.split(".")[:2])


@dataclass(frozen=True, slots=True)
class Program:
    """Everything an allocator needs to be told, in order.

    Attributes:
        name: for messages.
        since: oldest release that has everything the program uses, such as ``"2.11"``.
        total: bytes of device memory.
        capacity: bytes of it that segments may take together.
        seed: 0: the driver gives ascending addresses, else scattered ones.
        conf: settings at the start, as in ``PYTORCH_ALLOC_CONF``.
        ops: the operations.
    """

    name: str
    since: str
    total: int
    capacity: int
    seed: int
    conf: str
    ops: Sequence[Op]

    def runs_on(self, release: str) -> bool:
        """Whether the release has everything the program uses."""
        return version(release) >= version(self.since)

    def with_ops(self, ops: Iterable[Op]) -> Program:
        """The same device and settings under other operations; those that make no sense there are left out."""
        return replace(self, ops=legal(ops))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Program:
        """From plain data."""
        return cls(**data)


class Pools:
    """The private pools of a program as it runs: who uses them, and which scopes are open."""

    def __init__(self) -> None:
        self.users: Counter[int] = Counter()
        self.released: set[int] = set()  # had users, has none
        self.open: list[int] = []  # scopes, oldest first
        self.on_oom: set[int] = set()

    def selected(self, oldest_first: bool) -> int:
        """The pool that an allocation comes from; 0 is the default pool.

        Args:
            oldest_first: up to 2.9 the scope that was opened first counts, from 2.10 on the one opened last.
        """
        if not self.open:
            return 0
        return self.open[0 if oldest_first else -1]

    def allows(self, op: Op) -> bool:
        """Whether a pool operation makes sense now; most others run into PyTorch's own assertions."""
        kind, pool = op[0], op[1] if len(op) > 1 else 0
        match kind:
            case "pool_create":
                return pool not in self.released
            case "pool_begin":
                return pool not in self.released and pool not in self.open
            case "pool_end":
                return self.open[-1:] == [pool]  # as ``with`` blocks nest
            case "pool_release":
                users = self.users[pool] - (pool in self.open)  # an open scope keeps its own
                # A pool that helps out on OOM stays: PyTorch keeps asking it when it has no users, and stops on that.
                return users > (pool in self.on_oom)
            case "empty_pool":
                # Up to 2.12 synchronizing inside a scope is such an assertion.
                return pool in self.released and not self.open
        return True

    def apply(self, op: Op) -> None:
        """Follow one operation of the program."""
        match op:
            case ["pool_create", pool, use_on_oom, _]:
                self.users[pool] += 1
                if use_on_oom:
                    self.on_oom.add(pool)
            case ["pool_begin", pool]:
                self.users[pool] += 1
                self.open.append(pool)
            case ["pool_end", pool]:
                self.open.remove(pool)
            case ["pool_release", pool]:
                self.users[pool] -= 1
                if not self.users[pool]:
                    self.released.add(pool)


def legal(ops: Iterable[Op]) -> list[Op]:
    """Without operations that make no sense: on ids that are not allocated, on pools that are not there."""
    pools, live, seen = Pools(), set(), set()
    kept = []
    for op in ops:
        match op:
            case ["alloc", id_, *_]:
                if id_ in seen:
                    continue
                seen.add(id_)
                live.add(id_)
            case ["free", id_]:
                if id_ not in live:
                    continue
                live.remove(id_)
            case ["use", id_, _]:
                if id_ not in live:
                    continue
            case _:
                if not pools.allows(op):
                    continue
                pools.apply(op)
        kept.append(op)
    return kept
