"""``fragscope lock``: exact figures into fragscope.lock."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragscope.errors import (
    EXIT_OVER_BUDGET,
    EXIT_PASS,
    FragscopeError,
    InputFileError,
    NotMeasuredError,
    UsageError,
    printable,
)

if TYPE_CHECKING:
    from fragscope.gate.lock import Lock
    from fragscope.gate.lock_update import Relock
    from fragscope.results import Results

_SHOWN = 20
"""Cases named of a list; the diff of the file has them all."""


@click.command("lock")
@click.argument("results", type=click.Path(path_type=Path), required=False)
@click.option(
    "--lock",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The lock.  [default: 'lock' in [tool.fragscope] of pyproject.toml, else ./fragscope.lock]",
)
@click.option("--update", is_flag=True, help="Write it although figures differ: they have been reviewed.")
@click.option("--check", is_flag=True, help="Write nothing; exit code 3 where there is no lock or it would change.")
@click.option("--prune", is_flag=True, help="Drop cases that these results lack; otherwise they stay.")
def command(results: Path | None, file: Path | None, update: bool, check: bool, prune: bool) -> int:
    """Write the exact figures of every case to fragscope.lock, which 'fragscope gate' holds results against.

    RESULTS is results.json or its folder; without it, the folder that 'fragscope run' writes to.

    A lock that is there and differs is only written with --update; what differs is printed in any case.

    \b
    Exit codes:
      0  the lock is written, or is as it should be
      3  it differs and was not written; or a case ended as its scenario does not declare, and nothing was locked
      4  the results are incomplete, or hold nothing that can be locked
      5  a file cannot be used; the message names the line
    """  # noqa: D301  # \b is click's mark for lines that stay as they are
    from fragscope.cli.gate_files import lock_file, relative, results_folder
    from fragscope.config import load_config
    from fragscope.gate.lock import lock_of, lock_text
    from fragscope.gate.lock_check import made_otherwise
    from fragscope.gate.lock_update import relock
    from fragscope.results import load_results
    from fragscope.trace.containers import write_atomically

    if update and check:
        raise UsageError("--update writes the lock and --check never does; give one of them")
    config = load_config()
    path = lock_file(file, config)
    shown = relative(path)
    measured = load_results(results_folder(results, config))
    undeclared = _check(measured)
    if undeclared:
        return undeclared
    new, left_out = lock_of(measured, shown)
    for id_, reason in sorted(left_out.items())[:_SHOWN]:
        click.echo(f"fragscope: not locked: {printable(id_)}: {printable(reason)}", err=True)
    _say_more(len(left_out), "cases that are not locked")
    if not new.cases:
        raise NotMeasuredError("the results hold nothing that can be locked; nothing is written")
    old = _there(path, shown, update=update) if path.exists() else None
    change = relock(old, new, prune=prune)
    if old is not None:
        _show(change, shown)
        note = made_otherwise(old, measured)
        if note:
            click.echo(f"fragscope: {printable(note)}", err=True)
    if check:
        if old is None:
            click.echo(f"fragscope: {printable(shown)} is not there; 'fragscope lock' writes it", err=True)
        return EXIT_PASS if old is not None and not change.differs else EXIT_OVER_BUDGET
    if old is not None and change.differs and not update:
        click.echo("fragscope: not written; review what differs, then run 'fragscope lock --update'", err=True)
        return EXIT_OVER_BUDGET
    if old is not None and not change.differs and not update:
        return EXIT_PASS
    if change.mixed:
        raise UsageError(change.mixed)
    text = lock_text(change.lock)
    try:
        write_atomically(path.resolve(), text.encode())  # where the name is a link, it stays one
    except OSError as e:
        raise FragscopeError(f"cannot write {printable(shown)}: {e.strerror or type(e).__name__}") from e
    click.echo(f"fragscope: locked {_cases(len(change.lock.cases))} in {printable(shown)}", err=True)
    return EXIT_PASS


def _there(path: Path, shown: str, *, update: bool) -> Lock | None:
    """The lock that is there; None for one of another version, which --update replaces whole.

    Raises:
        InputFileError: it is no lock, and says what to do; or one of another version, and nobody said --update.
    """
    from fragscope.gate.lock import load_lock, other_version

    try:
        return load_lock(path, shown)
    except InputFileError as e:
        version = other_version(path)
        if version is None:
            raise InputFileError(shown, f"{e.reason}; delete it, and 'fragscope lock' writes it anew") from None
        if not update:
            raise
        said = f"is of version {printable(str(version), 40)}, and is written anew with nothing but these results"
        click.echo(f"fragscope: {printable(shown)} {said}", err=True)
        return None


def _check(results: Results) -> int:
    """Whether results may be locked at all; an exit code where a case ended otherwise than declared."""
    run = results.run
    if not run.complete or len(results.cases) < run.planned:
        raise NotMeasuredError(
            f"the run is incomplete: {len(results.cases)} of {run.planned} planned cases are there; nothing is locked"
        )
    wrong = [case for case in results.cases if not case.as_expected and case.outcome != "skipped"]
    for case in wrong[:_SHOWN]:
        said = f"outcome {case.outcome}, declared {case.expected_outcome}"
        click.echo(f"undeclared  {printable(case.id)}  {said}  {printable(case.message)}".rstrip())
    _say_more(len(wrong), "cases that ended otherwise than declared")
    if wrong:
        click.echo("fragscope: nothing is locked: cases ended otherwise than their scenarios declare", err=True)
    return EXIT_OVER_BUDGET if wrong else EXIT_PASS


def _show(change: Relock, shown: str) -> None:
    for word, ids in (("new", change.added), ("dropped", change.dropped)):
        for id_ in ids[:_SHOWN]:
            click.echo(f"{word}  {printable(id_)}")
        if len(ids) > _SHOWN:
            click.echo(f"{word}  … and {len(ids) - _SHOWN:,} more")
    for id_, differences in list(change.changed.items())[:_SHOWN]:
        click.echo(f"changed  {printable(id_)}  {'; '.join(printable(d) for d in differences)}")
    if len(change.changed) > _SHOWN:
        click.echo(f"changed  … and {len(change.changed) - _SHOWN:,} more")
    if change.kept:
        click.echo(
            f"fragscope: {_cases(len(change.kept))} of {printable(shown)} not in these results, kept as locked; "
            "--prune drops what is not measured any more",
            err=True,
        )
    if not change.differs:
        click.echo(f"{printable(shown)} holds these figures: {_cases(len(change.lock.cases))}")


def _say_more(count: int, what: str) -> None:
    if count > _SHOWN:
        click.echo(f"fragscope: {count - _SHOWN:,} more {what}", err=True)


def _cases(count: int) -> str:
    return f"{count:,} case{'s' * (count != 1)}"
