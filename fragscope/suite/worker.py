"""One recording in a process of its own: run a variant, keep its Trace, decide it under every setting asked for."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fragscope.allocator import Counters, Replay, ReplaySettings, Span, Verification, card_named, replay
from fragscope.errors import FragscopeError, UnsupportedError, UsageError, printable
from fragscope.results import (
    AfterEmptyCache,
    AssumptionRecord,
    Calls,
    Case,
    DeviceKind,
    EstimatedOp,
    LossRecord,
    OomRecord,
    Outcome,
    Peak,
    Role,
    VerifyRecord,
)
from fragscope.suite.discover import load_scenarios
from fragscope.suite.scenario import Case as ScenarioCase
from fragscope.suite.scenario import Recorder, Scenario, SkipCase, Value
from fragscope.trace import RequestKind, Trace, write_trace
from fragscope.trace.containers import write_atomically

if TYPE_CHECKING:
    from fragscope.record.cuda import PhaseStatistics


@dataclass(frozen=True, slots=True)
class CaseTask:
    """One result to make from a recording."""

    id: str
    digest: str
    settings: ReplaySettings


@dataclass(frozen=True, slots=True)
class Task:
    """One recording, and the cases it may serve. The first case's settings are those it is recorded under."""

    file: Path
    root: Path
    scenario: str
    preset: str
    variant: str
    role: Role
    expect: Outcome
    values: tuple[tuple[str, Value], ...]
    changed: tuple[tuple[str, Value], ...]
    device: DeviceKind
    cases: tuple[CaseTask, ...]
    out: Path


class Report(msgspec.Struct):
    """What a worker hands back.

    Attributes:
        cases: results.
        again: ids of cases that need a recording of their own, since the program observed memory state or would not
            have gone on unchanged.
    """

    cases: list[Case]
    again: list[str] = []


class NumericReport(msgspec.Struct):
    """Outcome of a numeric step: facts for results.json, and the variants that are wrong with the reason."""

    numeric: dict[str, Any]
    wrong: dict[str, str]


def report_path(out: Path, key: str) -> Path:
    """Where the worker of a task puts its report."""
    return out / "work" / f"{key}.json"


def log_path(out: Path, key: str) -> Path:
    """Where what the program prints goes."""
    return out / "logs" / f"{key}.log"


def enter(log: Path) -> None:
    """Make this process a worker: output to its log, Ctrl-C left to the parent, one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def run_task(task: Task) -> None:
    """Process entry: record and write the report."""
    key = task.cases[0].digest
    enter(log_path(task.out, key))
    report = record(task)
    write_atomically(report_path(task.out, key), msgspec.json.encode(report))


def record(task: Task) -> Report:
    """Run the variant on its device and decide the recording under every setting."""
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    recording = _on_cuda(task) if task.device == "cuda" else _on_virtual(task)
    sources = _sources(task)
    trace = recording.trace
    observed = trace is not None and trace.count(RequestKind.OBSERVATION) > 0
    cases: list[Case] = []
    again: list[str] = []
    for position, wanted in enumerate(task.cases):
        decided = None
        if trace is not None:
            first = position == 0
            decided = replay(trace, wanted.settings, verify=first and task.device == "cuda")
        if position and (decided is None or observed or recording.outcome != "ok" or decided.ooms):
            again.append(wanted.id)
            continue
        elapsed = time.perf_counter() - began
        result = _result(task, wanted, recording, decided, sources, elapsed)
        if decided is not None:
            file = task.out / "traces" / f"{wanted.digest}.fscope"
            write_trace(decided.trace, file)
            result = msgspec.structs.replace(result, trace=str(file.relative_to(task.out)))
        cases.append(result)
        began = time.perf_counter()
    return Report(cases, again)


@dataclass(frozen=True, slots=True)
class _Recording:
    """What running a variant gave.

    Attributes:
        trace: None where the measured phase was never entered.
        statistics: PyTorch's own peaks and ends of the phase, from a GPU only.
    """

    trace: Trace | None
    outcome: Outcome
    message: str
    estimated: list[EstimatedOp]
    statistics: PhaseStatistics | None = None


def _on_virtual(task: Task) -> _Recording:
    from fragscope.record.virtual import VirtualDevice

    settings = task.cases[0].settings
    device = VirtualDevice(card_named(settings.card), settings, task.root)
    recorder = _PhaseRecorder(device.memory)
    with device:
        outcome, message, measured = _run_body(task, recorder)
        trace = device.trace(_provenance(task)) if measured else None
    estimated = [EstimatedOp(op, calls, where) for op, (calls, where) in sorted(device.estimated.items())]
    return _Recording(trace, outcome, message, estimated)


def _on_cuda(task: Task) -> _Recording:
    from fragscope.record.cuda import CudaRecorder

    cuda = CudaRecorder()
    recorder = _PhaseRecorder(cuda)
    outcome, message, measured = _run_body(task, recorder)
    trace = cuda.finish(_provenance(task)) if measured else None
    return _Recording(trace, outcome, message, [], cuda.statistics)


def _run_body(task: Task, recorder: _PhaseRecorder) -> tuple[Outcome, str, bool]:
    """Run the variant; outcome, message and whether the measured phase was entered."""
    import torch

    variant = _scenario(task).variants[task.variant]
    case = ScenarioCase(task.scenario, task.preset, task.variant, dict(task.values), recorder)
    outcome: Outcome = "ok"
    message = ""
    try:
        variant.body(case)
    except BaseException as e:
        outcome, message = _outcome_of(e, torch.OutOfMemoryError, task)
        # The frames of the error hold the program's tensors; their end is not part of what was measured.
        recorder.end_phase()
        traceback.clear_frames(e.__traceback__)
        del e
    if outcome == "ok" and not case.measured:
        outcome, message = "crash", "the scenario never entered case.measure()"
    return outcome, message, case.measured


class _PhaseRecorder:
    """Marks the phase once at each end, whatever happens inside."""

    def __init__(self, target: Recorder) -> None:
        self._target = target
        self._open = False

    def begin_phase(self, name: str) -> None:
        self._target.begin_phase(name)
        self._open = True

    def end_phase(self) -> None:
        if self._open:
            self._target.end_phase()
            self._open = False


def _scenario(task: Task) -> Scenario:
    if str(task.root) not in sys.path:
        sys.path.insert(0, str(task.root))
    for scenario in load_scenarios(task.file):
        if scenario.name == task.scenario and task.variant in scenario.variants:
            return scenario
    raise UsageError(f"{task.file}: no longer defines {task.scenario}/{task.variant}")


def _outcome_of(error: BaseException, oom: type[BaseException], task: Task) -> tuple[Outcome, str]:
    if isinstance(error, oom):
        return "oom", printable(str(error), 600)
    if isinstance(error, UnsupportedError):
        return "unsupported", printable(str(error), 600)
    if isinstance(error, SkipCase):
        return "skipped", printable(str(error), 600)
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(("<frozen", str(Path(__file__).parents[1]))) and "/torch/" not in frame.filename:
            where = f" (at {_relative(frame.filename, task.root)}:{frame.lineno})"
    if not isinstance(error, FragscopeError):
        traceback.print_exception(error)
    return "crash", printable(f"{type(error).__name__}: {error}{where}", 600)


def _relative(file: str, root: Path) -> str:
    return file[len(str(root)) + 1 :] if file.startswith(f"{root}/") else file


def _provenance(task: Task) -> dict[str, str]:
    values = " ".join(f"{k}={v}" for k, v in task.values)
    return {
        "scenario": f"{task.scenario}/{task.preset}/{task.variant}",
        "values": values,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _sources(task: Task) -> dict[str, str]:
    """SHA-256 of the user's own modules that are loaded: the code whose edit makes this result stale."""
    installed = tuple(f"{os.path.realpath(p)}/" for p in {sys.prefix, sys.base_prefix, Path(__file__).parents[1]})
    files = {str(task.file)}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.endswith(".py") and "-packages/" not in file:
            files.add(os.path.realpath(file))
    out: dict[str, str] = {}
    for file in sorted(files):
        if file.startswith(installed):
            continue
        try:
            out[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError:
            continue
    return out


def _result(
    task: Task,
    wanted: CaseTask,
    recording: _Recording,
    decided: Replay | None,
    sources: dict[str, str],
    seconds: float,
) -> Case:
    import torch

    settings = wanted.settings
    facts: dict[str, Any] = {}
    if decided is not None and decided.measured is not None:
        facts = _figures(decided, decided.measured, decided.trace)
        facts["exact"] = decided.exact and not recording.estimated and recording.outcome == "ok"
        if decided.verify is not None:
            facts["verify"] = _verified(decided.verify, decided.measured, recording.statistics)
    return Case(
        id=wanted.id,
        digest=wanted.digest,
        scenario=task.scenario,
        preset=task.preset,
        variant=task.variant,
        role=task.role,
        params=dict(task.values),
        changed=dict(task.changed),
        conf=settings.conf,
        torch=settings.rules.torch,
        torch_installed=str(torch.__version__),
        card=settings.card,
        device=task.device,
        capacity=settings.capacity,
        outcome=recording.outcome,
        expected_outcome=task.expect,
        estimated_ops=recording.estimated,
        seconds=round(seconds, 3),
        message=recording.message,
        sources=sources,
        **facts,
    )


def _verified(decisions: Verification, span: Span, statistics: PhaseStatistics | None) -> VerifyRecord:
    """The model against what the GPU's allocator did, and against PyTorch's own statistics of the phase."""
    compared, wrong = decisions.compared, decisions.mismatches
    first = None
    if decisions.first is not None:
        d = decisions.first
        first = f"event {d.event}: recorded {d.recorded}, modelled {d.modelled}"
    if statistics is not None:
        for what, theirs, ours in (("peak", statistics.peak, span.peak), ("end", statistics.end, span.end)):
            for name, value in theirs.items():
                compared += 1
                if getattr(ours, name) != value:
                    wrong += 1
                    first = first or f"{what} {name}: PyTorch says {value}, the model {getattr(ours, name)}"
    return VerifyRecord(compared, wrong, first)


def _figures(decided: Replay, span: Span, trace: Trace) -> dict[str, Any]:
    return {
        "base": span.base.allocated,
        "end_live": span.end.allocated,
        "transient": span.transient,
        "retained": span.retained,
        "peak": _peak(span.peak),
        "end": _peak(span.end),
        "after_empty_cache": AfterEmptyCache(span.reserved_after_empty_cache),
        "segments_peak": span.segments_peak,
        "allocs": span.allocs,
        "driver_calls": Calls(span.calls.alloc, span.calls.free, span.calls.sync),
        "ooms": [OomRecord(o.event, o.requested, o.rounded, o.stream) for o in decided.ooms],
        "retries": span.retries,
        "lost": [LossRecord(x.code, x.detail, x.events) for x in trace.lost],
        "assumptions": [AssumptionRecord(a.code, a.effect, a.events, a.detail) for a in decided.assumptions],  # type: ignore[arg-type]
    }


def _peak(counters: Counters) -> Peak:
    return Peak(*(getattr(counters, name) for name in Counters.__dataclass_fields__))


# --- the numeric step ---------------------------------------------------------------------------------------------


def run_numeric(task: Task, device: str, key: str) -> None:
    """Process entry: compare all variants on real data and write the report."""
    enter(log_path(task.out, key))
    write_atomically(report_path(task.out, key), msgspec.json.encode(compare_numerics(_scenario(task), device)))


def compare_numerics(scenario: Scenario, device: str) -> NumericReport:
    """Whether every variant computes what the reference, or else the first variant, computes, bit for bit."""
    import torch

    assert scenario.outputs is not None
    torch.set_num_threads(1)
    against = "reference" if scenario.expected is not None else next(iter(scenario.variants))
    expected = scenario.expected(device) if scenario.expected is not None else scenario.outputs(against, device)
    wrong: dict[str, str] = {}
    for variant in scenario.variants:
        torch.manual_seed(0)
        try:
            problem = _difference(scenario.outputs(variant, device), expected)
        except Exception as e:
            traceback.print_exception(e)
            problem = f"{type(e).__name__}: {e}"
        if problem:
            wrong[variant] = printable(problem, 300)
    facts = {
        "device": device,
        "compared_with": against,
        "variants": len(scenario.variants),
        "tensors": len(expected),
        "bytes": sum(t.nbytes for t in expected),
        "agree": not wrong,
    }
    return NumericReport(facts, wrong)


def _difference(got: Any, expected: Any) -> str:
    import torch

    if len(got) != len(expected):
        return f"makes {len(got)} tensors, not {len(expected)}"
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape:
            return f"tensor {number} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        if a.dtype != b.dtype:
            return f"tensor {number} is of type {a.dtype}, not {b.dtype}"
        x, y = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b))
        differing = int((x != y).sum())
        if differing:
            return f"tensor {number} differs in {differing} of {x.numel()} bytes"
    return ""
