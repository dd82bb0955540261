"""The value that every report shows: comparable cases in groups, each figure beside that of the original."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from fragscope.errors import printable
from fragscope.results import Case, Results
from fragscope.units import format_bytes

_NAME_LIMIT = 120
ESTIMATED = "~"
"""Before figures that are not exact."""
ESTIMATED_MEANS = f"{ESTIMATED} not exact: a size is unknown, or something assumed may change the figure"


@dataclass(frozen=True, slots=True)
class Row:
    """One case as reports show it.

    Attributes:
        case: the figures.
        variant: its name as one printable line.
        original: the case of the group whose variant has the role original, if that was measured.
    """

    case: Case
    variant: str
    original: Case | None

    @property
    def mark(self) -> str:
        """``~`` where the figures are not exact, else nothing."""
        return "" if self.case.exact else ESTIMATED

    @property
    def difference(self) -> int | None:
        """Bytes of transient beyond the original's; None where this is the original or either did not run to its end.

        What an OOM cut short might have needed more.
        """
        if self.original is None or self.original is self.case:
            return None
        if not (_complete(self.case) and _complete(self.original)):
            return None
        return self.case.transient - self.original.transient

    @property
    def difference_text(self) -> str:
        """The difference in percent of the original's transient, or in bytes where that is zero; ASCII."""
        if self.original is self.case:
            return "reference"
        if self.difference is None or self.original is None:
            return "-"
        mark = ESTIMATED if not (self.case.exact and self.original.exact) else ""
        if self.difference == 0:
            return f"{mark}same"
        if self.original.transient > 0:
            percent = 100 * self.difference / self.original.transient
            # A small difference is not none, and a small rest is not nothing.
            return f"{mark}{percent:+,.1f} %" if abs(percent) >= 0.05 else f"{mark}{_signed(self.difference)}"
        return f"{mark}{_signed(self.difference)}"

    @property
    def outcome_text(self) -> str:
        """The outcome and, if it is not the declared one, what was declared."""
        case = self.case
        if case.as_expected:
            return case.outcome if case.outcome == "ok" else f"{case.outcome} (declared)"
        return f"{case.outcome} (declared: {case.expected_outcome})"

    @property
    def notes(self) -> tuple[str, ...]:
        """What no column of the comparison shows, a printable line each."""
        before = self.case.precheck.note if self.case.precheck is not None else ""
        told = (refutation(self.case), printable(before), surprise(self.case), self._pool_note, self._raw_note)
        return tuple(filter(None, told))

    @property
    def _pool_note(self) -> str:
        """What is idle in private pools, which no column of the comparison shows; empty where nothing ever was."""
        peak, end = self.case.peak.pool_idle, self.case.end.pool_idle
        if not self.case.measured or not peak:
            return ""
        at_most, at_end = f"{self.mark}{format_bytes(peak)}", f"{self.mark}{format_bytes(end)}"
        return f"idle in private pools: at most {at_most}, at the end {at_end}"

    @property
    def _raw_note(self) -> str:
        """What was taken of the driver past the allocator; empty where nothing was."""
        peak = self.case.peak
        if not self.case.measured or not peak.raw:
            return ""
        raw, hbm = f"{self.mark}{format_bytes(peak.raw)}", f"{self.mark}{format_bytes(peak.hbm)}"
        return f"device memory past the allocator: at most {raw}; peak HBM {hbm}"

    @property
    def message(self) -> str:
        """What went wrong, as one printable line."""
        return printable(self.case.message)


@dataclass(frozen=True, slots=True)
class Group:
    """Cases that differ in their variant only, and so can be compared.

    Attributes:
        scenario: name, one printable line.
        preset: name, one printable line.
        settings: what else was fixed and is not the same in the whole run, such as ``conf max_split_size_mb:20``.
        rows: in the order of the results.
    """

    scenario: str
    preset: str
    settings: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Scenario, preset and settings in one line."""
        return " / ".join(filter(None, (self.scenario, self.preset, *self.settings)))


@dataclass(frozen=True, slots=True)
class Summary:
    """A results file as reports show it.

    Attributes:
        facts: what ran, as ``(word, value)``; one printable line each.
        warnings: what a reader must know before believing the figures; empty if nothing.
        headlines: what came out, worst first.
        groups: comparable cases.
    """

    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    headlines: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def estimated(self) -> bool:
        """Whether any measured figure is not exact, so that the mark needs an explanation."""
        return any(row.mark and row.case.measured for group in self.groups for row in group.rows)


def summarize(results: Results) -> Summary:
    """Group the cases and say what came out."""
    groups = _groups(results.cases)
    return Summary(_facts(results), _warnings(results), _headlines(results, groups), groups)


def refutation(case: Case) -> str:
    """Where the allocator model and the card part, as one printable line; empty where they do not."""
    if case.verify is None or not case.verify.mismatches:
        return ""
    first = f"; first: {printable(case.verify.first)}" if case.verify.first else ""
    differ = f"the allocator model differs from the recording in {case.verify.mismatches:,} of "
    return f"{differ}{case.verify.compared:,} comparisons, and the figures are the model's{first}"


def surprise(case: Case) -> str:
    """What a card did otherwise than the virtual device had said, as one printable line; empty where nothing."""
    differing = [
        f"{name} {count:+,}" if name == "allocs" else f"{name} {_signed(count)}"
        for name, count in case.surprises.items()
    ]
    if not differing:
        return ""
    rough = "" if case.predicted is None or case.predicted.exact else " by estimate"
    return f"against what the virtual device said{rough}: {', '.join(differing)}"


def _complete(case: Case) -> bool:
    return case.measured and case.outcome != "oom"


_Key = tuple[tuple[str, str], ...]


def _groups(cases: list[Case]) -> tuple[Group, ...]:
    keyed: dict[_Key, list[Case]] = {}
    for case in cases:
        keyed.setdefault(_key(case), []).append(case)
    varying = {
        name for column in zip(*keyed, strict=True) for name, _ in column[:1] if len({value for _, value in column}) > 1
    }
    out = []
    for key, members in keyed.items():
        original = next((c for c in members if c.role == "original" and c.measured), None)
        rows = tuple(Row(c, _name(c.variant), original) for c in members)
        extra = tuple(f"{name} {value or 'default'}" for name, value in key[2:] if name in varying)
        out.append(Group(key[0][1], key[1][1], extra, rows))
    return tuple(out)


def _key(case: Case) -> _Key:
    params = ", ".join(f"{k}={v!r}" for k, v in sorted(case.changed.items()))
    named = {
        "scenario": case.scenario,
        "preset": case.preset,
        "with": params,
        "conf": case.conf,
        "torch": case.torch,
        "card": case.card,
        "device": case.device,
    }
    return tuple((name, _name(value)) for name, value in named.items())


def _facts(results: Results) -> tuple[tuple[str, str], ...]:
    run, cases = results.run, results.cases
    devices = {"virtual": "virtual, no GPU involved", "cuda": "GPU"}
    facts = [
        ("card", _distinct([c.card for c in cases])),
        ("device", _distinct([devices[c.device] for c in cases])),
        ("conf", _distinct([c.conf or "default" for c in cases])),
        ("allocator rules of torch", _distinct([c.torch for c in cases])),
        ("torch installed", _distinct([c.torch_installed for c in cases])),
        ("started", _moment(run.started)),
        ("took", f"{run.seconds:,.1f} s"),
        ("cases", f"{len(cases)} of {run.planned} planned"),
    ]
    facts += [(_name(name), _name(version)) for name, version in run.versions.items() if name != "torch"]
    for left in run.not_applicable:
        what = left.variant or f"{left.conf or 'default'} under the rules of torch {left.torch}"
        facts.append(("not applicable", printable(f"{what}: {left.reason}", 300)))
    if run.command:
        facts.append(("command", printable(shlex.join(run.command), 300)))
    return tuple(facts)


def _moment(text: str) -> str:
    """An ISO 8601 time as people write it, in UTC; anything else as it stands."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            return _name(text)
        return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):
        return _name(text)


def _distinct(values: list[str]) -> str:
    return printable(", ".join(dict.fromkeys(map(_name, values))), 300) or "-"


def _warnings(results: Results) -> tuple[str, ...]:
    run, cases = results.run, results.cases
    out = []
    missing = run.planned - len(cases)
    if missing > 0:
        out.append(f"{missing} of {run.planned} planned cases have no result: the run was not finished.")
    elif not run.complete:
        out.append("The run was not finished.")
    rough = [c for c in cases if c.measured and not c.exact]
    if rough:
        out.append(f"{len(rough)} of {len(cases)} cases are marked {ESTIMATED}: their figures are not exact.")
    refuted = [c for c in cases if c.refuted]
    if refuted:
        where = f"{len(refuted)} of {len(cases)} cases"
        out.append(f"In {where} the allocator model differs from what was recorded: their figures are not the card's.")
    lossy = [c for c in cases if c.lost]
    if lossy:
        out.append(f"The recordings of {len(lossy)} cases are not complete; what is lost is listed with each.")
    return tuple(out)


def _headlines(results: Results, groups: tuple[Group, ...]) -> tuple[str, ...]:
    cases = results.cases
    if not cases:
        return ("Nothing was measured.",)
    out = []
    unexpected = [c for c in cases if not c.as_expected]
    if unexpected:
        kinds = Counter(c.outcome for c in unexpected)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        out.append(f"{len(unexpected)} of {len(cases)} outcomes are not the declared ones: {listed}.")
    else:
        out.append(
            "The outcome is the declared one."
            if len(cases) == 1
            else f"All {len(cases)} outcomes are the declared ones."
        )
    for group in groups:
        if any(row.case.peak.raw for row in group.rows):
            out += _of_all_memory(group)
            continue
        compared = [row for row in group.rows if row.difference is not None and row.case.outcome == "ok"]
        if not compared or compared[0].original is None:
            continue
        best = min(compared, key=lambda row: row.case.transient)
        original = compared[0].original
        which = f"{best.variant} has the smallest transient" if len(compared) > 1 else f"{best.variant} has a transient"
        change = best.difference_text.lstrip(ESTIMATED).lstrip("+-")
        against = "the same as" if not best.difference else f"{change} {'less' if best.difference < 0 else 'more'} than"
        reference = f"{ESTIMATED if not original.exact else ''}{format_bytes(original.transient)}"
        amount = f"{best.mark}{format_bytes(best.case.transient)}"
        out.append(f"{group.title}: {which}, {amount}, {against} the original's {reference}.")
    return tuple(out)


def _of_all_memory(group: Group) -> list[str]:
    """Who needs least where variants take memory past the allocator, which transients do not tell."""
    rows = sorted((row for row in group.rows if row.case.outcome == "ok"), key=lambda row: row.case.peak.hbm)
    if len(rows) < 2:
        return []
    least, most = rows[0], max(rows, key=lambda row: row.case.peak.hbm)
    best = [row.variant for row in rows if row.case.peak.hbm == least.case.peak.hbm]
    which = f"{' and '.join(best)} {'have' if len(best) > 1 else 'has'}"
    amount = f"{least.mark}{format_bytes(least.case.peak.hbm)}"
    more = most.case.peak.hbm - least.case.peak.hbm
    rest = f"; {most.variant} has {most.mark or least.mark}{format_bytes(more)} more" if more else ""
    return [f"{group.title}: {which} the smallest peak HBM, {amount}{rest}."]


def _signed(count: int) -> str:
    return f"{'+' if count > 0 else ''}{format_bytes(count)}"


def _name(text: str) -> str:
    return printable(text, _NAME_LIMIT)
