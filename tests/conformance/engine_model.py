"""The package's allocator as a ``Model``."""

from __future__ import annotations

from collections.abc import Sequence

from model import Entry, SegmentView

from fragscope.allocator import CachingAllocator, Conf, OutOfMemoryError, Rules
from fragscope.trace import DecisionKind

_REQUESTED = (DecisionKind.ALLOC, DecisionKind.FREE_REQUESTED, DecisionKind.FREE_COMPLETED)


class EngineModel:
    """Asks ``CachingAllocator``; see ``model.Model`` for the calls."""

    def __init__(self, total: int, capacity: int, rules: Rules, conf: Conf | None = None) -> None:
        self.allocator = CachingAllocator(total, capacity, rules, conf)
        self.requested: dict[int, int] = {}
        self.taken = 0

    def give_addresses(self, segments: Sequence[tuple[int, int]], maps: Sequence[int]) -> None:
        self.allocator.give_addresses(segments, maps)

    def malloc(self, id: int, size: int, stream: int, pool: int) -> bool:
        self.requested[id] = size
        try:
            self.allocator.malloc(id, size, stream, pool)
        except OutOfMemoryError:
            return False
        return True

    def free(self, id: int) -> None:
        self.allocator.free(id)

    def record_stream(self, id: int, stream: int) -> None:
        self.allocator.record_stream(id, stream)

    def uses_done(self, id: int) -> None:
        self.allocator.uses_done(id)

    def empty_cache(self, pool: int = 0) -> None:
        self.allocator.empty_cache(pool)

    def set_memory_fraction(self, fraction: float) -> None:
        self.allocator.set_memory_fraction(fraction)

    def set_conf(self, conf: Conf) -> None:
        self.allocator.set_conf(conf)

    def create_pool(self, pool: int, use_on_oom: bool, no_split: bool) -> None:
        self.allocator.create_pool(pool, use_on_oom=use_on_oom, no_split=no_split)

    def begin_pool(self, pool: int) -> None:
        self.allocator.open_scope(pool)

    def end_pool(self, pool: int) -> None:
        del pool
        self.allocator.close_scope()

    def release_pool(self, pool: int) -> None:
        self.allocator.release_pool(pool)

    def take_entries(self) -> list[Entry]:
        d = self.allocator.decisions(self.taken)
        self.taken += len(d)
        out = []
        columns = (d.kind, d.id, d.addr, d.size, d.stream, d.pool)
        for kind, id_, addr, size, stream, pool in zip(*(c.tolist() for c in columns), strict=True):
            named = DecisionKind(kind)
            shown = self.requested[id_] if named in _REQUESTED else size
            out.append(Entry(named.name.lower(), addr, shown, stream, pool))
        return out

    def stats(self) -> dict[str, tuple[int, ...]]:
        a = self.allocator
        return {
            **a.statistics(),
            "num_alloc_retries": (a.retries,),
            "num_ooms": (a.ooms,),
            "num_sync_all_streams": (a.calls.sync,),
            "num_device_alloc": (a.calls.alloc,),
            "num_device_free": (a.calls.free,),
        }

    def segments(self) -> list[SegmentView]:
        return [
            SegmentView(s.addr, s.size, s.stream, s.pool, s.expandable, s.blocks) for s in self.allocator.segments()
        ]
