"""``fragscope cards``: the device profiles that ``--card`` takes, and where their figures come from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from fragscope.cli.tables import aligned, markdown_list, markdown_table
from fragscope.errors import printable

if TYPE_CHECKING:
    from fragscope.allocator import Card

SCHEMA_VERSION = 1
_NOTE = "MiB; ~: not measured on such a card, and answers that may hang on it say so (free_estimated, total_estimated)"


@click.command("cards")
@click.option("--format", "form", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
def command(form: str) -> None:
    """List the device profiles that --card takes: those that come with fragscope and those of pyproject.toml.

    A card of your own is a table [tool.fragscope.cards.NAME] there: total, free, capability, multiprocessors and l2, or
    like = "CARD" and what differs.
    """
    from fragscope.allocator import CARDS
    from fragscope.allocator.cards import is_shipped
    from fragscope.cli.configured import configured

    configured()
    cards = sorted(CARDS.values(), key=lambda card: (not is_shipped(card.name), card.free))
    if form == "json":
        answer = {"schema_version": SCHEMA_VERSION, "cards": [card_json(card) for card in cards]}
        click.echo(json.dumps(answer, indent=2))
        return
    sources = [f"{card.name}: {printable(card.source)}" for card in cards]
    if form == "markdown":
        click.echo("\n".join([*markdown_table(_table(cards)), "", _NOTE, "", *markdown_list(sources)]))
        return
    for line in (*aligned(_table(cards)), "", _NOTE, *sources):
        click.echo(line)


def card_json(card: Card) -> dict[str, Any]:
    """A profile as published; sizes are integer bytes."""
    return {
        "name": card.name,
        "product": card.product,
        "total": card.total,
        "free": card.free,
        "capability": ".".join(map(str, card.capability)),
        "multiprocessors": card.multiprocessors,
        "l2": card.l2,
        "measured": card.measured,
        "estimated": list(card.estimated),
        "source": card.source,
    }


def _table(cards: list[Card]) -> list[tuple[str, ...]]:
    from fragscope.units import mib

    def size(card: Card, field: str) -> str:
        return f"{'~' if field in card.estimated else ''}{mib(getattr(card, field))}"

    rows: list[tuple[str, ...]] = [("card", "total", "free", "L2", "capability", "SMs", "product")]
    for card in cards:
        capability = ".".join(map(str, card.capability))
        rows.append((
            card.name, size(card, "total"), size(card, "free"), size(card, "l2"), capability,
            str(card.multiprocessors), printable(card.product, 100),
        ))  # fmt: skip
    return rows
