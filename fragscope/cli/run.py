"""``fragscope run``: runs scenarios, writes results, traces and the report, and says what each variant costs."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragscope.cli.printed_at_import import shown_on_stderr
from fragscope.cli.running import RichProgress, stopped_by_signals
from fragscope.cli.scenarios import selections_of
from fragscope.errors import (
    EXIT_INTERNAL,
    EXIT_NOT_MEASURED,
    EXIT_OVER_BUDGET,
    EXIT_PASS,
    FragscopeError,
    NotMeasuredError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fragscope.allocator import Card
    from fragscope.config import Config
    from fragscope.results import DeviceKind, NotApplicable, Results
    from fragscope.suite.discover import Selection

_TIMEOUT = 600.0
_LONGEST = 7 * 24 * 3600.0  # what any system call that waits takes


@click.command("run")
@click.argument("what", nargs=-1, metavar="[PATH|NAME[/PRESET[/VARIANT]]]...")
@click.option("--device", type=click.Choice(["auto", "virtual", "cuda"]), default="auto", show_default=True,
              help="auto: cuda where a GPU is, else virtual.")  # fmt: skip
@click.option("--preset", multiple=True, metavar="GLOB", help="Only these presets.")
@click.option("--variant", multiple=True, metavar="GLOB", help="Only these variants.")
@click.option("--matrix", type=click.Choice(["quick", "nightly"]), default="quick", show_default=True,
              help="quick: no conf, newest rules. nightly: no conf, max_split_size_mb:20 and expandable_segments:True, "
              "each under the rules of 2.11 and 2.13. --conf and --torch replace its confs and releases.")  # fmt: skip
@click.option("--conf", multiple=True, metavar="CONF", help="PYTORCH_ALLOC_CONF to run under; repeatable.")
@click.option("--torch", "releases", multiple=True, metavar="RELEASE", help="Release whose rules apply; repeatable.")
@click.option("--card", "cards", multiple=True, metavar="NAME", help="Device profile; repeatable.")
@click.option("--capacity", metavar="SIZE", help="Bytes the card has left for segments, such as '22 GiB'.")
@click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Set a scenario's parameter.")
@click.option("--sweep", metavar="NAME=LOW:HIGH[:STEP]",
              help="Peak memory over a size such as tokens=1k:1M, and the largest that fits.")  # fmt: skip
@click.option("--budgets", type=click.Path(path_type=Path),
              help="With --sweep: the largest size must be within these, too.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0.1, max=_LONGEST), default=_TIMEOUT, show_default=True,
              help="Seconds one recording may take.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), help="Recordings at once; one a core by default.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results; .fragscope by default.")
@click.option("--resume", is_flag=True, help="Keep what an earlier run finished and nothing has changed.")
@click.option("--list", "list_only", is_flag=True, help="Only list what would run.")
@click.option("--no-report", is_flag=True, help="Do not write report.html.")
@click.option("--format", "style", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
def command(
    what: tuple[str, ...],
    device: str,
    preset: tuple[str, ...],
    variant: tuple[str, ...],
    matrix: str,
    conf: tuple[str, ...],
    releases: tuple[str, ...],
    cards: tuple[str, ...],
    capacity: str | None,
    overrides: tuple[str, ...],
    sweep: str | None,
    budgets: Path | None,
    timeout: float,
    jobs: int | None,
    out: Path | None,
    resume: bool,
    list_only: bool,
    no_report: bool,
    style: str,
) -> int:
    """Run scenarios and write results, traces and a report.

    A PATH is a scenario file, or a folder with files named scenario_*.py; without one, the paths configured in
    [tool.fragscope] are searched. NAME, NAME/PRESET and NAME/PRESET/VARIANT choose from what is found; each part may
    be a glob.

    On a GPU a case first runs on the virtual device; where it needs more than the card has free now, it is skipped.

    Exit codes: 0 every outcome is the declared one, 3 one is not, 1 the allocator model differs from a recording
    (please report it), 4 something was skipped or nothing was measured, 130 interrupted; what is finished
    then is kept, and --resume goes on from there.
    """
    from fragscope.cli.configured import configured

    if math.isnan(timeout):
        raise UsageError("--timeout: nan is not a time")
    config = configured()
    root = config.root or Path.cwd()
    with shown_on_stderr():
        kind = _device(device)
        selections = selections_of(config, what, preset, variant)

    from fragscope.allocator import DEFAULT_CARD
    from fragscope.cli.sweep import FOLDER as SWEEP_FOLDER
    from fragscope.cli.sweep import make_sweep, run_sweep, show_sweep
    from fragscope.suite.card_here import ask_card
    from fragscope.suite.installed import applicable
    from fragscope.suite.matrix import MATRICES, cells
    from fragscope.suite.plan import plan
    from fragscope.suite.runner import RunOptions, run_plan, usable_cores
    from fragscope.units import parse_memory

    parsed = _overrides(overrides, selections)
    here = ask_card({s.scenario.file: None for s in selections}) if kind == "cuda" else None
    settings, left_out = cells(
        conf or MATRICES[matrix].confs,
        releases or MATRICES[matrix].releases or (_release(config, kind),),
        cards or _profile_of(None if here is None else here.card) or (config.card or DEFAULT_CARD,),
        None if capacity is None else parse_memory(capacity, "--capacity"),
    )
    if capacity is None:
        _tell_estimated(dict.fromkeys(s.card for s in settings))
    selections, absent = applicable(selections)
    left_out += absent
    _tell_left_out(left_out)
    if not selections:
        raise NotMeasuredError("nothing that was asked for is applicable here")
    folder = out or config.out or Path(".fragscope")
    if sweep is not None:
        swept = make_sweep(sweep, selections, parsed, settings, kind, budgets)
        planned, folder = swept.first(), folder / SWEEP_FOLDER
    elif budgets is not None:
        raise UsageError("--budgets goes with --sweep; fragscope gate holds the results of a run against budgets")
    else:
        planned = plan(selections, parsed, settings, kind)
    if list_only:
        for case in planned:
            click.echo(case.id)
        return EXIT_PASS
    options = RunOptions(
        out=folder,
        root=root,
        jobs=jobs or (usable_cores() if kind == "virtual" else 1),
        timeout=timeout,
        resume=resume,
        card=None if here is None else here.card,
        files_first=here is not None and here.files_first,
        command=("fragscope", *(a.encode(errors="backslashreplace").decode() for a in sys.argv[1:])),
        not_applicable=tuple(left_out),
    )
    try:
        with stopped_by_signals(), RichProgress() as progress:
            if sweep is not None:
                found = run_sweep(swept, options, progress)
            else:
                results = run_plan(planned, options, progress)
    except KeyboardInterrupt:
        click.echo(f"fragscope: what is finished is in {folder}; the same command with --resume goes on", err=True)
        raise click.Abort from None
    except OSError as e:
        raise FragscopeError(f"cannot write to {folder}: {e.strerror or type(e).__name__}") from e
    if sweep is not None:
        return show_sweep(found, style, folder, report=not no_report)
    _show(results, folder, style, report=not no_report)
    return _exit_code(results)


def _device(choice: str) -> DeviceKind:
    try:
        import torch
    except ImportError:
        raise UsageError(
            "running scenarios needs torch, which is not installed: pip install 'fragscope[torch]' "
            "(a CPU build is enough)"
        ) from None
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise UsageError("--device cuda: torch sees no CUDA device here; --device virtual needs none")
    if choice == "virtual" or not available:
        return "virtual"
    return "cuda"


def _profile_of(here: Card | None) -> tuple[str, ...]:
    """The profile of the card at hand; one without a profile gets one for this run."""
    if here is None:
        return ()
    from dataclasses import replace

    from fragscope.allocator import CARDS, card_like

    known = card_like(here.product, here.total)
    if known is None:
        CARDS[here.name] = here
        return (here.name,)
    if not known.measured:  # here it is
        CARDS[known.name] = replace(here, name=known.name)
    return (known.name,)


def _release(config: Config, kind: DeviceKind) -> str:
    """Whose rules apply where nobody says: on a GPU those of its own allocator, else the newest known."""
    if config.torch:
        return config.torch
    if kind == "cuda":
        import torch

        return str(torch.__version__).partition("+")[0]
    from fragscope.allocator import NEWEST

    return NEWEST.release


def _tell_left_out(left_out: list[NotApplicable]) -> None:
    for left in left_out:
        what = left.variant or f"--conf {left.conf} --torch {left.torch}"
        click.echo(f"fragscope: not applicable: {what}: {left.reason}", err=True)


def _tell_estimated(cards: Iterable[str]) -> None:
    """Cards whose free memory is not known; a capacity that the user names is taken instead."""
    from fragscope.allocator import card_named

    guessed = [name for name in cards if "free" in card_named(name).estimated]
    if guessed:
        click.echo(
            f"fragscope: {', '.join(guessed)}: free memory estimated, results that may hang on it are marked "
            "(free_estimated; --capacity names it, fragscope cards lists sources)",
            err=True,
        )


def _overrides(overrides: tuple[str, ...], selections: list[Selection]) -> dict[str, str]:
    import difflib

    parsed: dict[str, str] = {}
    known = sorted({k for s in selections for k in s.scenario.values_for(s.preset, {})})
    for item in overrides:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {item}: write NAME=VALUE")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known) or 'none'}"
            raise UsageError(f"--set {item}: no selected scenario has a parameter {name!r}; {hint}")
        parsed[name] = value
    return parsed


def _show(results: Results, folder: Path, style: str, *, report: bool) -> None:
    from fragscope.cli.pages import page_written
    from fragscope.report import markdown, refutation, results_table, write_html

    report = report and page_written("report.html", lambda: write_html(results, folder, folder / "report.html"))
    if style == "json":
        click.echo((folder / "results.json").read_bytes(), nl=False)
    elif style == "markdown":
        click.echo(markdown(results), nl=False)
    else:
        from rich.console import Console

        Console().print(results_table(results))
    for case in results.cases:
        if not case.as_expected:
            log = folder / "logs" / f"{case.digest}.log"
            more = f" (log: {log})" if log.is_file() else ""
            click.echo(f"fragscope: {case.outcome}: {case.id}: {case.message or 'no message'}{more}", err=True)
        if case.refuted:
            trace = f" (recorded: {folder / case.trace})" if case.trace else ""
            click.echo(f"fragscope: model: {case.id}: {refutation(case)}; please report it{trace}", err=True)
    written = "results.json, traces" + (", report.html" if report else "")
    took = f"{len(results.cases)} case{'s' * (len(results.cases) != 1)} in {results.run.seconds:.1f} s"
    click.echo(f"fragscope: {took}; wrote {written} to {folder}", err=True)


def _exit_code(results: Results) -> int:
    unexpected = [c for c in results.cases if not c.as_expected]
    if any(c.outcome != "skipped" for c in unexpected):
        return EXIT_OVER_BUDGET
    if any(c.refuted for c in results.cases):
        return EXIT_INTERNAL  # as for ``fragscope replay --verify``: the fault is ours
    if unexpected or not results.run.complete or not any(c.measured for c in results.cases):
        return EXIT_NOT_MEASURED
    return EXIT_PASS
