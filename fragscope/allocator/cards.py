"""Named device profiles: what a card offers and what is left once a CUDA context stands.

One card was measured. Of the others multiprocessors, capability and L2 are what CUDA reports everywhere; their memory
in all is what one machine reported, and drivers differ in it: by up to 0.5 % (H100: 81,079 to 81,106 MiB), and by 2 %
on cards without ECC. What a context leaves free is an estimate. ``estimated`` says so field by field, and answers that
may hang on it say it, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from fragscope.errors import UsageError, printable
from fragscope.units import MIB

CONTEXT = 552_402_944
"""Bytes that a CUDA context takes of an H100, measured as total less free; on other cards the estimate. A context grows
with the number of multiprocessors: those of L40, L40S, RTX 6000 Ada, B200, B300 and RTX PRO 6000 take somewhat more."""


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
        estimated: names of the fields that another card of this product may have otherwise.
    """

    name: str
    product: str
    total: int
    free: int
    capability: tuple[int, int]
    multiprocessors: int
    l2: int
    source: str
    estimated: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether all of it was measured on such a card."""
        return not self.estimated


def _reported(
    name: str, product: str, total: int, capability: tuple[int, int], processors: int, l2: int, source: str, *also: str
) -> Card:
    """A card that others published the properties of; what a context leaves of it is estimated."""
    estimated = ("total", "free", *also)
    return Card(name, product, total, total - CONTEXT, capability, processors, l2, source, estimated)


_SHIPPED = (
    _reported("a10", "NVIDIA A10", 23_609_475_072, (8, 6), 72, 6 * MIB,
              "deviceQuery, CUDA driver 12.2, published in aalanwyr/face2cuda (step2cuda/README.md)"),
    _reported("a10g", "NVIDIA A10G", 22_587 * MIB, (8, 6), 80, 6 * MIB,
              "torch's device properties, in whole MiB, published in torchcodec's guide to decoding with CUDA"),
    _reported("l4", "NVIDIA L4", 23_583_784_960, (8, 9), 58, 48 * MIB,
              "deviceQuery, CUDA driver 12.2, published in bottlerocket-os/bottlerocket-kernel-kit #139"),
    _reported("l40s", "NVIDIA L40S", 47_576_711_168, (8, 9), 142, 96 * MIB,
              "device query, CUDA driver 12.4, published in alvarobartt/cuda-device-query (README.md)"),
    _reported("l40", "NVIDIA L40", 47_576_711_168, (8, 9), 142, 96 * MIB,
              "memory as an L40S has it: nvidia-smi shows 46,068 MiB of both; the rest from NVIDIA's datasheet"),
    _reported("rtx-4090", "NVIDIA GeForce RTX 4090", 25_250_627_584, (8, 9), 128, 72 * MIB,
              "a published deviceQuery, CUDA driver 13.0; others are up to 2 % larger"),
    _reported("rtx-6000-ada", "NVIDIA RTX 6000 Ada Generation", 48_622 * MIB, (8, 9), 142, 96 * MIB,
              "torch's device properties, in whole MiB, torch 2.3.0+cu121; L2 from NVIDIA's datasheet", "l2"),
    _reported("a100-40gb", "NVIDIA A100-SXM4-40GB", 42_298_834_944, (8, 0), 108, 40 * MIB,
              "deviceQuery, CUDA driver 12.2, published in bottlerocket-os/bottlerocket #3873"),
    _reported("a100-40gb-pcie", "NVIDIA A100-PCIE-40GB", 42_298_834_944, (8, 0), 108, 40 * MIB,
              "published deviceQuery outputs, CUDA driver 12.2"),
    _reported("a100-80gb", "NVIDIA A100-SXM4-80GB", 85_100_068_864, (8, 0), 108, 40 * MIB,
              "a published deviceQuery, CUDA driver 12.5"),
    _reported("a100-80gb-pcie", "NVIDIA A100 80GB PCIe", 84_974_239_744, (8, 0), 108, 40 * MIB,
              "a published deviceQuery, CUDA driver 12.4"),
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
    _reported("h100-80gb-pcie", "NVIDIA H100 PCIe", 85_045_477_376, (9, 0), 114, 50 * MIB,
              "a published nvaccelinfo, CUDA driver 12.7"),
    _reported("gh200-96gb", "NVIDIA GH200 480GB", 102_005_473_280, (9, 0), 132, 60 * MIB,
              "a published deviceQuery, CUDA driver 12.2"),
    _reported("h200", "NVIDIA H200", 143_156 * MIB, (9, 0), 132, 60 * MIB,
              "torch's device properties, in whole MiB, published in ai-bot-pro/achatbot (deploy/modal)", "l2"),
    _reported("h200-nvl", "NVIDIA H200 NVL", 143_156 * MIB, (9, 0), 132, 60 * MIB,
              "memory and L2 as an H200 reports them; torch published the same 139.80 GiB of it", "l2"),
    _reported("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Server Edition", 97_250 * MIB, (12, 0), 188, 128 * MIB,
              "torch's device properties, in whole MiB, torch 2.7.1+cu128"),
    _reported("b200", "NVIDIA B200", 182_631 * MIB, (10, 0), 148, 253 * MIB // 2,
              "torch's device properties, in whole MiB; L2 of 126.50 MiB published in pytorch/ao #4002", "l2"),
    _reported("b300", "NVIDIA B300 SXM6 AC", 274_074 * MIB, (10, 3), 148, 253 * MIB // 2,
              "torch's device properties, printed as 267.7 GiB, of which this is the least; L2 as a B200 has it", "l2"),
)  # fmt: skip

CARDS: dict[str, Card] = {card.name: card for card in _SHIPPED}
DEFAULT_CARD = "h100-80gb"
_defined: list[str] = []


def define(cards: Iterable[Card]) -> None:
    """Add a repository's own cards to those that ship, in place of what was defined before."""
    for name in _defined:
        CARDS.pop(name, None)
    _defined[:] = []
    for card in cards:
        CARDS[card.name] = card
        _defined.append(card.name)


def defined() -> tuple[Card, ...]:
    """The repository's own cards."""
    return tuple(CARDS[name] for name in _defined)


def is_shipped(name: str) -> bool:
    """Whether a card of that name comes with fragscope."""
    return any(card.name == name for card in _SHIPPED)


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
        written = name.lower()
        longer = [known for known in CARDS if known.startswith(written) and written]
        near = (longer or difflib.get_close_matches(written, CARDS, n=3, cutoff=0.4))[:3]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(
            f"{where}: no profile named {printable(repr(name), 80)}; {hint}known cards: {', '.join(sorted(CARDS))}"
        )
    return card
