"""``fragscope replay``: a trace's requests decided under settings of the user's choice, or verified against its own.

Exit codes beyond the common ones: with ``--verify``, 1 if the model and the recording differ. That is neither a budget
exceeded nor a bad file: either a setting that the recording does not hold was not named, or the model is wrong.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fragscope.cli.compiling import announce_compilation
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
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
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
    What is not given is taken from the file.
    """
    from fragscope.allocator import RULES, ReplaySettings, card_named, recorded_under, replay, settle, tape_of
    from fragscope.trace import load_trace, with_sidecar
    from fragscope.units import parse_bytes

    sizes = [parse_bytes(c, "--capacity") for c in capacities]
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
    if len(fractions) == 1 and trace.settings.memory_fraction is None:
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
        _check_comparable(trace, recorded, confs, sizes)
    notes = list(recorded.notes)
    own = ReplaySettings.of(recorded)
    if len(sizes) == 1 and trace.settings.capacity is None and verify:
        own = replace(own, capacity=sizes[0])
    announce_compilation(len(trace.requests))
    tape = tape_of(trace)
    if not verify:
        tape = settle(tape, own)
    settings = _product(own, confs=confs, chosen=chosen, cards=profiles, capacities=sizes, fractions=fractions)
    replays = [replay(tape, s, verify=verify) for s in settings]
    for note in notes:
        print(f"fragscope: {note}", file=sys.stderr)
    if form == "json":
        print(json.dumps(as_json(file, trace, replays), indent=2))
    else:
        _print_text(file, trace, replays)
    wrong = [r for r in replays if r.verify is not None and r.verify.mismatches]
    if wrong:
        raise FragscopeError(
            f"{file}: model and recording differ in {len(wrong)} of {len(replays)} replays; "
            "if the settings are right, the model is wrong: please report it"
        )


def _check_comparable(trace: Trace, recorded: Recorded, confs: tuple[str, ...], sizes: list[int]) -> None:
    """Decisions can only be compared under the settings that they were made with."""
    from fragscope.allocator import parse_conf

    for conf in confs:
        if replace(parse_conf(conf, recorded.rules.rules), text="") != replace(recorded.conf, text=""):
            raise UsageError(
                f"--verify: the decisions were recorded under conf {recorded.conf.text!r}; "
                f"a replay under {conf!r} is not expected to equal them"
            )
    if trace.settings.capacity is not None and any(c != trace.settings.capacity for c in sizes):
        raise UsageError(
            f"--verify: the decisions were made with {trace.settings.capacity} bytes to take; "
            "with another --capacity they are not expected to be equal"
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
    no_card: list[Card | None] = [None]
    no_capacity: list[int | None] = [None]
    for conf, rules, card, capacity, fraction in itertools.product(
        confs or (own.conf,), chosen or [own.rules], cards or no_card, capacities or no_capacity, fractions or (None,)
    ):
        settings = replace(own, conf=conf, rules=rules)
        if card is not None:  # another card has memory of its own
            settings = replace(settings, card=card.name, total=card.total)
            if card.name != own.card:
                settings = replace(settings, capacity=card.free, limit=None)
        if capacity is not None:
            settings = replace(settings, capacity=capacity)
        if fraction is not None:
            settings = replace(settings, memory_fraction=fraction, limit=None)
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
        "trace": {
            "path": file,
            "source": trace.source,
            "events": len(trace.requests),
            "device": trace.device,
            "torch": trace.torch,
            "card": trace.card,
            "lost": [asdict(loss) for loss in trace.lost],
        },
        "replays": [_replay_json(r) for r in replays],
    }


def _replay_json(r: Replay) -> dict[str, Any]:
    s, whole = r.settings, r.whole
    return {
        "conf": s.conf,
        "torch": s.rules.torch,
        "rules": s.rules.rules.release,
        "card": s.card,
        "total": s.total,
        "capacity": s.capacity,
        "memory_fraction": s.memory_fraction,
        "limit": s.limit,
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

    from fragscope.units import format_bytes, mib

    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    say(f"{printable(file)}: {len(trace.requests):,} events on device {trace.device}, source {printable(trace.source)}")
    for loss in trace.lost:
        say(f"  not in the file: {printable(loss.detail)} ({loss.events:,})")
    for r in replays:
        s, whole = r.settings, r.whole
        limit = "" if s.memory_fraction is None else f", memory fraction {s.memory_fraction:g}"
        if s.limit is not None:
            limit = f", {format_bytes(s.limit)} may be reserved"
        title = f"conf {s.conf or 'default'}, torch {s.rules.torch}, {s.card} with {format_bytes(s.capacity)}{limit}"
        table = Table()
        table.add_column("MiB")
        table.add_column("peak", justify="right")
        table.add_column("end", justify="right")
        names = ["requested", "allocated", "active", "reserved", "stranded", "inactive_split"]
        if whole.peak.pool_idle:
            names.append("pool_idle")
        for name in names:
            table.add_row(name, mib(getattr(whole.peak, name)), mib(getattr(whole.end, name)))
        say("")
        say(printable(title))
        console.print(table)
        calls = whole.calls
        say(
            f"segments at most {whole.segments_peak:,}; cudaMalloc {calls.alloc:,}, cudaFree {calls.free:,}, "
            f"synchronisations {calls.sync:,}; OOMs {len(r.ooms):,}, retries {whole.retries:,}"
        )
        say("exact" if r.exact else "not exact:" if r.assumptions else "not exact: the recording shows otherwise")
        for a in r.assumptions:
            say(f"  {a.code} (effect {a.effect}, {a.events:,} events): {a.detail}")
        if r.verify is not None:
            for line in _verification(r.verify):
                say(line)


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
