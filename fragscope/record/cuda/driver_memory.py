"""Taking device memory of the CUDA driver itself, past PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from fragscope.errors import NotMeasuredError
from fragscope.record.device_memory import How


class DriverOutOfMemoryError(Exception):
    """The driver has too little.

    Attributes:
        size: bytes that were asked of it.
    """

    def __init__(self, size: int) -> None:
        super().__init__(f"the driver has no {size} bytes")
        self.size = size


def take(size: int, how: How, device: int) -> tuple[int, Callable[[], None]]:
    """Take device memory; returns the bytes taken and what gives them back.

    ``cudaMalloc`` is asked for by the driver's name, ``cuMemAlloc``: the runtime's hands the request on to it, and a
    failure of the runtime's would stay behind as the last error, which PyTorch reports later.

    Args:
        size: bytes; rounded up to the recommended granularity for ``cuMemCreate``.
        how: who is asked.
        device: CUDA device index; its context is current.

    Raises:
        DriverOutOfMemoryError: there is too little.
        NotMeasuredError: cuda-bindings is missing, or the driver refuses for another reason.
    """
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
    except ImportError as e:
        reason = f"device memory past the allocator needs cuda-bindings on a GPU (pip install cuda-bindings): {e}"
        raise NotMeasuredError(reason) from None
    if how == "cudaMalloc":
        (pointer,) = _asked(driver, "cuMemAlloc", size, size)
        return size, lambda: _ask(driver, "cuMemFree", pointer)
    wanted = driver.CUmemAllocationProp()
    wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    wanted.location.id = device
    recommended = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    (granularity,) = _asked(driver, "cuMemGetAllocationGranularity", size, wanted, recommended)
    taken = -(-size // int(granularity)) * int(granularity)
    (handle,) = _asked(driver, "cuMemCreate", taken, taken, wanted, 0)
    return taken, lambda: _ask(driver, "cuMemRelease", handle)


def _ask(driver: Any, name: str, *args: Any) -> None:
    _asked(driver, name, 0, *args)


def _asked(driver: Any, name: str, size: int, *args: Any) -> tuple[Any, ...]:
    error, *out = getattr(driver, name)(*args)
    if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise DriverOutOfMemoryError(size)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise NotMeasuredError(f"{name} fails: {getattr(error, 'name', error)}")
    return tuple(out)
