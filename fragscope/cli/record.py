"""``fragscope record -- COMMAND``: any command, unmodified, with a recording of each process that uses CUDA."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fragscope.errors import UsageError, printable

if TYPE_CHECKING:
    from fragscope.record.launch import Launched, RecordedProcess

SCHEMA_VERSION = 1


@click.command("record", context_settings={"allow_interspersed_args": False})
@click.argument("program", nargs=-1, required=True, metavar="COMMAND...", type=click.UNPROCESSED)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path(".fragscope/record"),
              show_default=True, help="Folder for the recordings, one file a process.")  # fmt: skip
@click.option("--stacks", type=click.Choice(["none", "python", "all"]), default="none", show_default=True,
              help="Call stacks to record; all: Python's and C++'s.")  # fmt: skip
@click.option("--strip-stacks", is_flag=True, help="Leave call stacks out of the files.")
@click.option("--non-torch", "non_torch", type=click.FloatRange(min=0.01), metavar="SECONDS",
              help="Sample device memory outside PyTorch's allocator this often.")  # fmt: skip
@click.option("--max-entries", type=click.IntRange(min=1), help="Entries of PyTorch's history, where that is needed.")
@click.option("--overwrite", is_flag=True, help="Replace the recordings that are in the folder.")
@click.option("--summary", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Also write what was recorded as JSON.")  # fmt: skip
def command(
    program: tuple[str, ...],
    out: Path,
    stacks: str,
    strip_stacks: bool,
    non_torch: float | None,
    max_entries: int | None,
    overwrite: bool,
    summary: Path | None,
) -> int:
    """Run COMMAND and record the GPU memory of every process of it that uses CUDA through torch.

    COMMAND may be a script, 'python -m …', a console script, torchrun, or anything that starts such processes. Its
    streams, signals and exit code are its own (127: no such command, 126: not executable, 128 + n: ended by signal n);
    what fragscope has to say comes on stderr when it is over.
    """
    from fragscope.record.launch import LaunchOptions, launch

    if summary is not None and not summary.absolute().parent.is_dir():
        raise UsageError(f"--summary {summary}: the folder is not there")
    options = LaunchOptions(
        out=out,
        stacks=stacks,
        strip_stacks=strip_stacks,
        non_torch=non_torch,
        max_entries=max_entries,
        overwrite=overwrite,
    )
    return told(launch(program, options), out, summary)


def told(launched: Launched, out: Path, summary: Path | None) -> int:
    """Say what was recorded, and return the command's exit code whatever becomes of that."""
    notes = list(launched.notes)
    rows = [_figures(process, notes) for process in launched.processes]
    if summary is not None:
        value = {
            "schema_version": SCHEMA_VERSION,
            "exit_code": launched.exit_code,
            "folder": str(out),
            "processes": rows,
            "notes": notes,
        }
        try:
            summary.write_text(json.dumps(value, indent=2) + "\n")
        except OSError as e:
            notes.append(f"--summary {summary}: {(e.strerror or str(e)).lower()}")
    with contextlib.suppress(OSError):  # stderr may be gone with its terminal
        for line in [*_table(rows), *(f"fragscope: {printable(note, 2000)}" for note in notes)]:
            print(line, file=sys.stderr)
        sys.stderr.flush()
    return launched.exit_code


def _figures(process: RecordedProcess, notes: list[str]) -> dict[str, Any]:
    """A recording in figures, in bytes; keys only ever get more."""
    from fragscope.measure import non_torch, peaks
    from fragscope.trace import load_trace

    out: dict[str, Any] = {
        "name": process.name, "pid": process.pid, "path": str(process.path), "complete": process.complete,
        "rank": None, "events": None, "peak": None, "lost": [],
    }  # fmt: skip
    try:
        trace = load_trace(process.path)
        peak, outside = peaks(trace), non_torch(trace)
    except Exception as e:  # whatever it is, the command's exit code is not ours to change
        if not process.path.is_dir():  # else it is said already that it could not be packed, and why
            notes.append(f"{process.name}: {e}")
        return out
    rank = trace.provenance.get("rank")
    out["rank"] = None if rank is None else int(rank)
    out["events"] = len(trace.requests)
    out["peak"] = {
        "requested": peak.requested,
        "reserved": peak.reserved,
        "non_torch": None if outside is None else outside.peak,
        "hbm": None if outside is None else outside.peak_hbm,
    }
    out["lost"] = [{"code": x.code, "detail": x.detail, "events": x.events} for x in trace.lost]
    return out


def _table(rows: list[dict[str, Any]]) -> list[str]:
    from fragscope.cli.tables import aligned
    from fragscope.units import mib

    if not rows:
        return []

    def size(count: int | None) -> str:
        return "-" if count is None else mib(count)

    # Sampled peaks are lower bounds; they have columns where something was sampled.
    sampled = [name for name in ("non_torch", "hbm") if any((row["peak"] or {}).get(name) is not None for row in rows)]
    bounds = [f"{name} at least" for name in sampled]
    titles = ("process", "pid", "rank", "events", "peak requested", "peak reserved", *bounds)
    cells = [(*titles, "lost", "complete", "file")]
    for row in rows:
        peak = row["peak"] or {}
        cells.append(
            (
                row["name"],
                str(row["pid"] or "-"),
                "-" if row["rank"] is None else str(row["rank"]),
                "-" if row["events"] is None else f"{row['events']:,}",
                *(size(peak.get(name)) for name in ("requested", "reserved", *sampled)),
                str(len(row["lost"])),
                "yes" if row["complete"] else "no",
                printable(row["path"]),
            )
        )
    losses = [
        f"fragscope: {row['name']}: {printable(x['detail'])}" + (f" ({x['events']:,})" if x["events"] else "")
        for row in rows
        for x in row["lost"]
    ]
    return ["fragscope: recorded, in MiB", *aligned(cells), *losses]
