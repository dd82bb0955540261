"""``fragscope gate --against REF``: what the working tree costs more than another commit."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fragscope.cli.gate_files import BUDGETS, LOCK
from fragscope.cli.running import RichProgress, stopped_by_signals
from fragscope.errors import InputFileError, UsageError, printable
from fragscope.units import format_bytes

if TYPE_CHECKING:
    from fragscope.against.git import Repository
    from fragscope.against.protocol import Step
    from fragscope.allocator import Card
    from fragscope.config import Config
    from fragscope.gate import Budgets, Lock, Verdict
    from fragscope.gate.verdict import Against, PolicyChange

_TIMEOUT = 600.0
_CARD_FACTS: dict[str, Callable[[Any], str]] = {
    "total": format_bytes,
    "free": format_bytes,
    "capability": lambda c: f"{c[0]}.{c[1]}",
    "multiprocessors": str,
    "l2": format_bytes,
    "product": str,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for.

    Attributes:
        ref: the commit to compare with.
        only, confs, releases, cards: as options; empty where not given.
        tolerance: as it is written; None where not given.
        jobs: recordings at once; None for one a core.
        budgets, lock: files that options name.
    """

    ref: str
    only: tuple[str, ...] = ()
    confs: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    cards: tuple[str, ...] = ()
    tolerance: str | None = None
    jobs: int | None = None
    budgets: Path | None = None
    lock: Path | None = None


def verdict_against(wanted: Wanted, config: Config, limits: Budgets, lock: Lock | None) -> Verdict:
    """Run both trees and compare them.

    Args:
        wanted: the options.
        config: of the working tree.
        limits: what its budgets file says.
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
    from fragscope.against.run import SideOptions, run_both, stated_config
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
        cards=tuple(dict.fromkeys(wanted.cards)) or (config.card or DEFAULT_CARD,),
        jobs=wanted.jobs or usable_cores(),
        timeout=_TIMEOUT,
        out=(config.out or Path(".fragscope")).absolute() / "against",
    )
    cells(options.confs, options.releases, options.cards, None)  # complains before anything is checked out
    repository = Repository.at(root)
    commit = repository.commit_of(wanted.ref)
    which = _named(wanted.ref, commit)
    against = _against(repository, wanted.ref, commit, which, options.out.parent)
    with stopped_by_signals(), locked(options.out), repository.checked_out(commit) as tree, _progress() as step:
        click.echo(f"fragscope: running {which} and the working tree", err=True)
        before, after = run_both(repository, tree, which, root, config, options, step)
        policy = policy_changes(repository, tree, stated_config(tree, before.root), config, wanted)
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


def policy_changes(
    repository: Repository, tree: Path, theirs: Config, config: Config, wanted: Wanted
) -> list[PolicyChange]:
    """What changed in the limits: which files hold them, what these say, and how strictly they are held.

    Each side's own settings say which files are its limits. Otherwise a change could name a looser file, or none.

    Args:
        repository: whose working tree is gated.
        tree: of the other commit.
        theirs: the settings as that tree states them.
        config: of the working tree.
        wanted: a file that an option names is compared with the one at its place in the other tree.

    Raises:
        InputFileError: the current budgets file cannot be used.
    """
    from fragscope.gate.policy import PolicyFile, budget_changes, lock_changes, read_policy, setting_changes

    def at_its_place(file: Path) -> Path | None:
        name = repository.relative(file)
        return None if name is None else tree / name

    def files(option: Path | None, was: Path | None, now: Path | None, usual: Path) -> tuple[PolicyFile, PolicyFile]:
        new = option or now or usual
        old = at_its_place(new) if option is not None else was or at_its_place(usual)
        shown = _short(new)
        if old is not None:
            shown = _short(repository.top / old.relative_to(tree)) if old.is_relative_to(tree) else _short(old)
        return read_policy(old, shown), read_policy(new, _short(new))

    found = budget_changes(*files(wanted.budgets, theirs.budgets, config.budgets, BUDGETS))
    found += lock_changes(*files(wanted.lock, theirs.lock, config.lock, LOCK))
    stated = [
        ("budgets", _stated(theirs.budgets, theirs.root), _stated(config.budgets, config.root)),
        ("lock", _stated(theirs.lock, theirs.root), _stated(config.lock, config.root)),
        ("warn_only", str(theirs.warn_only).lower(), str(config.warn_only).lower()),
        ("tolerance", theirs.tolerance, config.tolerance),
        ("card", theirs.card, config.card),
        ("torch", theirs.torch, config.torch),
        *_card_changes(_own_cards(theirs), _own_cards(config)),
    ]
    return [*(change for key, was, now in stated for change in setting_changes(key, was, now)), *found]


def _own_cards(config: Config) -> dict[str, Card]:
    """The cards that a tree defines; none where they cannot be used."""
    from fragscope.allocator.own_cards import cards_of

    if config.own_cards is None:
        return {}
    try:
        return {card.name: card for card in cards_of(config.own_cards)}
    except InputFileError:
        return {}


def _card_changes(before: dict[str, Card], after: dict[str, Card]) -> Iterator[tuple[str, str, str]]:
    """Cards that became others under their old names: what is not alike in them, before and now."""
    for name, was in before.items():
        now = after.get(name)
        if now is None:
            yield f"cards.{name}", "defined", "not"
            continue
        unlike = [key for key in _CARD_FACTS if getattr(was, key) != getattr(now, key)]
        if unlike:
            yield f"cards.{name}", _facts(was, unlike), _facts(now, unlike)


def _facts(card: Card, keys: list[str]) -> str:
    return ", ".join(f"{key} {_CARD_FACTS[key](getattr(card, key))}" for key in keys)


def _stated(file: Path | None, root: Path | None) -> str | None:
    """A file as pyproject.toml names it."""
    if file is None:
        return None
    return str(file.relative_to(root) if root is not None and file.is_relative_to(root) else file)


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
