"""``fragscope fit``: the smallest memory in which a trace's requests run, and what fails just below it.

On which cards traces and the cases of a run have room is answered in ``fit_cards``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from fragscope.cli.subjects import granted, subject_json
from fragscope.cli.tables import aligned, markdown_list, markdown_table
from fragscope.cli.tune import progress
from fragscope.errors import EXIT_PASS, NotMeasuredError, UsageError, printable

if TYPE_CHECKING:
    from fragscope.search import Failure, Fit, Subject

SCHEMA_VERSION = 1
_REPLAYS = 60  # a search takes about so many
_LONGEST = 2000  # characters of a line


@click.command()
@click.argument("file", metavar="TRACE|RESULTS", type=click.Path(path_type=str))
@click.option("--conf", "confs", multiple=True, metavar="CONF",
              help="PYTORCH_ALLOC_CONF string. [default: as recorded, '', and expandable_segments:True]")  # fmt: skip
@click.option("--torch", "release", metavar="RELEASE", help="Release whose rules decide, as 2.11.0.")
@click.option("--card", "cards", multiple=True, metavar="NAME",
              help="Say whether it runs on this card, with how much room; repeatable. [of RESULTS: all]")  # fmt: skip
@click.option(
    "--total", metavar="SIZE", help="Total memory of the device; expandable segments reserve addresses by it."
)
@click.option("--assume-unchanged", is_flag=True,
              help="Take the requests as they are although the program learned about memory on the way.")  # fmt: skip
@click.option("--sidecar", type=click.Path(path_type=str), metavar="JSON",
              help="What the snapshot leaves out: torch, conf, memory_fraction, total_memory, ...")  # fmt: skip
@click.option("--device-index", type=click.IntRange(min=0), help="CUDA device, where a snapshot holds several.")
@click.option("--format", "form", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
def command(
    *,
    file: str,
    confs: tuple[str, ...],
    release: str | None,
    cards: tuple[str, ...],
    total: str | None,
    assume_unchanged: bool,
    sidecar: str | None,
    device_index: int | None,
    form: str,
) -> int:
    """Find the smallest memory for segments in which the requests in TRACE run without an OOM.

    The figure is what PyTorch's allocator may take from the driver, in pages of 2 MiB; the CUDA context, NCCL and other
    users of the device come on top. The exit code is 4 where the requests run under none of the confs, however much
    memory there is.

    With --card, and for RESULTS (results.json or its folder, as 'fragscope run' writes it), say for every case on which
    cards it runs, beside a CUDA context and nothing else: under the conf it was recorded with, else under which other,
    else which request fails. Worst first. Exit codes then: 0 all run on all these cards, 3 something does not, 4 of
    something it cannot be said.
    """
    from fragscope.cli.fit_cards import answer_on_cards, is_results

    if cards and total is not None:
        raise UsageError("--total: --card already says how much the device has")
    if cards or is_results(file):
        if total is not None:
            raise UsageError("--total: results are held against cards; name them with --card")
        given_files = (sidecar, device_index, release)
        return answer_on_cards(file, cards, confs, given_files, assume_unchanged=assume_unchanged, form=form)

    from fragscope.allocator import worth_compiling
    from fragscope.search import Given, fit, load_subject
    from fragscope.search.play import compile_with
    from fragscope.units import parse_memory

    size = None if total is None else parse_memory(total, "--total")
    if size == 0:
        raise UsageError("--total: a device without memory runs nothing")
    with progress() as say:
        say("reading")
        given = Given(torch=release, total=size, device=device_index, sidecar=sidecar)
        subject = load_subject(file, given)
        chosen = different(confs or (subject.settings.conf, "", "expandable_segments:True"), subject)
        compiled = worth_compiling(_REPLAYS * len(chosen) * len(subject.tape.kind))
        if compiled:
            compile_with(say)
        fits = [
            fit(
                subject,
                conf,
                assume_unchanged=assume_unchanged,
                compiled=compiled,
                tested=lambda capacity, conf=conf: say(f"{conf or 'default'}: {capacity >> 20:,} MiB"),  # type: ignore[misc]
            )
            for conf in chosen
        ]
    for note in subject.notes:
        print(f"fragscope: {note}", file=sys.stderr)
    if form == "json":
        print(json.dumps(as_json(subject, fits), indent=2))
    elif form == "markdown":
        click.echo("\n".join(as_markdown(subject, fits)))
    else:
        _print_text(subject, fits)
    if all(f.capacity is None for f in fits):
        raise NotMeasuredError(f"{file}: the requests run under none of these confs, however much memory there is")
    return EXIT_PASS


def different(confs: tuple[str, ...], subject: Subject) -> list[str]:
    """The confs that mean different things to the release."""
    from fragscope.search.confs import effective

    meanings = {effective(conf, [subject.settings.rules.rules]): conf for conf in reversed(confs)}
    return [conf for conf in dict.fromkeys(confs) if conf in meanings.values()]


def as_json(subject: Subject, fits: list[Fit]) -> dict[str, Any]:
    """The answer as published: sizes are integer bytes, keys only ever get more."""
    return {
        "schema_version": SCHEMA_VERSION,
        "trace": subject_json(subject),
        "fits": [_fit_json(f) for f in fits],
    }


def _fit_json(f: Fit) -> dict[str, Any]:
    return {
        "conf": f.conf,
        "capacity": f.capacity,
        "lowest": f.lowest,
        "tested": f.tested,
        "failing": list(f.failing),
        "failure": None if f.failure is None else asdict(f.failure),
        "unlimited": {"reserved": f.unlimited, "driver_calls": asdict(f.calls_unlimited)},
        "retries": f.retries,
        "driver_calls": asdict(f.calls),
        "cards": list(f.cards),
        "exact": f.exact,
        "assumptions": [asdict(a) for a in f.assumptions],
    }


def _print_text(subject: Subject, fits: list[Fit]) -> None:
    for line in (*_about(subject), *aligned(_table(fits)), *(line for f in fits for line in explanation(f))):
        click.echo(printable(line, _LONGEST))
    assumed = _granted(fits)
    for line in ["taken for granted:", *(f"  {a}" for a in assumed)] if assumed else []:
        click.echo(printable(line, _LONGEST))


def as_markdown(subject: Subject, fits: list[Fit]) -> list[str]:
    """The same as Markdown; names come from strangers' files and are escaped."""
    from fragscope.report.markdown import escaped

    head, about = _about(subject)
    lines = [f"### fragscope fit: {escaped(head)}", "", escaped(about), "", *markdown_table(_table(fits))]
    why = [line for f in fits for line in explanation(f)]
    if why:
        lines += ["", *markdown_list(why)]
    assumed = _granted(fits)
    if assumed:
        lines += ["", "Taken for granted:", "", *markdown_list(assumed)]
    return lines


def _about(subject: Subject) -> tuple[str, str]:
    events = f"{subject.name}: {len(subject.tape.kind):,} events, torch {subject.settings.rules.torch}"
    return events, "smallest memory to hold from the driver in MiB, and what is held where memory is no limit"


def _table(fits: list[Fit]) -> list[tuple[str, ...]]:
    from fragscope.units import mib

    rows: list[tuple[str, ...]] = [
        ("smallest", "no limit", "retries", "alloc", "free", "sync", "tested", "exact", "conf and cards it fits")
    ]
    for f in fits:
        calls = f.calls
        rows.append((
            "-" if f.capacity is None else mib(f.capacity), mib(f.unlimited), f"{f.retries:,}",
            f"{calls.alloc:,}", f"{calls.free:,}", f"{calls.sync:,}", f"{f.tested:,}", "yes" if f.exact else "no",
            f"{f.conf or 'default'} ({_smallest(f.cards)})",
        ))  # fmt: skip
    return rows


def _smallest(cards: tuple[str, ...]) -> str:
    """Which cards are large enough, in a few words; the smallest comes first."""
    if len(cards) < 2:
        return cards[0] if cards else "no known card"
    return f"{cards[0]} and {len(cards) - 1} larger"


def _granted(fits: list[Fit]) -> list[str]:
    from fragscope.allocator import merged

    return granted(merged([f.assumptions for f in fits], max))


def explanation(f: Fit) -> list[str]:
    """What fails just below, and where more memory does not help."""
    from fragscope.units import mib

    name, lines = f.conf or "default", []
    if f.failing and f.lowest is not None and f.capacity is not None:
        lines.append(
            f"{name}: {mib(f.lowest)} MiB run as well, but {len(f.failing):,} of the larger capacities tested fail, "
            f"up to {mib(f.failing[-1])} MiB; from {mib(f.capacity)} MiB on all tested ones run"
        )
    if f.failure is not None:
        where = "with unlimited memory" if f.capacity is None else f"with {mib(f.failure.capacity)} MiB"
        first, *rest = failure_lines(f.failure)
        lines += [f"{name}, {where}: {first}", *(f"  {line}" for line in rest)]
    return lines


def failure_lines(x: Failure) -> list[str]:
    """What failed and why, for people."""
    from fragscope.units import format_bytes

    at = f" at {x.frame}" if x.frame else ""
    whose = "past the allocator" if x.stream is None else f"on stream {x.stream}"
    past = f", past the allocator {format_bytes(x.raw)}" if x.raw else ""
    lines = [
        f"event {x.event:,} fails, {format_bytes(x.requested)} {whose}{at}",
        f"reserved {format_bytes(x.reserved)}, allocated {format_bytes(x.allocated)}, stranded "
        f"{format_bytes(x.stranded)}{past}; the driver has {format_bytes(x.left)}, {format_bytes(x.needed)} are needed",
    ]
    for idle in x.idle:
        pieces = f"{idle.pieces:,} pieces" if idle.pieces > 1 else "one piece"
        lines.append(f"{format_bytes(idle.bytes)} {idle.detail} ({pieces}, largest {format_bytes(idle.largest)})")
    return lines
