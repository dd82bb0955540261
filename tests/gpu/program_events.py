"""Keep what whole programs asked for on a GPU, as the data of tests/integration/test_whole_programs.py.

    python tests/gpu/program_events.py FOLDER OUT.json.xz PROGRAM ...

FOLDER is one that whole_programs.py filled. For each program, by conf: the peaks that PyTorch counted, and without a
conf the events: ``["alloc", bytes]`` and ``["free", n]``, n counting the program's own allocations.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

from fragscope.trace import RequestKind, Trace, load_trace


def events_of(trace: Trace) -> list[list[Any]]:
    """Allocations and frees in order."""
    requests = trace.requests
    numbers: dict[int, int] = {}
    events: list[list[Any]] = []
    for kind, size, id_ in zip(requests.kind.tolist(), requests.size.tolist(), requests.id.tolist(), strict=True):
        if kind == RequestKind.ALLOC:
            numbers[id_] = len(numbers)
            events.append(["alloc", size])
        elif kind == RequestKind.FREE:
            events.append(["free", numbers[id_]])
    return events


def main(folder: Path, out: Path, *programs: str) -> None:
    results = json.loads((folder / "results.json").read_text())
    kept: dict[str, Any] = {}
    for name in programs:
        cards = {c: results["programs"][name][f"card-{c}"]["result"] for c in ("default", "expandable")}
        kept[name] = {conf: {k: card[k] for k in ("allocated", "reserved")} for conf, card in cards.items()}
        kept[name]["events"] = events_of(load_trace(folder / f"{name}-card-default.fscope"))
    facts = {"card": results["card"], "versions": results["versions"], "programs": kept}
    out.write_bytes(lzma.compress(json.dumps(facts, separators=(",", ":")).encode(), preset=9))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
