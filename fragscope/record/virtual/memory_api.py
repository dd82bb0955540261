"""``torch.cuda.memory`` as the model answers it.

Queries of memory state are observations: the program may act on what it reads, so a replay under other settings would
have to be recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fragscope.allocator.conf import UNLIMITED
from fragscope.errors import UnmodelledError, UsageError
from fragscope.record.virtual.card import VirtualCard
from fragscope.trace import SegmentState
from fragscope.trace.sizes import SMALL_SEGMENT

_STATES = {"allocated": "active_allocated", "pending": "active_pending_free", "free": "inactive"}
_BY_POOL = "reserved_bytes_by_private_pools"


class Memory:
    """The answers of one virtual device; each method replaces the function of its name."""

    NAMES = (
        "empty_cache", "mem_get_info", "memory_allocated", "max_memory_allocated", "memory_reserved",
        "max_memory_reserved", "memory_stats", "memory_stats_as_nested_dict", "memory_summary", "memory_snapshot",
        "reset_peak_memory_stats", "reset_accumulated_memory_stats", "set_per_process_memory_fraction",
        "get_per_process_memory_fraction", "caching_allocator_alloc", "caching_allocator_delete",
        "get_allocator_backend", "_record_memory_history", "_set_allocator_settings",
    )  # fmt: skip

    def __init__(self, device: VirtualCard) -> None:
        self._device = device
        self._memory = device.memory
        self._allocator = device.memory.allocator
        self._fraction = 1.0
        self._raw: dict[int, int] = {}  # address -> lifetime id, of caching_allocator_alloc
        self._forgotten: dict[str, int] = {}  # what accumulated statistics were at their last reset
        self._flat: Callable[..., dict[str, int]] = torch.cuda.memory.memory_stats
        self._summary: Callable[..., str] = torch.cuda.memory.memory_summary

    # --- now and at its peak --------------------------------------------------------------------------------------

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        self._asked("mem_get_info", device)
        return self._allocator.free_memory, self._memory.settings.total

    def memory_allocated(self, device: Any = None) -> int:
        self._asked("memory_allocated", device)
        return self._allocator.now.allocated

    def memory_reserved(self, device: Any = None) -> int:
        self._asked("memory_reserved", device)
        return self._allocator.now.reserved

    def max_memory_allocated(self, device: Any = None) -> int:
        self._asked("max_memory_allocated", device)
        return self._allocator.peaks(self._allocator.program_peaks).allocated

    def max_memory_reserved(self, device: Any = None) -> int:
        self._asked("max_memory_reserved", device)
        return self._allocator.peaks(self._allocator.program_peaks).reserved

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self._device.check_index(device)
        self._allocator.reset_program_peaks()

    # --- all statistics -------------------------------------------------------------------------------------------

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return _Statistics(self._device, self._flat(device))

    def memory_stats_as_nested_dict(self, device: Any = None) -> dict[str, Any]:
        """Statistics that the release of the rules keeps; see ``torch.cuda.memory_stats``."""
        self._asked("memory_stats", device)
        a, rules = self._allocator, self._memory.settings.rules.rules
        out: dict[str, Any] = _Statistics(self._device)
        for key, (current, peak, allocated, freed) in a.statistics().items():
            name, _, part = key.partition(".")
            entry = {
                "current": current,
                "peak": peak,
                "allocated": allocated - self._forgotten.get(f"{key}.allocated", 0),
                "freed": freed - self._forgotten.get(f"{key}.freed", 0),
            }
            if part:
                out.setdefault(name, {})[part if part == "all" else f"{part}_pool"] = entry
            else:
                out[name] = entry
        out["num_alloc_retries"] = a.retries - self._forgotten.get("num_alloc_retries", 0)
        out["num_ooms"] = a.ooms - self._forgotten.get("num_ooms", 0)
        out.update(num_device_alloc=a.calls.alloc, num_device_free=a.calls.free, num_sync_all_streams=a.calls.sync)
        out["max_split_size"] = -1 if a.conf.max_split_size == UNLIMITED else a.conf.max_split_size
        if "throw_on_cudamalloc_oom" in rules.conf_keys:
            out["num_oom_rejections"] = a.rejections
        if "pinned_max_cached_size_mb" in rules.conf_keys and len(self._memory.pools) == 1:
            out[_BY_POOL] = {}  # by pool they are not kept
        return out

    def reset_accumulated_memory_stats(self, device: Any = None) -> None:
        """As its documentation says: what was allocated and freed, retries and OOMs."""
        self._device.check_index(device)
        a = self._allocator
        self._forgotten = {"num_alloc_retries": a.retries, "num_ooms": a.ooms}
        for key, (_, _, allocated, freed) in a.statistics().items():
            self._forgotten |= {f"{key}.allocated": allocated, f"{key}.freed": freed}

    def memory_summary(self, device: Any = None, abbreviated: bool = False) -> str:
        return self._summary(device, abbreviated)

    def memory_snapshot(self, mempool_id: tuple[int, int] | None = None, **_: Any) -> list[dict[str, Any]]:
        """Segments and blocks as they stand; stacks are in the case's trace."""
        self._asked("memory_snapshot", None)
        pools = self._memory.pools
        states = (s for s in self._allocator.segments() if mempool_id in (None, pools[s.pool]))
        requested = self._memory.requested_by_address()
        return [self._segment(s, requested) for s in states]

    def _segment(self, segment: SegmentState, requested: dict[int, int]) -> dict[str, Any]:
        blocks = [
            {
                "address": addr,
                "size": size,
                "requested_size": requested.get(addr, size) if state != "free" else 0,
                "state": _STATES[state],
                "frames": [],
            }
            for addr, size, state in segment.blocks
        ]
        active = [b for b in blocks if b["state"] != "inactive"]
        return {
            "device": 0,
            "address": segment.addr,
            "total_size": segment.size,
            "allocated_size": sum(b["size"] for b in blocks if b["state"] == "active_allocated"),
            "active_size": sum(b["size"] for b in active),
            "requested_size": sum(b["requested_size"] for b in active),
            "stream": segment.stream,
            "segment_type": "small" if (segment.page or segment.size) == SMALL_SEGMENT else "large",
            "segment_pool_id": self._memory.pools[segment.pool],
            "is_expandable": segment.expandable,
            "frames": [],
            "blocks": blocks,
        }

    def _record_memory_history(self, *args: Any, **kwargs: Any) -> None:
        """The virtual device records in any case, into the case's trace."""

    # --- what programs do -----------------------------------------------------------------------------------------

    def empty_cache(self) -> None:
        self._memory.empty_cache()

    def get_allocator_backend(self) -> str:
        return "native"

    def _set_allocator_settings(self, env: str) -> None:
        try:
            self._memory.set_conf(env)
        except UnmodelledError as e:
            raise self._device.unsupported(str(e)) from None
        except UsageError as e:
            raise RuntimeError(str(e)) from None

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        self._device.check_index(device)
        if not isinstance(fraction, float):
            raise TypeError("Invalid type for fraction argument, must be `float`")
        if not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        self._memory.set_memory_fraction(fraction)
        self._fraction = fraction

    def get_per_process_memory_fraction(self, device: Any = None) -> float:
        self._device.check_index(device)
        return self._fraction

    def caching_allocator_alloc(self, size: int, device: Any = None, stream: Any = None) -> int:
        self._device.check_index(device)
        handle = self._device.stream if stream is None else getattr(stream, "cuda_stream", stream)
        id_ = self._device.allocate(size, int(handle))
        if id_ is None:
            return 0
        address = self._memory.address(id_)
        self._raw[address] = id_
        return address

    def caching_allocator_delete(self, mem_ptr: int) -> None:
        if mem_ptr == 0:
            return
        id_ = self._raw.pop(mem_ptr, None)
        if id_ is None:
            raise RuntimeError(f"invalid device pointer: {mem_ptr:#x}")
        self._memory.free(id_)

    def _asked(self, what: str, device: Any) -> None:
        self._device.check_index(device)
        self._device.observe(f"torch.cuda.{what}")


class _Statistics(dict[str, Any]):
    """Statistics of torch; one that is not kept is refused, never 0."""

    def __init__(self, device: VirtualCard, values: dict[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self._device = device

    def __missing__(self, key: str) -> Any:
        raise self._device.unsupported(f"torch.cuda.memory_stats()[{key!r}] is not kept on the virtual device")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a statistic that is kept; the default for names that torch does not know either."""
        if key not in self and key.startswith(_BY_POOL):
            return self[key]
        return super().get(key, default)
