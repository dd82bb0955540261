"""The HTML page: what it says about each group and case, and how the figures get into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from fragscope.errors import printable
from fragscope.report.colors import line_name
from fragscope.report.drawing import Drawing
from fragscope.report.figures import (
    LINE_POINTS,
    STATE_WORDS,
    has_raw,
    map_figure,
    map_scale,
    progress_figure,
    raster,
)
from fragscope.report.memory_map import HOLE_SHARE, CellState, MemoryMap
from fragscope.report.pools import Breakdown, PoolShare, breakdown
from fragscope.report.shell import page
from fragscope.report.summary import ESTIMATED_MEANS, Group, Row, refutation, summarize, surprise
from fragscope.report.table import HEADINGS
from fragscope.report.table import figures as table_figures
from fragscope.report.traces import Recording, Unavailable, open_recording
from fragscope.results import Results
from fragscope.units import format_bytes, mib

POOL_HEADINGS = ("segments", "reserved", "active", "stranded", "idle in pool", "releasable")
"""The columns of a breakdown after the pool's name."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One case on the page.

    Attributes:
        letter: what the figures call it.
        color: name of its line's colour.
        row: names and figures.
        events: requests of the measured phase, None without a Trace.
        facts: ``(word, value)`` beside its memory map.
        notes: what a reader must know about its figures, ``(kind, text)``.
        missing: why there is no memory map, ``""`` if there is one.
        drawing: the memory map.
        alternative: the memory map in words.
        resolution: what one cell of it stands for, and where the phase begins.
        breakdown: what each pool held, None where there is no more to say than the map does.
    """

    letter: str
    color: str
    row: Row
    events: int | None
    facts: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]
    missing: str
    drawing: Drawing | None
    alternative: str
    resolution: str
    breakdown: Breakdown | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """One group on the page: its variants on one axis, then their memory maps.

    Attributes:
        anchor: its name in addresses.
        group: the cases.
        variants: one for each.
        drawing: the variants on one axis.
        alternative: that in words.
        legend: name of a colour of the memory maps, and what it means.
        has_raw: memory was taken past the allocator, and has a line.
    """

    anchor: str
    group: Group
    variants: tuple[Variant, ...]
    drawing: Drawing | None
    alternative: str
    legend: tuple[tuple[str, str], ...]
    has_raw: bool = False


MOST_MAPS = 240
"""Memory maps on a page, unless more are asked for: they take a third of a second and 20 KB each, and nobody looks at
a thousand."""
_NOT_DRAWN = (
    "Not drawn: this page shows figures for the first settings of each preset, and where something went wrong. "
    "fragscope report --all-figures draws all."
)


def render(results: Results, folder: Path, *, all_figures: bool = False) -> str:
    """The whole page as one string.

    Args:
        results: what to show.
        folder: where traces lie.
        all_figures: draw every case, however many there are.
    """
    summary = summarize(results)
    chosen = set(range(len(summary.groups))) if all_figures else _drawn(summary.groups)
    sections = tuple(_section(n, group, folder, draw=n in chosen) for n, group in enumerate(summary.groups))
    return page(
        "report.html",
        {"figures": table_figures, "pool_cells": _pool_cells},
        summary=summary,
        sections=sections,
        headings=HEADINGS,
        pool_headings=POOL_HEADINGS,
        hole_share=f"1/{round(1 / HOLE_SHARE)}",
        line_points=LINE_POINTS,
        estimated_means=ESTIMATED_MEANS,
        draws=any(s.drawing for s in sections),
    )


def _drawn(groups: Sequence[Group]) -> set[int]:
    """Groups that get figures: all of few, else the first of each preset and those in which something went wrong."""
    if sum(len(group.rows) for group in groups) <= MOST_MAPS:
        return set(range(len(groups)))
    first: dict[tuple[str, str], int] = {}
    for number, group in enumerate(groups):
        first.setdefault((group.scenario, group.preset), number)
    wrong = (n for n, g in enumerate(groups) if any(not r.case.as_expected or r.case.refuted for r in g.rows))
    return {*first.values(), *wrong}


def _letter(number: int) -> str:
    """A to Z, then AA, AB and so on."""
    text = ascii_uppercase[number % 26]
    return text if number < 26 else _letter(number // 26 - 1) + text


def _section(number: int, group: Group, folder: Path, *, draw: bool) -> Section:
    left_out = Unavailable(_NOT_DRAWN)
    opened = [
        None if not row.case.measured else open_recording(row.case, folder) if draw else left_out for row in group.rows
    ]
    read = [(_letter(i), i, r) for i, r in enumerate(opened) if isinstance(r, Recording)]
    scale = map_scale([r for _, _, r in read])
    variants = tuple(
        _variant(i, row, recording, scale) for i, (row, recording) in enumerate(zip(group.rows, opened, strict=True))
    )
    spoken = []
    for letter, i, recording in read:
        level = recording.timeline.peak(recording.rows)
        base = int(recording.timeline.allocated[recording.rows.start])
        spoken.append(
            f"{letter}, {group.rows[i].variant}: from {format_bytes(base)} allocated to a peak of "
            f"{format_bytes(level.allocated)}; peak reserved {format_bytes(level.reserved)}"
            + (f"; with memory past the allocator {format_bytes(level.hbm)}" if has_raw(recording) else "")
        )
    alternative = f"Allocated and reserved bytes over the measured phase. {'; '.join(spoken)}."
    has_pools = any(len(recording.lives.holds) for _, _, recording in read)
    states = [state for state in CellState if state != CellState.POOL_IDLE or has_pools]
    return Section(
        anchor=f"g{number + 1}",
        group=group,
        variants=variants,
        drawing=progress_figure(read) if read else None,
        alternative=alternative,
        legend=tuple((f"cell-{state.value}", STATE_WORDS[state]) for state in states),
        has_raw=any(has_raw(recording) for _, _, recording in read),
    )


def _variant(number: int, row: Row, recording: Recording | Unavailable | None, scale: int) -> Variant:
    letter, color = _letter(number), line_name(number)
    if not isinstance(recording, Recording):
        missing = recording.reason if recording is not None else "Nothing was measured."
        return Variant(letter, color, row, None, _facts(row, None), _notes(row, None), missing, None, "", "")
    drawn = raster(recording, scale)
    facts = _facts(row, recording)
    alternative = f"Memory map of variant {letter}, {row.variant}. " + ", ".join(f"{w} {v}" for w, v in facts) + "."
    return Variant(
        letter=letter,
        color=color,
        row=row,
        events=recording.events,
        facts=facts,
        notes=_notes(row, recording),
        missing="",
        drawing=map_figure(recording, drawn, scale),
        alternative=alternative,
        resolution=_resolution(drawn, recording),
        breakdown=breakdown(recording),
    )


def _facts(row: Row, recording: Recording | None) -> tuple[tuple[str, str], ...]:
    case = row.case
    if not case.measured:
        return ()

    def size(count: int) -> str:
        return f"{row.mark}{format_bytes(count)}"

    facts = [
        ("base", size(case.base)),
        ("peak allocated", size(case.peak.allocated)),
        ("transient", size(case.transient)),
        ("end", size(case.end_live)),
        ("peak reserved", size(case.peak.reserved)),
        ("stranded at most", size(case.peak.stranded)),
        ("stranded at end", size(case.end.stranded)),
    ]
    if case.peak.raw:
        facts.append(("past the allocator at most", size(case.peak.raw)))
        facts.append(("peak HBM", size(case.peak.hbm)))
    if case.peak.pool_idle:
        facts.append(("idle in private pools at most", size(case.peak.pool_idle)))
        facts.append(("idle in private pools at end", size(case.end.pool_idle)))
    if recording is not None:
        facts.append(("events", f"{recording.events:,}"))
    return tuple(facts)


def _notes(row: Row, recording: Recording | None) -> tuple[tuple[str, str], ...]:
    case = row.case
    out = []
    if not case.as_expected:
        out.append(("outcome", f"{row.outcome_text}. {row.message}".strip()))
    elif row.message:
        out.append(("outcome", row.message))
    out += [("failed", f"a request for {format_bytes(o.requested)} at event {o.event:,}") for o in case.ooms[:3]]
    if len(case.ooms) > 3:
        out.append(("failed", f"and {len(case.ooms) - 3} more requests"))
    if case.refuted:
        out.append(("model", refutation(case)))
    if case.precheck is not None and case.precheck.note:
        out.append(("before", printable(case.precheck.note)))
    if case.surprises:
        out.append(("surprise", surprise(case)))
    out += [("estimated", f"{printable(e.op, 80)} called {e.calls:,} times {printable(e.where, 120)}".strip())
            for e in case.estimated_ops]  # fmt: skip
    out += [
        (f"assumed, effect {a.effect}", printable(a.detail or a.code)) for a in case.assumptions if a.effect != "none"
    ]
    out += [("lost", printable(x.detail or x.code)) for x in case.lost]
    if recording is not None:
        seen = recording.timeline.peak(recording.rows).allocated
        if seen != case.peak.allocated:
            stated = format_bytes(case.peak.allocated)
            out.append(("trace", f"it shows a peak allocated of {format_bytes(seen)}, the results say {stated}"))
    return tuple(out)


def _pool_cells(share: PoolShare) -> tuple[tuple[str, str], ...]:
    """The cells of a line of a breakdown, each with its heading; MiB."""
    sizes = (share.reserved, share.active, share.stranded, share.pool_idle, share.releasable)
    return tuple(zip(POOL_HEADINGS, (f"{share.ranges:,}", *map(mib, sizes)), strict=True))


def _resolution(drawn: MemoryMap, recording: Recording) -> str:
    events = drawn.canvas.events_per_cell
    width = "1 event" if events == 1 else f"{events:,.1f} events"
    cell = f"One cell is {format_bytes(round(drawn.canvas.bytes_per_cell))} by {width}."
    if recording.timeline.measured is None:
        return f"{cell} No phase is marked: this is the whole recording, and before it is what stood when it began."
    return f"{cell} The dotted line is where the phase begins."
