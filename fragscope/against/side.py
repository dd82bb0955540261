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
from typing import IO, NoReturn

import msgspec

from fragscope.against.protocol import LeftOut, SideAnswer, SideRequest, Step, answer_path
from fragscope.allocator.cards import define
from fragscope.errors import EXIT_INTERRUPTED, EXIT_PASS, FragscopeError, UsageError, printable, to_plain
from fragscope.results import Case
from fragscope.suite.discover import load_scenarios, select
from fragscope.suite.installed import applicable
from fragscope.suite.matrix import cells
from fragscope.suite.plan import plan
from fragscope.suite.process import end_with_parent
from fragscope.suite.runner import RunOptions, run_plan
from fragscope.suite.scenario import Scenario


def run_side(request: SideRequest, step: Callable[[Step], None]) -> SideAnswer:
    """Import the tree's scenarios and run them on the virtual device.

    Raises:
        FragscopeError: as ``fragscope run`` would.
    """
    top, root = Path(request.own.top), Path(request.root)
    define(request.own_cards)
    if request.lenient:
        # What is not there is not to be had from the working tree, by the .pth file of an editable install: a package
        # that comes with a change is new, and not a reason to refuse. Workers import from the same folders.
        sys.path[:] = [entry for entry in sys.path if not request.own.is_others(Path(entry).absolute())]
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
    settings, refused = cells(request.confs, request.releases, request.cards, None)
    files = {s.scenario.name: str(s.scenario.file.relative_to(top)) for s in selections}
    foreign = request.own.foreign(sys.modules)
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


def _scenarios(request: SideRequest, left_out: list[LeftOut]) -> list[Scenario]:
    found: list[Scenario] = []
    for borrowed, files in ((False, request.files), (True, request.borrowed)):
        own = {scenario.name for scenario in found}
        for file in files:
            try:
                loaded = load_scenarios(Path(file))
            except FragscopeError as e:
                if not (borrowed or request.lenient):
                    raise
                name = str(Path(file).relative_to(request.own.top))
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
