"""Reading budgets.toml: budgets, waivers, and what the lock lets pass."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from fragscope.errors import UsageError
from fragscope.gate.budgets import METRICS, NARROWING, Budget, Limit, parse_limit
from fragscope.gate.lock import LockOptions
from fragscope.gate.waivers import Waiver
from fragscope.results import DeviceKind
from fragscope.toml import TomlFile, nearest, parse_toml, quoted, read_toml

_TABLES = ("budget", "waiver", "lock")
_WAIVER_KEYS = ("case", "metrics", "owner", "reason", "expires", "limit", *NARROWING)
_LOCK_KEYS = ("improvements", "new")
_LONGEST = 500  # characters of an owner or a reason; both are shown wherever the waiver applies


@dataclass(frozen=True, slots=True)
class Budgets:
    """A budgets file.

    Attributes:
        file: the path as it is shown to people.
        budgets: in the order of the file.
        waivers: in the order of the file.
        lock: what the lock lets pass.
    """

    file: str
    budgets: tuple[Budget, ...]
    waivers: tuple[Waiver, ...] = ()
    lock: LockOptions = field(default_factory=LockOptions)


def load_budgets(path: Path, shown_as: str | None = None) -> Budgets:
    """Read a budgets file. It may come from strangers.

    Args:
        path: the file.
        shown_as: what to call it in messages; the path where None.

    Raises:
        InputFileError: unreadable, too large, not TOML, or with a table, key or value that means nothing; names the
            line and the key.
    """
    return _budgets(read_toml(path, str(path) if shown_as is None else shown_as, "budgets"))


def parse_budgets(text: str, file: str = "budgets.toml") -> Budgets:
    """The budgets in a TOML text.

    Raises:
        InputFileError: as ``load_budgets``.
    """
    return _budgets(parse_toml(text, file, "budgets"))


def _budgets(toml: TomlFile) -> Budgets:
    reader = _Reader(toml)
    reader.check_tables()
    return Budgets(toml.file, tuple(reader.budgets()), tuple(reader.waivers()), reader.lock())


class _Reader:
    """Turns decoded TOML into budgets; every complaint names line and key."""

    def __init__(self, toml: TomlFile) -> None:
        self._toml = toml
        self._lines = toml.lines

    def check_tables(self) -> None:
        for key in self._toml.content:
            if key not in _TABLES:
                raise self._toml.error((key,), f"unknown table {quoted(key)}; {nearest(key, _TABLES)}")

    def budgets(self) -> list[Budget]:
        tables = self._toml.content.get("budget", {})
        if not isinstance(tables, dict):
            raise self._toml.error(("budget",), 'budget is not a table; write [budget."scenario/preset/variant"]')
        found: list[Budget] = []
        for pattern, value in tables.items():
            path = ("budget", pattern)
            self._check_pattern(path, pattern, value)
            if isinstance(value, dict):
                found.append(self._budget(path, pattern, value))
                continue
            for index, table in enumerate(value):
                if not isinstance(table, dict):
                    raise self._toml.error((*path, index), f"budget.{quoted(pattern)} holds something that is no table")
                found.append(self._budget((*path, index), pattern, table))
        # Tables may be written in any order, and a dotted key may come back to an earlier one.
        return sorted(found, key=lambda b: b.line)

    def waivers(self) -> list[Waiver]:
        tables = self._toml.content.get("waiver", [])
        if not isinstance(tables, list):
            raise self._toml.error(("waiver",), "a waiver is written below [[waiver]], in double brackets")
        return [self._waiver(("waiver", index), table) for index, table in enumerate(tables)]

    def lock(self) -> LockOptions:
        table = self._toml.content.get("lock", {})
        if not isinstance(table, dict):
            raise self._toml.error(("lock",), "lock is not a table; write [lock]")
        allowed: dict[str, bool] = {}
        for key, value in table.items():
            path = ("lock", key)
            if key not in _LOCK_KEYS:
                raise self._toml.error(path, f"unknown key {quoted(key)}; {nearest(key, _LOCK_KEYS)}")
            if value not in ("allow", "fail"):
                raise self._toml.error(path, f'{key}: {quoted(value)} is neither "allow" nor "fail"')
            allowed[key] = value == "allow"
        return LockOptions(**allowed)

    def _waiver(self, path: tuple[str | int, ...], table: object) -> Waiver:
        if not isinstance(table, dict):
            raise self._toml.error(path, "a waiver is written below [[waiver]], in double brackets")
        for key in table:
            if key not in _WAIVER_KEYS:
                raise self._toml.error((*path, key), f"unknown key {quoted(key)}; {nearest(key, _WAIVER_KEYS)}")
        for key, wanted in (
            ("case", 'a glob over scenario/preset/variant, such as "moe-fp8-shuffle/*/*"'),
            ("metrics", f"a list of {', '.join(METRICS)}"),
            ("owner", "who answers for it"),
            ("reason", "why it is right for now"),
            ("expires", "the last day on which it applies, such as 2027-03-31"),
        ):
            if key not in table:
                raise self._toml.error(path, f"the waiver has no {key}; give {wanted}")
        pattern = self._text((*path, "case"), "case", table["case"])
        if pattern.count("/") < 2:
            raise self._toml.error(
                (*path, "case"), f"case: {quoted(pattern)} has fewer than three parts; write scenario/preset/variant"
            )
        narrowing = {key: self._narrowing((*path, key), key, table[key]) for key in NARROWING if key in table}
        line = self._lines.of(*path)
        return Waiver(
            cases=Budget(pattern=pattern, limits={}, line=line, **narrowing),
            metrics=self._metrics((*path, "metrics"), table["metrics"]),
            owner=self._text((*path, "owner"), "owner", table["owner"]),
            reason=self._text((*path, "reason"), "reason", table["reason"]),
            expires=self._date((*path, "expires"), table["expires"]),
            limit=self._limit((*path, "limit"), "limit", table["limit"]) if "limit" in table else None,
            line=line,
        )

    def _metrics(self, path: tuple[str | int, ...], value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            raise self._toml.error(path, f'metrics: {quoted(value)} is not a list such as ["transient"]')
        for metric in value:
            if metric not in METRICS:
                hint = nearest(metric, METRICS) if isinstance(metric, str) else f"known: {', '.join(METRICS)}"
                raise self._toml.error(path, f"metrics: unknown metric {quoted(metric)}; {hint}")
        return tuple(metric for metric in METRICS if metric in value)

    def _text(self, path: tuple[str | int, ...], key: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self._toml.error(path, f"{key}: {quoted(value)} is not a non-empty string")
        if len(value) > _LONGEST:
            raise self._toml.error(path, f"{key}: has {len(value):,} characters; {_LONGEST} are the most")
        return value

    def _date(self, path: tuple[str | int, ...], value: object) -> datetime.date:
        # A point in time is a date too, to Python.
        if not isinstance(value, datetime.date) or isinstance(value, datetime.datetime):
            raise self._toml.error(
                path, f"expires: {quoted(value)} is not a date; write year-month-day without quotes, such as 2027-03-31"
            )
        return value

    def _check_pattern(self, path: tuple[str, ...], pattern: str, value: object) -> None:
        if pattern in METRICS or pattern in NARROWING:
            raise self._toml.error(
                path, f'budget.{pattern} belongs to no case; write it below [budget."scenario/preset/variant"]'
            )
        if pattern.count("/") < 2:
            raise self._toml.error(
                path,
                f"budget.{quoted(pattern)} has fewer than three parts; a budget's name is a quoted glob over "
                'scenario/preset/variant, such as "moe-fp8-shuffle/*/*"',
            )
        if not isinstance(value, dict | list) or value == []:
            raise self._toml.error(path, f"budget.{quoted(pattern)} is not a table of limits")

    def _budget(self, path: tuple[str | int, ...], pattern: str, table: dict[str, Any]) -> Budget:
        limits: dict[str, Limit] = {}
        narrowing: dict[str, str] = {}
        for key, value in table.items():
            if key in METRICS:
                limits[key] = Limit(self._limit((*path, key), key, value), self._lines.of(*path, key))
            elif key in NARROWING:
                narrowing[key] = self._narrowing((*path, key), key, value)
            else:
                known = (*METRICS, *NARROWING)
                raise self._toml.error((*path, key), f"unknown key {quoted(key)}; {nearest(key, known)}")
        if not limits:
            raise self._toml.error(
                path, f"budget.{quoted(pattern)} states no limit; give at least one of {', '.join(METRICS)}"
            )
        return Budget(pattern=pattern, limits=limits, line=self._lines.of(*path), **narrowing)

    def _limit(self, path: tuple[str | int, ...], key: str, value: object) -> int:
        try:
            return parse_limit(key, value)
        except UsageError as e:
            raise self._toml.error(path, str(e)) from None

    def _narrowing(self, path: tuple[str | int, ...], key: str, value: object) -> str:
        if not isinstance(value, str):
            raise self._toml.error(path, f"{key}: {quoted(value)} is not a string; write it in quotes")
        if key == "device" and value not in get_args(DeviceKind):
            raise self._toml.error(
                path, f"device: unknown device {quoted(value)}; {nearest(value, get_args(DeviceKind))}"
            )
        if key != "conf" and not value:
            raise self._toml.error(path, f"{key}: is empty; leave the key out for a budget that holds for every {key}")
        return value
