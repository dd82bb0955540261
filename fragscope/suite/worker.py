"""One recording in a process of its own: run a variant, keep its Trace, decide it under every setting asked for."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from fragscope.allocator import (
    Card,
    Counters,
    Replay,
    ReplaySettings,
    Span,
    card_named,
    replay,
)
from fragscope.errors import FragscopeError, NotMeasuredError, UnsupportedError, UsageError, printable
from fragscope.measure import non_torch
from fragscope.record.cuda import PhaseStatistics, RecorderOptions, Stacks
from fragscope.record.cuda import Recorder as CudaRecorder
from fragscope.record.device_memory import DeviceMemory, How
from fragscope.record.virtual import VirtualDevice
from fragscope.results import (
    CAME_TO_ITS_END,
    AfterEmptyCache,
    AssumptionRecord,
    Calls,
    Case,
    DeviceKind,
    EstimatedOp,
    InstalledCode,
    LossRecord,
    OomRecord,
    Outcome,
    Peak,
    Role,
    VerifyRecord,
)
from fragscope.suite.discover import load_scenarios
from fragscope.suite.process import enter, innermost, leave, log_path, report_path
from fragscope.suite.scenario import Case as ScenarioCase
from fragscope.suite.scenario import EndCase, Scenario, Value
from fragscope.suite.sources import loaded_sources
from fragscope.suite.verification import installed_rules, verified_recording
from fragscope.trace import DecisionKind, RequestKind, Trace, write_trace
from fragscope.trace.containers import write_atomically
from fragscope.units import format_bytes

_SAMPLE_EVERY = 0.25  # seconds between samples of device memory outside the allocator


@dataclass(frozen=True, slots=True)
class CaseTask:
    """One result to make from a recording, and the outcome declared for it."""

    id: str
    digest: str
    settings: ReplaySettings
    expect: Outcome = "ok"


@dataclass(frozen=True, slots=True)
class Task:
    """One recording, and the cases it may serve. The first case's settings are those it is recorded under.

    Attributes:
        card: the card at hand and what is free of it, for a recording on CUDA.
        profile: the virtual card of the first case, which may be one that only the run knows; None for a shipped one.
        replays: whose code the variant replays.
        installed: the installed code that the variant runs.
    """

    file: Path
    root: Path
    scenario: str
    preset: str
    variant: str
    role: Role
    values: tuple[tuple[str, Value], ...]
    changed: tuple[tuple[str, Value], ...]
    device: DeviceKind
    cases: tuple[CaseTask, ...]
    out: Path
    timeout: float
    card: Card | None = None
    profile: Card | None = None
    replays: str | None = None
    installed: InstalledCode | None = None


class Report(msgspec.Struct):
    """What a worker hands back.

    Attributes:
        cases: results.
        again: ids of cases that need a recording of their own, since the program observed memory state, asked what
            the card is, or would not have gone on unchanged.
    """

    cases: list[Case]
    again: list[str] = []


def run_task(task: Task) -> None:
    """Process entry: record and write the report."""
    key = task.cases[0].digest
    enter(log_path(task.out, key), task.timeout)
    report = record(task)
    write_atomically(report_path(task.out, key), msgspec.json.encode(report))
    leave()


def record(task: Task) -> Report:
    """Run the variant on its device and decide the recording under every setting."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    recording = _on_cuda(task) if task.device == "cuda" else on_virtual(task, _virtual_device(task))
    sources = loaded_sources(task.file)
    trace = recording.trace
    observed = trace is not None and trace.count(RequestKind.OBSERVATION) > 0
    recorded_on = task.cases[0].settings.card
    cases: list[Case] = []
    again: list[str] = []
    verified: VerifyRecord | None = None
    for position, wanted in enumerate(task.cases):
        decided = None
        if trace is not None:
            try:
                if position == 0 and task.device == "cuda":
                    verified = verified_recording(trace, task.card, recording.statistics)
                if recording.any_card:
                    trace = replace(trace, card=wanted.settings.card)
                decided = replay(trace, wanted.settings)
            except UsageError as e:  # the model does not cover what was recorded
                recording = replace(recording, trace=None, outcome="unsupported", message=printable(str(e), 600))
                trace = None
        other_card = task.device == "virtual" and not recording.any_card and wanted.settings.card != recorded_on
        if position and (decided is None or observed or other_card or recording.outcome != "ok" or decided.ooms):
            again.append(wanted.id)
            continue
        elapsed = time.perf_counter() - began
        result = _result(task, wanted, recording, decided, verified, sources, elapsed)
        if decided is not None and trace is not None:
            file = task.out / "traces" / f"{wanted.digest}.fscope"
            # Where the model is wrong, what the card did is what there is to see, and to report.
            write_trace(trace if position == 0 and result.refuted else decided.trace, file)
            result = msgspec.structs.replace(result, trace=str(file.relative_to(task.out)))
        cases.append(result)
        began = time.perf_counter()
    return Report(cases, again)


@dataclass(frozen=True, slots=True)
class Recording:
    """What running a variant gave.

    Attributes:
        trace: None where the measured phase was never entered.
        statistics: PyTorch's own peaks and ends of the phase, from a GPU only.
        missing: bytes that something of a fixed size lacked.
        any_card: on every other virtual card it would have asked for the same.
    """

    trace: Trace | None
    outcome: Outcome
    message: str
    estimated: list[EstimatedOp]
    statistics: PhaseStatistics | None = None
    missing: int | None = None
    any_card: bool = False


def _virtual_device(task: Task) -> VirtualDevice:
    settings = task.cases[0].settings
    return VirtualDevice(task.profile or card_named(settings.card), settings, task.root)


def on_virtual(task: Task, device: VirtualDevice) -> Recording:
    """Run the variant on a virtual device, whatever device the task is for."""
    absent = _absent_code(task)
    if absent:
        return Recording(None, "skipped", absent, [])
    recorder = _PhaseRecorder(device.memory, device.take_device_memory, device.kernel)
    with device:
        ran = _run_body(task, recorder)
        unordered = device.memory.ordering.summary()
        if ran.outcome == "ok" and unordered:
            ran = replace(ran, outcome="hazard", message=printable(unordered, 600))
        trace = device.trace(_provenance(task)) if ran.measured else None
    estimated = [EstimatedOp(op, calls, where) for op, (calls, where) in sorted(device.estimated.items())]
    if ran.outcome != "unsupported":  # the program caught the error, and went another way than it would on a card
        estimated += [EstimatedOp(f"caught: {what}", n, where) for what, (n, where) in sorted(device.refused.items())]
    return Recording(trace, ran.outcome, ran.message, estimated, missing=ran.missing, any_card=not device.asked_card)


def _on_cuda(task: Task) -> Recording:
    # The allocator reads its settings when CUDA is first used, which is now; the user's own must not mix in.
    settings = task.cases[0].settings
    rules = installed_rules().rules
    for variable in (*rules.conf_variables, *rules.conf.variables_in_part):
        os.environ.pop(variable, None)
    if settings.conf:
        os.environ[rules.conf_variables[0]] = settings.conf
    absent = _absent_code(task)
    if absent:
        return Recording(None, "skipped", absent, [])
    cuda = CudaRecorder(RecorderOptions(stacks=Stacks.PYTHON, sample_non_torch=_SAMPLE_EVERY))
    cuda.start()
    recorder = _PhaseRecorder(cuda, cuda.take_device_memory, lambda *_: None)
    ran = _run_body(task, recorder)
    if not ran.measured:
        cuda.discard()
        return Recording(None, ran.outcome, ran.message, [], missing=ran.missing)
    return Recording(cuda.stop(_provenance(task)), ran.outcome, ran.message, [], cuda.statistics, ran.missing)


def _absent_code(task: Task) -> str:
    """Import the installed code that the variant runs; why there is none, or ``""``.

    What a package does while it is imported is not what is measured, and it should see the machine as it is, without a
    virtual device.
    """
    code = scenario_of(task).variants[task.variant].installed
    if code is None:
        return ""
    try:
        code.load()
    except Exception as e:
        traceback.print_exception(e)
        where = f"{code.package} is installed, but {code.function} cannot be imported"
        return printable(f"{where}: {type(e).__name__}: {e}", 600)
    return ""


@dataclass(frozen=True, slots=True)
class _Ran:
    """How a variant's function ended, and whether it entered the measured phase."""

    outcome: Outcome
    message: str
    measured: bool
    missing: int | None


def _run_body(task: Task, recorder: _PhaseRecorder) -> _Ran:
    """Run the variant."""
    variant = scenario_of(task).variants[task.variant]
    case = ScenarioCase(task.scenario, task.preset, task.variant, dict(task.values), recorder)
    outcome: Outcome = "ok"
    message = ""
    missing: int | None = None
    with _thread_errors(task) as in_threads:
        try:
            variant.body(case)
        except BaseException as e:
            outcome, message = _outcome_of(e, torch.OutOfMemoryError, task)
            missing = e.missing if isinstance(e, EndCase) else None
            # The frames of the error hold the program's tensors; their end is not part of what was measured.
            recorder.end_phase()
            traceback.clear_frames(e.__traceback__)
            del e
    if outcome == "ok" and in_threads:
        outcome, message = in_threads[0]
        message = f"in a thread: {message}"
    if outcome == "ok" and not case.measured:
        outcome, message = "crash", "the scenario never entered case.measure()"
    elif outcome == "oom" and not case.measured:
        message = f"before the measured phase: {message}"
    return _Ran(outcome, message, case.measured, missing)


@contextlib.contextmanager
def _thread_errors(task: Task) -> Iterator[list[tuple[Outcome, str]]]:
    """Collect what ends the program's threads; Python only prints it, and the recording would lack their part."""
    found: list[tuple[Outcome, str]] = []
    standard = threading.excepthook

    def note(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            found.append(_outcome_of(args.exc_value, torch.OutOfMemoryError, task))

    threading.excepthook = note
    try:
        yield found
    finally:
        threading.excepthook = standard


class _Marks(Protocol):
    """Where a phase is marked."""

    def begin_phase(self, name: str) -> None: ...

    def end_phase(self) -> None: ...


class _PhaseRecorder:
    """Marks the phase once at each end, whatever happens inside."""

    def __init__(
        self,
        target: _Marks,
        take: Callable[[int, How], DeviceMemory],
        kernel: Callable[[str, Sequence[torch.Tensor], Sequence[torch.Tensor], Any], None],
    ) -> None:
        self._target = target
        self.take_device_memory = take
        self.kernel = kernel
        self._open = False

    def begin_phase(self, name: str) -> None:
        self._target.begin_phase(name)
        self._open = True

    def end_phase(self) -> None:
        if self._open:
            self._target.end_phase()
            self._open = False


def scenario_of(task: Task) -> Scenario:
    """The scenario of a task, from its file."""
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
    if isinstance(error, NotMeasuredError):  # something that the case needs is not installed here
        return "skipped", printable(str(error), 600)
    if isinstance(error, EndCase):
        return error.outcome, printable(str(error), 600)
    if not isinstance(error, FragscopeError):
        traceback.print_exception(error)
    frames = reversed(traceback.extract_tb(error.__traceback__))
    where = innermost(((f.filename, f.lineno or 0) for f in frames), task.root)
    if isinstance(error, NotImplementedError) and "'CUDA' backend" in str(error):
        what = "CUDA code ran past the virtual device, which serves the thread that runs the scenario and no other"
        return "unsupported", printable(f"{what}{where}", 600)
    # The place comes after the text, and must not be what is cut off.
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return "crash", printable(text, 500) + printable(where)


def _provenance(task: Task) -> dict[str, str]:
    values = " ".join(f"{k}={v}" for k, v in task.values)
    return {
        "scenario": f"{task.scenario}/{task.preset}/{task.variant}",
        "values": values,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _result(
    task: Task,
    wanted: CaseTask,
    recording: Recording,
    decided: Replay | None,
    verified: VerifyRecord | None,
    sources: dict[str, str],
    seconds: float,
) -> Case:
    settings = wanted.settings
    outcome, message = recording.outcome, recording.message
    facts: dict[str, Any] = {}
    if decided is not None and decided.measured is not None:
        facts = _figures(decided, decided.measured, decided.trace)
        right = verified is None or not verified.mismatches
        facts["exact"] = right and decided.exact and not recording.estimated and recording.outcome in CAME_TO_ITS_END
        facts["verify"] = verified
        outside = None if recording.trace is None else non_torch(recording.trace)
        facts["non_torch_peak"] = None if outside is None else outside.peak
        if outcome == "ok" and task.device == "cuda" and decided.measured.ooms and not _failed_when_recorded(recording):
            # A card cannot be made smaller; that the program would have failed is known from the replay alone.
            outcome, oom = "oom", decided.ooms[0]
            message = f"replayed: {format_bytes(oom.requested)} do not fit within {format_bytes(settings.capacity)}"
    return msgspec.structs.replace(
        bare_case(task, wanted, outcome, message, str(torch.__version__)),
        missing=recording.missing,
        estimated_ops=recording.estimated,
        any_card=recording.any_card,
        seconds=round(seconds, 3),
        sources=sources,
        **facts,
    )


def bare_case(task: Task, wanted: CaseTask, outcome: Outcome, message: str, torch_installed: str) -> Case:
    """A result that says what was run, under what, and how it ended, and has no figures."""
    settings = wanted.settings
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
        torch_installed=torch_installed,
        card=settings.card,
        device=task.device,
        capacity=settings.capacity,
        outcome=outcome,
        expected_outcome=wanted.expect,
        replays=task.replays,
        installed=task.installed,
        message=message,
    )


def _failed_when_recorded(recording: Recording) -> bool:
    decisions = recording.trace.decisions if recording.trace is not None else None
    return decisions is not None and bool((decisions.kind == DecisionKind.OOM).any())


def _figures(decided: Replay, span: Span, trace: Trace) -> dict[str, Any]:
    return {
        "base": span.base.allocated,
        "end_live": span.end.allocated,
        "base_requested": span.base.requested,
        "transient": span.transient,
        "retained": span.retained,
        "peak": peak_of(span.peak),
        "end": peak_of(span.end),
        "after_empty_cache": AfterEmptyCache(span.reserved_after_empty_cache),
        "segments_peak": span.segments_peak,
        "allocs": span.allocs,
        "driver_calls": Calls(span.calls.alloc, span.calls.free, span.calls.sync),
        "ooms": [OomRecord(o.event, o.requested, o.rounded, o.stream) for o in decided.ooms],
        "retries": span.retries,
        "lost": [LossRecord(x.code, x.detail, x.events) for x in trace.lost],
        "assumptions": [AssumptionRecord(a.code, a.effect, a.events, a.detail) for a in decided.assumptions],
    }


def peak_of(counters: Counters) -> Peak:
    """Counters as results hold them."""
    return Peak(*(getattr(counters, name) for name in Counters.__dataclass_fields__))
