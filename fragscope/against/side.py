"""One of the two trees, run in a process of its own: ``python -P -m fragscope.against.side REQUEST``.

The request is a file, its answer another. On standard output go lines for whoever shows how the run goes; what scenario
files print goes to standard error.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import msgspec

from fragscope.against.imports import Foreign, foreign_modules
from fragscope.errors import EXIT_INTERRUPTED, EXIT_PASS, FragscopeError, UsageError, printable, to_plain
from fragscope.results import Case


class SideRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to run.

    Attributes:
        top: the tree.
        root: the project's folder in it, which is the working directory.
        others: other trees of the repository.
        names: distributions that are the repository's own.
        files: scenario files of the tree.
        borrowed: scenario files of the other tree, put into this one. What they define counts where the tree's own
            do not define it, and one that cannot be imported is left out.
        lenient: own scenario files that cannot be imported are left out too, and names that match nothing are none.
        only: names of cases as arguments of ``fragscope run``; all where empty.
        confs, releases, card: what the cases are run under.
        out: folder for results.
        jobs, timeout: as options of ``fragscope run``.
    """

    top: str
    root: str
    others: list[str]
    names: list[str]
    files: list[str]
    borrowed: list[str]
    lenient: bool
    only: list[str]
    confs: list[str]
    releases: list[str]
    card: str
    out: str
    jobs: int
    timeout: float


class LeftOut(msgspec.Struct, frozen=True):
    """A scenario file that could not be imported.

    Attributes:
        file: relative to the tree.
        reason: one line.
        borrowed: it is one of the other tree.
    """

    file: str
    reason: str
    borrowed: bool


class SideAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How it went; results are in the request's folder.

    Attributes:
        ran: there are results; False where the tree has no case to run.
        left_out: scenario files that could not be imported.
        scenarios: the file, relative to the tree, of each scenario that was run.
        foreign: modules that are not of this tree although they should be.
        error: what ended it, as ``to_plain`` makes it.
    """

    ran: bool = False
    left_out: list[LeftOut] = []
    scenarios: dict[str, str] = {}
    foreign: list[Foreign] = []
    error: dict[str, Any] | None = None


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of progress: so many cases more are planned, or one is finished."""

    planned: int = 0
    finished: str = ""


def answer_path(request: Path) -> Path:
    """Where the answer to a request goes."""
    return request.with_suffix(".answer.json")


def run_side(request: SideRequest, step: Callable[[Step], None]) -> SideAnswer:
    """Import the tree's scenarios and run them on the virtual device.

    Raises:
        FragscopeError: as ``fragscope run`` would.
    """
    from fragscope.suite.discover import select
    from fragscope.suite.installed import applicable
    from fragscope.suite.matrix import cells
    from fragscope.suite.plan import plan
    from fragscope.suite.runner import RunOptions, run_plan

    top, root = Path(request.top), Path(request.root)
    left_out: list[LeftOut] = []
    scenarios = _scenarios(request, left_out)
    selections = []
    for name in request.only or ["*"]:
        try:
            selections += select(scenarios, [name], (), ())
        except UsageError:
            if not request.lenient:
                raise
    selections = list({s.name: s for s in selections}.values())
    selections, absent = applicable(selections)
    settings, refused = cells(request.confs, request.releases, [request.card], None)
    files = {s.scenario.name: str(s.scenario.file.relative_to(top)) for s in selections}
    foreign = foreign_modules(sys.modules, top, [Path(o) for o in request.others], set(request.names))
    answer = SideAnswer(left_out=left_out, scenarios=files, foreign=foreign)
    if not selections or foreign:
        return answer
    options = RunOptions(
        out=Path(request.out),
        root=root,
        jobs=request.jobs,
        timeout=request.timeout,
        resume=False,
        command=("fragscope", "gate", "--against"),
        not_applicable=(*refused, *absent),
    )
    run_plan(plan(selections, {}, settings, "virtual"), options, _Steps(step))
    return msgspec.structs.replace(answer, ran=True)


def _scenarios(request: SideRequest, left_out: list[LeftOut]) -> list[Any]:
    from fragscope.suite.discover import load_scenarios

    found: list[Any] = []
    for borrowed, files in ((False, request.files), (True, request.borrowed)):
        own = {scenario.name for scenario in found}
        for file in files:
            try:
                loaded = load_scenarios(Path(file))
            except FragscopeError as e:
                if not (borrowed or request.lenient):
                    raise
                name = str(Path(file).relative_to(request.top))
                left_out.append(LeftOut(name, printable(str(e).replace(f"{file}: ", ""), 400), borrowed))
                continue
            found += [scenario for scenario in loaded if scenario.name not in own]
    return found


class _Steps:
    """Tells of a run line by line."""

    def __init__(self, step: Callable[[Step], None]) -> None:
        self._step = step

    def planned(self, cases: int, resumed: int) -> None:
        """So many cases are to be run."""
        self._step(Step(planned=cases - resumed))

    def planned_more(self, cases: int) -> None:
        """There are more."""
        self._step(Step(planned=cases))

    def started(self, what: str) -> None:
        """Not told."""

    def finished(self, case: Case) -> None:
        """One is done."""
        self._step(Step(finished=case.id))


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    """Process entry."""
    from fragscope.suite.process import end_with_parent

    signal.signal(signal.SIGTERM, _stop)
    end_with_parent(signal.SIGTERM)
    file = Path(argv[0])
    request = msgspec.json.decode(file.read_bytes(), type=SideRequest)
    lines: IO[bytes] = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def step(made: Step) -> None:
        lines.write(msgspec.json.encode(made) + b"\n")

    try:
        answer = run_side(request, step)
    except FragscopeError as e:
        answer = SideAnswer(error=to_plain(e))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    answer_path(file).write_bytes(msgspec.json.encode(answer))
    return EXIT_PASS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
