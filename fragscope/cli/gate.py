"""``fragscope gate``: results against budgets, or the working tree against another commit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragscope.errors import InputFileError, UsageError

if TYPE_CHECKING:
    from fragscope.config import Config
    from fragscope.gate import Verdict


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
@click.option("--card", metavar="NAME", help="With --against: device profile.")
@click.option("--jobs", type=click.IntRange(min=1), help="With --against: recordings at once; one a core by default.")
@click.option("--format", "layout", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
def command(
    results: Path | None,
    budgets: Path | None,
    against: str | None,
    only: tuple[str, ...],
    tolerance: str | None,
    conf: tuple[str, ...],
    releases: tuple[str, ...],
    card: str | None,
    jobs: int | None,
    layout: str,
) -> int:
    """Hold results against budgets, or the working tree against another commit, and say pass or fail.

    RESULTS is results.json or its folder; without it, the folder that 'fragscope run' writes to.

    With --against REF nothing needs to be there: that commit is checked out in a temporary folder, its scenarios and
    those of the working tree run on the virtual device, and what the change costs is said with the lines that hold it.
    Budgets, where there are any, hold for the working tree.

    \b
    Exit codes:
      0  every budget is met, and nothing regressed
      3  a value is over its budget or has regressed, or a case ended as its scenario does not declare
      4  a case was not measured (skipped, or its recording refutes the model), or nothing was held against a
         budget, or nothing was compared
      5  a file cannot be used; the message names the line
    Where both 3 and 4 apply, everything is printed and 3 is the exit code: measuring again would not help.
    """  # noqa: D301  # \b is click's mark for lines that stay as they are
    import msgspec

    from fragscope.config import load_config
    from fragscope.gate.render import as_markdown, as_text

    config = load_config()
    if against is None:
        given = {"--only": only, "--tolerance": tolerance, "--conf": conf, "--torch": releases, "--card": card,
                 "--jobs": jobs}  # fmt: skip
        for option, value in given.items():
            if value:
                raise UsageError(f"{option} goes with --against REF")
        verdict = _held(results, budgets, config)
    else:
        if results is not None:
            raise UsageError(f"--against runs what it compares, and takes no results: leave {results} out")
        from fragscope.cli.against import Wanted, verdict_against

        file = _budgets_file(budgets, config.budgets) if _has_budgets(budgets, config) else None
        wanted = Wanted(against, only, conf, releases, card, tolerance, jobs)
        verdict = verdict_against(wanted, config, file, _relative(file or Path("budgets.toml")))
    match layout:
        case "json":
            click.echo(msgspec.json.format(msgspec.json.encode(verdict), indent=1))
        case "markdown":
            click.echo(as_markdown(verdict), nl=False)
        case _:
            click.echo(as_text(verdict), nl=False)
    return verdict.exit_code


def _held(results: Path | None, budgets: Path | None, config: Config) -> Verdict:
    """Results against budgets."""
    from fragscope.gate import evaluate, load_budgets
    from fragscope.results import load_results

    file = _budgets_file(budgets, config.budgets)
    found = load_budgets(file, shown_as=_relative(file))
    folder = results or config.out or Path(".fragscope")
    if not folder.exists():
        raise InputFileError(_relative(folder), "is not there; write results with 'fragscope run' first")
    return evaluate(load_results(folder), found)


def _has_budgets(option: Path | None, config: Config) -> bool:
    """A comparison needs no budgets; those that are named must be there."""
    return option is not None or config.budgets is not None or Path("budgets.toml").exists()


def _budgets_file(option: Path | None, configured: Path | None) -> Path:
    if option is not None:
        if not option.exists():
            raise UsageError(f"--budgets {option}: there is no such file")
        return option
    if configured is not None:
        if not configured.exists():
            raise UsageError(
                f"{_relative(configured)}, named by 'budgets' in [tool.fragscope] of pyproject.toml, is not there; "
                "write it, correct the key, or pass --budgets FILE"
            )
        return configured
    file = Path("budgets.toml")
    if not file.exists():
        raise UsageError(
            "there is no budgets file: write budgets.toml here, name one with 'budgets' in [tool.fragscope] of "
            "pyproject.toml, or pass --budgets FILE"
        )
    return file


def _relative(path: Path) -> str:
    """The path as short as it can be said from here; absolute ones differ from machine to machine."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)
