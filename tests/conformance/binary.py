"""The real allocator of a torch release in this process, with the operations that models have (``model.Model``)."""

from __future__ import annotations

import ctypes
import os
import struct
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_uint64, c_void_p
from pathlib import Path

from model import Entry, SegmentView

# In the order of number_of() in oracle/shim.cpp.
ACTIONS = (
    "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap", "oom",
)  # fmt: skip
_ARRAYS = (
    "allocation", "segment", "active", "inactive_split", "allocated_bytes", "reserved_bytes", "active_bytes",
    "inactive_split_bytes", "requested_bytes",
)  # fmt: skip
_CALLS = ("num_alloc_retries", "num_ooms", "num_sync_all_streams", "num_device_alloc", "num_device_free")
# Counters as oracle_counters() in oracle/shim.cpp gives them, with the number of values of each.
COUNTERS: dict[str, int] = {
    **{f"{name}.{part}": 4 for name in _ARRAYS for part in ("all", "small", "large")},
    "oversize_allocations": 4,
    "oversize_segments": 4,
    **dict.fromkeys(_CALLS, 1),
}
_ENTRY = struct.Struct("5Q")  # action, address, bytes, stream, pool
_CONF_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


class BinaryError(Exception):
    """The binary raised something other than out-of-memory, such as an internal assertion of its own."""


class Libraries:
    """The libraries of one release, loaded but not started: a process that forks can start one allocator a child."""

    def __init__(self, directory: Path) -> None:
        for variable in _CONF_VARIABLES:
            os.environ.pop(variable, None)  # the conf is the program's
        os.environ["TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC"] = "0"  # do not ask the management library about fabric handles
        runtime = next(directory.glob("libcudart.so.*"))
        self.runtime = ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        for name in ("libc10.so", "libc10_cuda.so"):
            ctypes.CDLL(str(directory / "torch/lib" / name), ctypes.RTLD_GLOBAL)
        self.shim = ctypes.CDLL(str(directory / "libshim.so"))
        self.runtime.runtime_configure.argtypes = [c_uint64] * 3
        self.runtime.runtime_finish_stream.argtypes = [c_uint64]
        shim = self.shim
        shim.oracle_error.restype = c_char_p
        shim.oracle_start.argtypes = shim.oracle_set_conf.argtypes = [c_char_p]
        shim.oracle_malloc.argtypes = [c_uint64, c_uint64, POINTER(c_uint64)]
        shim.oracle_record_stream.argtypes = [c_uint64, c_uint64]
        shim.oracle_set_memory_fraction.argtypes = [c_double]
        shim.oracle_create_pool.argtypes = [c_uint64, c_int, c_int]
        for name in ("free", "empty_cache", "begin_pool", "end_pool", "release_pool"):
            getattr(shim, f"oracle_{name}").argtypes = [c_uint64]
        for name in ("take_entries", "counters", "segments"):
            function = getattr(shim, f"oracle_{name}")
            function.argtypes, function.restype = [POINTER(c_void_p)], c_uint64


class Binary:
    """The allocator itself: one device, one life, one process.

    Args:
        libraries: of the release.
        total: bytes of device memory.
        capacity: bytes that segments may take together.
        seed: 0: cudaMalloc gives ascending addresses, else scattered ones.
        conf: as in ``PYTORCH_ALLOC_CONF``.

    Raises:
        BinaryError: the release refuses the conf.
    """

    def __init__(self, libraries: Libraries, total: int, capacity: int, seed: int = 0, conf: str = "") -> None:
        self._runtime, self._shim = libraries.runtime, libraries.shim
        self._address_of: dict[int, int] = {}  # live allocations
        self._runtime.runtime_configure(total, capacity, seed)
        self._do("start", conf.encode())

    def _do(self, call: str, *arguments: object) -> int:
        result: int = getattr(self._shim, f"oracle_{call}")(*arguments)
        if result < 0:
            message = self._shim.oracle_error().decode(errors="replace")
            raise BinaryError(f"{call}: {message.splitlines()[0] if message else 'no reason given'}")
        return result

    def malloc(self, id: int, size: int, stream: int) -> bool:
        """Whether the request was served; from the pool that the binary's own open scopes select."""
        addr = c_uint64()
        if not self._do("malloc", size, stream, byref(addr)):
            return False
        self._address_of[id] = addr.value
        return True

    def is_live(self, id: int) -> bool:
        """Whether that request was served and not freed."""
        return id in self._address_of

    def free(self, id: int) -> None:
        self._do("free", self._address_of.pop(id))

    def record_stream(self, id: int, stream: int) -> None:
        self._do("record_stream", self._address_of[id], stream)

    def finish_stream(self, stream: int) -> None:
        """What was put on the stream so far is done; the allocator notices when it next looks."""
        self._runtime.runtime_finish_stream(stream)

    def empty_cache(self, pool: int = 0) -> None:
        self._do("empty_cache", pool)

    def set_memory_fraction(self, fraction: float) -> None:
        self._do("set_memory_fraction", fraction)

    def set_conf(self, conf: str) -> None:
        self._do("set_conf", conf.encode())

    def create_pool(self, pool: int, use_on_oom: bool, no_split: bool) -> None:
        self._do("create_pool", pool, use_on_oom, no_split)

    def begin_pool(self, pool: int) -> None:
        self._do("begin_pool", pool)

    def end_pool(self, pool: int) -> None:
        self._do("end_pool", pool)

    def release_pool(self, pool: int) -> None:
        self._do("release_pool", pool)

    def take_entries(self) -> list[Entry]:
        """Trace entries since the last call."""
        data = self._array("take_entries", _ENTRY.size)
        return [Entry(ACTIONS[action], *rest) for action, *rest in _ENTRY.iter_unpack(data)]

    def counters(self) -> tuple[int, ...]:
        """The values of ``COUNTERS``, one after the other."""
        data = self._array("counters", 8)
        values = struct.unpack(f"{len(data) // 8}q", data)
        assert len(values) == sum(COUNTERS.values())
        return values

    def segments(self) -> list[SegmentView]:
        """Segments as they stand, in address order."""
        data = self._array("segments", 8)
        numbers = iter(struct.unpack(f"{len(data) // 8}Q", data))
        views = []
        for addr in numbers:
            size, stream, pool, expandable, count = (next(numbers) for _ in range(5))
            blocks, at = [], addr
            for _ in range(count):
                length, allocated, active = next(numbers), next(numbers), next(numbers)
                blocks.append((at, length, "allocated" if allocated else "pending" if active else "free"))
                at += length
            views.append(SegmentView(addr, size, stream, pool, bool(expandable), tuple(blocks)))
        return sorted(views)

    def _array(self, name: str, width: int) -> bytes:
        start = c_void_p()
        count = getattr(self._shim, f"oracle_{name}")(byref(start))
        return ctypes.string_at(start.value, count * width) if count else b""
