"""``fragscope report``: results as one HTML page, as Markdown, or as a table for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import click

from fragscope.errors import UsageError

_WIDTH = 120  # of a text table in a file, which has no terminal to ask

Format = Literal["html", "markdown", "text"]


@click.command("report")
@click.argument("results", type=click.Path(path_type=Path), required=False)
@click.option(
    "--format", "form", type=click.Choice(["html", "markdown", "text"]), default="html", show_default=True,
    help="What to write.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write it. An HTML page goes to report.html beside the results, the others to stdout.",
)  # fmt: skip
@click.option("--all-figures", is_flag=True, help="Draw every case; of a large run the page else shows some.")
def command(results: Path | None, form: Format, out: Path | None, all_figures: bool) -> None:
    """Show RESULTS, a results.json or the folder that holds it (default: where run puts it).

    The HTML page is complete in itself and opens without a network; its path is printed.
    """
    from fragscope.config import load_config
    from fragscope.results import load_results

    results = results or load_config().out or Path(".fragscope")
    loaded = load_results(results)
    folder = results if results.is_dir() else results.parent
    if form == "html":
        from fragscope.report import write_html

        target = folder / "report.html" if out is None else out
        _write(target, lambda: write_html(loaded, folder, target, all_figures=all_figures))
        return
    if form == "markdown":
        from fragscope.report import markdown

        text = markdown(loaded)
    else:
        from rich.console import Console

        from fragscope.report import results_table

        if out is None:
            Console(file=sys.stdout).print(results_table(loaded))
            return
        console = Console(file=sys.stdout, width=_WIDTH, color_system=None)
        with console.capture() as captured:
            console.print(results_table(loaded))
        text = captured.get()
    if out is None:
        click.echo(text, nl=False)
        return
    from fragscope.trace.containers import write_atomically

    encoded = text.encode("utf-8", errors="replace")
    _write(out, lambda: write_atomically(out, encoded))


def _write(target: Path, write: Callable[[], None]) -> None:
    """Write a file and print its path; a place that cannot be written is the caller's mistake, not ours."""
    try:
        write()
    except OSError as e:
        raise UsageError(f"--out: {target} cannot be written ({(e.strerror or type(e).__name__).lower()})") from None
    click.echo(str(target))
