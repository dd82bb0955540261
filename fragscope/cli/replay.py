"""``fragscope replay``: a trace's requests decided under settings of the user's choice, or verified against its own.

Exit codes beyond the common ones: with ``--verify``, 1 if the model and the recording differ. That is neither a budget
exceeded nor a bad file: either a setting that the recording does not hold was not named, or the model is wrong.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fragscope.cli.compiling import announce_compilation
from fragscope.cli.rank_sets import for_each
from fragscope.cli.subjects import granted, settings_json, trace_json
from fragscope.cli.tables import markdown_list, markdown_table
from fragscope.errors import FragscopeError, UsageError, printable

if TYPE_CHECKING:
    from fragscope.allocator import Card, ChosenRules, Recorded, Replay, ReplaySettings, Verification
    from fragscope.trace import Trace

SCHEMA_VERSION = 1


@click.command()
@click.argument("file", type=click.Path(path_type=str))
@click.option("--conf", "confs", multiple=True, metavar="CONF", help="PYTORCH_ALLOC_CONF string; '' is the default.")
@click.option(
    "--torch",
    "releases",
    multiple=True,
    metavar="RELEASE",
    help="Release whose rules decide, as 2.11.0; 'all' for every one known.",
)
@click.option("--card", "cards", multiple=True, metavar="NAME", help="Device profile, such as h100-80gb.")
@click.option("--capacity", "capacities", multiple=True, metavar="SIZE", help="What segments may take: '22 GiB'.")
@click.option("--memory-fraction", "fractions", multiple=True, type=float, metavar="F",
              help="set_per_process_memory_fraction; snapshots do not record it.")  # fmt: skip
@click.option("--sidecar", type=click.Path(path_type=str), metavar="JSON",
              help="What the snapshot leaves out: torch, conf, memory_fraction, total_memory, ...")  # fmt: skip
@click.option("--verify", is_flag=True, help="Compare every decision with the recorded one; exit 1 if any differs.")
@click.option("--strict", is_flag=True, help="Refuse a release newer than the rules known.")
@click.option("--device-index", type=click.IntRange(min=0), help="CUDA device, where a snapshot holds several.")
@click.option("--format", "form", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
def command(
    *,
    file: str,
    confs: tuple[str, ...],
    releases: tuple[str, ...],
    cards: tuple[str, ...],
    capacities: tuple[str, ...],
    fractions: tuple[float, ...],
    sidecar: str | None,
    verify: bool,
    strict: bool,
    device_index: int | None,
    form: str,
) -> None:
    """Decide the requests in FILE (.fscope or a PyTorch memory snapshot) under other settings.

    An option given several times makes a replay for each value; several options make one for each combination.
    What is not given is taken from the file. A folder of 'fragscope record' stands for all its recordings.
    """
    from fragscope.cli.configured import configured
    from fragscope.trace.rank_set import expand

    if cards:
        configured()

    if (paths := expand(file)) != (file,):
        for_each(paths, "file")
        return

    from fragscope.allocator import (
        RULES,
        ReplaySettings,
        card_named,
        knows_fraction,
        recorded_under,
        replay,
        settle,
        tape_of,
    )
    from fragscope.trace import load_trace, with_sidecar
    from fragscope.units import parse_memory

    sizes = [parse_memory(c, "--capacity") for c in capacities]
    for given in fractions:
        if not 0.0 <= given <= 1.0:
            raise UsageError(f"--memory-fraction: {given} is not between 0 and 1")
    if "all" in releases:
        releases = tuple(r.release for r in RULES)
    chosen = [_rules(r, strict) for r in releases]
    profiles = [card_named(name) for name in cards]
    trace = load_trace(file, device_index)
    if sidecar is not None:
        trace = with_sidecar(trace, Path(sidecar))
    if len(fractions) == 1 and not knows_fraction(trace):
        trace = replace(trace, settings=replace(trace.settings, memory_fraction=fractions[0]))
    # Where one value is given it may also be what the file leaves out; of several none is more likely than the others.
    recorded = recorded_under(
        trace,
        chosen[0] if len(chosen) == 1 and (verify or trace.torch is None) else None,
        profiles[0] if len(profiles) == 1 and trace.card is None else None,
    )
    if strict and recorded.rules.assumed:
        raise UsageError(f"--strict: torch {recorded.rules.torch} is newer than the newest rules known")
    if verify:
        _check_comparable(trace, recorded, confs)
        _check_named(trace, releases=chosen, cards=profiles, capacities=sizes, fractions=fractions)
    own = ReplaySettings.of(recorded)
    if len(sizes) == 1 and trace.settings.capacity is None and verify:
        own = own.with_capacity(sizes[0])
    announce_compilation(len(trace.requests))
    tape = tape_of(trace)
    if not verify:
        tape = settle(tape, own)
    settings = _product(own, confs=confs, chosen=chosen, cards=profiles, capacities=sizes, fractions=fractions)
    replays = [replay(tape, s, verify=verify) for s in settings]
    for note in recorded.notes:
        print(f"fragscope: {note}", file=sys.stderr)
    if form == "json":
        print(json.dumps(as_json(file, trace, replays), indent=2))
    elif form == "markdown":
        click.echo("\n".join(as_markdown(file, trace, replays)))
    else:
        _print_text(file, trace, replays)
    wrong = [r for r in replays if r.verify is not None and r.verify.mismatches]
    if wrong:
        raise FragscopeError(
            f"{file}: model and recording differ in {len(wrong)} of {len(replays)} replays; "
            "if the settings are right, the model is wrong: please report it"
        )


def _check_comparable(trace: Trace, recorded: Recorded, confs: tuple[str, ...]) -> None:
    """Decisions can only be compared under the settings that they were made with."""
    from fragscope.allocator import parse_conf

    for conf in confs:
        if replace(parse_conf(conf, recorded.rules.rules), text="") != replace(recorded.conf, text=""):
            raise UsageError(
                f"--verify: the decisions were recorded under conf {recorded.conf.text!r}; "
                f"a replay under {conf!r} is not expected to equal them"
            )


def _check_named(
    trace: Trace,
    *,
    releases: Sequence[ChosenRules],
    cards: Sequence[Card],
    capacities: Sequence[int],
    fractions: Sequence[float],
) -> None:
    """What the file itself says of how it was recorded cannot be otherwise; what it leaves out can be named."""
    from fragscope.allocator import card_of, knows_fraction, rules_for

    named: list[tuple[str, str, bool]] = []
    if trace.torch is not None and not any(loss.code == "torch_release" for loss in trace.lost):
        known = rules_for(trace.torch).rules.release
        named += [("--torch", trace.torch, r.rules.release != known) for r in releases]
    if trace.card is not None and cards:
        named += [("--card", trace.card, card.name != card_of(trace).name) for card in cards]
    if trace.settings.capacity is not None:
        named += [("--capacity", f"{trace.settings.capacity} bytes", c != trace.settings.capacity) for c in capacities]
    if knows_fraction(trace):
        fraction = trace.settings.memory_fraction
        said = "no memory fraction" if fraction is None else f"{fraction:g}"
        named += [("--memory-fraction", said, f != fraction) for f in fractions]
    for option, value, is_other in named:
        if is_other:
            raise UsageError(
                f"--verify: the decisions were made with {printable(value)}; "
                f"with another {option} they are not expected to be equal"
            )


def _product(
    own: ReplaySettings,
    *,
    confs: tuple[str, ...],
    chosen: list[ChosenRules],
    cards: list[Card],
    capacities: list[int],
    fractions: tuple[float, ...],
) -> Iterator[ReplaySettings]:
    """One setting for each combination; what is not given is that of the recording."""
    for conf, rules, card, capacity, fraction in itertools.product(
        confs or (None,), chosen or (None,), cards or (None,), capacities or (None,), fractions or (None,)
    ):
        settings = own if conf is None else own.with_conf(conf)
        if rules is not None:
            settings = settings.with_rules(rules)
        if card is not None:
            settings = settings.with_card(card)
        if capacity is not None:
            settings = settings.with_capacity(capacity)
        if fraction is not None:
            settings = settings.with_fraction(fraction)
        yield settings


def _rules(release: str, strict: bool) -> ChosenRules:
    from fragscope.allocator import rules_for

    chosen = rules_for(release)
    if strict and chosen.assumed:
        raise UsageError(f"--strict: torch {release} is newer than the newest rules known ({chosen.rules.release})")
    return chosen


def as_json(file: str, trace: Trace, replays: list[Replay]) -> dict[str, Any]:
    """The answer as published: sizes are integer bytes, keys only ever get more."""
    return {
        "schema_version": SCHEMA_VERSION,
        "trace": trace_json(file, trace),
        "replays": [_replay_json(r) for r in replays],
    }


def _replay_json(r: Replay) -> dict[str, Any]:
    whole = r.whole
    return {
        **settings_json(r.settings),
        "exact": r.exact,
        "events": len(r.trace.requests),
        "peak": asdict(whole.peak),
        "end": asdict(whole.end),
        "reserved_after_empty_cache": whole.reserved_after_empty_cache,
        "segments_peak": whole.segments_peak,
        "allocs": whole.allocs,
        "driver_calls": asdict(whole.calls),
        "ooms": [asdict(oom) for oom in r.ooms],
        "retries": whole.retries,
        "verify": None if r.verify is None else asdict(r.verify),
        "assumptions": [asdict(a) for a in r.assumptions],
    }


def _print_text(file: str, trace: Trace, replays: list[Replay]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    head, *losses = _about(file, trace)
    say(printable(head))
    for line in losses:
        say(f"  {printable(line)}")
    for r in replays:
        say("")
        say(printable(_title(r)))
        heading, *rows = _peaks(r)
        table = Table()
        for number, name in enumerate(heading):
            table.add_column(name, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in _remarks(r):
            say(line)


def as_markdown(file: str, trace: Trace, replays: list[Replay]) -> list[str]:
    """The same as Markdown; names come from strangers' files and are escaped."""
    from fragscope.report.markdown import escaped

    head, *losses = _about(file, trace)
    lines = [f"### fragscope replay: {escaped(head)}", *([""] if losses else []), *markdown_list(losses)]
    for r in replays:
        lines += [
            "",
            f"#### {escaped(_title(r))}",
            "",
            *markdown_table(_peaks(r), words=0),
            "",
            *markdown_list(_remarks(r)),
        ]
    return lines


def _about(file: str, trace: Trace) -> list[str]:
    events = f"{file}: {len(trace.requests):,} events on device {trace.device}, source {trace.source}"
    return [events, *(f"not in the file: {loss.detail} ({loss.events:,})" for loss in trace.lost)]


def _title(r: Replay) -> str:
    from fragscope.units import format_bytes

    s = r.settings
    limit = "" if s.memory_fraction is None else f", memory fraction {s.memory_fraction:g}"
    if s.limit is not None:
        limit = f", {format_bytes(s.limit)} may be reserved"
    return f"conf {s.conf or 'default'}, torch {s.rules.torch}, {s.card} with {format_bytes(s.capacity)}{limit}"


def _peaks(r: Replay) -> list[tuple[str, str, str]]:
    """Peaks and ends, the headings first."""
    from fragscope.units import mib

    names = ["requested", "allocated", "active", "reserved", "stranded", "inactive_split"]
    if r.whole.peak.pool_idle:
        names.append("pool_idle")
    if r.whole.peak.raw:
        names += ["raw", "hbm"]
    rows = [(name, mib(getattr(r.whole.peak, name)), mib(getattr(r.whole.end, name))) for name in names]
    return [("MiB", "peak", "end"), *rows]


def _remarks(r: Replay) -> list[str]:
    """What else happened, whether it is exact and what it takes for granted, and how it compares."""
    whole, calls = r.whole, r.whole.calls
    first = f" (the first at event {r.ooms[0].event:,})" if r.ooms else ""
    assumed = granted(r.assumptions)
    return [
        f"segments at most {whole.segments_peak:,}; cudaMalloc {calls.alloc:,}, cudaFree {calls.free:,}, "
        f"synchronisations {calls.sync:,}; OOMs {len(r.ooms):,}{first}, retries {whole.retries:,}",
        "exact" if r.exact else "not exact:" if assumed else "not exact: the recording shows otherwise",
        *(f"  {line}" for line in assumed),
        *([] if r.verify is None else _verification(r.verify)),
    ]


def _verification(v: Verification) -> list[str]:
    lines = [f"verified: {v.compared:,} decisions compared, {v.mismatches:,} mismatches"]
    if v.first is not None:
        where = "at the end" if v.first.event < 0 else f"at event {v.first.event:,}"
        lines += [
            f"first difference {where}:",
            f"  recorded: {v.first.recorded}",
            f"  modelled: {v.first.modelled}",
            *(f"  {line}" for line in v.first.around),
            f"  likely reason: {v.first.likely}",
        ]
    return lines
