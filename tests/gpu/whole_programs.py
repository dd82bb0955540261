"""Run model_programs.py on this machine's GPU and on the virtual device, and hold the figures against each other.

    python tests/gpu/whole_programs.py FOLDER [--virtual-only] [--seconds N] [PROGRAM ...]
    python tests/gpu/whole_programs.py --table RESULTS.json

Each program runs under no conf and under expandable segments, in a process of its own, forked from this one, which has
the libraries loaded and never touches CUDA. A third run on the GPU, under PyTorch's profiler, tells what each operator
allocates. To the folder go ``results.json``, ``table.md``, the recordings of both devices, and
``footprints-PROGRAM.json.xz``. A program that fails is a line of the table. ``--virtual-only`` needs no GPU and takes
the card for an H100. ``--table`` prints the tables of a run once more, and needs none either.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import lzma
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from model_programs import PROGRAMS
from program_report import assumed_in, report, requests_compared, verified_in

from fragscope.allocator import Card, ReplaySettings, card_named, rules_for
from fragscope.record.virtual import VirtualDevice
from fragscope.trace import RequestKind, write_trace

CONFS = {"default": "", "expandable": "expandable_segments:True"}
# Imported once, before any process is forked; a program whose library is missing fails in its own process.
LIBRARIES = (
    "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.bert.modeling_bert", "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers.generation.utils", "safetensors.torch",
    "torchvision.models", "timm", "torch._dynamo", "torch.utils.cpp_extension",
)  # fmt: skip
SIDES = ("virtual", "card")
CARD_JOBS = 2  # at a time; all together they take a small part of a card, and each counts its own memory


@dataclass
class Job:
    """One process.

    Attributes:
        name: of the files it leaves.
        run: what it does; the result is kept as JSON.
        on_card: it uses the GPU.
        conf: allocator settings of its environment.
    """

    name: str
    run: Callable[[], Any]
    on_card: bool = False
    conf: str = ""
    result: Any = None
    error: str = ""
    started: float = 0.0
    seconds: float = 0.0


@dataclass
class Jobs:
    """Runs jobs: few on the GPU, and ``beside`` on the virtual device at the same time."""

    folder: Path
    seconds: float
    beside: int
    running: dict[int, Job] = field(default_factory=dict)

    def run(self, jobs: list[Job]) -> None:
        waiting = list(jobs)
        while waiting or self.running:
            for job in [j for j in waiting if self._room(j)]:
                if self._room(job):
                    waiting.remove(job)
                    self._start(job)
            self._reap()
            time.sleep(0.02)

    def _room(self, job: Job) -> bool:
        same = sum(j.on_card == job.on_card for j in self.running.values())
        return same < (CARD_JOBS if job.on_card else self.beside)

    def _start(self, job: Job) -> None:
        job.started = time.monotonic()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._child(job)
        self.running[pid] = job

    def _child(self, job: Job) -> None:
        code = 1
        try:
            log = os.open(self._file(job, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
                os.environ.pop(variable, None)
            if job.conf:
                os.environ["PYTORCH_CUDA_ALLOC_CONF"] = job.conf
            self._file(job, "json").write_text(json.dumps(job.run()))
            code = 0
        except BaseException as e:
            traceback.print_exc()
            self._file(job, "error").write_text(f"{type(e).__name__}: {str(e)[:500]}")
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        for pid, job in list(self.running.items()):
            ended, _ = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() - job.started > self.seconds
            if not ended and not late:
                continue
            if not ended:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del self.running[pid]
            job.seconds = round(time.monotonic() - job.started, 1)
            self._read(job, late and not ended)
            print(f"{job.name:40} {job.seconds:6.1f} s  {job.error or 'ok'}", flush=True)

    def _read(self, job: Job, late: bool) -> None:
        if late:
            job.error = f"stopped after {self.seconds:g} s"
        elif self._file(job, "json").exists():
            job.result = json.loads(self._file(job, "json").read_text())
        elif self._file(job, "error").exists():
            job.error = self._file(job, "error").read_text()
        else:
            job.error = "the process died; see its log"

    def _file(self, job: Job, kind: str) -> Path:
        return self.folder / "jobs" / f"{job.name}.{kind}"


def ask() -> dict[str, Any]:
    """What the GPU says of itself."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": "this-machine", "product": properties.name, "total": total, "free": free,
        "capability": [properties.major, properties.minor], "multiprocessors": properties.multi_processor_count,
        "l2": properties.L2_cache_size, "source": "this machine",
    }  # fmt: skip


def figures() -> dict[str, int]:
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def on_virtual(program: str, card: Card, conf: str, file: Path) -> dict[str, Any]:
    settings = ReplaySettings(rules_for(torch.__version__.split("+")[0]), card.name, card.total, card.free, conf=conf)
    device = VirtualDevice(card, settings, Path(__file__).parents[2])
    with device:
        PROGRAMS[program]()
        peak = figures()
        trace = device.trace({"program": program, "conf": conf})
    write_trace(trace, file)
    estimated = {op: [calls, within_package(place)] for op, (calls, place) in sorted(device.estimated.items())}
    allocations = trace.count(RequestKind.ALLOC)
    return {**peak, "allocations": allocations, "estimated": estimated, "assumed": assumed_in(file)}


def within_package(place: str) -> str:
    """A place in an installed package, without the folders of this machine."""
    return place.rpartition("/site-packages/")[2]


def on_card(program: str, conf: str, file: Path) -> dict[str, Any]:
    from fragscope import Recorder, RecorderOptions, Stacks

    recorder = Recorder(RecorderOptions(stacks=Stacks.PYTHON))
    recorder.start()
    try:
        PROGRAMS[program]()
        peak = figures()
    finally:
        trace = recorder.stop({"program": program, "conf": conf})
        write_trace(trace, file)
    lost = [str(x) for x in trace.lost]
    return {**peak, "allocations": trace.count(RequestKind.ALLOC), "lost": lost, "verified": verified_in(file)}


def footprints(program: str, file: Path) -> dict[str, int]:
    """Write what the operators allocated; returns the largest temporary bytes of each."""
    from op_footprints import footprints_of

    found = footprints_of(PROGRAMS[program], "cuda")
    versions = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(0)}
    with lzma.open(file, "wt") as stream:
        json.dump({"versions": versions, "program": program, "operators": found}, stream, separators=(",", ":"))
    return {name: max(f["temporary"] for f in kinds) for name, kinds in found.items()}


def results_of(folder: Path, card: Card, programs: list[str], jobs: dict[tuple[str, str], Job]) -> dict[str, Any]:
    """All that the tables need, as JSON."""
    versions = {"torch": torch.__version__, **{m: _version(m) for m in ("transformers", "timm", "safetensors")}}
    found: dict[str, Any] = {"versions": versions, "card": card.product, "programs": {}}
    for program in programs:
        own = {kind: job for (name, kind), job in jobs.items() if name == program}
        kept = {kind: {"result": j.result, "error": j.error, "seconds": j.seconds} for kind, j in own.items()}
        for tag in CONFS:
            if all(f"{side}-{tag}" in own and not own[f"{side}-{tag}"].error for side in SIDES):
                files = (folder / f"{program}-{side}-{tag}.fscope" for side in SIDES)
                kept[f"compared-{tag}"] = requests_compared(*files)
        if (profiled := own.get("footprints")) is not None and profiled.result:
            unknown = {op for job in own.values() for op in (job.result or {}).get("estimated", ())}
            kept["footprints"]["result"] = {op: n for op, n in profiled.result.items() if op in unknown}
        found["programs"][program] = kept
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("programs", nargs="*", metavar="PROGRAM")
    parser.add_argument("--virtual-only", action="store_true")
    parser.add_argument("--seconds", type=float, default=90.0, help="that a process may take")
    parser.add_argument("--table", type=Path, metavar="RESULTS.json", help="print the tables of a run; nothing else")
    options = parser.parse_intermixed_args()
    if (options.folder is None) == (options.table is None):
        parser.error("name either FOLDER or --table RESULTS.json")
    if options.table is not None:
        try:
            print(report(json.loads(options.table.read_text())), end="")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            parser.error(f"{options.table} is no results.json of this command: {type(e).__name__}: {e}")
        return
    unknown = set(options.programs) - PROGRAMS.keys()
    if unknown:
        parser.error(f"no program {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}")
    programs = options.programs or list(PROGRAMS)
    folder: Path = options.folder
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    for old in (folder / "jobs").iterdir():
        old.unlink()
    warnings.simplefilter("ignore")
    # Libraries that are imported ask whether there is a GPU; without this the answer makes CUDA unusable in forks.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except Exception as e:
            print(f"{name} cannot be imported: {type(e).__name__}: {e}")
    runner = Jobs(folder, options.seconds, max(2, (os.cpu_count() or 2) // 4))
    card = card_named("h100-80gb")
    if not options.virtual_only:
        asked = Job("ask", ask, on_card=True)
        runner.run([asked])
        if asked.error:
            sys.exit(f"the GPU cannot be used: {asked.error}")
        card = replace(card, **{**asked.result, "capability": tuple(asked.result["capability"])})
    jobs: dict[tuple[str, str], Job] = {}
    for program in programs:
        for tag, conf in CONFS.items():
            file = folder / f"{program}-virtual-{tag}.fscope"
            jobs[program, f"virtual-{tag}"] = Job(
                f"{program}-virtual-{tag}", lambda p=program, c=conf, f=file: on_virtual(p, card, c, f)
            )
            if not options.virtual_only:
                file = folder / f"{program}-card-{tag}.fscope"
                jobs[program, f"card-{tag}"] = Job(
                    f"{program}-card-{tag}", lambda p=program, c=conf, f=file: on_card(p, c, f), True, conf
                )
        if not options.virtual_only:
            file = folder / f"footprints-{program}.json.xz"
            jobs[program, "footprints"] = Job(
                f"{program}-footprints", lambda p=program, f=file: footprints(p, f), on_card=True
            )
    runner.run(list(jobs.values()))
    results = results_of(folder, card, programs, jobs)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    text = report(results)
    print("\n" + text)
    (folder / "table.md").write_text(text)
    sys.exit(1 if any(job.error for job in jobs.values()) else 0)


def _version(module: str) -> str:
    return str(getattr(sys.modules.get(module), "__version__", "absent"))


if __name__ == "__main__":
    main()
