"""What ``whole_programs.py`` found, as JSON, and its tables, made from that alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fragscope.allocator import ReplaySettings, recorded_under, replay, settle, tape_of
from fragscope.cli.tables import markdown_table
from fragscope.trace import RequestKind, Trace, load_trace

SOME = 12  # rows shown of what differs, for each program
TIES = "tie_by_modelled_address"
HEADING = (
    "program", "conf", "outcome", "allocated, said", "measured", "difference", "reserved, said", "measured",
    "difference", "requests", "said to be",
)  # fmt: skip


def assumed_in(virtual: Path) -> list[str]:
    """Codes of what a recording of the virtual device takes for granted, where that can change its figures."""
    trace = load_trace(virtual)
    settings = ReplaySettings.of(recorded_under(trace, None, None))
    decided = replay(settle(tape_of(trace), settings), settings, decisions=False)
    return sorted({a.code for a in decided.assumptions if a.effect != "none"})


def verified_in(card: Path) -> dict[str, int]:
    """How the model compares with the card's own allocator, as in ``fragscope replay --verify``."""
    trace = load_trace(card)
    found = replay(tape_of(trace), ReplaySettings.of(recorded_under(trace, None, None)), verify=True).verify
    return {"compared": found.compared, "mismatches": found.mismatches} if found is not None else {}


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


def requests_compared(virtual: Path, card: Path) -> dict[str, Any]:
    """How the two recordings ask for memory.

    Returns:
        ``requests``: ``equal``; ``frees in another order`` where all allocations are equal, in order; or what else.
        ``sizes``: those asked for another number of times, weightiest first: bytes, times said, times on the card.
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
    return {"requests": requests, "sizes": sorted(sizes, key=lambda r: (-r[0] * abs(r[1] - r[2]), r))}


def is_exact(run: dict[str, Any]) -> bool:
    """Whether what was said was called exact beforehand."""
    return not run["virtual"]["estimated"] and not run["virtual"]["assumed"]


def is_measured(run: dict[str, Any]) -> bool:
    return not run["virtual"]["error"] and not run.get("card", {"error": "none"})["error"]


def is_equal(run: dict[str, Any]) -> bool:
    """Whether both figures are equal to the byte."""
    return all(run["virtual"][key] == run["card"][key] for key in ("allocated", "reserved"))


def _said(run: dict[str, Any]) -> str:
    reasons = ["ties"] if TIES in run["virtual"]["assumed"] else []
    reasons += [code for code in run["virtual"]["assumed"] if code != TIES]
    unknown = len(run["virtual"]["estimated"])
    reasons += [f"{unknown} unknown operator{'s' if unknown > 1 else ''}"] if unknown else []
    return f"estimated: {', '.join(reasons)}" if reasons else "exact"


def row(program: str, conf: str, run: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    said, done = run["virtual"], run.get("card")
    if said["error"]:
        return (program, conf, f"virtual: {said['error'][:120]}", *["-"] * 8)
    cells = []
    for key in ("allocated", "reserved"):
        mib = f"{said[key] / 2**20:,.2f}"
        if not is_measured(run):
            cells += [mib, "-", "-"]
            continue
        measured = done[key]
        off = said[key] - measured
        cells += [mib, f"{measured / 2**20:,.2f}", f"{off:+,} B ({off / measured:+.2%})" if off else "0 B"]
    outcome = "ok" if done is None or not done["error"] else f"GPU: {done['error'][:120]}"
    return (program, conf, outcome, *cells, run.get("requests", "-"), _said(run))


def _runs(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for program, found in results["programs"].items():
        for conf, run in found["runs"].items():
            yield program, conf, run


def _unknown(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    calls: Counter[str] = Counter()
    where: dict[str, str] = {}
    used: dict[str, list[str]] = {}
    temporary: dict[str, int] = {}
    for program, conf, run in _runs(results):
        if conf != "default" or run["virtual"]["error"]:
            continue
        for op, (times, place) in run["virtual"]["estimated"].items():
            calls[op] += times
            where.setdefault(op, place)
            used.setdefault(op, []).append(program)
        for op, size in results["programs"][program].get("temporary", {}).items():
            temporary[op] = max(size, temporary.get(op, 0))
    for op, times in calls.most_common():
        yield op, f"{times:,}", ", ".join(used[op]), where[op], f"{temporary[op]:,}" if op in temporary else "-"


def report(results: dict[str, Any]) -> str:
    """Markdown: every row, unknown operators, and sizes asked for another number of times."""
    lines = markdown_table([HEADING, *(row(*found) for found in _runs(results))], words=0)
    lines += ["", "MiB; difference is said minus measured, of the whole program.", *_summary(results), ""]
    unknown = ("unknown operator", "calls", "programs", "first place", "temporary bytes, at most")
    lines += markdown_table([unknown, *_unknown(results)], words=0)
    sizes = [(p, run["sizes"]) for p, conf, run in _runs(results) if conf == "default" and run.get("sizes")]
    if sizes:
        lines += ["", f"Sizes asked for another number of times, the weightiest {SOME} of each program first:", ""]
        rows = [
            (program, f"{size:,}", f"{said:,}", f"{made:,}")
            for program, differing in sizes
            for size, said, made in differing[:SOME]
        ]
        lines += markdown_table([("program", "bytes", "times said", "on the card"), *rows], words=0)
    return "\n".join(lines) + "\n"


def _summary(results: dict[str, Any]) -> list[str]:
    runs = [run for _, _, run in _runs(results) if is_measured(run)]
    if not runs:
        return []
    exact = [run for run in runs if is_exact(run)]
    verified = [run["card"]["verified"] for run in runs if run["card"]["verified"]]
    return [
        f"Both figures equal to the byte: {sum(map(is_equal, runs))} of {len(runs)}; of those said to be exact, "
        f"{sum(map(is_equal, exact))} of {len(exact)}.",
        f"Every request equal, in order: {sum(run['requests'] == 'equal' for run in runs)}.",
        f"The model beside the card's own decisions: {sum(v['mismatches'] for v in verified)} of "
        f"{sum(v['compared'] for v in verified):,} differ.",
    ]
