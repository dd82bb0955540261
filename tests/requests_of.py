"""Short traces written by hand: what a program asks for, one line each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fragscope.trace import (
    UNKNOWN_SIZE,
    DecisionKind,
    DecisionLog,
    Observation,
    RequestKind,
    RequestLog,
    Settings,
    Trace,
)

MIB = 2**20


def trace_of(*requests: tuple[Any, ...], torch: str = "2.11.0", failed: Iterable[int] = (), **fields: Any) -> Trace:
    """A trace of ``("alloc", id, bytes[, stream])``, ``("free", id)``, ``("uses", id, stream)``, ``("done", id)``,
    ``("raw", id, bytes)``, ``("raw free", id, bytes)``, ``("empty",)``, ``("seen", what)``,
    ``("fraction", f)`` and ``("conf", text)``; with ``failed`` the requests in these rows failed when recorded and all
    others were served."""
    log = RequestLog()
    observations = []
    confs: list[str] = []
    for name, *values in requests:
        match name:
            case "alloc":
                log.append(RequestKind.ALLOC, id=values[0], size=values[1], stream=values[2] if values[2:] else 0)
            case "free":
                log.append(RequestKind.FREE, id=values[0])
            case "uses":
                log.append(RequestKind.RECORD_STREAM, id=values[0], stream=values[1])
            case "done":
                log.append(RequestKind.USES_DONE, id=values[0])
            case "raw":
                log.append(RequestKind.RAW_ALLOC, id=values[0], size=values[1])
            case "raw free":
                log.append(RequestKind.RAW_FREE, id=values[0], size=values[1])
            case "empty":
                log.append(RequestKind.EMPTY_CACHE)
            case "seen":
                log.append(RequestKind.OBSERVATION, size=len(observations))
                observations.append(Observation(values[0], "loader.py:7"))
            case "fraction":
                log.append(RequestKind.MEMORY_FRACTION, size=round(values[0] * 10**9))
            case "conf":
                log.append(RequestKind.SETTINGS, size=len(confs))
                confs.append(values[0])
    decisions = DecisionLog()
    failed = set(failed)
    for row, (name, *values) in enumerate(requests):
        if failed and name == "alloc":
            decisions.request = row
            kind, size = (DecisionKind.OOM, 512) if row in failed else (DecisionKind.ALLOC, UNKNOWN_SIZE)
            decisions.append(kind, values[0], 0, size, 0, 0)
    values = {
        "requests": log.finish(),
        "decisions": decisions.finish() if failed else None,
        "observations": tuple(observations),
        "confs": tuple(confs),
        "torch": torch,
        "card": "h100-80gb",
        "settings": Settings(conf=fields.pop("conf", "")),
        "source": "cuda",
    }
    return Trace(**(values | fields))


def random_requests(seed: int, count: int, sizes: list[int], streams: int = 1) -> list[tuple[Any, ...]]:
    """Allocations and frees in random order; what is live is bounded by chance only."""
    random = np.random.default_rng(seed)
    out: list[tuple[Any, ...]] = []
    live: list[int] = []
    for number in range(count):
        if live and random.random() < 0.45:
            out.append(("free", live.pop(int(random.integers(len(live))))))
        else:
            out.append(("alloc", number, int(random.choice(sizes)), int(random.integers(streams))))
            live.append(number)
    return out
