"""Named device profiles: what a card offers and what is left once a CUDA context stands."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from fragscope.errors import UsageError


@dataclass(frozen=True, slots=True)
class Card:
    """A device profile; bytes.

    Attributes:
        name: what ``--card`` takes.
        product: the name CUDA reports.
        total: ``torch.cuda.get_device_properties().total_memory``.
        free: free memory when the context stands and nothing is allocated.
        capability: compute capability.
        multiprocessors: streaming multiprocessors.
        l2: L2 cache size.
        source: where the figures come from.
    """

    name: str
    product: str
    total: int
    free: int
    capability: tuple[int, int]
    multiprocessors: int
    l2: int
    source: str


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            name="h100-80gb",
            product="NVIDIA H100 80GB HBM3",
            total=85_017_493_504,
            free=84_465_090_560,
            capability=(9, 0),
            multiprocessors=132,
            l2=52_428_800,
            source="measured: driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130",
        ),
    )
}
DEFAULT_CARD = "h100-80gb"


def card_like(product: str, total: int | None) -> Card | None:
    """The profile of a device by the name CUDA reports and its memory in bytes (None: any); None if there is none."""
    for card in CARDS.values():
        if card.product == product and total in (None, card.total):
            return card
    return None


def card_named(name: str, where: str = "--card") -> Card:
    """The profile of that name.

    Args:
        name: what the user wrote.
        where: the place to name in an error.

    Raises:
        UsageError: there is none; the nearest names are in the message.
    """
    card = CARDS.get(name)
    if card is None:
        near = difflib.get_close_matches(name, CARDS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"{where}: no profile named {name!r}; {hint}known cards: {', '.join(sorted(CARDS))}")
    return card
