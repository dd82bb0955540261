"""Record random programs under several confs on this machine's GPU: the recordings in tests/data/traces/confs.

    python tests/gpu/record_confs.py FOLDER [NAME ...]

Writes ``NAME.pickle.xz``, the pickled memory snapshot, and ``NAME.json``, what torch itself said at the end and what
the snapshot leaves out. Each job runs in a process of its own, with its conf in the environment; one line tells how it
went. The programs draw from a seeded generator, so that they ask for the same again.
"""

from __future__ import annotations

import json
import lzma
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KIB, MIB = 2**10, 2**20
SECONDS = 100  # that one job may take
Facts = dict[str, Any]
Program = Callable[[random.Random], Iterator[Facts]]
"""Asks for memory, then yields what its JSON should hold beside the statistics; until it is closed all of it lives."""


@dataclass(frozen=True)
class Job:
    """One recording."""

    name: str
    conf: str
    program: str
    fraction: float | None = None
    seed: int = 0


EXPANDABLE = "expandable_segments:True"
OOM_CONFS = {
    "default": "",
    "split64": "max_split_size_mb:64",
    "split64nsr100": "max_split_size_mb:64,max_non_split_rounding_mb:100",
    "round4": "roundup_power2_divisions:4",
    "roundlist": "roundup_power2_divisions:[64:8,256:4,1024:2,>:1]",
    "expandable": EXPANDABLE,
    "gc": "garbage_collection_threshold:0.6",
    "gcsplit": "garbage_collection_threshold:0.5,max_split_size_mb:128",
    "large64": "large_segment_size_mb:64",
    "explarge32": f"{EXPANDABLE},large_segment_size_mb:32",
}
JOBS = [
    *(Job(f"oom-{tag}", conf, "random", fraction=0.08, seed=3) for tag, conf in OOM_CONFS.items()),
    Job("oom-fractionkey", "per_process_memory_fraction:0.07", "random", seed=3),
    Job("fill-default", "", "fill", seed=5),
    Job("fill-expandable", EXPANDABLE, "fill", seed=5),
    Job("fill-split", "max_split_size_mb:256", "fill", seed=6),
    Job("pools-default", "", "pools", seed=1),
    Job("pools-oom", "", "pools", fraction=0.1, seed=2),
    Job("poolsexp", EXPANDABLE, "pools", seed=3),
    Job("graphs-default", "", "graphs"),
    Job("graphs-expandable", EXPANDABLE, "graphs"),
    Job("toggle", "", "toggle", fraction=0.2, seed=4),
]


# --- programs -----------------------------------------------------------------------------------------------------
# Their draws from the generator, and the order of them, are what makes a recording reproducible.


def drawn_size(draw: random.Random, largest: int) -> int:
    """Bytes of a request: many are small, some get segments of their own, a few have up to 400 MiB × ``largest``."""
    kind = draw.random()
    if kind < 0.4:
        return draw.randint(1, 4 * KIB)
    if kind < 0.6:
        return draw.randint(1, MIB)
    if kind < 0.85:
        return draw.randint(MIB, 12 * MIB)
    if kind < 0.97:
        return draw.choice([2, 10, 16, 20, 64, 100]) * MIB
    return draw.randint(1, 400 * largest) * MIB


def tensor(size: int) -> Any:
    import torch

    return torch.empty(size, dtype=torch.uint8, device="cuda")


def drop_half(draw: random.Random, live: list[Any]) -> None:
    """What the programs do about an OOM."""
    draw.shuffle(live)
    del live[len(live) // 2 :]


def random_program(draw: random.Random) -> Iterator[Facts]:
    """Sizes and lifetimes at random on three streams, with ``record_stream``, synchronisation and ``empty_cache``."""
    import torch

    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    live: list[Any] = []
    ooms = 0
    for _ in range(5000):
        step = draw.random()
        if step < 0.56 or not live:
            with torch.cuda.stream(draw.choice(streams)):
                try:
                    live.append(tensor(drawn_size(draw, 4)))
                except torch.cuda.OutOfMemoryError:
                    ooms += 1
                    drop_half(draw, live)
        elif step < 0.97:
            dying = live.pop(draw.randrange(len(live)))
            if draw.random() < 0.05:
                dying.record_stream(draw.choice(streams))
            del dying
        elif step < 0.985:
            torch.cuda.synchronize()
        elif step < 0.99:
            torch.cuda.empty_cache()
    yield {"ooms": ooms}


def fill_program(draw: random.Random) -> Iterator[Facts]:
    """Sizes of up to 48 GB at random, more made than freed, until the card is full."""
    import torch

    live: list[Any] = []
    ooms = 0
    for _ in range(3000):
        try:
            live.append(tensor(drawn_size(draw, 40) * draw.choice([1, 1, 1, 3])))
        except torch.cuda.OutOfMemoryError:
            ooms += 1
            drop_half(draw, live)
        while live and draw.random() < 0.3:
            live.pop(draw.randrange(len(live)))
    yield {"ooms": ooms}


def pools_program(draw: random.Random) -> Iterator[Facts]:
    """Sizes at random from the default pool and three private ones, of which two are deleted on the way."""
    import torch

    pools: list[Any] = [torch.cuda.MemPool(), torch.cuda.MemPool(use_on_oom=True), torch.cuda.MemPool(no_split=True)]
    live: list[Any] = []
    ooms = 0
    for turn in range(4000):
        step = draw.random()
        try:
            if step < 0.3:
                live.append(tensor(drawn_size(draw, 4)))
            elif step < 0.5:
                with torch.cuda.use_mem_pool(draw.choice([pool for pool in pools if pool is not None])):
                    for _ in range(draw.randint(1, 6)):
                        live.append(tensor(drawn_size(draw, 2)))
            elif step < 0.97 and live:
                live.pop(draw.randrange(len(live)))
            elif step < 0.98:
                torch.cuda.empty_cache()
            elif step < 0.983 and turn > 2500:
                held = [at for at, pool in enumerate(pools) if pool is not None]
                if len(held) > 1:
                    pools[draw.choice(held)] = None
        except torch.cuda.OutOfMemoryError:
            ooms += 1
            drop_half(draw, live)
    yield {"ooms": ooms, "pools": [None if pool is None else list(pool.id) for pool in pools]}


def graphs_program(draw: random.Random) -> Iterator[Facts]:
    """Four CUDA graphs of one network, each with a private pool; the first is deleted before the end."""
    import torch

    net = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(6)]).cuda()
    graphs = []
    for batch in (8, 64, 512, 8192):
        given = torch.randn(batch, 1024, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                net(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = net(given)
        graphs.append((graph, given, result))
        beside = [tensor(drawn_size(draw, 1)) for _ in range(20)]
        graph.replay()
        del beside
    del graphs[0]
    torch.cuda.empty_cache()
    beside = [tensor(drawn_size(draw, 1)) for _ in range(50)]
    torch.cuda.synchronize()
    yield {}
    del beside


SWITCHES = {400: True, 1100: False, 1700: True}
"""Turn of ``toggle_program`` to whether expandable segments are on from there; each turn is one allocation."""


def toggle_program(draw: random.Random) -> Iterator[Facts]:
    """Sizes at random while expandable segments are switched on, off and on again."""
    import torch

    live: list[Any] = []
    marks = []
    ooms = 0
    for turn in range(2500):
        if turn in SWITCHES:
            conf = f"expandable_segments:{SWITCHES[turn]}"
            torch.cuda.memory._set_allocator_settings(conf)
            marks.append([turn, conf])
        try:
            live.append(tensor(drawn_size(draw, 4)))
        except torch.cuda.OutOfMemoryError:
            ooms += 1
            drop_half(draw, live)
        while live and draw.random() < 0.45:
            live.pop(draw.randrange(len(live)))
    yield {"ooms": ooms, "marks": marks}


PROGRAMS: dict[str, Program] = {
    "random": random_program,
    "fill": fill_program,
    "pools": pools_program,
    "graphs": graphs_program,
    "toggle": toggle_program,
}


# --- recording ----------------------------------------------------------------------------------------------------


def record(job: Job, folder: Path) -> None:
    """Run one job in this process, whose environment holds its conf, and write what was recorded."""
    import torch

    torch.cuda.init()
    torch.cuda.set_device(0)
    free, total = torch.cuda.mem_get_info()
    if job.fraction is not None:
        torch.cuda.set_per_process_memory_fraction(job.fraction)
    torch.cuda.memory._record_memory_history(max_entries=10**7, context=None)
    running = PROGRAMS[job.program](random.Random(job.seed))
    noted = next(running)
    snapshot = torch.cuda.memory._snapshot()
    facts = {
        "memory_stats": torch.cuda.memory_stats(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "total_memory": total,
        "conf": job.conf,
        "workload": job.program,
        "marks": [],
        "free_at_start": free,
        **noted,
    }
    if job.fraction is not None:
        facts["memory_fraction"] = job.fraction
    with lzma.open(folder / f"{job.name}.pickle.xz", "wb", preset=6) as file:
        pickle.dump(snapshot, file)
    (folder / f"{job.name}.json").write_text(json.dumps(facts, default=str))
    events = sum(map(len, snapshot["device_traces"]))
    print(f"{job.name:22} {events:7,} events {noted}")


def in_own_process(job: Job, folder: Path) -> str:
    """Run one job in a process of its own; what it said, or how it failed."""
    conf = {"PYTORCH_ALLOC_CONF": job.conf} if job.conf else {}
    command = [sys.executable, __file__, "--here", str(folder), job.name]
    try:
        done = subprocess.run(
            command, env={**os.environ, **conf}, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{job.name:22} not done after {SECONDS} s"
    return done.stdout.strip() or f"{job.name:22} failed with {done.returncode}: {done.stderr.strip()[-300:]}"


def main(arguments: list[str]) -> None:
    """Record the jobs named, or all."""
    here = arguments[:1] == ["--here"]
    folder, *names = arguments[here:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for job in JOBS:
        if job.name not in names and names:
            continue
        if here:
            record(job, Path(folder))
        else:
            start = time.monotonic()
            print(in_own_process(job, Path(folder)), f"{time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
