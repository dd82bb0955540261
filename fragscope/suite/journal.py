"""Results on disk while a run is going: one line a case, so that an interruption loses only what was not finished."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from fragscope.results import Case


class Journal:
    """``cases.jsonl`` in the run's folder.

    Args:
        folder: the run's folder; created if missing.
        keep: go on with what is there, instead of starting over.
    """

    def __init__(self, folder: Path, *, keep: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "cases.jsonl"
        self._handle = self._file.open("ab" if keep else "wb")

    def add(self, case: Case) -> None:
        """Append a finished case and make sure it is on disk."""
        self._handle.write(msgspec.json.encode(case) + b"\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """No more cases."""
        self._handle.close()


def finished_cases(folder: Path) -> dict[str, Case]:
    """Cases of an earlier run that are still valid, by digest.

    A case is valid if every source file it ran is unchanged and its trace is where it should be. A last line cut off by a
    crash is ignored, as is a line of another version.
    """
    file = folder / "cases.jsonl"
    if not file.is_file():
        return {}
    hashes: dict[str, str | None] = {}
    out: dict[str, Case] = {}
    for line in file.read_bytes().splitlines():
        try:
            case = msgspec.json.decode(line, type=Case)
        except msgspec.MsgspecError:
            continue
        out.pop(case.digest, None)
        if case.outcome in ("crash", "timeout"):
            continue  # may well go differently the next time
        if all(_hash(p, hashes) == h for p, h in case.sources.items()) and _trace_is_there(folder, case):
            out[case.digest] = case
    return out


def _hash(path: str, known: dict[str, str | None]) -> str | None:
    if path not in known:
        try:
            known[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError:
            known[path] = None
    return known[path]


def _trace_is_there(folder: Path, case: Case) -> bool:
    return case.trace is None or (folder / case.trace).is_file()
