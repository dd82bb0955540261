"""What recording costs on this machine: a decode loop without it, with PyTorch's own history, and with fragscope's.

    python tests/gpu/recording_cost.py [ROUNDS]

The kinds of runs are interleaved in one process, so that all meet the same clocks, and it stays on one core. The
allocator tracker cannot be detached again, so the runs before it was attached are given beside those after. For each
kind: the fastest run and its ratio to the fastest without recording, and the median of the ratios to the run without
recording in the same round.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from programs import decode

from fragscope import Recorder, RecorderOptions, Stacks


@contextmanager
def history(context: str | None) -> Any:
    torch.cuda.memory._record_memory_history(
        enabled="all", context=context, stacks="python", max_entries=2_000_000, clear_history=True
    )
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def timed(step: Callable[[], Any], around: Callable[[], AbstractContextManager[Any]]) -> tuple[float, float]:
    """Seconds inside, and in all with beginning and ending the recording."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    with around():
        inside = time.perf_counter()
        step()
        torch.cuda.synchronize()
        inside = time.perf_counter() - inside
    return inside, time.perf_counter() - began


def compare(
    step: Callable[[], Any], kinds: dict[str, Callable[[], AbstractContextManager[Any]]], rounds: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in kinds}
    whole: dict[str, list[float]] = {name: [] for name in kinds}
    gc.collect()
    gc.disable()
    for number in range(rounds):
        order = list(kinds.items())
        for name, around in order[number % len(order) :] + order[: number % len(order)]:
            inside, all_of_it = timed(step, around)
            times[name].append(inside)
            whole[name].append(all_of_it)
    gc.enable()
    base = times[next(iter(kinds))]
    for name, values in times.items():
        ratios = [value / without for value, without in zip(values, base, strict=True)]
        print(
            f"  {name:34} fastest {min(values) * 1e3:8.2f} ms x{min(values) / min(base):.4f}  "
            f"median {statistics.median(values) * 1e3:8.2f} ms x{statistics.median(ratios):.4f}  "
            f"with start and stop {statistics.median(whole[name]) * 1e3:.1f} ms",
            flush=True,
        )
    return times


@contextmanager
def recorded(options: RecorderOptions) -> Any:
    """A recording whose Trace nobody wants: making it is timed by itself."""
    recorder = Recorder(options)
    recorder.start()
    try:
        yield
    finally:
        recorder.discard()


def recorder(stacks: Stacks, sampling: float | None = None) -> Callable[[], AbstractContextManager[Any]]:
    options = RecorderOptions(stacks=stacks, sample_non_torch=sampling, max_entries=2_000_000)
    return lambda: recorded(options)


def main() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    print(torch.cuda.get_device_name(0), torch.__version__, f"{rounds} rounds")
    for program in ("decode", "small"):
        step = decode(tokens=8) if program == "decode" else pairs
        for _ in range(3):
            step()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        step()
        print(f"{program}: {torch.cuda.memory_stats()['allocation.all.allocated'] - before} allocations a run")
        own = {
            "no recording": nullcontext,
            "PyTorch's, no stacks": lambda: history(None),
            "PyTorch's, Python stacks": lambda: history("alloc"),
        }
        if program == "decode":
            print(" tracker never attached")
            compare(step, own, rounds)
        print(" tracker attached")
        ours = {
            "fragscope, no stacks": recorder(Stacks.NONE),
            "fragscope, no stacks, non_torch 1/s": recorder(Stacks.NONE, 1.0),
            "fragscope, Python stacks": recorder(Stacks.PYTHON),
        }
        for stacks in (Stacks.NONE, Stacks.PYTHON):
            whole = Recorder(RecorderOptions(stacks=stacks, max_entries=2_000_000))
            whole.start()
            step()
            began = time.perf_counter()
            events = len(whole.stop().requests)
            seconds = time.perf_counter() - began
            print(f"  making the Trace, stacks {stacks}: {seconds * 1e3:.0f} ms for {events} requests")
        compare(step, {**own, **ours}, rounds)


def pairs() -> None:
    """Nothing but allocations and frees: the worst case."""
    empty = torch.empty
    for _ in range(20_000):
        empty(1024, device="cuda")


if __name__ == "__main__":
    main()
