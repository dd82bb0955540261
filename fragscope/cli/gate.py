"""``fragscope gate``: results against budgets and the lock, or the working tree against another commit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fragscope.errors import FragscopeError, UsageError

if TYPE_CHECKING:
    from fragscope.config import Config
    from fragscope.gate import Budgets, Lock, Verdict


def _annotated(gate: Callable[..., int]) -> Callable[..., int]:
    """Where annotations are asked for, an error without a verdict is one too; stderr is only in a job's log."""

    @functools.wraps(gate)
    def annotated(**given: Any) -> int:
        try:
            return gate(**given)
        except FragscopeError as e:
            if given["layout"] == "github":
                from fragscope.gate.annotations import error_command

                click.echo(error_command(str(e)))
            raise

    return annotated


@click.command("gate")
@click.argument("results", type=click.Path(path_type=Path), required=False)
@click.option(
    "--budgets",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Budgets file.  [default: 'budgets' in [tool.fragscope] of pyproject.toml, else ./budgets.toml]",
)
@click.option("--against", metavar="REF", help="Run this commit and the working tree, and compare them.")
@click.option("--only", multiple=True, metavar="NAME[/PRESET[/VARIANT]]",
              help="With --against: only these cases; repeatable, each part may be a glob.")  # fmt: skip
@click.option("--tolerance", metavar="SIZE|SHARE",
              help="With --against: by how much may grow what moves by itself, such as '64 MiB' or '2 %'.  "
              "[default: 'tolerance' in [tool.fragscope], else the larger of 20 MiB and 1 %]")  # fmt: skip
@click.option("--conf", multiple=True, metavar="CONF", help="With --against: PYTORCH_ALLOC_CONF; repeatable.")
@click.option("--torch", "releases", multiple=True, metavar="RELEASE",
              help="With --against: release whose rules apply; repeatable.")  # fmt: skip
@click.option("--card", "cards", multiple=True, metavar="NAME", help="With --against: device profile; repeatable.")
@click.option("--jobs", type=click.IntRange(min=1), help="With --against: recordings at once; one a core by default.")
@click.option(
    "--lock",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Lock file.  [default: 'lock' in [tool.fragscope] of pyproject.toml, else ./fragscope.lock where it is]",
)
@click.option("--no-lock", is_flag=True, help="Hold results against budgets only.")
@click.option(
    "--warn-only/--no-warn-only",
    default=None,
    help="Say everything and end with 0.  [default: 'warn_only' in [tool.fragscope] of pyproject.toml, else no]",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["text", "json", "markdown", "github"]),
    default="text",
    show_default=True,
    help="github: annotations at the responsible lines, then the text.",
)
@click.option("--summary", type=click.Path(path_type=Path), metavar="FILE",
              help="Also add Markdown to FILE, such as $GITHUB_STEP_SUMMARY; under 1 MiB in all.")  # fmt: skip
@click.option("--comment", type=click.Path(path_type=Path), metavar="FILE",
              help="Also write the body of a pull request's comment to FILE.")  # fmt: skip
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Also write JUnit XML to FILE.")
@_annotated
def command(
    results: Path | None,
    budgets: Path | None,
    against: str | None,
    only: tuple[str, ...],
    tolerance: str | None,
    conf: tuple[str, ...],
    releases: tuple[str, ...],
    cards: tuple[str, ...],
    jobs: int | None,
    lock: Path | None,
    no_lock: bool,
    warn_only: bool | None,
    layout: str,
    summary: Path | None,
    comment: Path | None,
    junit: Path | None,
) -> int:
    """Hold results against budgets and the lock, or the working tree against another commit, and say pass or fail.

    RESULTS is results.json or its folder; without it, the folder that 'fragscope run' writes to.

    With --against REF nothing needs to be there: that commit is checked out in a temporary folder, its scenarios and
    those of the working tree run on the virtual device, and what the change costs is said with the lines that hold it.
    Budgets and the lock, where there are any, hold for the working tree.

    \b
    Exit codes:
      0  every budget is met, everything is as locked, and nothing regressed
      3  a value is over its budget, not as locked, or has regressed; or a case ended as its scenario does not declare
      4  a case was not measured (skipped, or its recording refutes the model), or nothing was held against
         anything, or nothing was compared
      5  a file cannot be used; the message names the line
    Where both 3 and 4 apply, everything is printed and 3 is the exit code: measuring again would not help. With
    --warn-only both are 0.
    """  # noqa: D301  # \b is click's mark for lines that stay as they are
    import datetime

    import msgspec

    from fragscope.cli.configured import configured
    from fragscope.cli.gate_files import BUDGETS, budgets_file, lock_to_hold, relative
    from fragscope.cli.gate_outputs import write_outputs
    from fragscope.gate import Budgets, decided, load_budgets, load_lock, waive

    if no_lock and lock is not None:
        raise UsageError("--lock names a lock and --no-lock wants none; give one of them")
    config = configured()
    limits_file = budgets_file(budgets, config)
    locked_file = None if no_lock else lock_to_hold(lock, config)
    shown = relative(limits_file or BUDGETS)
    limits = Budgets(shown, ()) if limits_file is None else load_budgets(limits_file, shown_as=shown)
    locked = None if locked_file is None else load_lock(locked_file, shown_as=relative(locked_file))
    if against is None:
        given = {"--only": only, "--tolerance": tolerance, "--conf": conf, "--torch": releases, "--card": cards,
                 "--jobs": jobs}  # fmt: skip
        for option, value in given.items():
            if value:
                raise UsageError(f"{option} goes with --against REF")
        if limits_file is None and locked_file is None:
            raise UsageError(
                "there is no budgets file: write budgets.toml here, name one with 'budgets' in [tool.fragscope] of "
                "pyproject.toml, or pass --budgets FILE; or write a lock with 'fragscope lock'"
            )
        verdict = _held(results, limits, locked, config)
    else:
        if results is not None:
            raise UsageError(f"--against runs what it compares, and takes no results: leave {results} out")
        from fragscope.cli.against import Wanted, verdict_against

        wanted = Wanted(against, only, conf, releases, cards, tolerance, jobs, budgets, lock)
        verdict = verdict_against(wanted, config, limits, locked)
    verdict = waive(verdict, limits.waivers, limits.file, datetime.datetime.now(datetime.UTC).date())
    verdict = decided(msgspec.structs.replace(verdict, warn_only=config.warn_only if warn_only is None else warn_only))
    _print(verdict, layout)
    return write_outputs(verdict, summary=summary, comment=comment, junit=junit)


def _held(results: Path | None, limits: Budgets, locked: Lock | None, config: Config) -> Verdict:
    """Results against budgets and the lock."""
    from fragscope.cli.gate_files import results_folder
    from fragscope.gate import evaluate, hold_to_lock
    from fragscope.results import load_results

    measured = load_results(results_folder(results, config))
    verdict = evaluate(measured, limits, also_held=locked is not None)
    return verdict if locked is None else hold_to_lock(verdict, measured, locked, limits.lock)


def _print(verdict: Verdict, layout: str) -> None:
    import msgspec

    from fragscope.cli.gate_outputs import folder_in_repository
    from fragscope.gate.annotations import as_github
    from fragscope.gate.markdown import as_markdown
    from fragscope.gate.render import as_text

    match layout:
        case "json":
            # Where GitHub's runner reads along, "##[" may begin a command; in JSON it can be written otherwise.
            said = msgspec.json.format(msgspec.json.encode(verdict), indent=1).decode()
            click.echo(said.replace("##[", "##\\u005b"))
        case "markdown":
            click.echo(as_markdown(verdict), nl=False)
        case "github":
            click.echo(as_github(verdict, folder_in_repository()), nl=False)
        case _:
            click.echo(as_text(verdict), nl=False)
