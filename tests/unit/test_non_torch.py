"""Device memory outside the caching allocator: which source is believed, and what the sampler does to a program."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from fragscope.errors import NotMeasuredError, UsageError
from fragscope.record.cuda.non_torch import (
    FakeDeviceMemory,
    ProcessMemory,
    Sampler,
    WholeDevice,
    first_working,
    nvml_handle,
)

MIB = 1024**2
UUID = "b9ad6c7e-0000-1111-2222-333344445555"
LONG = 30  # seconds: only a test that fails waits so long


class NvmlError(Exception):
    """As pynvml.NVMLError."""


class FakeNvml:
    """The part of nvidia-ml-py that is used."""

    NVMLError = NvmlError

    def __init__(self, processes=(), devices=(f"GPU-{UUID}",), refuses: str = "") -> None:
        self.processes = processes
        self.devices = devices
        self.refuses = refuses

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid not in self.devices:
            raise NvmlError("Not Found")
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        if self.refuses:
            raise NvmlError(self.refuses)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]


def process_memory(*processes, reserved=0, refuses=""):
    return ProcessMemory(FakeNvml(processes, refuses=refuses), "the device", 77, lambda: reserved)


def test_a_process_is_found_among_others():
    memory = process_memory((5, 1000 * MIB), (77, 600 * MIB), (78, MIB))
    assert (memory.used(), memory.scope) == (600 * MIB, "process")


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        (process_memory((5, 1000 * MIB)), "lists 1 process on the device and not this one (pid 77)"),
        (process_memory(), "--pid=host"),
        (process_memory((77, None)), "not how much memory"),
        (process_memory((77, 0)), "not how much memory"),
        (process_memory(refuses="Insufficient Permissions"), "lists no processes: Insufficient Permissions"),
        # Another process that has our number, in the numbers of the host
        (process_memory((77, 500 * MIB), reserved=501 * MIB), "uses 500 MiB, and this one has reserved 501 MiB"),
    ],
)
def test_a_process_that_is_not_this_one_is_not_believed(memory, says):
    with pytest.raises(NotMeasuredError) as e:
        memory.used()
    assert says in str(e.value)


def test_what_is_reserved_is_asked_for_once():
    asked = []
    memory = ProcessMemory(FakeNvml([(77, MIB)]), "the device", 77, lambda: asked.append(1) or MIB)
    assert [memory.used(), memory.used()] == [MIB, MIB]
    assert asked == [1]


def test_the_device_in_use_is_total_minus_free():
    memory = WholeDevice(lambda: (70 * MIB, 80 * MIB))
    assert (memory.used(), memory.scope) == (10 * MIB, "device")


def test_an_error_of_cuda_is_one_line():
    def fails():
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    with pytest.raises(NotMeasuredError, match=r"^cudaMemGetInfo: CUDA error: out of memory$"):
        WholeDevice(fails).used()


def test_the_first_source_that_gives_a_number_is_chosen():
    hidden = process_memory((5, MIB))
    whole = FakeDeviceMemory([9], scope="device")
    chosen = first_working([lambda: hidden, lambda: whole])
    assert chosen.memory is whole
    assert len(chosen.passed_over) == 1
    assert "not this one" in chosen.passed_over[0]


def test_a_source_that_cannot_be_made_is_passed_over():
    def no_nvml():
        raise NotMeasuredError("NVML: Driver Not Loaded")

    assert first_working([no_nvml, lambda: FakeDeviceMemory([9])]).passed_over == ("NVML: Driver Not Loaded",)
    with pytest.raises(NotMeasuredError, match="cannot be sampled: NVML: Driver Not Loaded; NVML: Driver Not Loaded"):
        first_working([no_nvml, no_nvml])


@pytest.mark.parametrize("prefix", ["GPU-", "MIG-"])
@pytest.mark.parametrize("named", [UUID, f"GPU-{UUID}", f"MIG-{UUID}"])
def test_devices_and_instances_are_found_by_uuid(prefix, named):
    assert nvml_handle(FakeNvml(devices=[prefix + UUID]), named) == prefix + UUID


def test_a_device_that_nvml_does_not_know():
    with pytest.raises(NotMeasuredError, match=UUID):
        nvml_handle(FakeNvml(devices=[]), UUID)


# The sampler


def test_samples_come_again_and_again_with_the_time():
    got: queue.Queue[tuple[int, int]] = queue.Queue()
    before = time.time_ns() // 1000
    with Sampler(FakeDeviceMemory([1, 2, 3]), 1e-4, lambda t, used: got.put((t, used))) as sampler:
        samples = [got.get(timeout=LONG) for _ in range(5)]
        assert sampler.running
    assert [used for _, used in samples] == [1, 2, 3, 3, 3]
    times = [before, *(t for t, _ in samples), time.time_ns() // 1000]
    assert times == sorted(times)
    assert not sampler.running
    assert sampler.trouble is None


def test_no_sample_comes_after_stop():
    got: queue.Queue[int] = queue.Queue()
    sampler = Sampler(FakeDeviceMemory([1]), 1e-4, lambda _, used: got.put(used))
    sampler.start()
    got.get(timeout=LONG)
    sampler.stop()
    assert "fragscope-memory" not in [t.name for t in threading.enumerate()]
    assert got.qsize() == sampler.taken - 1
    sampler.stop()  # twice does no harm


def test_a_long_interval_does_not_delay_stop():
    first = threading.Event()
    sampler = Sampler(FakeDeviceMemory([1]), 3600.0, lambda *_: first.set())
    sampler.start()
    assert first.wait(LONG)
    sampler.stop()
    assert "fragscope-memory" not in [t.name for t in threading.enumerate()]
    assert sampler.taken == 1


def test_it_can_be_started_again():
    got: queue.Queue[int] = queue.Queue()
    sampler = Sampler(FakeDeviceMemory([1]), 3600.0, lambda _, used: got.put(used))
    for _ in range(2):
        sampler.start()
        assert got.get(timeout=LONG) == 1
        sampler.stop()
    assert sampler.taken == 2


def test_one_sample_now():
    got = []
    sampler = Sampler(FakeDeviceMemory([7]), 1.0, lambda _, used: got.append(used))
    assert sampler.sample() == 7
    assert (got, sampler.taken, sampler.missed) == ([7], 1, 0)


@pytest.mark.parametrize("wrong", ["the source", "the callback"])
def test_nothing_is_raised_into_the_program(wrong):
    def on_sample(_, used):
        if wrong == "the callback":
            raise OSError(28, "No space left on device")

    numbers = [NotMeasuredError("gone"), NotMeasuredError("again")] if wrong == "the source" else [1]
    sampler = Sampler(FakeDeviceMemory(numbers), 1.0, on_sample)
    assert [sampler.sample(), sampler.sample()] == [None, None]
    assert (sampler.taken, sampler.missed) == (0, 2)
    assert sampler.trouble == ("gone" if wrong == "the source" else "[Errno 28] No space left on device")


def test_a_process_that_can_have_no_more_threads_goes_on(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    sampler = Sampler(FakeDeviceMemory([1]), 1.0, lambda *_: None)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    sampler.start()
    assert (sampler.running, sampler.trouble) == (False, "can't start new thread")
    assert sampler.sample() == 1
    sampler.stop()


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_slow_samples(seconds: float, work: float, samples: int) -> tuple[list[float], Sampler]:
    """Samples of an interval of one second, each of which takes so long; when each was taken."""
    clock, busy = Clock(), Clock()
    begun: list[float] = []
    done = threading.Event()

    class Slow:
        scope, source = "process", "a slow one"

        def used(self) -> int:
            begun.append(clock.now)
            busy.now += work
            # The next one is waited for on a real clock; what is left to wait on this one is at most nothing.
            clock.now += seconds
            return 1

    sampler = Sampler(Slow(), 1.0, lambda *_: len(begun) >= samples and done.set(), clock=clock, work=busy)
    sampler.start()
    assert done.wait(LONG)
    sampler.stop()
    return begun, sampler


def test_samples_that_come_too_late_count_as_missed():
    # Due at 100, 101, ...; the first ends at 103.5, so that 101, 102 and 103 are missed and 104 is next.
    begun, sampler = run_slow_samples(seconds=3.5, work=0.0, samples=1)
    assert begun == [100.0]
    assert (sampler.taken, sampler.missed) == (1, 3)


def test_samples_that_take_much_work_are_left_out():
    # 0.05 s of work allow the next sample 5 s after the first began, at 105; 101 to 104 are left out.
    begun, sampler = run_slow_samples(seconds=0.05, work=0.05, samples=1)
    assert begun == [100.0]
    assert (sampler.taken, sampler.missed) == (1, 4)


def test_work_of_less_than_a_hundredth_leaves_nothing_out():
    _, sampler = run_slow_samples(seconds=1.0, work=0.009, samples=3)
    assert sampler.missed == 0


@pytest.mark.parametrize("interval", [0, -1.0, float("nan"), float("inf")])
def test_an_interval_that_is_none(interval):
    with pytest.raises(UsageError, match="positive number of seconds"):
        Sampler(FakeDeviceMemory([1]), interval, lambda *_: None)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # forking with threads is the point
def test_a_forked_child_has_no_sampler_and_does_not_hang():
    holding, let_go = threading.Event(), threading.Event()

    def on_sample(*_):
        holding.set()
        let_go.wait(LONG)

    sampler = Sampler(FakeDeviceMemory([1]), 1e-4, on_sample)
    sampler.start()
    assert holding.wait(LONG)  # the thread is inside a sample while the process forks
    child = os.fork()
    if child == 0:
        signal.alarm(LONG)
        sampler.start()
        fine = not sampler.running and sampler.sample() is None
        sampler.stop()
        os._exit(0 if fine else 1)
    let_go.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sampler.running
    sampler.stop()


def test_a_program_that_forgets_to_stop_ends_as_it_would():
    code = (
        "from fragscope.record.cuda.non_torch import FakeDeviceMemory, Sampler\n"
        "import threading\n"
        "first = threading.Event()\n"
        "Sampler(FakeDeviceMemory([1]), 1e-4, lambda *_: first.set()).start()\n"
        "first.wait()\n"
        "raise SystemExit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
