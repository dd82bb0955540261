"""Both trees run side by side, each in processes of its own, with the same fragscope, torch, Python and settings."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

import fragscope
from fragscope.against.git import Repository, environment
from fragscope.against.imports import (
    Foreign,
    Own,
    dotted,
    folders_in_use,
    installed_files,
    is_environment,
    is_utf8,
    own_names,
    packages_of,
    refusal,
)
from fragscope.against.protocol import LeftOut, SideAnswer, SideRequest, Step, answer_path
from fragscope.allocator.cards import defined
from fragscope.config import Config, load_config
from fragscope.errors import FragscopeError, NotMeasuredError, UsageError, from_plain, printable
from fragscope.results import Results, load_results
from fragscope.suite.discover import scenario_files
from fragscope.trace import load_trace

_PATIENCE = 10.0  # seconds that a side gets to stop its workers


@dataclass(frozen=True, slots=True)
class SideOptions:
    """What both sides are run with.

    Attributes:
        only: names of cases as arguments of ``fragscope run``.
        confs, releases, cards: settings.
        jobs: recordings at once, on both sides together.
        timeout: seconds one recording may take.
        out: folder for the results of both.
    """

    only: tuple[str, ...]
    confs: tuple[str, ...]
    releases: tuple[str, ...]
    cards: tuple[str, ...]
    jobs: int
    timeout: float
    out: Path


@dataclass(frozen=True, slots=True)
class Side:
    """One tree and what running it gave.

    Attributes:
        which: what people call it.
        top: the tree.
        root: the project's folder in it.
        config: its settings.
        results: None where it has no case to run.
        folder: of the results.
        left_out: scenario files that could not be imported.
        scenarios: the file, relative to the tree, of each scenario that was run.
        borrowed: scenario files of the other tree that were run, relative to the tree.
    """

    which: str
    top: Path
    root: Path
    config: Config
    folder: Path
    results: Results | None = None
    left_out: tuple[LeftOut, ...] = ()
    scenarios: dict[str, str] | None = None
    borrowed: tuple[str, ...] = ()


def run_both(
    repository: Repository,
    tree: Path,
    which: str,
    root: Path,
    config: Config,
    options: SideOptions,
    step: Callable[[Step], None],
) -> tuple[Side, Side]:
    """Run the other tree and the one that is checked out.

    Args:
        repository: whose working tree is one side.
        tree: of the other commit; scenario files that it lacks are put into it.
        which: what people call that commit.
        root: the project's folder in the working tree.
        config: of the working tree.
        options: for both.
        step: told how it goes.

    Returns:
        The other side, and the current one.

    Raises:
        UsageError: a side ran code of the other one.
        NotMeasuredError: there are no scenario files, or the project's folder is not in the other tree.
        FragscopeError: what ended a side.
    """
    inside = repository.relative(root)
    if inside is None:
        raise UsageError(f"{printable(str(root))} lies outside the repository {printable(str(repository.top))}")
    if not (tree / inside).is_dir():
        raise NotMeasuredError(f"{which} has no folder {printable(str(inside))}: there is nothing to compare with")
    files = scenario_files(config.scenarios)
    if not files:
        searched = ", ".join(printable(str(p)) for p in config.scenarios)
        raise NotMeasuredError(f"no scenario files in {searched} (in a folder, they are named scenario_*.py)")
    theirs = _with_ours(stated_config(tree, tree / inside), tree, config, repository.top)
    own = scenario_files(p for p in theirs.scenarios if p.exists())
    trees = [repository.top, *(t for t in repository.other_trees() if t != tree)]
    _refuse_names(*files, *own, *trees)
    borrowed = _borrow(repository, tree, files)
    before = Side(which, tree, tree / inside, theirs, options.out / "before", borrowed=tuple(map(str, borrowed)))
    after = Side("the working tree", repository.top, root.resolve(), config, options.out / "after")
    names = sorted(own_names(root) | own_names(before.root))
    packages = packages_of(repository.files_below(repository.top))
    jobs = max(1, options.jobs // 2)
    shim = _shim(tree.parent)

    def request(side: Side, files: Sequence[Path], others: Sequence[Path], *, lenient: bool) -> SideRequest:
        return SideRequest(
            own=Own(top=str(side.top), others=[str(o) for o in others], distributions=names, packages=packages),
            root=str(side.root),
            files=[str(f) for f in files],
            borrowed=[str(side.top / b) for b in side.borrowed],
            lenient=lenient,
            only=list(options.only),
            confs=list(options.confs),
            releases=list(options.releases),
            cards=list(options.cards),
            own_cards=list(defined()),
            out=str(side.folder.absolute()),
            jobs=jobs,
            timeout=options.timeout,
        )

    asked = [
        (before, request(before, own, trees, lenient=True)),
        (after, request(after, files, [tree, *trees[1:]], lenient=False)),
    ]
    answers = _run([(side, req, _import_path(trees, side, shim)) for side, req in asked], tree.parent, step)
    for side, req, answer in zip((before, after), (a[1] for a in asked), answers, strict=True):
        _refuse_foreign(side, req, answer, repository.top)
    return _with(before, answers[0]), _with(after, answers[1])


def _refuse_names(*paths: Path) -> None:
    """Refuse scenario files and trees whose names can be told to no process.

    Raises:
        UsageError: one is not UTF-8.
    """
    for path in paths:
        if not is_utf8(path):
            raise UsageError(f"{printable(str(path))}: the name is not UTF-8, and cannot be compared; rename it")


def _with(side: Side, answer: SideAnswer) -> Side:
    results = load_results(side.folder) if answer.ran else None
    if results is not None:
        results = _without_paths(results, side.top)
    kept = tuple(msgspec.structs.replace(x, reason=x.reason.replace(f"{side.top}/", "")) for x in answer.left_out)
    return replace(side, results=results, left_out=kept, scenarios=answer.scenarios)


def _without_paths(results: Results, top: Path) -> Results:
    """The same results with messages that do not depend on where the tree was."""
    cases = [msgspec.structs.replace(c, message=c.message.replace(f"{top}/", "")) for c in results.cases]
    return msgspec.structs.replace(results, cases=cases)


def stated_config(tree: Path, root: Path) -> Config:
    """The settings as a tree states them; none where they cannot be used.

    Args:
        tree: of the other commit.
        root: the project's folder in it.
    """
    try:
        config = load_config(root)
    except FragscopeError:
        return Config()
    return config if config.root is not None and config.root.is_relative_to(tree) else Config()


def _with_ours(config: Config, tree: Path, current: Config, top: Path) -> Config:
    """What the other tree is run with: its settings, or ours at the same places where it has none of use."""

    def moved(path: Path) -> Path:
        path = path.resolve()
        return tree / path.relative_to(top) if path.is_relative_to(top) else path

    if not any(p.exists() for p in config.scenarios):
        config = replace(config, scenarios=tuple(moved(p) for p in current.scenarios))
    if not config.import_paths:
        config = replace(config, import_paths=tuple(moved(p) for p in current.import_paths))
    return config


def _borrow(repository: Repository, tree: Path, files: Sequence[Path]) -> list[Path]:
    """Put scenario files that the other tree lacks into it, with all of their folder where it lacks that too."""
    borrowed = []
    for file in files:
        name = repository.relative(file)
        if name is None or (tree / name).exists():
            continue
        borrowed.append(name)
    missing = dict.fromkeys(name.parent for name in borrowed if not (tree / name.parent).exists())
    wanted = {*borrowed, *(name for folder in missing for name in repository.files_below(folder))}
    for name in sorted(wanted):
        source, target = repository.top / name, tree / name
        if source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return borrowed


def _import_path(trees: list[Path], side: Side, shim: Path) -> list[Path]:
    """What a side's Python imports from first: this fragscope, the tree's own folders, then what is not the tree's.

    Entries of the user's PYTHONPATH that lead into the working tree lead to the same place in the side's tree.
    """
    own = [*side.config.import_folders(side.root), *(side.top / f for f in folders_in_use(trees))]
    given = [Path(entry).absolute() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    outside = [e for e in given if is_environment(e) or not any(e.resolve().is_relative_to(t) for t in trees)]
    return list(dict.fromkeys([shim, *(f for f in own if f.is_dir()), *outside]))


def _shim(folder: Path) -> Path:
    """A folder that holds this fragscope and nothing else: the trees may hold one, and its own may hold much more."""
    shim = folder / "python"
    shim.mkdir()
    (shim / "fragscope").symlink_to(Path(fragscope.__file__).resolve().parent, target_is_directory=True)
    return shim


@dataclass(frozen=True, slots=True)
class _Running:
    """A side's process, and its request."""

    side: Side
    file: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> Path:
        """What the process said to people."""
        return self.file.with_suffix(".log")

    def answer(self) -> SideAnswer:
        """What it answered.

        Raises:
            FragscopeError: what ended it.
        """
        try:
            answer = msgspec.json.decode(answer_path(self.file).read_bytes(), type=SideAnswer)
        except (OSError, msgspec.MsgspecError):
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = f": {printable(said[-1], 300)}" if said else ""
            code = self.process.returncode
            raise FragscopeError(f"{self.side.which}: its process ended with code {code}{last}") from None
        if answer.error is not None:
            error = from_plain(answer.error)
            error.args = (f"{self.side.which}: {str(error).replace(f'{self.side.top}/', '')}",)
            raise error
        return answer


def _run(
    wanted: Sequence[tuple[Side, SideRequest, list[Path]]], folder: Path, step: Callable[[Step], None]
) -> list[SideAnswer]:
    """Start all sides, and wait for all of them; an interrupt ends them first."""
    with contextlib.ExitStack() as stack:
        running: list[_Running] = []
        for number, (side, request, path) in enumerate(wanted):
            file = folder / f"side-{number}.json"
            file.write_bytes(msgspec.json.encode(request))
            log = stack.enter_context(file.with_suffix(".log").open("wb"))
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "fragscope.against.side", str(file)],
                cwd=side.root,
                env=_environment(path),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which ends them in order
            )
            stack.callback(_stop, process)
            running.append(_Running(side, file, process))
        try:
            _follow(running, step)
        except BaseException:
            for one in running:  # all at once; what follows waits for one after the other
                one.process.terminate()
            raise
        return [one.answer() for one in running]


def _environment(path: list[Path]) -> dict[str, str]:
    return environment() | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",  # nothing is left in the user's tree
    }


def _follow(running: Sequence[_Running], step: Callable[[Step], None]) -> None:
    """Pass on what sides say until all have ended.

    Raises:
        FragscopeError: what ended one of them; the others need not go on.
    """
    with selectors.DefaultSelector() as waiting:
        for one in running:
            assert one.process.stdout is not None
            waiting.register(one.process.stdout, selectors.EVENT_READ, one)
        while waiting.get_map():
            for key, _ in waiting.select():
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if not line:
                    waiting.unregister(key.fileobj)
                    key.data.process.wait()
                    key.data.answer()
                    continue
                with contextlib.suppress(msgspec.MsgspecError):
                    step(msgspec.json.decode(line, type=Step))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _refuse_foreign(side: Side, request: SideRequest, answer: SideAnswer, top: Path) -> None:
    """Refuse a side that ran code of another tree, or a copy that is installed.

    Raises:
        UsageError: it did.
    """
    found = list(answer.foreign)
    installed = installed_files(set(request.own.distributions))
    for case in load_results(side.folder).cases if answer.ran else ():
        files = set(case.sources)
        if installed and case.trace is not None:
            # What a function imports is not among the sources of a case where it is installed; its stacks tell.
            stacks = load_trace(side.folder / case.trace).stacks
            files |= {frame.file for stack in stacks for frame in stack if Path(frame.file).is_absolute()}
        for file in sorted(files):
            name, path = dotted(Path(file)), Path(file)
            if request.own.is_elsewhere(name, path.resolve(), installed):
                found.append(Foreign(name, file, installed=is_environment(path)))
    if found:
        raise UsageError(refusal(found[0], side.which, top))
