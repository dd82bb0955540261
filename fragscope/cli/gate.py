"""``fragscope gate``: results against budgets."""

from __future__ import annotations

from pathlib import Path

import click

from fragscope.errors import InputFileError, UsageError


@click.command("gate")
@click.argument("results", type=click.Path(path_type=Path), required=False)
@click.option(
    "--budgets",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Budgets file.  [default: 'budgets' in [tool.fragscope] of pyproject.toml, else ./budgets.toml]",
)
@click.option("--format", "layout", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
def command(results: Path | None, budgets: Path | None, layout: str) -> int:
    """Hold results against budgets and say pass or fail.

    RESULTS is results.json or its folder; without it, the folder that 'fragscope run' writes to.

    \b
    Exit codes:
      0  every budget is met
      3  a value is over its budget, or a case ended as its scenario does not declare
      4  a budget's case was not measured (skipped, or its recording refutes the model), or nothing was held against a
         budget
      5  a file cannot be used; the message names the line
    Where both 3 and 4 apply, everything is printed and 3 is the exit code: measuring again would not help.
    """  # noqa: D301  # \b is click's mark for lines that stay as they are
    import msgspec

    from fragscope.config import load_config
    from fragscope.gate import evaluate, load_budgets
    from fragscope.gate.render import as_markdown, as_text
    from fragscope.results import load_results

    config = load_config()
    file = _budgets_file(budgets, config.budgets)
    found = load_budgets(file, shown_as=_relative(file))
    folder = results or config.out or Path(".fragscope")
    if not folder.exists():
        raise InputFileError(_relative(folder), "is not there; write results with 'fragscope run' first")
    verdict = evaluate(load_results(folder), found)
    match layout:
        case "json":
            click.echo(msgspec.json.format(msgspec.json.encode(verdict), indent=1))
        case "markdown":
            click.echo(as_markdown(verdict), nl=False)
        case _:
            click.echo(as_text(verdict), nl=False)
    return verdict.exit_code


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
