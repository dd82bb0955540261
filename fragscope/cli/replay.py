"""``fragscope replay``: a trace's requests decided under settings of the user's choice, or verified against its own.

Exit codes beyond the common ones: with ``--verify``, 1 if the model and the recording differ. That is neither a budget
exceeded nor a bad file: either a setting that the recording does not hold was not named, or the model is wrong.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from fragscope.errors import FragscopeError, UsageError, printable

if TYPE_CHECKING:
    from fragscope.allocator import Card, ChosenRules, Replay, ReplaySettings, Verification
    from fragscope.trace import Trace

SCHEMA_VERSION = 1


@click.command()
@click.argument("file", type=click.Path(path_type=str))
@click.option("--conf", "confs", multiple=True, metavar="CONF", help="PYTORCH_ALLOC_CONF string; '' is the default.")
@click.option("--torch", "releases", multiple=True, metavar="RELEASE", help="Release whose rules decide, as 2.11.0.")
@click.option("--card", "cards", multiple=True, metavar="NAME", help="Device profile, such as h100-80gb.")
@click.option("--capacity", "capacities", multiple=True, metavar="SIZE", help="What segments may take: '22 GiB'.")
@click.option("--memory-fraction", "fractions", multiple=True, type=float, metavar="F",
              help="set_per_process_memory_fraction; snapshots do not record it.")  # fmt: skip
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
    verify: bool,
    strict: bool,
    device_index: int | None,
    form: str,
) -> None:
    """Decide the requests in FILE (.fscope or a PyTorch memory snapshot) under other settings.

    An option given several times makes a replay for each value; several options make one for each combination.
    What is not given is taken from the file.
    """
    from fragscope.allocator import replay
    from fragscope.trace import load_trace
    from fragscope.units import parse_bytes

    sizes = [parse_bytes(c, "--capacity") for c in capacities]
    chosen = [_rules(r, strict) for r in releases]
    trace = load_trace(file, device_index)
    notes: list[str] = []
    settings = list(
        _product(
            trace,
            confs=confs,
            chosen=chosen,
            cards=cards,
            capacities=sizes,
            fractions=fractions,
            strict=strict,
            verify=verify,
            notes=notes,
        )
    )
    replays = [replay(trace, s, verify=verify) for s in settings]
    for note in notes:
        print(f"fragscope: {note}", file=sys.stderr)
    if form == "json":
        print(json.dumps(as_json(file, trace, replays), indent=2))
    else:
        _print_text(file, trace, replays)
    wrong = [r for r in replays if r.verify is not None and r.verify.mismatches]
    if wrong:
        hint = "" if fractions else "; if a memory fraction was in force, name it with --memory-fraction"
        raise FragscopeError(
            f"{file}: model and recording differ in {len(wrong)} of {len(replays)} replays{hint}; "
            "if the settings are right, the model is wrong: please report it"
        )


def _product(
    trace: Trace,
    *,
    confs: tuple[str, ...],
    chosen: list[ChosenRules],
    cards: tuple[str, ...],
    capacities: list[int],
    fractions: tuple[float, ...],
    strict: bool,
    verify: bool,
    notes: list[str],
) -> Iterator[ReplaySettings]:
    """One setting for each combination; what is not given comes from the trace, and where it has nothing, a default."""
    from fragscope.allocator import DEFAULT_CARD, NEWEST, ReplaySettings, recorded_conf

    for given in fractions:
        if not 0.0 <= given <= 1.0:
            raise UsageError(f"--memory-fraction: {given} is not between 0 and 1")
    if verify:
        recorded = recorded_conf(trace.settings)
        for conf in confs:
            if conf != recorded:
                raise UsageError(
                    f"--verify: the decisions were recorded under conf {recorded!r}; "
                    f"a replay under {conf!r} is not expected to equal them"
                )
        if trace.settings.capacity is not None and any(c != trace.settings.capacity for c in capacities):
            raise UsageError(
                f"--verify: the decisions were made with {trace.settings.capacity} bytes to take; "
                "with another --capacity they are not expected to be equal"
            )
    if not chosen:
        if trace.torch is None:
            notes.append(f"the file does not name its torch release; the rules of {NEWEST.release} decide (--torch)")
        chosen = [_rules(trace.torch or NEWEST.release, strict)]
    if not cards and trace.card is None:
        notes.append(f"the file does not name its card; {DEFAULT_CARD} is assumed (--card)")
    for rules in chosen:
        if rules.assumed:
            notes.append(f"torch {rules.torch} is newer than the rules known; those of {rules.rules.release} decide")
    own_capacity = trace.settings.capacity if not cards else None  # another card has its own
    profiles = _profiles(trace, cards)
    for conf, rules, card, capacity, fraction in itertools.product(
        confs or (recorded_conf(trace.settings),),
        chosen,
        profiles,
        capacities or (own_capacity,),
        fractions or (trace.settings.memory_fraction,),
    ):
        yield ReplaySettings(
            rules=rules,
            card=card.name,
            total=card.total,
            capacity=card.free if capacity is None else capacity,
            conf=conf,
            memory_fraction=fraction,
        )


def _profiles(trace: Trace, cards: tuple[str, ...]) -> list[Card]:
    """The cards asked for; else that of the trace, which may be one that no profile describes."""
    from fragscope.allocator import CARDS, DEFAULT_CARD, Card, card_named

    if cards:
        return [card_named(name) for name in cards]
    if trace.card is None or trace.card in CARDS:
        return [card_named(trace.card or DEFAULT_CARD)]
    total, free = trace.device_total, trace.settings.capacity
    if total is None:
        raise UsageError(
            f"the trace names the card {trace.card!r}, which has no profile, and not its memory; use --card"
        )
    return [Card(trace.card, trace.card, total, total if free is None else free, (0, 0), 0, 0, "the trace")]


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

    say(f"{printable(file)}: {len(trace.requests):,} events on device {trace.device}, source {trace.source}")
    for loss in trace.lost:
        say(f"  not in the file: {loss.detail} ({loss.events:,})")
    for r in replays:
        s, whole = r.settings, r.whole
        limit = "" if s.memory_fraction is None else f", memory fraction {s.memory_fraction:g}"
        title = f"conf {s.conf or 'default'}, torch {s.rules.torch}, {s.card} with {format_bytes(s.capacity)}{limit}"
        table = Table()
        table.add_column("MiB")
        table.add_column("peak", justify="right")
        table.add_column("end", justify="right")
        for name in ("requested", "allocated", "active", "reserved", "stranded", "inactive_split"):
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
        ]
    return lines
