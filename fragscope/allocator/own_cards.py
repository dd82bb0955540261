"""A repository's own cards: the tables ``[tool.fragscope.cards.NAME]`` of its pyproject.toml.

[tool.fragscope.cards.mig-20gb]
like = "h100-80gb"        # what is not said here is as there
total = "20 GiB"          # torch.cuda.get_device_properties().total_memory
free = "19.6 GiB"         # of it, beside a CUDA context; left out: total less the context of the other card
multiprocessors = 32
capability = "9.0"
l2 = "25 MiB"
product = "NVIDIA H100 80GB HBM3 MIG 2g.20gb"   # the name CUDA reports
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fragscope.allocator.cards import CARDS, CONTEXT, Card, define, is_shipped
from fragscope.errors import InputFileError, UsageError
from fragscope.toml import TomlFile, nearest, quoted, read_toml
from fragscope.units import format_bytes, parse_memory

_KEYS = ("like", "total", "free", "capability", "multiprocessors", "l2", "product")
_NEEDED = ("total", "capability", "multiprocessors", "l2")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # as it stands in case ids and file names
_CAPABILITY = re.compile(r"([1-9][0-9]?)\.([0-9])")
_MOST_PROCESSORS = 4096


def use_cards_of(pyproject: Path) -> None:
    """Make the cards that a pyproject.toml defines known to ``--card``, in place of what was defined before.

    Raises:
        InputFileError: a table is not right; names file, line and key.
    """
    define(())
    define(cards_of(pyproject))


def cards_of(pyproject: Path) -> tuple[Card, ...]:
    """The cards that a pyproject.toml defines, in its order.

    Raises:
        InputFileError: a table is not right; names file, line and key.
    """
    here = Path.cwd()
    shown = pyproject.relative_to(here) if pyproject.is_relative_to(here) else pyproject
    toml = read_toml(pyproject, str(shown), "project")
    tables = toml.content.get("tool", {}).get("fragscope", {}).get("cards", {})
    found: dict[str, Card] = {}
    if not isinstance(tables, dict):
        raise toml.error(("tool", "fragscope", "cards"), "cards is not a table; write [tool.fragscope.cards.NAME]")
    for name, table in tables.items():
        found[name] = _Reader(toml, name, table, found).card()
    return tuple(found.values())


class _Reader:
    """One table."""

    def __init__(self, toml: TomlFile, name: str, table: Any, before: Mapping[str, Card]) -> None:
        self._toml, self._name, self._table, self._before = toml, name, table, before

    def card(self) -> Card:
        name, table = self._name, self._table
        if not isinstance(table, dict):
            raise self._error(None, f"is not a table; write [tool.fragscope.cards.{name}]")
        if not _NAME.fullmatch(name):
            raise self._error(None, "is no name of a card; use up to 64 of a-z, 0-9, '.', '_' and '-'")
        if is_shipped(name):
            raise self._error(None, "is the name of a card that comes with fragscope; choose another")
        for key in table:
            if key not in _KEYS:
                raise self._error(key, f"unknown key {quoted(key)}; {nearest(key, _KEYS)}")
        base = self._base()
        if base is None:
            missing = [key for key in _NEEDED if key not in table]
            if missing:
                raise self._error(None, f"lacks {', '.join(missing)}; say it, or name a card that it is like")
        total = self._size("total", base)
        if "free" in table:
            free = self._size("free", base)
        elif base is not None and "total" not in table:
            free = base.free
        else:
            free = total - (CONTEXT if base is None else base.total - base.free)
        if free <= 0:
            raise self._error("total", f"{format_bytes(total)} is less than a CUDA context takes; say what is free")
        if free > total:
            raise self._error("free", f"{format_bytes(free)} is more than the card has ({format_bytes(total)})")
        known = {field.name for field in fields(Card)} & set(table)
        if "free" not in table and "total" in table:
            known -= {"free"}
            estimated = {"free"}
        else:
            estimated = set()
        estimated |= set(() if base is None else base.estimated) - known
        return Card(
            name=name,
            product=self._product(base),
            total=total,
            free=free,
            capability=self._capability(base),
            multiprocessors=self._multiprocessors(base),
            l2=self._size("l2", base),
            source=f"{self._toml.file}:{self._toml.lines.of('tool', 'fragscope', 'cards', name)}"
            + ("" if base is None else f", like {base.name}"),
            estimated=tuple(f.name for f in fields(Card) if f.name in estimated),
        )

    def _base(self) -> Card | None:
        like = self._table.get("like")
        if like is None:
            return None
        known = {**{n: c for n, c in CARDS.items() if is_shipped(n)}, **self._before}
        if not isinstance(like, str) or like not in known:
            hint = nearest(like, tuple(known)) if isinstance(like, str) else f"known: {', '.join(known)}"
            raise self._error("like", f"{quoted(like)} is no card that ships or stands above; {hint}")
        return known[like]

    def _size(self, key: str, base: Card | None) -> int:
        if key not in self._table:
            assert base is not None
            size: int = getattr(base, key)
            return size
        try:
            size = parse_memory(self._table[key], key)
        except UsageError as e:
            raise self._error(key, str(e)) from None
        if size == 0:
            raise self._error(key, f"{key}: a card without memory runs nothing")
        return size

    def _capability(self, base: Card | None) -> tuple[int, int]:
        if "capability" not in self._table:
            assert base is not None
            return base.capability
        value = self._table["capability"]
        match = _CAPABILITY.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise self._error("capability", f'capability: {quoted(value)} is none; write it as "9.0"')
        return int(match[1]), int(match[2])

    def _multiprocessors(self, base: Card | None) -> int:
        if "multiprocessors" not in self._table:
            assert base is not None
            return base.multiprocessors
        value = self._table["multiprocessors"]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST_PROCESSORS:
            raise self._error("multiprocessors", f"multiprocessors: {quoted(value)} is not a number of them")
        return value

    def _product(self, base: Card | None) -> str:
        value = self._table.get("product", self._name if base is None else base.product)
        if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 200:
            raise self._error("product", f"product: {quoted(value)} is not a name such as 'NVIDIA L4'")
        return value

    def _error(self, key: str | None, reason: str) -> InputFileError:
        path = ("tool", "fragscope", "cards", self._name) + (() if key is None else (key,))
        return self._toml.error(path, f"[tool.fragscope.cards.{quoted(self._name)[1:-1]}] {reason}")
