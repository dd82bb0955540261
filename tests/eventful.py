"""A Trace with every kind of request and decision in it, and the members of its file."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from snapshots import BASE, MIB

from fragscope.trace import (
    DecisionKind,
    DecisionLog,
    Frame,
    Loss,
    Observation,
    RequestKind,
    RequestLog,
    SegmentState,
    Settings,
    StackTable,
    Trace,
    write_trace,
)

K, D = RequestKind, DecisionKind


def eventful() -> Trace:
    """A recording that began late and has every kind of request and decision in it."""
    log, decided = RequestLog(), DecisionLog()
    decided.request = log.append(K.START)
    decided.append(D.SEGMENT_ALLOC, -1, BASE, 2 * MIB, 0, 0)
    decided.append(D.SEGMENT_MAP, -1, 2 * BASE, 20 * MIB, 5, 0)
    decided.request = log.append(K.HELD, id=0, size=400)
    decided.append(D.ALLOC, 0, BASE + 512, 512, 0, 0)
    decided.request = log.append(K.HELD, id=1, size=12 * MIB, stream=5)
    decided.append(D.ALLOC, 1, 2 * BASE, 12 * MIB, 5, 0)
    log.append(K.MEMORY_FRACTION, size=5 * 10**8)
    log.append(K.PHASE_BEGIN, phase=1)
    log.append(K.POOL_CREATE, pool=1, size=1)
    log.append(K.SCOPE_OPEN, pool=1)
    decided.request = log.append(K.ALLOC, id=2, size=3 * MIB, pool=1, stack=0, phase=1)
    decided.append(D.SEGMENT_ALLOC, -1, 3 * BASE // 2, 20 * MIB, 0, 1)
    decided.append(D.ALLOC, 2, 3 * BASE // 2, 3 * MIB, 0, 1)
    log.append(K.SCOPE_CLOSE, pool=1)
    log.append(K.RECORD_STREAM, id=2, stream=7)
    decided.request = log.append(K.FREE, id=2, phase=1)
    decided.append(D.FREE_REQUESTED, 2, 3 * BASE // 2, 3 * MIB, 0, 1)
    decided.request = log.append(K.USES_DONE, id=2)
    decided.append(D.FREE_COMPLETED, 2, 3 * BASE // 2, 3 * MIB, 0, 1)
    log.append(K.POOL_RELEASE, pool=1)
    log.append(K.POOL_RELEASE, pool=1)
    decided.request = log.append(K.EMPTY_CACHE)
    decided.append(D.SEGMENT_FREE, -1, 3 * BASE // 2, 20 * MIB, 0, 1)
    log.append(K.PHASE_END, phase=1)
    log.append(K.SETTINGS, size=1)
    log.append(K.RELEASE_SEEN)
    decided.request = log.append(K.ALLOC, id=3, size=2**61)
    decided.append(D.OOM, 3, 2**36, 2**61, 0, 0)
    log.append(K.RAW_ALLOC, id=4, size=5 * MIB)
    log.append(K.RAW_FREE, id=4, size=5 * MIB)
    log.append(K.CAPTURE_BEGIN)
    log.append(K.CAPTURE_END)
    log.append(K.OBSERVATION, size=0)
    decided.request = log.append(K.FREE, id=1, stream=5)
    decided.append(D.FREE_REQUESTED, 1, 2 * BASE, 12 * MIB, 5, 0)
    decided.append(D.FREE_COMPLETED, 1, 2 * BASE, 12 * MIB, 5, 0)
    decided.append(D.SEGMENT_UNMAP, -1, 2 * BASE, 20 * MIB, 5, 0)
    ordinary = ((BASE, 512, "free"), (BASE + 512, 512, "allocated"), (BASE + 1024, 2 * MIB - 1024, "free"))
    mapped = ((2 * BASE, 12 * MIB, "pending"), (2 * BASE + 12 * MIB, 8 * MIB, "free"))
    stood = SegmentState(BASE, 2 * MIB, 0, 0, ordinary)  # type: ignore[arg-type]
    return Trace(
        requests=log.finish(),
        decisions=decided.finish(),
        stacks=StackTable(((Frame("model.py", 3, "f"),),)),
        phases=("", "load"),
        pools=((0, 0), (0, 3)),
        observations=(Observation("torch.cuda.mem_get_info", "loop.py:9"),),
        settings=Settings(memory_fraction=0.75, capacity=2**36, recorded={"max_split_size": "-1"}),
        torch="2.11.0",
        card="h100-80gb",
        device_total=85_017_493_504,
        confs=("", "expandable_segments:True"),
        initial=(stood, SegmentState(2 * BASE, 20 * MIB, 5, 0, mapped, 20 * MIB)),  # type: ignore[arg-type]
        final=(stood,),
        lost=(Loss("start_state", "recording began late", 2),),
        placement="recorded",
        source="snapshot",
    )


@cache
def members(*, has_decisions: bool = True) -> dict[str, bytes]:
    trace = eventful() if has_decisions else replace(eventful(), decisions=None, placement="modelled")
    with TemporaryDirectory() as folder:
        write_trace(trace, Path(folder) / "t")
        with zipfile.ZipFile(Path(folder) / "t") as z:
            return {name: z.read(name) for name in z.namelist()}


def pack(path: Path, members: dict[str, bytes]) -> Path:
    """A file of these members."""
    with zipfile.ZipFile(path, "w") as z:
        for name, data in members.items():
            z.writestr(name, data)
    return path
