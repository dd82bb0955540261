"""What the CUDA driver is asked for, by a stand-in for ``cuda.bindings.driver`` with its calls and return values."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fragscope.errors import NotMeasuredError
from fragscope.record.cuda import driver_memory
from fragscope.record.cuda.driver_memory import DriverOutOfMemoryError

MIB = 2**20


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_DEVICE = 101


class Driver(ModuleType):
    """Has ``free`` bytes, and a granularity of 2 MiB; every call returns its result first, as cuda-bindings' do."""

    CUresult = Result
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED="recommended")

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.free = 10 * MIB
        self.held: dict[int, int] = {}
        self.asked: list[tuple[Any, ...]] = []

    @staticmethod
    def CUmemAllocationProp() -> SimpleNamespace:  # noqa: N802 - as it is called there
        return SimpleNamespace(location=SimpleNamespace())

    def _take(self, size: int) -> tuple[Any, ...]:
        if size > self.free - sum(self.held.values()):
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        handle = 100 + len(self.asked)
        self.held[handle] = size
        return Result.CUDA_SUCCESS, handle

    def cuMemGetAllocationGranularity(self, prop: SimpleNamespace, flag: str) -> tuple[Any, ...]:  # noqa: N802
        assert (prop.type, prop.location.type, flag) == ("pinned", "device", "recommended")
        return Result.CUDA_SUCCESS, 2 * MIB

    def cuMemCreate(self, size: int, prop: SimpleNamespace, flags: int) -> tuple[Any, ...]:  # noqa: N802
        self.asked.append(("create", size, prop.location.id, flags))
        return self._take(size)

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        self.asked.append(("alloc", size))
        return self._take(size)

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:  # noqa: N802
        self.asked.append(("release", self.held.pop(handle)))
        return (Result.CUDA_SUCCESS,)

    def cuMemFree(self, pointer: int) -> tuple[Any, ...]:  # noqa: N802
        self.asked.append(("free", self.held.pop(pointer)))
        return (Result.CUDA_SUCCESS,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", made)
    return made


def test_physical_memory_is_rounded_to_the_granularity(driver: Driver) -> None:
    taken, give = driver_memory.take(3 * MIB, "cuMemCreate", 1)
    assert (taken, driver.held) == (4 * MIB, {101: 4 * MIB})
    give()
    assert driver.asked == [("create", 4 * MIB, 1, 0), ("release", 4 * MIB)]


def test_bytes_are_taken_as_they_are(driver: Driver) -> None:
    taken, give = driver_memory.take(3 * MIB + 1, "cudaMalloc", 0)
    give()
    assert (taken, driver.held) == (3 * MIB + 1, {})
    assert driver.asked == [("alloc", 3 * MIB + 1), ("free", 3 * MIB + 1)]


@pytest.mark.parametrize("how", ["cuMemCreate", "cudaMalloc"])
def test_too_little_is_told_with_what_was_asked_for(driver: Driver, how: Any) -> None:
    with pytest.raises(DriverOutOfMemoryError) as caught:
        driver_memory.take(12 * MIB, how, 0)
    assert caught.value.size == 12 * MIB


def test_another_refusal_is_told_by_its_name(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse: Callable[..., Any] = lambda size: (Result.CUDA_ERROR_INVALID_DEVICE, None)  # noqa: E731
    monkeypatch.setattr(driver, "cuMemAlloc", refuse)
    with pytest.raises(NotMeasuredError, match="cuMemAlloc fails: CUDA_ERROR_INVALID_DEVICE"):
        driver_memory.take(MIB, "cudaMalloc", 0)


def test_without_the_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(NotMeasuredError, match="pip install cuda-bindings"):
        driver_memory.take(MIB, "cudaMalloc", 0)
