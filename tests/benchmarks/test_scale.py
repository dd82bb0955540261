"""What ten times as many events cost, step by step: ``pytest tests/benchmarks/test_scale.py -s``.

Every step runs in a process of its own and tells its processor time an event, which other programs on the machine
disturb less than the clock, and the most memory that it held beyond what was there before it. The figure to quote is
the last column: time an event at the larger size over that at the smaller one, in one run. Whatever grows faster than
the events shows there on any machine. ``FRAGSCOPE_BENCH_EVENTS=10000000`` is the size that the documentation tells of.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from long_traces import SETTINGS, long_recording

from fragscope.allocator import Tape, replay, settle, tape_of
from fragscope.allocator.engine.compiled import compile_now
from fragscope.measure import lifetimes, timeline
from fragscope.trace import Trace, load_trace, write_trace

EVENTS = int(os.environ.get("FRAGSCOPE_BENCH_EVENTS", "1000000"))
SMALLER = 10
RELEASES = 1_000  # one in so many events is an ``empty_cache()`` that the recording does not name
GROWTH = 4.0  # memory that no longer fits the caches stays below it, what is quadratic is at 10


def _ready(file: Path) -> Trace:
    compile_now()
    return load_trace(file)


def _tape(file: Path) -> Tape:
    return tape_of(_ready(file))


def _settled(file: Path) -> Tape:
    return settle(_tape(file), SETTINGS)


def _decided(file: Path) -> Trace:
    return replay(_ready(file), SETTINGS).trace


def _written(trace: Trace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_trace(trace, Path(folder) / "trace.fscope")


STEPS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], object]]] = {
    "load .fscope": (lambda file: file, load_trace),
    "make ready for replays": (_ready, tape_of),
    "tell releases apart": (_tape, lambda tape: settle(tape, SETTINGS)),
    "replay, figures only": (_settled, lambda tape: replay(tape, SETTINGS, decisions=False, compiled=True)),
    "replay with decisions": (_settled, lambda tape: replay(tape, SETTINGS, compiled=True)),
    "replay interpreted": (_settled, lambda tape: replay(tape, SETTINGS, decisions=False, compiled=False)),
    "verify": (_tape, lambda tape: replay(tape, SETTINGS, verify=True, compiled=True)),
    "lifetimes": (_decided, lifetimes),
    "timeline": (_decided, timeline),
    "write .fscope": (_decided, _written),
}
"""What is there before a step, and the step."""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, Path]]:
    """Recordings of both sizes: how many events, and where."""
    out = []
    for events in (EVENTS // SMALLER, EVENTS):
        file = tmp_path_factory.mktemp("scale") / f"{events}.fscope"
        write_trace(long_recording(events, releases=events // RELEASES), file)
        out.append((events, file))
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("step", STEPS)
def test_growth(step: str, recordings: list[tuple[int, Path]]) -> None:
    """Time an event stays what it is where there are ten times as many."""
    each = []
    line = f"\n{step:24}"
    for events, file in recordings:
        said = subprocess.run([sys.executable, __file__, step, file], stdout=subprocess.PIPE, check=True).stdout
        seconds, peak = json.loads(said)
        each.append(seconds / events)
        line += f" | {events:>10,} events {seconds:8.2f} s {1e6 * each[-1]:7.3f} µs an event, at most {peak:8,.0f} MiB"
    growth = each[1] / each[0]
    print(f"{line} | x {growth:.2f}")
    assert growth < GROWTH


def _memory(name: str) -> float:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def main(step: str, file: str) -> None:
    """One step: its processor time in seconds and its most memory in MiB."""
    prepare, run = STEPS[step]
    given = prepare(Path(file))
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far starts over
    held, start = _memory("VmRSS"), time.process_time()
    result = run(given)
    print(json.dumps([time.process_time() - start, _memory("VmHWM") - held]))
    del result


if __name__ == "__main__":
    main(*sys.argv[1:])
