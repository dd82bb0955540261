"""Record what each operator of footprint_cases allocates on this machine's GPU.

    python tests/gpu/record_footprints.py OUT.json [BEGINNING ...]

Writes, for each case, the events of a first and of a second run: ``["alloc", bytes]`` and ``["free", n]``, n counting
the run's own allocations; frees of earlier memory are left out. ``|`` separates the operator from the end of its
results. With beginnings of names, only those cases. Interrupted, it writes the cases that it has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import footprint_cases
import program_cases  # noqa: F401 - adds its cases to footprint_cases.COMPOSITES
import sweep_cases  # noqa: F401 - likewise

Events = list[list[Any]]


def entries() -> list[dict[str, Any]]:
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    return [e for e in trace if e["action"] in ("alloc", "free_completed")]


def record(make: footprint_cases.Case) -> Events:
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=1_000_000, clear_history=True)
    running = make()
    next(running)
    before = len(entries())
    next(running)
    torch.cuda.synchronize()
    middle = len(entries())
    running.close()
    del running
    after = entries()
    torch.cuda.memory._record_memory_history(enabled=None)
    out: Events = []
    live: dict[int, int] = {}
    for position, entry in enumerate(after[before:], start=before):
        if position == middle:
            out.append(["|"])
        if entry["action"] == "alloc":
            live[entry["addr"]] = sum(1 for e in out if e[0] == "alloc")
            out.append(["alloc", entry["size"]])
        elif entry["addr"] in live:
            out.append(["free", live.pop(entry["addr"])])
    if ["|"] not in out:
        out.append(["|"])
    return out


def main(path: str, *beginnings: str) -> None:
    versions = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(0)}
    try:
        import flashinfer

        footprint_cases.interleave_cases()
        versions["flashinfer"] = flashinfer.__version__
    except ImportError as e:
        print("no flashinfer:", e)
    results = {}
    for name, make in {**footprint_cases.CASES, **footprint_cases.COMPOSITES}.items():
        if beginnings and not name.startswith(beginnings):
            continue
        try:
            results[name] = {"first": record(make), "second": record(make)}
        except KeyboardInterrupt:
            print(f"interrupted at {name}")
            break
        except Exception as e:
            results[name] = {"error": f"{type(e).__name__}: {str(e)[:200]}"}
            torch.cuda.memory._record_memory_history(enabled=None)
        torch.cuda.empty_cache()
    Path(path).write_text(json.dumps({"versions": versions, "cases": results}, separators=(",", ":")))
    failed = [n for n, r in results.items() if "error" in r]
    print(f"{len(results)} cases, {len(failed)} failed", *(f"{n}: {results[n]['error']}" for n in failed), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
