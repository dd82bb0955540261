"""Device memory of this process as the driver counts it, sampled: also what PyTorch's allocator does not know of.

A CUDA context, NCCL, cuBLAS, Triton modules and every ``cudaMalloc`` or ``cuMemCreate`` past PyTorch take memory that
no allocator history holds. What is sampled is all the memory in use; who reads a trace subtracts what was reserved.

A sample sees one instant. The highest sample is a lower bound of the true peak: what was taken and given back between
two samples was never seen.

NVML counts the memory of each process, but in many containers it calls processes by other numbers than they do
themselves, lists none, or lists them with nothing. Then only the memory in use on the whole device is known, other
processes' included, and it is marked so.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, Protocol, Self

from fragscope.errors import NotMeasuredError, UsageError, printable
from fragscope.units import MIB

Scope = Literal["process", "device"]

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED of cuda.h
_LARGEST_SHARE = 0.01  # of the time: NVML's list of processes may take milliseconds and holds a lock of the driver
_LONGEST_JOIN = 5.0  # seconds; a driver call that hangs must not hang the program


class DeviceMemory(Protocol):
    """Where the number comes from.

    Attributes:
        scope: whether other processes' memory on the device is left out (``process``) or included (``device``).
        source: what gives the number, for people.
    """

    @property
    def scope(self) -> Scope: ...  # noqa: D102

    @property
    def source(self) -> str: ...  # noqa: D102

    def used(self) -> int:
        """Bytes in use now.

        Raises:
            NotMeasuredError: no number is to be had; the message says why in one line.
        """


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best source there is.

    Attributes:
        memory: gives numbers.
        passed_over: why each better source does not, one line each.
    """

    memory: DeviceMemory
    passed_over: tuple[str, ...]


def device_memory(device: int) -> Chosen:
    """The best source for a CUDA device of this process, by its index under ``CUDA_VISIBLE_DEVICES``.

    The process gets a CUDA context if it has none: without one, NVML does not list it. torch's functions are looked up
    now, so that who wraps them afterwards, to see what the program asks for, does not see the samples.

    Raises:
        NotMeasuredError: there is none; the message says why, source by source.
    """
    return first_working([partial(ProcessMemory.of, device), partial(WholeDevice.of, device)])


def first_working(sources: Iterable[Callable[[], DeviceMemory]]) -> Chosen:
    """The first source that gives a number when it is asked.

    Raises:
        NotMeasuredError: none does.
    """
    passed_over: list[str] = []
    for source in sources:
        try:
            memory = source()
            memory.used()
        except NotMeasuredError as e:
            passed_over.append(str(e))
        else:
            return Chosen(memory, tuple(passed_over))
    raise NotMeasuredError(f"device memory cannot be sampled: {'; '.join(passed_over)}")


def load_nvml() -> Any:
    """nvidia-ml-py's module, initialised.

    Raises:
        NotMeasuredError: it or NVML itself is not there, or NVML refuses; the message says which.
    """
    try:
        import pynvml as nvml  # noqa: PLC0415 - optional
    except ImportError:
        raise NotMeasuredError("NVML's Python binding is not installed: pip install 'fragscope[nvml]'") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError_LibraryNotFound:
        raise NotMeasuredError("no NVIDIA driver is installed: libnvidia-ml.so.1 is not there") from None
    except nvml.NVMLError as e:
        raise NotMeasuredError(f"NVML: {printable(str(e), 200)}") from None
    return nvml


def nvml_handle(nvml: Any, uuid: str) -> Any:
    """NVML's handle of the device (or MIG instance) that CUDA names by this UUID, with or without a prefix.

    Raises:
        NotMeasuredError: NVML does not know it.
    """
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    for prefix in ("MIG-", "GPU-"):  # CUDA gives a MIG instance's own UUID where it runs on one
        with suppress(nvml.NVMLError):
            return nvml.nvmlDeviceGetHandleByUUID(prefix + bare)
    raise NotMeasuredError(f"NVML knows no device with CUDA's UUID {printable(bare, 60)}")


class ProcessMemory:
    """What NVML says about this process on one device. Does not call CUDA.

    Args:
        nvml: nvidia-ml-py's module, initialised.
        handle: NVML's handle of the device.
        pid: of the process, as it knows itself.
        reserved: bytes that PyTorch's allocator holds on the device, asked before the first number. The process uses at
            least as much; less means that what NVML calls by our number is another process.
    """

    scope: Scope = "process"
    source = "NVML, by process"

    def __init__(self, nvml: Any, handle: Any, pid: int, reserved: Callable[[], int]) -> None:
        self._nvml = nvml
        self._handle = handle
        self._pid = pid
        self._reserved: Callable[[], int] | None = reserved  # None once a number was believed

    @classmethod
    def of(cls, device: int) -> ProcessMemory:
        """For a CUDA device of this process.

        Raises:
            NotMeasuredError: NVML is not there, or does not know the device.
        """
        torch = _torch_with_context(device)
        nvml = load_nvml()
        handle = nvml_handle(nvml, str(torch.cuda.get_device_properties(device).uuid))
        return cls(nvml, handle, os.getpid(), partial(torch.cuda.memory_reserved, device))

    def used(self) -> int:
        """Bytes that NVML counts for this process, its CUDA context included.

        Raises:
            NotMeasuredError: NVML does not list this process, hides its memory or fails.
        """
        reserved = 0 if self._reserved is None else self._reserved()
        try:
            listed = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError as e:
            raise NotMeasuredError(f"NVML lists no processes: {printable(str(e), 200)}") from None
        own = [process.usedGpuMemory for process in listed if process.pid == self._pid]
        if not own:
            raise NotMeasuredError(
                f"NVML lists {len(listed)} process{'' if len(listed) == 1 else 'es'} on the device and not this one "
                f"(pid {self._pid}): in a container, give it the host's process numbers (docker run --pid=host)"
            )
        if not all(own):  # with a CUDA context it cannot be nothing
            raise NotMeasuredError("NVML lists this process, but not how much memory it uses")
        used = sum(int(size) for size in own)
        if used < reserved:
            raise NotMeasuredError(
                f"NVML's process {self._pid} uses {used // MIB} MiB, and this one has reserved {reserved // MIB} MiB: "
                "NVML calls processes by other numbers here"
            )
        self._reserved = None
        return used


class WholeDevice:
    """Total minus free memory of a device, whoever uses it (``cudaMemGetInfo``).

    Args:
        memory_info: free and total bytes of the device.
    """

    scope: Scope = "device"
    source = "cudaMemGetInfo, the whole device"

    def __init__(self, memory_info: Callable[[], tuple[int, int]]) -> None:
        self._memory_info = memory_info

    @classmethod
    def of(cls, device: int) -> WholeDevice:
        """For a CUDA device of this process.

        Raises:
            NotMeasuredError: torch cannot use the device.
        """
        torch = _torch_with_context(device)
        return cls(partial(torch.cuda.cudart().cudaMemGetInfo, device))

    def used(self) -> int:
        """Bytes in use on the device.

        Raises:
            NotMeasuredError: CUDA fails.
        """
        try:
            with _CapturesUndisturbed():
                free, total = self._memory_info()
        except RuntimeError as e:
            raise NotMeasuredError(f"cudaMemGetInfo: {printable(str(e).partition(chr(10))[0], 200)}") from None
        return total - free


class _CapturesUndisturbed:
    """While entered, what this thread asks of CUDA is no reason to end another thread's stream capture.

    In CUDA's default mode a call that might be unsafe during a capture fails, and spoils the capture, from whichever
    thread it comes (cuThreadExchangeStreamCaptureMode in the driver API's reference).
    """

    def __enter__(self) -> None:
        self._mode = ctypes.c_int(_RELAXED)
        self._exchange()

    def __exit__(self, *exc: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        exchange = _exchange_capture_mode()
        if exchange is not None:
            exchange(ctypes.byref(self._mode))


@cache
def _exchange_capture_mode() -> Callable[[Any], int] | None:
    try:
        return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None  # no driver, or one older than captures (CUDA 10.1)


def _torch_with_context(device: int) -> Any:
    """torch, when the process has a CUDA context on the device.

    Raises:
        NotMeasuredError: torch is not installed, or cannot use the device.
    """
    try:
        import torch  # noqa: PLC0415 - the sampler itself needs none
    except ImportError:
        raise NotMeasuredError("torch is not installed") from None
    try:
        torch.cuda.mem_get_info(device)
    except (RuntimeError, AssertionError) as e:  # AssertionError: torch is a CPU build
        raise NotMeasuredError(f"torch: {printable(str(e).partition(chr(10))[0], 200)}") from None
    return torch


class Sampler:
    """A daemon thread that reads the memory in use again and again and hands each number on.

    It keeps no samples, raises nothing into the program, ends with it, and is not there in a forked child. It works for
    at most a hundredth of the time: after a sample that took much work, the next ones are left out and count as missed.

    Args:
        memory: where the number comes from.
        interval: seconds from one sample to the next.
        on_sample: called with the time (microseconds since the epoch, as PyTorch's history has it) and the bytes in
            use; from the sampler's thread or from the one that calls ``sample``, never from two at once.
        clock: seconds, by which samples fall due.
        work: seconds of processor time of the calling thread, kernel included.

    Attributes:
        taken: samples handed on.
        missed: samples that were due and not handed on: left out, or failed.
        trouble: the first failure in one line, None while there is none.

    Raises:
        UsageError: the interval is not a positive number of seconds.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        interval: float,
        on_sample: Callable[[int, int], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        work: Callable[[], float] = time.thread_time,
    ) -> None:
        if not (interval > 0 and math.isfinite(interval)):
            raise UsageError(f"device memory cannot be sampled every {interval} s; name a positive number of seconds")
        self.memory = memory
        self.interval = interval
        self.taken = 0
        self.missed = 0
        self.trouble: str | None = None
        self._on_sample = on_sample
        self._clock = clock
        self._work = work
        self._pid = os.getpid()
        self._one_at_once = threading.Lock()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether samples are being taken in this process."""
        return self._is_here() and self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Take samples from now on, the first one at once. Does nothing while running, and in a forked child."""
        if not self._is_here() or self.running:
            return
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._ending,), name="fragscope-memory", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as e:  # no more threads, or the interpreter is going away
            self._thread = None
            self.trouble = self.trouble or printable(str(e), 300)
            return
        # A daemon thread inside the driver while the interpreter goes away can bring the program down.
        atexit.register(self.stop)

    def stop(self) -> None:
        """No more samples when this returns. Does nothing where none are taken, and in a forked child."""
        thread = self._thread
        if not self._is_here() or thread is None:
            return
        self._thread = None
        self._ending.set()
        if thread is not threading.current_thread():
            thread.join(_LONGEST_JOIN)
        atexit.unregister(self.stop)

    def sample(self) -> int | None:
        """Take one sample now, beside those that fall due; None, counted as missed, where that fails."""
        if not self._is_here():  # a fork may have copied the lock while it was held
            return None
        with self._one_at_once:
            try:
                used = self.memory.used()
                self._on_sample(time.time_ns() // 1000, used)
            except Exception as e:  # whatever goes wrong here is none of the program's business
                self.missed += 1
                self.trouble = self.trouble or printable(str(e) or type(e).__name__, 300)
                return None
            self.taken += 1
            return used

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self, ending: threading.Event) -> None:
        due = self._clock()
        while not ending.wait(max(0.0, due - self._clock())):
            began, before = self._clock(), self._work()
            self.sample()
            rested = began + (self._work() - before) / _LARGEST_SHARE
            due += self.interval
            left_out = math.ceil((max(rested, self._clock()) - due) / self.interval)
            if left_out > 0:
                self.missed += left_out
                due += left_out * self.interval

    def _is_here(self) -> bool:
        return os.getpid() == self._pid


class FakeDeviceMemory:
    """Stands in for a device in tests: gives the numbers it was made with in turn, and the last one from then on.

    Args:
        numbers: bytes, or exceptions to be raised.
        scope: as of ``DeviceMemory``.
    """

    source = "a fake"

    def __init__(self, numbers: Sequence[int | Exception], scope: Scope = "process") -> None:
        self.scope: Scope = scope
        self._numbers = list(numbers)

    def used(self) -> int:
        """The next number."""
        number = self._numbers[0] if len(self._numbers) == 1 else self._numbers.pop(0)
        if isinstance(number, Exception):
            raise number
        return number
