"""``fragscope tune``: the conf under which traces need least, and how far that is from what is possible at all."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from fragscope.cli.subjects import granted, subject_json
from fragscope.cli.tables import aligned, markdown_list, markdown_table
from fragscope.errors import UsageError, printable

if TYPE_CHECKING:
    from fragscope.search import Bound, Figures, Goal, Subject, Trial, Tuning

Orders = dict[str, "list[Figures]"]
"""Figures of each trace, in their order, by how equal blocks are told apart."""
SCHEMA_VERSION = 1
_ROWS = 10  # confs shown without --all
_PACKING_SECONDS = 20.0
_LONGEST = 2000  # characters of a line


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="TRACE...", type=click.Path(path_type=str))
@click.option("--goal", type=click.Choice(["reserved", "stranded", "no-oom"]), default="reserved", show_default=True,
              help="What to minimise: peak reserved, peak stranded, or failed requests, then retries.")  # fmt: skip
@click.option("--keep", multiple=True, metavar="KEY[:VALUE]",
              help="A setting that stays: as it was recorded, or at VALUE.")  # fmt: skip
@click.option("--torch", "release", metavar="RELEASE", help="Release whose rules decide, as 2.11.0.")
@click.option("--card", "cards", multiple=True, metavar="NAME",
              help="Device profile, such as h100-80gb; of several the worst decides.")  # fmt: skip
@click.option("--capacity", metavar="SIZE", help="What segments may take: '22 GiB'.")
@click.option("--memory-fraction", "fraction", type=float, metavar="F", help="set_per_process_memory_fraction.")
@click.option("--bound", "wants_bound", is_flag=True, help="Also say how little memory any allocator needs.")
@click.option("--bound-seconds", type=click.FloatRange(min=0), default=_PACKING_SECONDS, show_default=True,
              help="About how long a trace's packing may take; the same value gives the same answer.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), help="Processes at once; one a core by default.")
@click.option("--sidecar", "sidecars", multiple=True, type=click.Path(path_type=str), metavar="JSON",
              help="What the snapshots leave out; one for all TRACEs, or one for each in their order.")  # fmt: skip
@click.option("--device-index", type=click.IntRange(min=0), help="CUDA device, where a snapshot holds several.")
@click.option("--all", "show_all", is_flag=True, help="Show every conf that was tried.")
@click.option("--format", "form", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
def command(
    *,
    files: tuple[str, ...],
    goal: Goal,
    keep: tuple[str, ...],
    release: str | None,
    cards: tuple[str, ...],
    capacity: str | None,
    fraction: float | None,
    wants_bound: bool,
    bound_seconds: float,
    jobs: int | None,
    sidecars: tuple[str, ...],
    device_index: int | None,
    show_all: bool,
    form: str,
) -> None:
    """Find the conf under which the worst of the TRACEs needs least, by replaying them under many.

    TRACEs are .fscope files, PyTorch memory snapshots, or folders of 'fragscope record', which stand for all their
    recordings. Fewer OOMs come first, then the peak relative to each trace's own as recorded, then fewer driver calls
    beyond those as recorded, then fewer settings. With several --card each trace is replayed on each of them, and the
    worst decides. The last line can be pasted into a shell.
    """
    from fragscope.cli.configured import configured
    from fragscope.trace.rank_set import expand

    if cards:
        configured()

    files = tuple(path for file in files for path in expand(file))

    from fragscope.search import Given, bound, load_subject, player, tune
    from fragscope.search.tune import MOST_TRIES
    from fragscope.units import parse_memory

    if len(set(files)) < len(files):
        raise UsageError("tune: a trace is named twice")
    if len(sidecars) not in (0, 1, len(files)):
        raise UsageError(f"--sidecar: give one for all traces or one for each of the {len(files)}, in their order")
    given = Given(
        torch=release,
        capacity=None if capacity is None else parse_memory(capacity, "--capacity"),
        memory_fraction=fraction,
        device=device_index,
    )
    with progress() as say:
        say("reading")
        said = sidecars if len(sidecars) == len(files) else (sidecars or (None,)) * len(files)
        subjects = [
            load_subject(file, replace(given, card=card, sidecar=sidecar))
            for card in (dict.fromkeys(cards) or (None,))
            for file, sidecar in zip(files, said, strict=True)
        ]
        with player(subjects, jobs=jobs or usable_cores(), tries=MOST_TRIES // 2, say=say) as play:
            say("replaying")
            tuning = tune(subjects, play, goal=goal, keep=keep, found=lambda n: say(f"{n} confs tried"))
        orders = _other_orders(subjects, tuning)
        bounds: list[Bound] | None = None
        if wants_bound:
            bounds = []
            for subject in subjects[: len(files)]:  # what traces need at least is the same on every card
                say(f"packing {printable(subject.name)}")
                bounds.append(bound(subject.tape, bound_seconds))
    for note in dict.fromkeys(note for subject in subjects for note in subject.notes):
        print(f"fragscope: {note}", file=sys.stderr)
    if form == "json":
        print(json.dumps(as_json(subjects, tuning, bounds, orders, show_all=show_all), indent=2))
    elif form == "markdown":
        click.echo("\n".join(as_markdown(subjects, tuning, bounds, orders, show_all=show_all)))
    else:
        _print_text(subjects, tuning, bounds, orders, show_all=show_all)


def _other_orders(subjects: list[Subject], t: Tuning) -> Orders:
    """What the best conf does if equal blocks are told apart otherwise, where modelled addresses decided.

    Traces in which they did not decide, since their release goes by something else, keep their figures.
    """
    from fragscope.search import play_other_orders

    if t.best is None:
        return {}
    best = t.best
    played = [
        play_other_orders(subject, best.conf)
        if any(a.code == "tie_by_modelled_address" for a in figures.assumptions)
        else {}
        for subject, figures in zip(subjects, best.figures, strict=True)
    ]
    orders = dict.fromkeys(order for each in played for order in each)
    return {
        order.value: [each.get(order, own) for each, own in zip(played, best.figures, strict=True)] for order in orders
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Says on a terminal's stderr what is going on; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text("")) as status:
        yield lambda what: status.update(Text(what))


def as_json(
    subjects: list[Subject], t: Tuning, bounds: list[Bound] | None, orders: Orders, *, show_all: bool
) -> dict[str, Any]:
    """The answer as published: sizes are integer bytes, keys only ever get more."""
    return {
        "schema_version": SCHEMA_VERSION,
        "goal": t.goal,
        "traces": [subject_json(s) for s in subjects],
        "tried": len(t.ranked),
        "current": _trial_json(t, t.current),
        "best": _trial_json(t, t.best),
        "calmer": _trial_json(t, t.calmer),
        "simpler": _trial_json(t, t.simpler),
        "surer": _trial_json(t, t.surer),
        "export": None if t.best is None else {"variable": t.variable, "conf": t.best.conf},
        "ranked": [_trial_json(t, trial) for trial in (t.ranked if show_all else t.ranked[:_ROWS])],
        "other_orders": [
            {"order": order, "outcomes": [_figures_json(f) for f in figures]} for order, figures in orders.items()
        ],
        "bounds": None if bounds is None else [_bound_json(b) for b in bounds],
    }


def _trial_json(t: Tuning, trial: Trial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    return {
        "conf": trial.conf,
        "settings": trial.settings,
        "saved": t.saved(trial),
        "ooms": trial.ooms,
        "retries": trial.retries,
        "driver_calls": asdict(trial.calls),
        "exact": trial.exact,
        "assumptions": [asdict(a) for a in trial.assumptions],
        "outcomes": [_figures_json(f) for f in trial.figures],
    }


def _figures_json(f: Figures) -> dict[str, Any]:
    return {
        "peak": {"reserved": f.reserved, "stranded": f.stranded},
        "ooms": f.ooms,
        "retries": f.retries,
        "driver_calls": asdict(f.calls),
        "exact": f.exact,
    }


def _bound_json(b: Bound) -> dict[str, Any]:
    return {
        "allocations": b.allocations,
        "left_out": b.left_out,
        "event": b.event,
        "live": b.live,
        "lower": b.lower,
        "lower_apart": b.lower_apart,
        "lower_kept": b.lower_kept,
        "packed": b.packed,
        "gap": b.gap,
        "heuristic": b.packing.best.name,
        "tried": [{"heuristic": name, "height": height} for name, height in b.packing.tried],
        "skipped": list(b.packing.skipped),
    }


def _print_text(
    subjects: list[Subject], t: Tuning, bounds: list[Bound] | None, orders: Orders, *, show_all: bool
) -> None:
    lines = [*_about(subjects, t), *aligned(_table(subjects, t, show_all=show_all)), *_bounds(subjects, bounds)]
    for line in lines:
        click.echo(printable(line, _LONGEST))
    for line in conclusion(t, orders):
        click.echo(line)


def as_markdown(
    subjects: list[Subject], t: Tuning, bounds: list[Bound] | None, orders: Orders, *, show_all: bool
) -> list[str]:
    """The same as Markdown; names come from strangers' files and are escaped."""
    about, bound = _about(subjects, t), _bounds(subjects, bounds)
    *remarks, last = conclusion(t, orders)
    lines = ["### fragscope tune", "", *markdown_list(about), ""]
    lines += markdown_table(_table(subjects, t, show_all=show_all))
    lines += ["", *markdown_list(bound)] if bound else []
    lines += ["", *markdown_list(remarks)] if remarks else []
    shown = markdown_list([last]) if t.best is None else ["```sh", last, "```"]
    return [*lines, "", *shown]


def _about(subjects: list[Subject], t: Tuning) -> list[str]:
    lines = []
    for subject in subjects:
        s = subject.settings
        limit = "" if s.memory_fraction is None else f", memory fraction {s.memory_fraction:g}"
        lines.append(f"{subject.name}: {len(subject.tape.kind):,} events, torch {s.rules.torch}, {s.card}{limit}")
    lines.append(
        f"goal {t.goal}; {len(t.ranked):,} confs tried; reserved, saved and stranded are peaks in MiB, "
        "more is driver calls beyond those as recorded"
    )
    if len(subjects) > 1:
        lines.append("reserved and stranded are the largest of all of them, saved is of the one where it is least")
    return lines


def _table(subjects: list[Subject], t: Tuning, *, show_all: bool) -> list[tuple[str, ...]]:
    from fragscope.units import mib

    rows: list[tuple[str, ...]] = [
        ("reserved", "saved", "stranded", "OOMs", "retries", "alloc", "free", "sync", "more", "exact", "conf")
    ]
    before = _count(t.current)
    for trial in _shown(t, show_all=show_all):
        calls = trial.calls
        rows.append((
            mib(trial.reserved), mib(t.saved(trial)), mib(trial.stranded), f"{trial.ooms:,}", f"{trial.retries:,}",
            f"{calls.alloc:,}", f"{calls.free:,}", f"{calls.sync:,}", f"{_count(trial) - before:+,}",
            "yes" if trial.exact else "no", _label(t, trial, subjects),
        ))  # fmt: skip
    return rows


def _bounds(subjects: list[Subject], bounds: list[Bound] | None) -> list[str]:
    pairs = zip(subjects, bounds or (), strict=False)
    return [line for subject, b in pairs for line in bound_lines(b, subject.name if len(subjects) > 1 else "")]


def _count(trial: Trial) -> int:
    return trial.calls.alloc + trial.calls.free + trial.calls.sync


def _shown(t: Tuning, *, show_all: bool) -> list[Trial]:
    """The recorded confs, the best, and PyTorch's default; of confs that do the same only the first."""
    if show_all:
        return [t.current, *t.ranked]
    out: list[Trial] = []
    seen: set[object] = set()
    for trial in t.ranked:
        figures = tuple((f.reserved, f.stranded, f.ooms, f.retries, f.calls, f.exact) for f in trial.figures)
        if (figures not in seen and len(out) < _ROWS) or trial.conf == "":
            seen.add(figures)
            out.append(trial)
    return [t.current, *out]


def _label(t: Tuning, trial: Trial, subjects: list[Subject]) -> str:
    if trial is t.current:
        confs = {s.settings.conf for s in subjects}
        own = (confs.pop() or "default") if len(confs) == 1 else "each its own"
        return f"as recorded ({own})"
    return f"{trial.conf or 'default'}{' (best)' if trial is t.best else ''}"


def bound_lines(b: Bound, name: str) -> list[str]:
    """What the bound says, and what it does not."""
    from fragscope.units import mib

    head = f"{name}: " if name else ""
    lines = [
        f"{head}no allocator needs less than {mib(b.lower)} MiB for these requests (live at event {b.event:,}); "
        f"all fit into {mib(b.packed)} MiB if everything is known beforehand "
        f"(gap {mib(b.gap)} MiB, {b.gap_percent:.2f} %; {b.packing.best.name})",
        f"  at least {mib(b.lower_apart)} MiB where streams, pools and size classes share no page, "
        f"{mib(b.lower_kept)} MiB where pages also never go from one to another",
        "  an ordinary segment can neither move nor serve another stream, so no conf need reach this; "
        "expandable segments come closest",
    ]
    if b.left_out:
        lines.append(f"  {b.left_out:,} requests that failed when recorded are left out")
    if b.packing.skipped:
        lines.append(f"  {len(b.packing.skipped)} packings were not tried; --bound-seconds allows for more")
    return lines


def conclusion(t: Tuning, orders: Orders) -> list[str]:
    """What to do, and what that takes for granted; the last line can be pasted into a shell."""
    from fragscope.units import mib

    if t.best is None:
        what = {"reserved": "needs less", "stranded": "strands less", "no-oom": "has fewer OOMs or retries"}[t.goal]
        return [f"keep the recorded conf: none of the {len(t.ranked):,} confs tried {what} in the worst of the traces"]
    lines = []
    for name, other in (
        ("without more driver calls", t.calmer), ("with one setting", t.simpler), ("exact", t.surer),
    ):  # fmt: skip
        if other is not None:
            lines.append(f"{name}: {other.conf or 'the default conf'} ({_gain(t, other)})")
    assumed = granted(t.best.assumptions)
    if assumed:
        lines += ["the best one takes for granted:", *(f"  {line}" for line in assumed)]
    if orders:
        peaks = (f"{mib(max(f.reserved for f in figures))} MiB by {order}" for order, figures in orders.items())
        lines.append(f"  were equal blocks told apart otherwise, it would reserve {' and '.join(peaks)}")
    if t.variable != "PYTORCH_CUDA_ALLOC_CONF":
        lines.append("PYTORCH_CUDA_ALLOC_CONF must not be set: it would win")
    return [*lines, f"export {t.variable}={shlex.quote(t.best.conf or '')}  # {_gain(t, t.best)}"]


def _gain(t: Tuning, trial: Trial) -> str:
    from fragscope.units import mib

    parts = []
    if trial.ooms != t.current.ooms:
        parts.append(f"{trial.ooms:,} OOMs instead of {t.current.ooms:,}")
    saved, what = t.saved(trial), "stranded" if t.goal == "stranded" else "reserved"
    parts.append(f"saves {mib(saved)} MiB of peak {what}" if saved >= 0 else f"peak {what} {mib(-saved)} MiB higher")
    return "; ".join(parts)
