"""How long each variant's measured phase takes on this machine's GPU, beside a plain copy of the same bytes.

    python tests/gpu/variant_times.py OUT.json NAME[/PRESET[/VARIANT]] ...
    python tests/gpu/variant_times.py OUT.json

The second prints what the first wrote, as a Markdown table.

No recording. A process for each scenario and preset; variants in turn, round by round, so that all meet the same
clocks. The phase is timed by the wall, from one idle device to the next: that is what a loader's user waits for, and
much of it is Python. The first round warms up and does not count. The copy is of as many bytes as are allocated when
the phase begins, in pieces of at most 1 GiB.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fragscope.cli.tables import markdown_table
from fragscope.record.cuda.edge import TorchEdge
from fragscope.record.device_memory import DeviceMemory, How

ROOT = Path(__file__).parents[2]
ROUNDS = 5
PIECE = 2**30
SECONDS = 240


class Watch:
    """Times one phase."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.base = 0
        self.peak = 0

    def begin_phase(self, name: str) -> None:
        import torch

        del name
        torch.cuda.synchronize()
        self.base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.seconds = time.perf_counter()

    def end_phase(self) -> None:
        import torch

        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.seconds
        self.peak = torch.cuda.max_memory_allocated()

    def take_device_memory(self, size: int, how: How) -> DeviceMemory:
        """For memory past the allocator."""
        taken, give = TorchEdge().take_device_memory(size, how, 0)
        return DeviceMemory(taken, how, give)

    def kernel(self, *described: object) -> None:
        """For kernels that torch does not see; their place in time is their own."""


def copy_seconds(size: int) -> float:
    """A copy of so many bytes within the device."""
    import torch

    piece = min(size, PIECE)
    source = torch.empty(piece, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for start in range(0, size, piece):
        rest = min(piece, size - start)
        target[:rest].copy_(source[:rest])
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(scenario_name: str, preset: str, variants: list[str]) -> dict[str, Any]:
    """All variants of one scenario and preset, in this process."""
    import torch

    from fragscope.suite.discover import load_scenarios, scenario_files
    from fragscope.suite.scenario import Case

    (scenario,) = (
        s for f in scenario_files([ROOT / "scenarios"]) for s in load_scenarios(f) if s.name == scenario_name
    )
    times: dict[str, list[float]] = {v: [] for v in variants}
    facts: dict[str, dict[str, Any]] = {v: {} for v in variants}
    copies: list[float] = []
    for round_ in range(ROUNDS + 1):
        for name in [v for v in variants if "failed" not in facts[v]]:
            watch = Watch()
            case = Case(scenario_name, preset, name, scenario.values_for(preset, {}), watch)
            try:
                scenario.variants[name].body(case)
            except Exception as e:  # out of memory, or an end of its own
                facts[name]["failed"] = f"{type(e).__name__}: {e}".partition(". GPU")[0][:160]
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            facts[name].update(base=watch.base, peak_allocated=watch.peak)
            if round_:
                times[name].append(watch.seconds)
        largest = max((f.get("base", 0) for f in facts.values()), default=0)
        if round_ and largest:
            copies.append(copy_seconds(largest))
            torch.cuda.empty_cache()
    out: dict[str, Any] = {"card": torch.cuda.get_device_name(0), "torch": torch.__version__, "variants": {}}
    for name in variants:
        taken = times[name]
        role = scenario.variants[name].role
        timed = {"median": statistics.median(taken), "fastest": min(taken), "rounds": len(taken)} if taken else {}
        out["variants"][name] = {"role": role, **facts[name], **timed}
    if copies:
        out["copy"] = {"bytes": largest, "median": statistics.median(copies), "fastest": min(copies)}
    return out


def table(results: dict[str, Any]) -> str:
    """A line a variant: median and fastest in milliseconds, and the median in copies of what the phase began with."""
    rows = [("case", "role", "median, ms", "fastest, ms", "copies")]
    for case, made in results.items():
        copy = made.get("copy")
        for variant, facts in made["variants"].items():
            if "median" in facts:
                took = (f"{facts['median'] * 1e3:,.1f}", f"{facts['fastest'] * 1e3:,.1f}")
                copies = f"{facts['median'] / copy['median']:,.0f}" if copy else "-"
            else:
                took, copies = ("-", "-"), facts.get("failed", "not timed")
            rows.append((f"{case}/{variant}", facts["role"], *took, copies))
    return "\n".join(markdown_table(rows, words=0))


def main() -> None:
    if sys.argv[1] == "--job":
        print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4].split(","))))
        return
    if len(sys.argv) == 2:
        print(table(json.loads(Path(sys.argv[1]).read_text())))
        return
    from fragscope.suite.discover import load_scenarios, scenario_files, select
    from fragscope.suite.installed import applicable

    scenarios = [s for f in scenario_files([ROOT / "scenarios"]) for s in load_scenarios(f)]
    wanted: dict[tuple[str, str], list[str]] = {}
    selections, left_out = applicable(select(scenarios, sys.argv[2:], [], []))
    for absent in left_out:
        print(f"{absent.variant}: not applicable: {absent.reason}")
    for selection in selections:
        wanted.setdefault((selection.scenario.name, selection.preset), []).append(selection.variant)
    results: dict[str, Any] = {}
    for (name, preset), variants in wanted.items():
        command = [sys.executable, __file__, "--job", name, preset, ",".join(variants)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}/{preset}: took longer than {SECONDS} s")
            continue
        if done.returncode:
            print(f"{name}/{preset}: failed: {done.stderr[-800:]}")
            continue
        results[f"{name}/{preset}"] = json.loads(done.stdout.splitlines()[-1])
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
