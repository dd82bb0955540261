"""What ``whole_programs.py`` found, as JSON, and its tables, made from that alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fragscope.allocator import ReplaySettings, recorded_under, replay, settle, tape_of
from fragscope.cli.tables import markdown_table
from fragscope.trace import RequestKind, Trace, load_trace

SOME = 12  # rows shown of what differs, for each program
TIES = "tie_by_modelled_address"
FIGURES = ("allocated", "reserved")
HEADING = (
    "program", "conf", "outcome", "allocated, said", "measured", "difference", "reserved, said", "measured",
    "difference", "requests", "said to be",
)  # fmt: skip


def assumed_in(virtual: Path) -> list[str]:
    """Codes of what a recording of the virtual device takes for granted, where that can change its figures."""
    trace = load_trace(virtual)
    settings = ReplaySettings.of(recorded_under(trace))
    decided = replay(settle(tape_of(trace), settings), settings, decisions=False)
    return sorted({a.code for a in decided.assumptions if a.effect != "none"})


def verified_in(card: Path) -> dict[str, int]:
    """How the model compares with the card's own allocator, as in ``fragscope replay --verify``."""
    trace = load_trace(card)
    found = replay(tape_of(trace), ReplaySettings.of(recorded_under(trace)), verify=True).verify
    assert found is not None  # it was asked for
    return {"compared": found.compared, "mismatches": found.mismatches}


def _allocations(trace: Trace) -> list[int]:
    requests = trace.requests
    sizes: list[int] = requests.size[requests.kind == RequestKind.ALLOC].tolist()
    return sizes


def _order(trace: Trace) -> list[tuple[str, int]]:
    """Allocations by their bytes, frees by the number of their allocation; what else a recording holds is left out."""
    requests = trace.requests
    out: list[tuple[str, int]] = []
    number: dict[int, int] = {}
    for kind, lifetime, size in zip(requests.kind.tolist(), requests.id.tolist(), requests.size.tolist(), strict=True):
        if kind == RequestKind.ALLOC:
            number[lifetime] = len(number)
            out.append(("alloc", size))
        elif kind == RequestKind.FREE:
            out.append(("free", number.get(lifetime, -1)))
    return out


def _peak_requested(trace: Trace) -> int:
    live = peak = 0
    sizes: dict[int, int] = {}
    requests = trace.requests
    for kind, lifetime, size in zip(requests.kind.tolist(), requests.id.tolist(), requests.size.tolist(), strict=True):
        if kind == RequestKind.ALLOC:
            sizes[lifetime] = size
            live += size
            peak = max(peak, live)
        elif kind == RequestKind.FREE:
            live -= sizes.pop(lifetime, 0)
    return peak


def requests_compared(virtual: Path, card: Path) -> dict[str, Any]:
    """How the two recordings ask for memory.

    Returns:
        ``requests``: ``equal``; ``frees in another order`` where all allocations are equal, in order; or what else.
        ``sizes``: those asked for another number of times, weightiest first: bytes, times said, times on the card.
        ``peak_requested``: most bytes that were asked for at a time, said and on the card.
    """
    said, done = load_trace(virtual), load_trace(card)
    ours, theirs = Counter(_allocations(said)), Counter(_allocations(done))
    sizes = [[size, ours[size], theirs[size]] for size in ours.keys() | theirs.keys() if ours[size] != theirs[size]]
    if _order(said) == _order(done):
        requests = "equal"
    elif sizes:
        requests = f"{len(sizes)} sizes differ"
    else:
        requests = "in another order" if _allocations(said) != _allocations(done) else "frees in another order"
    return {
        "requests": requests,
        "sizes": sorted(sizes, key=lambda r: (-r[0] * abs(r[1] - r[2]), r)),
        "peak_requested": [_peak_requested(said), _peak_requested(done)],
    }


@dataclass(frozen=True)
class Run:
    """One program under one conf.

    Attributes:
        said: what the virtual device's process returned; None where it failed.
        done: likewise the GPU's; None where there was none, too.
        compared: of :func:`requests_compared`; empty where either is None.
        error: of the process that failed.
    """

    program: str
    conf: str
    said: dict[str, Any] | None
    done: dict[str, Any] | None
    compared: dict[str, Any]
    error: str

    @property
    def is_measured(self) -> bool:
        return self.said is not None and self.done is not None

    @property
    def is_exact(self) -> bool:
        """Whether what was said was called exact beforehand."""
        return self.said is not None and not self.said["estimated"] and not self.said["assumed"]

    @property
    def is_equal(self) -> bool:
        """Whether both figures are equal to the byte."""
        return self.is_measured and all(self.said[key] == self.done[key] for key in FIGURES)  # type: ignore[index]


def runs_of(results: dict[str, Any]) -> list[Run]:
    """All of a results file, in order."""
    out = []
    for program, jobs in results["programs"].items():
        for conf in (kind.removeprefix("virtual-") for kind in jobs if kind.startswith("virtual-")):
            virtual, card = jobs[f"virtual-{conf}"], jobs.get(f"card-{conf}", {"result": None, "error": ""})
            error = f"virtual: {virtual['error'][:120]}" if virtual["error"] else ""
            error = error or (f"GPU: {card['error'][:120]}" if card["error"] else "")
            compared = jobs.get(f"compared-{conf}", {})
            out.append(Run(program, conf, virtual["result"], card["result"], compared, error))
    return out


def _said(said: dict[str, Any]) -> str:
    reasons = ["ties" if code == TIES else code for code in said["assumed"]]
    unknown = len(said["estimated"])
    reasons += [f"{unknown} unknown operator{'s' if unknown > 1 else ''}"] if unknown else []
    return f"estimated: {', '.join(reasons)}" if reasons else "exact"


def row(run: Run) -> tuple[str, ...]:
    """One line of the table."""
    outcome = run.error or "ok"
    if run.said is None:
        return (run.program, run.conf, outcome, *["-"] * (len(HEADING) - 3))
    cells = []
    for key in FIGURES:
        said = run.said[key]
        measured = None if run.done is None else run.done[key]
        cells += [f"{said / 2**20:,.2f}", "-", "-"] if measured is None else _figures(said, measured)
    return (run.program, run.conf, outcome, *cells, run.compared.get("requests", "-"), _said(run.said))


def _figures(said: int, measured: int) -> list[str]:
    off = said - measured
    difference = f"{off:+,} B ({off / measured:+.2%})" if off and measured else f"{off:,} B"
    return [f"{said / 2**20:,.2f}", f"{measured / 2**20:,.2f}", difference]


def _unknown(results: dict[str, Any], runs: list[Run]) -> Iterator[tuple[str, ...]]:
    calls: Counter[str] = Counter()
    where: dict[str, str] = {}
    used: dict[str, list[str]] = {}
    temporary: dict[str, int] = {}
    for run in runs:
        for op, (times, place) in run.said["estimated"].items() if run.said is not None else ():
            calls[op] += times
            where.setdefault(op, place)
            used.setdefault(op, []).append(run.program)
        profiled = results["programs"][run.program].get("footprints", {"result": None})["result"] or {}
        for op, size in profiled.items():
            temporary[op] = max(size, temporary.get(op, 0))
    for op, times in calls.most_common():
        yield op, f"{times:,}", ", ".join(used[op]), where[op], f"{temporary[op]:,}" if op in temporary else "-"


def report(results: dict[str, Any]) -> str:
    """Markdown: every row, what they come to, unknown operators, and sizes asked for another number of times."""
    runs = runs_of(results)
    first = [run for run in runs if run.conf == "default"]  # the others ask for the same, or nearly
    lines = markdown_table([HEADING, *map(row, runs)], words=0)
    lines += ["", "MiB; difference is said minus measured, of the whole program.", ""]
    lines += _summary([run for run in runs if run.is_measured])
    unknown = ("unknown operator", "calls", "programs", "first place", "temporary bytes, at most")
    lines += markdown_table([unknown, *_unknown(results, first)], words=0)
    rows = [
        (run.program, f"{size:,}", f"{said:,}", f"{made:,}")
        for run in first
        for size, said, made in run.compared.get("sizes", [])[:SOME]
    ]
    if rows:
        lines += ["", f"Sizes asked for another number of times, the weightiest {SOME} of each program first:", ""]
        lines += markdown_table([("program", "bytes", "times said", "on the card"), *rows], words=0)
    return "\n".join(lines) + "\n"


def _summary(runs: list[Run]) -> list[str]:
    if not runs:
        return []
    exact = [run for run in runs if run.is_exact]
    verified = [run.done["verified"] for run in runs if run.done is not None]
    wrong, compared = (sum(v[key] for v in verified) for key in ("mismatches", "compared"))
    same = sum(said == done for said, done in (run.compared["peak_requested"] for run in runs))
    return [
        f"- Both figures equal to the byte: {sum(run.is_equal for run in runs)} of {len(runs)}",
        f"- Of those said to be exact: {sum(run.is_equal for run in exact)} of {len(exact)}",
        f"- Peak of requested bytes equal: {same} of {len(runs)}",
        f"- Every request equal, in order: {sum(run.compared['requests'] == 'equal' for run in runs)} of {len(runs)}",
        f"- The model beside the card's own decisions: {wrong:,} of {compared:,} differ",
        "",
    ]
