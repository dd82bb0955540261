"""fragscope.lock: the exact figures of every case, as they were when someone last looked at them.

    version = 1
    fragscope = "0.1.0"                     # what measured them
    torch = "2.13.0"

    [case."moe/deepseek/list@default,torch-2.13,h100-80gb,virtual"]
    peak_requested = 9_437_184_000  # 9,000.00 MiB
    …

A case's name is its id in results.json: what was run, under which conf, by which release's rules, on which card. A
block has one line a value, in bytes, so that a diff shows which value changed, and says the size in words beside it.

**What is locked.** Cases of the virtual device: what a card does also depends on what else happens there. Of a case
that came to its end, all figures that can have a budget; ``peak_hbm`` only where memory was taken past PyTorch's
allocator, since it equals ``peak_reserved`` elsewhere. Of one that is declared to end otherwise, its outcome. Estimated
figures are locked too, with the reason: they are the same every time, though not what a card would have. A case that
was skipped, or has no figures, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from fragscope.errors import InputFileError, UsageError, printable
from fragscope.gate.budgets import METRICS, metric_value
from fragscope.results import CAME_TO_ITS_END, Case, Outcome, Peak, Results
from fragscope.toml import TomlFile, nearest, parse_toml, quoted, read_toml
from fragscope.units import KIB, MIB, format_bytes

VERSION = 1
FILE_LIMIT = 4 * MIB
"""About 12,000 cases; none is written that could not be read."""

_HEADING = """\
# The exact figures of every case, in bytes. `fragscope lock` writes this file, and `fragscope gate` holds results
# against it: a change that costs memory, or saves some, shows in its diff. Review it; do not edit it.
"""
_OPTIONAL = "peak_hbm"  # equal to peak_reserved where it is not stated
_REQUIRED = tuple(metric for metric in METRICS if metric != _OPTIONAL)
_CASE_KEYS = (*METRICS, "outcome", "estimated")
_LEAST, _MOST = -(2**63), 2**63 - 1  # what results.json can hold


@dataclass(frozen=True, slots=True)
class LockOptions:
    """What the lock lets pass, from ``[lock]`` of the budgets file.

    Attributes:
        improvements: values that are smaller than locked.
        new: cases that the lock lacks.
    """

    improvements: bool = False
    new: bool = False


@dataclass(frozen=True, slots=True)
class LockedCase:
    """One block of the file.

    Attributes:
        id: of the case.
        figures: by metric, bytes; empty for a case that did not come to its end.
        outcome: how it ends.
        estimated: why its figures are not certain; "" where they are exact.
        line: of the block, counted from 1; 0 where it stands in no file yet.
        lines: of each key.
    """

    id: str
    figures: dict[str, int]
    outcome: Outcome = "ok"
    estimated: str = ""
    line: int = field(default=0, compare=False)
    lines: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def stated(self) -> dict[str, int]:
        """The figures that have a line of their own."""
        same = _OPTIONAL in self.figures and self.figures[_OPTIONAL] == self.figures["peak_reserved"]
        return {metric: value for metric, value in self.figures.items() if not (same and metric == _OPTIONAL)}


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock file.

    Attributes:
        file: the path as it is shown to people.
        cases: by id.
        fragscope, torch: the releases that measured them; "" where that is not known.
    """

    file: str
    cases: dict[str, LockedCase]
    fragscope: str = ""
    torch: str = ""


def lock_of(results: Results, file: str) -> tuple[Lock, dict[str, str]]:
    """What results lock, and by id why other cases are left out.

    Args:
        results: complete, every outcome declared, and no id twice; the caller sees to that.
        file: the lock, as it is shown to people.
    """
    cases: dict[str, LockedCase] = {}
    left_out: dict[str, str] = {}
    for case in results.cases:
        reason = why_not_locked(case)
        if reason:
            left_out[case.id] = reason
        else:
            cases[case.id] = locked_case(case)
    return Lock(file, cases, *makers(results)), left_out


def makers(results: Results) -> tuple[str, str]:
    """The releases of fragscope and torch that measured; "" where that is not known.

    Which build of a release, as in ``2.13.0+cpu``, does not matter to the virtual device, and differs from machine to
    machine.
    """
    versions = results.run.versions
    return versions.get("fragscope", ""), versions.get("torch", "").partition("+")[0]


def why_not_locked(case: Case) -> str:
    """Why a case has nothing that could be locked; ``""`` where it has."""
    if case.device != "virtual":
        return "was measured on a card, whose figures also depend on what else happens there"
    if case.outcome == "skipped":
        return f"was skipped{f': {case.message}' if case.message else ''}"
    if case.outcome in CAME_TO_ITS_END and case.peak == Peak() and case.end == Peak() and case.allocs == 0:
        return "has no figures"
    return ""


def locked_case(case: Case) -> LockedCase:
    """The block of one case that can be locked."""
    if case.outcome not in CAME_TO_ITS_END:
        return LockedCase(case.id, {}, case.outcome)
    figures = {metric: metric_value(case, metric) for metric in METRICS}
    estimated = "" if case.exact else _why_estimated(case)
    return LockedCase(case.id, figures, case.outcome, estimated)


def _why_estimated(case: Case) -> str:
    reasons = sorted({op.op for op in case.estimated_ops} or {a.code for a in case.assumptions if a.effect != "none"})
    return printable(", ".join(reasons), 200) or "the results do not say why"


def lock_text(lock: Lock) -> str:
    """The file: sorted by id, the same text for the same figures whatever order they came in.

    Raises:
        UsageError: it would be larger than any lock that can be read.
    """
    lines = [_HEADING, f"version = {VERSION}"]
    lines += [
        f"{key} = {_string(value)}" for key, value in (("fragscope", lock.fragscope), ("torch", lock.torch)) if value
    ]
    for _, case in sorted(lock.cases.items()):
        lines += ["", f"[case.{_string(case.id)}]"]
        if case.outcome != "ok":
            lines.append(f"outcome = {_string(case.outcome)}")
        for metric in METRICS:
            if metric in case.stated:
                value = case.stated[metric]
                lines.append(f"{metric} = {value:_}" + (f"  # {format_bytes(value)}" if abs(value) >= KIB else ""))
        if case.estimated:
            lines.append(f"estimated = {_string(case.estimated)}")
    text = "\n".join(lines) + "\n"
    if len(text.encode()) > FILE_LIMIT:
        raise UsageError(
            f"{printable(lock.file)}: {len(lock.cases):,} cases are more than a lock holds "
            f"({format_bytes(FILE_LIMIT)}); lock fewer confs, releases or cards"
        )
    return text


def _string(text: str) -> str:
    """A TOML string in one line; what cannot be seen is written by its number."""
    escaped = (
        f"\\{c}"
        if c in '\\"'
        else c
        if c.isprintable()
        else f"\\u{ord(c):04X}"
        if ord(c) < 0x10000
        else f"\\U{ord(c):08X}"
        for c in text
    )
    return f'"{"".join(escaped)}"'


def load_lock(path: Path, shown_as: str | None = None) -> Lock:
    """Read a lock. It may come from strangers.

    Args:
        path: the file.
        shown_as: what to call it in messages; the path where None.

    Raises:
        InputFileError: unreadable, too large, not TOML, of another version, or with a table, key or value that means
            nothing; names the line.
    """
    return _lock(read_toml(path, str(path) if shown_as is None else shown_as, "locks", FILE_LIMIT))


def other_version(path: Path) -> int | None:
    """The version of a lock that is of another one than can be read; None for a file that says none."""
    try:
        version = read_toml(path, str(path), "locks", FILE_LIMIT).content.get("version")
    except InputFileError:
        return None
    return version if type(version) is int and version != VERSION else None


def parse_lock(text: str, file: str = "fragscope.lock") -> Lock:
    """The lock in a TOML text.

    Raises:
        InputFileError: as ``load_lock``.
    """
    return _lock(parse_toml(text, file, "locks"))


def _lock(toml: TomlFile) -> Lock:
    content = toml.content
    version = content.get("version")
    if version != VERSION or isinstance(version, bool):
        if "version" not in content:
            raise InputFileError(toml.file, "line 1: states no version; it is not a lock that fragscope wrote")
        raise toml.error(
            ("version",),
            f"version is {quoted(version)}; this fragscope reads {VERSION}: "
            "'fragscope lock --update' writes the lock anew",
        )
    for key in content:
        if key not in ("version", "fragscope", "torch", "case"):
            known = nearest(key, ("version", "fragscope", "torch", "case"))
            raise toml.error((key,), f"unknown key {quoted(key)}; {known}")
    tables = content.get("case", {})
    if not isinstance(tables, dict):
        raise toml.error(("case",), 'case is not a table; each case is written below [case."…"]')
    return Lock(
        file=toml.file,
        cases={id_: _case(toml, id_, table) for id_, table in tables.items()},
        fragscope=_text(toml, ("fragscope",), content.get("fragscope", "")),
        torch=_text(toml, ("torch",), content.get("torch", "")),
    )


def _case(toml: TomlFile, id_: str, table: Any) -> LockedCase:
    path = ("case", id_)
    if not isinstance(table, dict):
        raise toml.error(path, f"case.{quoted(id_)} is not a table of figures")
    figures: dict[str, int] = {}
    for key, value in table.items():
        if key not in _CASE_KEYS:
            raise toml.error((*path, key), f"unknown key {quoted(key)}; {nearest(key, _CASE_KEYS)}")
        if key in METRICS:
            figures[key] = _figure(toml, (*path, key), key, value)
    outcome = table.get("outcome", "ok")
    if outcome not in get_args(Outcome):
        raise toml.error((*path, "outcome"), f"outcome: {quoted(outcome)} is not one of {', '.join(get_args(Outcome))}")
    if outcome in CAME_TO_ITS_END:
        missing = [metric for metric in _REQUIRED if metric not in figures]
        if missing:
            raise toml.error(path, f"case.{quoted(id_)} states no {missing[0]}")
        figures.setdefault(_OPTIONAL, figures["peak_reserved"])
    elif figures:
        raise toml.error((*path, next(iter(figures))), f"a case whose outcome is {outcome} has no figures")
    return LockedCase(
        id=id_,
        figures=figures,
        outcome=outcome,
        estimated=_text(toml, (*path, "estimated"), table.get("estimated", "")),
        line=toml.lines.of(*path),
        lines={key: toml.lines.of(*path, key) for key in table},
    )


def _figure(toml: TomlFile, path: tuple[str, ...], key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise toml.error(path, f"{key}: {quoted(value)} is not a whole number of bytes")
    if not (_LEAST if key == "retained" else 0) <= value <= _MOST:
        raise toml.error(path, f"{key}: {quoted(value)} is no size that memory has")
    return value


def _text(toml: TomlFile, path: tuple[str, ...], value: object) -> str:
    if not isinstance(value, str):
        raise toml.error(path, f"{path[-1]}: {quoted(value)} is not a string")
    return value
