"""Running a plan: recordings in worker processes, results to the journal, and results.json at the end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from fragscope.allocator import Card, card_named
from fragscope.errors import printable
from fragscope.results import Case, NotApplicable, Outcome, PrecheckRecord, Prediction, Results, Run, save_results
from fragscope.suite.journal import Journal, finished_cases, locked
from fragscope.suite.numerics import NumericReport, run_numeric
from fragscope.suite.plan import PlannedCase, versions
from fragscope.suite.precheck import Need, asks_for_plenty, judge, run_need
from fragscope.suite.process import log_path, place_in_log, report_path
from fragscope.suite.server import Job, WorkerServer
from fragscope.suite.worker import CaseTask, Report, Task, bare_case, run_task


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a plan is run.

    Attributes:
        out: folder for results, traces and logs.
        root: folder whose modules scenarios may import and that file names are shown relative to.
        jobs: worker processes at once.
        timeout: seconds a recording may take.
        resume: take valid results of an earlier run in the same folder.
        card: the card at hand with what is free of it, where cases run on CUDA; one that does not fit is skipped.
        command: the command line, for provenance.
        files_first: scenario files may be imported before a process is forked that uses CUDA.
        not_applicable: what was asked for and does not exist here, for the record.
    """

    out: Path
    root: Path
    jobs: int
    timeout: float
    resume: bool
    card: Card | None = None
    files_first: bool = False
    command: tuple[str, ...] = ()
    not_applicable: tuple[NotApplicable, ...] = ()


class Progress(Protocol):
    """Who is told how a run goes."""

    def planned(self, cases: int, resumed: int) -> None:
        """How many cases there are, and how many of them an earlier run already finished."""

    def planned_more(self, cases: int) -> None:
        """There are more cases than was said."""

    def started(self, what: str) -> None:
        """A recording began."""

    def finished(self, case: Case) -> None:
        """A case has a result."""


More = Callable[[Case], Iterable[PlannedCase]]
"""What else to run now that a case is finished."""


def _nothing_more(_: Case) -> Iterable[PlannedCase]:
    return ()


def run_plan(
    planned: Sequence[PlannedCase],
    options: RunOptions,
    progress: Progress,
    more: More = _nothing_more,
    written: Callable[[Results], None] = lambda _: None,
) -> Results:
    """Run every planned case and write results.json; an interrupt keeps what is finished and is raised again.

    Args:
        planned: what to run at least.
        options: how.
        progress: who is told how it goes.
        more: asked after each case, those of an earlier run among them.
        written: told whenever results.json was written, at the beginning too, while nobody else may write there.

    Raises:
        UsageError: the folder for results cannot be written, or another run writes there.
    """
    # The program may change the working directory.
    options = replace(options, out=options.out.absolute(), root=options.root.absolute())
    with locked(options.out):
        return _run_locked(list(planned), options, progress, more, written)


def _run_locked(
    planned: list[PlannedCase],
    options: RunOptions,
    progress: Progress,
    more: More,
    written: Callable[[Results], None],
) -> Results:
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    known = finished_cases(options.out) if options.resume else {}
    results: dict[str, Case] = {}

    def taken_up(wanted: Iterable[PlannedCase]) -> list[PlannedCase]:
        """Add cases to the plan; those that an earlier run did not finish."""
        todo = []
        waiting = list(wanted)
        while waiting:
            case = waiting.pop(0)
            if case.digest not in known:
                todo.append(case)
                continue
            results[case.digest] = known[case.digest]
            further = list(more(known[case.digest]))
            planned.extend(further)
            waiting.extend(further)
        return todo

    def after(case: Case) -> list[PlannedCase]:
        further = list(more(case))
        planned.extend(further)
        return taken_up(further)

    run = _PlanRun(options, progress, results, after)
    todo = taken_up(list(planned))

    def write() -> Results:
        cases = [results[p.digest] for p in planned if p.digest in results]
        made = Results(
            run=Run(
                started=started,
                seconds=round(time.monotonic() - began, 3),
                complete=len(cases) == len(planned),
                planned=len(planned),
                versions=versions(),
                command=list(options.command),
                cards={p.settings.card: _card_facts(p) for p in planned},
                not_applicable=list(options.not_applicable),
            ),
            cases=cases,
        )
        save_results(made, options.out / "results.json")
        written(made)
        return made

    with run.journal_open(known.values()):
        write()  # an earlier run's results must not pass for this one's, however this one ends
        (options.out / "report.html").unlink(missing_ok=True)
        progress.planned(len(planned), len(results))
        try:
            run.play(todo)
        except BaseException:
            write()
            raise
    made = write()
    _remove_stray_files(options.out, made)
    return made


def _card_facts(planned: PlannedCase) -> dict[str, Any]:
    card = card_named(planned.settings.card)
    return {
        "product": card.product,
        "total": planned.settings.total,
        "capacity": planned.settings.capacity,
        "capability": list(card.capability),
        "source": card.source,
        "estimated": list(card.estimated),
    }


def _remove_stray_files(out: Path, results: Results) -> None:
    """Traces and logs of runs that this one replaced."""
    kept = {c.trace for c in results.cases}
    for file in (out / "traces").glob("*.fscope"):
        if f"traces/{file.name}" not in kept:
            file.unlink(missing_ok=True)
    keys = {c.digest for c in results.cases} | {numeric_key(c.scenario) for c in results.cases}
    for file in (out / "logs").glob("*.log"):
        if file.stem not in keys or file.stat().st_size == 0:
            file.unlink(missing_ok=True)


def numeric_key(scenario: str) -> str:
    """What the numeric step of a scenario is known by; its log has this name."""
    return f"numeric-{scenario}"


class _PlanRun:
    """The state of one run."""

    def __init__(
        self,
        options: RunOptions,
        progress: Progress,
        results: dict[str, Case],
        after: Callable[[Case], list[PlannedCase]],
    ) -> None:
        self._options = options
        self._progress = progress
        self._results = results
        self._after = after
        self._further: list[PlannedCase] = []
        self._numerics: dict[str, NumericReport] = {}
        self._held: dict[str, list[Case]] = {}  # cases by scenario whose numeric step is not over
        self._tasks: dict[str, Task] = {}
        self._planned: dict[str, PlannedCase] = {}
        self._needs: dict[str, Need] = {}  # on the card at hand, by digest of a recording's first case
        self._predictions: dict[str, Prediction] = {}  # by digest
        self._prechecks: dict[Any, PrecheckRecord] = {}  # by what cases share a recording by
        self._journal: Journal | None = None

    @contextlib.contextmanager
    def journal_open(self, kept: Iterable[Case]) -> Iterator[None]:
        self._journal = Journal(self._options.out, kept)
        try:
            yield
        finally:
            self._journal.close()

    def play(self, todo: Sequence[PlannedCase]) -> None:
        if not todo:
            return
        shutil.rmtree(self._options.out / "work", ignore_errors=True)
        first = self._options.files_first
        files = dict.fromkeys(p.selection.scenario.file for p in todo if p.device == "virtual" or first)
        numeric = [self._numeric_job(p) for p in _one_per_scenario(todo)]
        recordings = self._first_jobs(todo)
        try:
            with WorkerServer(files, self._options.jobs, self._options.timeout).running() as server:
                server.run([*numeric, *recordings], self._ended, self._started)
        finally:
            shutil.rmtree(self._options.out / "work", ignore_errors=True)

    def _started(self, job: Job) -> None:
        task = self._tasks[job.key]
        what = {run_numeric: f"numerics of {task.scenario}", run_need: f"need of {task.cases[0].id}"}
        self._progress.started(what.get(job.target, task.cases[0].id))

    def _first_jobs(self, cases: Iterable[PlannedCase]) -> list[Job]:
        groups: dict[Any, list[PlannedCase]] = {}
        for planned in cases:
            self._planned[planned.id] = planned
            groups.setdefault(planned.recording, []).append(planned)
        return [self._first_job(group) for group in groups.values()]

    def _ended(self, job: Job) -> Iterable[Job]:
        if job.target is run_numeric:
            jobs = list(self._numeric_ended(job))
        else:
            jobs = list(self._need_ended(job) if job.target is run_need else self._recording_ended(job))
        further, self._further = self._further, []
        return [*jobs, *self._first_jobs(further)]

    # --- numeric steps --------------------------------------------------------------------------------------------

    def _numeric_job(self, planned: PlannedCase) -> Job:
        scenario = planned.selection.scenario.name
        key = numeric_key(scenario)
        task = self._task([planned])
        self._tasks[key] = task
        self._held[scenario] = []
        device = "cpu" if planned.device == "virtual" else "cuda"
        return Job(key, run_numeric, (task, device, key))

    def _numeric_ended(self, job: Job) -> Iterable[Job]:
        task = self._tasks[job.key]
        report = _read(report_path(task.out, job.key), NumericReport)
        if report is None:
            why = f"the numeric step {_how_it_ended(job, task)}"
            report = NumericReport({"agree": False, "message": why}, {"*": why})
        self._numerics[task.scenario] = report
        for case in self._held.pop(task.scenario):
            self._finish(case)
        return ()

    # --- what cases need of a card --------------------------------------------------------------------------------

    def _first_job(self, group: Sequence[PlannedCase]) -> Job:
        """The recording itself, unless it has to fit a card first. One that is to run out of memory need not."""
        task = self._task(group)
        if task.device == "virtual" or task.card is None or task.cases[0].expect == "oom":
            return self._recording_job(group)
        return self._need_job(task, plenty=False)

    def _need_job(self, task: Task, *, plenty: bool) -> Job:
        key = f"need-{'with-plenty-' if plenty else ''}{task.cases[0].digest}"
        self._tasks[key] = task
        return Job(key, run_need, (task, plenty, key))

    def _need_ended(self, job: Job) -> Iterable[Job]:
        task = self._tasks[job.key]
        assert task.card is not None
        digest = task.cases[0].digest
        need: Need | None = _read(report_path(task.out, job.key), Need)
        if digest not in self._needs:
            if need is None:
                need = Need("timeout" if job.timed_out else "crash", f"the process {_how_it_ended(job, task)}")
            self._needs[digest] = need
            self._predictions |= need.predictions
            if asks_for_plenty(need, task.card):
                return [self._need_job(task, plenty=True)]
            judgement = judge(need, task.card)
        else:
            judgement = judge(self._needs[digest], task.card, need)
        group = [self._planned[c.id] for c in task.cases]
        self._prechecks[group[0].recording] = judgement.record
        if not judgement.skip:
            return [self._recording_job(group)]
        for wanted in task.cases:
            self._finish(bare_case(task, wanted, "skipped", judgement.skip, versions().get("torch", "")))
        return ()

    def _prediction(self, planned: PlannedCase) -> Prediction | None:
        """What the virtual device said of a case beforehand."""
        return self._predictions.get(planned.digest)

    # --- recordings -----------------------------------------------------------------------------------------------

    def _task(self, group: Sequence[PlannedCase]) -> Task:
        first = group[0]
        variant = first.selection.scenario.variants[first.selection.variant]
        return Task(
            file=first.selection.scenario.file,
            root=self._options.root,
            scenario=first.selection.scenario.name,
            preset=first.selection.preset,
            variant=variant.name,
            role=variant.role,
            values=first.values,
            changed=first.changed,
            device=first.device,
            cases=tuple(CaseTask(p.id, p.digest, p.settings, p.expect) for p in group),
            out=self._options.out,
            timeout=self._options.timeout,
            card=self._options.card,
            profile=card_named(first.settings.card),
            replays=None if variant.replays is None else str(variant.replays),
            installed=None if variant.installed is None else variant.installed.code(),
        )

    def _recording_job(self, group: Sequence[PlannedCase]) -> Job:
        task = self._task(group)
        key = task.cases[0].digest
        self._tasks[key] = task
        return Job(key, run_task, (task,))

    def _recording_ended(self, job: Job) -> Iterable[Job]:
        task = self._tasks[job.key]
        report = _read(report_path(task.out, job.key), Report)
        if report is None:
            outcome: Outcome = "timeout" if job.timed_out else "crash"
            message = f"the process {_how_it_ended(job, task)}"
            self._finish(bare_case(task, task.cases[0], outcome, message, versions().get("torch", "")))
            rest = task.cases[1:]
            return [self._recording_job([self._planned[c.id] for c in rest])] if rest else ()
        for case in report.cases:
            self._finish(case)
        return [self._recording_job([self._planned[i]]) for i in report.again]

    def _finish(self, case: Case) -> None:
        planned = self._planned[case.id]
        case = msgspec.structs.replace(
            case, precheck=self._prechecks.get(planned.recording), predicted=self._prediction(planned)
        )
        if case.scenario in self._held:
            self._held[case.scenario].append(case)
            return
        report = self._numerics.get(case.scenario)
        if report is not None:
            sources = report.sources | case.sources if case.sources else {}
            case = msgspec.structs.replace(case, numeric=report.numeric, sources=sources)
            problem = report.wrong.get(case.variant, report.wrong.get("*"))
            if problem is not None and case.outcome == "ok":
                case = msgspec.structs.replace(case, outcome="wrong", message=f"numerics: {problem}")
        self._results[case.digest] = case
        assert self._journal is not None
        self._journal.add(case)
        self._progress.finished(case)
        further = self._after(case)
        if further:
            self._progress.planned_more(len(further))
            self._further.extend(further)


def _one_per_scenario(todo: Sequence[PlannedCase]) -> list[PlannedCase]:
    out: dict[str, PlannedCase] = {}
    for planned in todo:
        if planned.selection.scenario.outputs is not None:
            out.setdefault(planned.selection.scenario.name, planned)
    return list(out.values())


def _read(path: Path, kind: Callable[..., Any]) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def _how_it_ended(job: Job, task: Task) -> str:
    """How, where and with what last words a process ended that left no report."""
    log = _end_of(log_path(task.out, job.key))
    place = place_in_log(log, task.root)
    if job.timed_out:
        return f"took longer than {task.timeout:g} s and was stopped{place}"
    how = f"ended with code {job.code}"
    if job.code is not None and job.code < 0:
        with contextlib.suppress(ValueError):
            how = f"was ended by {signal.Signals(-job.code).name}"
        if job.code == -signal.SIGKILL:
            how += ", as Linux does when memory runs out"
    said = [line for line in _FAULT.split(log)[0].splitlines() if line.strip()]
    return f"{how}{place}" + (f": {printable(said[-1].strip(), 200)}" if said else "")


_FAULT = re.compile(r"^(?:Fatal Python error: |Timeout \(|Current thread |Thread 0x)", re.MULTILINE)
_LOG_END = 64 * 1024


def _end_of(log: Path) -> str:
    """The last part of a log, which may be of any size."""
    try:
        with log.open("rb") as f:
            f.seek(max(0, log.stat().st_size - _LOG_END))
            return f.read(_LOG_END).decode(errors="replace")
    except OSError:
        return ""


def usable_cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
