"""``fragscope run --sweep``: how peak memory grows with a size, and the largest size that fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from fragscope.errors import EXIT_INTERNAL, EXIT_NOT_MEASURED, EXIT_PASS, UsageError
from fragscope.trace.containers import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fragscope.allocator import ReplaySettings
    from fragscope.results import Case, Curve, DeviceKind, Results, SweepResults
    from fragscope.suite.discover import Selection
    from fragscope.suite.runner import Progress, RunOptions
    from fragscope.suite.sweep import Sweep

FOLDER = "sweep"
"""Where a sweep's results go, below the folder for results: its failures are no regressions."""


def make_sweep(
    text: str,
    selections: Sequence[Selection],
    overrides: Mapping[str, str],
    settings: Sequence[ReplaySettings],
    device: DeviceKind,
    budgets: Path | None,
) -> Sweep:
    """The sweep that ``--sweep`` asks for.

    Raises:
        UsageError: it is malformed, no scenario has such a size, or ``--set`` sets it too.
        InputFileError: the budgets cannot be read.
    """
    from fragscope.suite.plan import plan
    from fragscope.suite.sweep import Sweep, parse_range, sweepable

    sizes = parse_range(text)
    if sizes.name in overrides:
        raise UsageError(f"--sweep {sizes.name}: --set sets it too; leave one out")
    chosen, without = sweepable(selections, sizes.name)
    for name in without:
        click.echo(f"fragscope: {name} has no {sizes.name} to sweep, and is left out", err=True)
    return Sweep(
        sizes,
        lambda size: plan(chosen, {**overrides, sizes.name: str(size)}, settings, device),
        _over(budgets, chosen),
    )


def _over(file: Path | None, chosen: Sequence[Selection]) -> Callable[[Case], str]:
    """Why a case is over its budget.

    Raises:
        UsageError: no budget is about any of the cases.
    """
    if file is None:
        return lambda _: ""
    from fragscope.gate import evaluate, load_budgets
    from fragscope.results import Results, Run
    from fragscope.units import format_bytes

    budgets = load_budgets(file)
    if not any(budget.matches_name(s.name.split("/")) for budget in budgets.budgets for s in chosen):
        raise UsageError(f"--budgets {file}: no budget in it is about {chosen[0].name} or any other case of the sweep")

    def over(case: Case) -> str:
        alone = Results(run=Run(started="", seconds=0.0, complete=True, planned=1), cases=[case])
        worst = next((c for c in evaluate(alone, budgets).checks if c.over), None)
        if worst is None:
            return ""
        limit = f"{format_bytes(worst.value)}, budget {format_bytes(worst.limit)}"
        return f"{worst.metric} {limit} ({worst.budget.file}:{worst.budget.line})"

    return over


def run_sweep(sweep: Sweep, options: RunOptions, progress: Progress) -> SweepResults:
    """Run the sweep and write sweep.json, also at an interrupt, which is raised again."""
    from fragscope.suite.runner import run_plan

    out = options.out.absolute()  # the program may change the working directory
    made = sweep.results(options.command, complete=False)

    def written(results: Results) -> None:
        nonlocal made
        made = sweep.results(options.command, complete=results.run.complete)
        write_atomically(out / "sweep.json", msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
        (out / "sweep.html").unlink(missing_ok=True)  # of an earlier sweep

    run_plan(sweep.first(), options, progress, sweep.after, written)
    return made


def show_sweep(results: SweepResults, style: str, folder: Path, *, report: bool) -> int:
    """Print what came out, and write the page; the exit code."""
    from fragscope.cli.pages import page_written
    from fragscope.report import write_sweep_html

    report = report and page_written("sweep.html", lambda: write_sweep_html(results, folder / "sweep.html"))
    if style == "json":
        click.echo((folder / "sweep.json").read_bytes(), nl=False)
    elif style == "markdown":
        click.echo("\n".join(_markdown(results)))
    else:
        click.echo("\n".join(_text(results)))
    click.echo(f"fragscope: wrote sweep.json{', sweep.html' if report else ''} to {folder}", err=True)
    if any(c.refuted for c in results.curves):
        return EXIT_INTERNAL  # as for ``fragscope run``: the fault is ours
    return EXIT_NOT_MEASURED if any(c.problem and not c.declared for c in results.curves) else EXIT_PASS


def _sentence(curve: Curve, results: SweepResults) -> str:
    """The answer for one case, in a line."""
    name, under = results.parameter, f"{curve.name} ({curve.conf or 'default'}, torch {curve.torch}, {curve.card})"
    if curve.refuted:
        return f"{under}: no answer: {curve.refuted}; please report it"
    if curve.problem:
        return f"{under}: no answer: {curve.problem}{' (declared)' if curve.declared else ''}"
    untried = "" if curve.untried_above is None else f"; nothing above {curve.untried_above:,} was tried"
    if curve.largest is None:
        return f"{under}: not even {name} = {results.low:,} fits: {curve.limited_by}{untried}"
    if not results.complete:
        return f"{under}: not finished; {name} = {curve.largest:,} fits"
    if not curve.limited_by:
        return f"{under}: every size tried fits, up to {name} = {curve.largest:,}"
    return f"{under}: {name} = {curve.largest:,} is the largest that fits; {curve.limited_by}{untried}"


def _rows(curve: Curve, results: SweepResults) -> Sequence[tuple[str, ...]]:
    """The doublings, and the two sizes where it turns."""
    from fragscope.suite.sweep import Range
    from fragscope.units import mib

    grid = set(Range(results.parameter, results.low, results.high, results.step).grid)
    above = min((p.size for p in curve.points if curve.largest is not None and p.size > curve.largest), default=None)
    rows: list[tuple[str, ...]] = [
        (results.parameter, "peak allocated MiB", "peak reserved MiB", "transient MiB", "outcome")
    ]
    for p in curve.points:
        if p.size in grid or p.size in (curve.largest, above):
            mark = "" if p.exact else "~"
            figures = tuple(
                mark + mib(count) if p.reached else "-" for count in (p.peak_allocated, p.peak_reserved, p.transient)
            )
            ended = "over budget" if p.over else "does not fit" if p.outcome == "skipped" else p.outcome
            rows.append((f"{p.size:,}", *figures, ended))
    return rows


def _text(results: SweepResults) -> list[str]:
    from fragscope.cli.tables import aligned

    lines = []
    for curve in results.curves:
        lines += [_sentence(curve, results), *(f"  {line}" for line in aligned(_rows(curve, results))), ""]
    return lines


def _markdown(results: SweepResults) -> list[str]:
    from fragscope.cli.tables import markdown_list, markdown_table

    lines = []
    for curve in results.curves:
        lines += [*markdown_list([_sentence(curve, results)]), "", *markdown_table(_rows(curve, results)), ""]
    return lines
