"""``fragscope thresholds``: how many tokens one launch of a mixture-of-experts kernel may have, for every model."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fragscope.cli.subjects import granted, settings_json
from fragscope.cli.tables import aligned, markdown_list, markdown_table
from fragscope.cli.tune import progress
from fragscope.errors import UsageError, printable

if TYPE_CHECKING:
    from fragscope.allocator import ReplaySettings
    from fragscope.thresholds import Thresholds

Answer = tuple["list[Thresholds]", "ReplaySettings"]
"""What was found for every model on one card."""
SCHEMA_VERSION = 1
_FILES = ("thresholds.html", "thresholds.json", "thresholds.csv")
_NOTES = (
    "tokens of one launch; peaks are what it reserves, MiB; the kernels' own workspaces are not known, so peaks are "
    "lower bounds, and tokens by memory upper ones",
    "upstream cap: measured by vLLM (#43599), reason unknown; recommended: the smallest launch that pads at most one "
    "row in 10 under the worst routing, never more than the largest; its speed was not measured",
    "untuned, tiles below 128 are taken only where experts have at most 128 tokens on average",
)


@click.command("thresholds")
@click.option("--model", "names", multiple=True, metavar="NAME", help="Only this model; repeatable.")
@click.option("--models", "file", type=click.Path(path_type=Path), metavar="FILE",
              help="Models of your own, in TOML, instead of those that come with fragscope.")  # fmt: skip
@click.option("--card", "cards", multiple=True, metavar="NAME", help="Device profile, such as h100-80gb; repeatable.")
@click.option("--free", metavar="SIZE", help="What launches may take: '40 GiB'. [default: all that the card has free]")
@click.option("--tile", type=click.Choice(["8", "16", "32", "64", "128", "192", "256"]), default="128",
              show_default=True, help="Rows of a tile; 192 is of FlashInfer 0.7.2.")  # fmt: skip
@click.option("--conf", default="", metavar="CONF", help="PYTORCH_ALLOC_CONF to reserve under.")
@click.option("--torch", "release", metavar="RELEASE", help="Release whose allocator rules apply, as 2.11.0.")
@click.option("--format", "form", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Also write a page with a figure for each model, and the curves as JSON and CSV.")  # fmt: skip
def command(
    *,
    names: tuple[str, ...],
    file: Path | None,
    cards: tuple[str, ...],
    free: str | None,
    tile: str,
    conf: str,
    release: str | None,
    form: str,
    out: Path | None,
) -> None:
    """Say how many tokens one launch of NVFP4 mixture-of-experts kernels may have, for each model.

    Three things limit a launch: its grid, memory, and what vLLM found to work. The recommended chunk is large enough to
    hide its padding, and keeps to all three. With several --card every table stands once for each, and --out makes a
    folder for each. Needs no GPU and no torch.
    """
    from fragscope.thresholds import chosen, load_models, shipped_models, thresholds

    models = chosen(shipped_models() if file is None else load_models(file), names)
    if free is not None and len(set(cards)) > 1:
        raise UsageError("--free: it says what is free of one card; name one --card")
    every = [_settings(card, free, conf, release) for card in (dict.fromkeys(cards) or (None,))]
    answers: list[Answer] = []
    with progress() as say:
        for settings in every:
            found = []
            for model in models:
                say(model.name if len(every) == 1 else f"{model.name} on {settings.card}")
                found.append(thresholds(model, int(tile), settings))
            answers.append((found, settings))
    if out is not None:
        for found, settings in answers:
            _write(out if len(every) == 1 else out / settings.card, found, settings)
    match form:
        case "json":
            first, *others = (as_json(found, settings) for found, settings in answers)
            click.echo(json.dumps({**first, **({"other_cards": others} if others else {})}, indent=2))
        case "markdown":
            click.echo("\n\n".join("\n".join(as_markdown(*answer)) for answer in answers))
        case _:
            click.echo("\n\n".join("\n".join(as_text(*answer)) for answer in answers))


def _settings(card: str | None, free: str | None, conf: str, release: str | None) -> ReplaySettings:
    from fragscope.allocator import DEFAULT_CARD, NEWEST, ReplaySettings, card_named, parse_conf, rules_for
    from fragscope.cli.configured import configured
    from fragscope.units import format_bytes, parse_memory

    config = configured()
    profile = card_named(card or config.card or DEFAULT_CARD)
    rules = rules_for(release or config.torch or NEWEST.release)
    parse_conf(conf, rules.rules)  # complains before anything is computed
    settings = ReplaySettings.on(profile, rules, conf, None if free is None else parse_memory(free, "--free"))
    if settings.capacity <= settings.total:
        return settings
    # More than the card has stands for a larger card.
    has, taken = format_bytes(settings.total), format_bytes(settings.capacity)
    print(f"fragscope: {profile.name} has {has}; it is taken to have {taken}, as --free says", file=sys.stderr)
    return settings.with_total(settings.capacity)


def as_json(found: list[Thresholds], settings: ReplaySettings) -> dict[str, Any]:
    """The answer as published: sizes are integer bytes, keys only ever get more."""
    from fragscope.thresholds import MAX_GRID_Y, UPSTREAM_CAP

    return {
        "schema_version": SCHEMA_VERSION,
        "settings": settings_json(settings),
        "max_grid_y": MAX_GRID_Y,
        "upstream_cap": UPSTREAM_CAP,
        "notes": list(_NOTES),
        "models": [_model_json(f) for f in found],
    }


def _model_json(f: Thresholds) -> dict[str, Any]:
    return {
        **asdict(f.model),
        "tile": f.tile,
        "tokens": {
            "launch_grid": f.grid[f.tile],
            "launch_grid_by_tile": {str(tile): tokens for tile, tokens in f.grid.items()},
            "memory": f.memory,
            "largest": f.largest,
            "binds": f.binds,
            "recommended": f.chunk,
        },
        "peak_at_largest": asdict(f.at_largest),
        "peak_at_recommended": asdict(f.at_chunk),
        "curve": [asdict(p) for p in f.curve],
        "assumptions": [asdict(a) for a in f.assumptions],
    }


def as_csv(found: list[Thresholds]) -> str:
    """Every point of every curve; bytes."""
    text = io.StringIO()
    columns = csv.writer(text, lineterminator="\n")
    columns.writerow(["model", "tile", "tokens", "ctas", "requested", "allocated", "reserved", "fits"])
    for f in found:
        for p in f.curve:
            columns.writerow(
                [f.model.name, f.tile, p.tokens, p.ctas, p.requested, p.allocated, p.reserved, int(p.fits)]
            )
    return text.getvalue()


def as_text(found: list[Thresholds], settings: ReplaySettings) -> list[str]:
    """For a terminal."""
    return [
        *_about(found, settings), "", *aligned(_limits(found)), "", "launch grid by rows of a tile",
        *aligned(_by_tile(found)), "", *_NOTES, *_granted(found),
    ]  # fmt: skip


def as_markdown(found: list[Thresholds], settings: ReplaySettings) -> list[str]:
    """For a pull request or a document."""
    from fragscope.report.markdown import escaped

    lines = [*(escaped(line) for line in _about(found, settings)), "", *markdown_table(_limits(found))]
    lines += ["", "Launch grid by rows of a tile:", "", *markdown_table(_by_tile(found)), ""]
    return [*lines, *markdown_list([*_NOTES, *_granted(found)])]


def _about(found: list[Thresholds], settings: ReplaySettings) -> tuple[str]:
    from fragscope.units import format_bytes

    conf = settings.conf or "default"
    return (
        f"tile {found[0].tile}, {format_bytes(settings.capacity)} free, card {settings.card}, conf {printable(conf)}, "
        f"allocator rules of torch {settings.rules.torch}",
    )


def _limits(found: list[Thresholds]) -> list[tuple[str, ...]]:
    from fragscope.thresholds import UPSTREAM_CAP
    from fragscope.units import mib

    rows: list[tuple[str, ...]] = [
        ("grid", "memory", "upstream cap", "largest", "its peak", "recommended", "its peak", "model and what binds")
    ]
    for f in found:
        rows.append((
            f"{f.grid[f.tile]:,}", f"{f.memory:,}", f"{UPSTREAM_CAP:,}", f"{f.largest:,}", mib(f.at_largest.reserved),
            f"{f.chunk:,}", mib(f.at_chunk.reserved), f"{f.model.name} ({f.binds})",
        ))  # fmt: skip
    return rows


def _by_tile(found: list[Thresholds]) -> list[tuple[str, ...]]:
    tiles = list(found[0].grid)
    rows: list[tuple[str, ...]] = [(*(str(tile) for tile in tiles), "model")]
    return [*rows, *((*(f"{f.grid[tile]:,}" for tile in tiles), f.model.name) for f in found)]


def _granted(found: list[Thresholds]) -> list[str]:
    from fragscope.allocator import merged

    return granted(merged([f.assumptions for f in found], max))


def _write(folder: Path, found: list[Thresholds], settings: ReplaySettings) -> None:
    """Write page, JSON and CSV; a place that cannot be written is the caller's mistake, not ours."""
    from fragscope.report import write_thresholds_html
    from fragscope.trace.containers import write_atomically

    page, data, curves = (folder / name for name in _FILES)
    try:
        write_thresholds_html(found, settings, page)
        write_atomically(data, json.dumps(as_json(found, settings), indent=2).encode() + b"\n")
        write_atomically(curves, as_csv(found).encode())
    except OSError as e:
        raise UsageError(f"--out: {folder} cannot be written ({(e.strerror or type(e).__name__).lower()})") from None
    for file in (page, data, curves):
        click.echo(f"fragscope: wrote {printable(str(file))}", err=True)
