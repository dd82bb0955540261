"""Under what a run measures: every conf with every release's rules on every card, where the release takes the conf."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fragscope.allocator import ReplaySettings, card_named, parse_conf, rules_for
from fragscope.errors import UnmodelledError, UsageError
from fragscope.results import NotApplicable
from fragscope.units import format_bytes


@dataclass(frozen=True, slots=True)
class Matrix:
    """A named set of cells.

    Attributes:
        confs: PYTORCH_ALLOC_CONF strings, ``""`` for none.
        releases: whose rules apply; empty for the one that applies by default.
    """

    confs: tuple[str, ...]
    releases: tuple[str, ...]


MATRICES = {
    "quick": Matrix(("",), ()),
    # What servers of models set: vLLM wraps loading in max_split_size_mb:20, trainers set expandable segments. Between
    # 2.11 and 2.13 the order of free blocks changed from addresses to segments, which decides what is stranded.
    "nightly": Matrix(("", "max_split_size_mb:20", "expandable_segments:True"), ("2.11", "2.13")),
}


def cells(
    confs: Sequence[str], releases: Sequence[str], cards: Sequence[str], limit: int | None
) -> tuple[list[ReplaySettings], list[NotApplicable]]:
    """Settings for every combination, and the confs that some of the releases refuse.

    Args:
        confs: conf strings.
        releases: torch releases.
        cards: names of device profiles.
        limit: bytes that segments may take together; None for what a card has free.

    Raises:
        UsageError: a release or card is unknown, a card has less than ``limit``, or no release takes the conf.
        UnmodelledError: a conf sets what the allocator model does not cover.
    """
    chosen = {release: rules_for(release) for release in releases}
    refused: dict[tuple[str, str], UsageError] = {}
    for conf, release in itertools.product(confs, releases):
        try:
            parse_conf(conf, chosen[release].rules)
        except UnmodelledError:
            raise
        except UsageError as e:
            refused[conf, release] = e
    for conf in confs:
        if all((conf, release) in refused for release in releases):
            raise refused[conf, releases[0]]
    out = []
    for release, name, conf in itertools.product(releases, cards, confs):
        if (conf, release) in refused:
            continue
        card = card_named(name)
        if limit is not None and limit > card.total:
            raise UsageError(f"--capacity: {format_bytes(limit)} is more than {name} has ({format_bytes(card.total)})")
        out.append(ReplaySettings.on(card, chosen[release], conf, limit))
    return out, [NotApplicable(conf, release, str(e)) for (conf, release), e in refused.items()]
