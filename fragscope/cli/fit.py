"""``fragscope fit``: the smallest memory in which a trace's requests run, and what fails just below it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from fragscope.cli.tune import aligned, progress
from fragscope.errors import UsageError, printable

if TYPE_CHECKING:
    from fragscope.search import Failure, Fit, Subject

SCHEMA_VERSION = 1
_REPLAYS = 60  # a search takes about so many


@click.command()
@click.argument("file", metavar="TRACE", type=click.Path(path_type=str))
@click.option("--conf", "confs", multiple=True, metavar="CONF",
              help="PYTORCH_ALLOC_CONF string. [default: as recorded, '', and expandable_segments:True]")  # fmt: skip
@click.option("--torch", "release", metavar="RELEASE", help="Release whose rules decide, as 2.11.0.")
@click.option("--card", metavar="NAME", help="Device profile whose total memory counts, such as h100-80gb.")
@click.option(
    "--total", metavar="SIZE", help="Total memory of the device; expandable segments reserve addresses by it."
)
@click.option("--assume-unchanged", is_flag=True,
              help="Take the requests as they are although the program learned about memory on the way.")  # fmt: skip
@click.option("--device-index", type=click.IntRange(min=0), help="CUDA device, where a snapshot holds several.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(
    *,
    file: str,
    confs: tuple[str, ...],
    release: str | None,
    card: str | None,
    total: str | None,
    assume_unchanged: bool,
    device_index: int | None,
    form: str,
) -> None:
    """Find the smallest memory for segments in which the requests in TRACE run without an OOM.

    The figure is what PyTorch's allocator may take from the driver, in pages of 2 MiB; the CUDA context, NCCL and other
    users of the device come on top.
    """
    from fragscope.search import Given, fit, load_subject
    from fragscope.search.play import compile_with, worth_compiling
    from fragscope.units import parse_bytes

    if card is not None and total is not None:
        raise UsageError("--total: --card already says how much the device has")
    size = None if total is None else parse_bytes(total, "--total")
    if size == 0:
        raise UsageError("--total: a device without memory runs nothing")
    with progress() as say:
        say("reading")
        subject = load_subject(file, Given(torch=release, card=card, total=size, device=device_index))
        chosen = _different(confs or (subject.settings.conf, "", "expandable_segments:True"), subject)
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
    else:
        _print_text(subject, fits)


def _different(confs: tuple[str, ...], subject: Subject) -> list[str]:
    """The confs that mean different things to the release."""
    from fragscope.search.confs import effective

    meanings = {effective(conf, [subject.settings.rules.rules]): conf for conf in reversed(confs)}
    return [conf for conf in dict.fromkeys(confs) if conf in meanings.values()]


def as_json(subject: Subject, fits: list[Fit]) -> dict[str, Any]:
    """The answer as published: sizes are integer bytes, keys only ever get more."""
    s, trace = subject.settings, subject.tape.trace
    return {
        "schema_version": SCHEMA_VERSION,
        "trace": {
            "path": subject.name,
            "source": trace.source,
            "events": len(trace.requests),
            "conf": s.conf,
            "torch": s.rules.torch,
            "rules": s.rules.rules.release,
            "card": s.card,
            "total": s.total,
            "lost": [asdict(loss) for loss in trace.lost],
        },
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
    from fragscope.units import mib

    s = subject.settings
    click.echo(f"{printable(subject.name)}: {len(subject.tape.kind):,} events, torch {s.rules.torch}")
    click.echo("smallest memory for segments in MiB, and what is reserved where memory is no limit")
    rows = [("smallest", "no limit", "retries", "alloc", "free", "sync", "tested", "exact", "conf and cards it fits")]
    for f in fits:
        calls = f.calls
        rows.append((
            "-" if f.capacity is None else mib(f.capacity), mib(f.unlimited), f"{f.retries:,}",
            f"{calls.alloc:,}", f"{calls.free:,}", f"{calls.sync:,}", f"{f.tested:,}", "yes" if f.exact else "no",
            f"{printable(f.conf) or 'default'} ({', '.join(f.cards) or 'no known card'})",
        ))  # fmt: skip
    for line in aligned(rows):
        click.echo(line)
    for f in fits:
        for line in explanation(f):
            click.echo(line)
    granted = {a.code: a for f in fits for a in f.assumptions}
    if granted:
        click.echo("taken for granted:")
    for a in granted.values():
        click.echo(f"  {a.code} (effect {a.effect}, {a.events:,} events): {a.detail}")


def explanation(f: Fit) -> list[str]:
    """What fails just below, and where more memory does not help."""
    from fragscope.units import mib

    name, lines = printable(f.conf) or "default", []
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

    at = f" at {printable(x.frame)}" if x.frame else ""
    lines = [
        f"event {x.event:,} fails, {format_bytes(x.requested)} on stream {x.stream}{at}",
        f"reserved {format_bytes(x.reserved)}, allocated {format_bytes(x.allocated)}, stranded "
        f"{format_bytes(x.stranded)}; the driver has {format_bytes(x.left)}, {format_bytes(x.needed)} are needed",
    ]
    for idle in x.idle:
        pieces = f"{idle.pieces:,} pieces" if idle.pieces > 1 else "one piece"
        lines.append(f"{format_bytes(idle.bytes)} {idle.detail} ({pieces}, largest {format_bytes(idle.largest)})")
    return lines
