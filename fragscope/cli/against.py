"""``fragscope gate --against REF``: what the working tree costs more than another commit."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragscope.cli.gate_files import LOCK
from fragscope.cli.running import RichProgress, stopped_by_signals
from fragscope.errors import UsageError, printable

if TYPE_CHECKING:
    from fragscope.against.git import Repository
    from fragscope.against.protocol import Step
    from fragscope.config import Config
    from fragscope.gate import Budgets, Lock, Verdict
    from fragscope.gate.verdict import Against, PolicyChange

_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for.

    Attributes:
        ref: the commit to compare with.
        only, confs, releases, cards: as options; empty where not given.
        tolerance: as it is written; None where not given.
        jobs: recordings at once; None for one a core.
    """

    ref: str
    only: tuple[str, ...] = ()
    confs: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    card: str | None = None
    tolerance: str | None = None
    jobs: int | None = None


def verdict_against(
    wanted: Wanted, config: Config, budgets: Path | None, limits: Budgets, lock: Lock | None
) -> Verdict:
    """Run both trees and compare them.

    Args:
        wanted: the options.
        config: of the working tree.
        budgets: its budgets file, if there is one.
        limits: what that file says.
        lock: of the working tree, if there is one.

    Raises:
        UsageError: no git, no such commit, no scenarios, or both sides would run the same code.
        NotMeasuredError: there is nothing to run.
        InputFileError: the budgets file cannot be used.
    """
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "--against runs scenarios, which needs torch, and that is not installed: pip install 'fragscope[torch]' "
            "(a CPU build is enough)"
        )
    from fragscope.against.git import Repository
    from fragscope.against.judge import Rules, judge
    from fragscope.against.run import SideOptions, run_both
    from fragscope.allocator import DEFAULT_CARD, NEWEST
    from fragscope.gate.compare import Tolerance, parse_tolerance
    from fragscope.suite.journal import locked
    from fragscope.suite.matrix import cells
    from fragscope.suite.runner import usable_cores

    if not config.scenarios:
        raise UsageError(
            "no scenarios are configured: set scenarios = [...] in [tool.fragscope] of pyproject.toml; "
            "both sides of a comparison are run, each with its own"
        )
    root = (config.root or Path.cwd()).resolve()
    tolerance = Tolerance()
    if wanted.tolerance is not None:
        tolerance = parse_tolerance(wanted.tolerance, "--tolerance")
    elif config.tolerance is not None:
        tolerance = parse_tolerance(config.tolerance, "tolerance in [tool.fragscope] of pyproject.toml")
    options = SideOptions(
        only=wanted.only,
        confs=wanted.confs or ("",),
        releases=wanted.releases or (config.torch or NEWEST.release,),
        card=wanted.card or config.card or DEFAULT_CARD,
        jobs=wanted.jobs or usable_cores(),
        timeout=_TIMEOUT,
        out=(config.out or Path(".fragscope")).absolute() / "against",
    )
    cells(options.confs, options.releases, [options.card], None)  # complains before anything is checked out
    repository = Repository.at(root)
    commit = repository.commit_of(wanted.ref)
    which = _named(wanted.ref, commit)
    against = _against(repository, wanted.ref, commit, which, options.out.parent)
    with stopped_by_signals(), locked(options.out), repository.checked_out(commit) as tree, _progress() as step:
        click.echo(f"fragscope: running {which} and the working tree", err=True)
        before, after = run_both(repository, tree, which, root, config, options, step)
        policy = _policy(repository, before.config, config, budgets, limits.file, tree)
        rules = Rules(limits, tolerance, policy, selected=bool(wanted.only), lock=lock)
        verdict = judge(before, after, rules, against)
    click.echo(f"fragscope: results of both are in {_short(options.out)}", err=True)
    return verdict


def _named(ref: str, commit: str) -> str:
    """``main (d17901e)``, or the commit alone where that is what was given."""
    return commit[:7] if commit.startswith(ref) else f"{printable(ref, 100)} ({commit[:7]})"


def _against(repository: Repository, ref: str, commit: str, which: str, out: Path) -> Against:
    from fragscope.gate.verdict import Against

    dirty = repository.dirty(but=out)
    notes = []
    if commit == repository.commit and not dirty:
        notes.append(f"{which} is what is checked out, and nothing is changed: both sides are the same code")
    missing = repository.missing_from_here(commit)
    if missing:
        lacks = f"{missing} commit{'s' * (missing != 1)}"
        notes.append(
            f"{which} has {lacks} that the working tree lacks, and differences may come from them; "
            f"--against $(git merge-base {printable(ref, 100)} HEAD) leaves them out"
        )
    return Against(ref=ref, commit=commit, current=repository.commit, dirty=dirty, notes=notes)


def _policy(
    repository: Repository, theirs: Config, config: Config, budgets: Path | None, shown: str, tree: Path
) -> list[PolicyChange]:
    """What changed in the limits: budgets, lock and tolerance."""
    from fragscope.gate.policy import budget_changes, lock_changes, read_policy, tolerance_changes

    root = (config.root or Path.cwd()).resolve()

    def of_theirs(file: Path) -> Path | None:
        name = repository.relative(file)
        return None if name is None else tree / name

    file = budgets if budgets is not None else config.budgets or root / "budgets.toml"
    old = theirs.budgets if theirs.budgets is not None and budgets in (None, config.budgets) else of_theirs(file)
    found = budget_changes(read_policy(old, shown), read_policy(file, shown))
    lock = config.lock or root / LOCK
    found += lock_changes(read_policy(of_theirs(lock), _short(lock)), read_policy(lock, _short(lock)))
    return [*tolerance_changes(theirs.tolerance, config.tolerance), *found]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Step], None]]:
    """Shows how many cases of both sides are done."""
    with RichProgress() as bar:
        bar.planned(0, 0)

        def step(made: Step) -> None:
            if made.planned:
                bar.planned_more(made.planned)
            else:
                bar.started(made.finished)
                bar.advance()

        yield step


def _short(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)
