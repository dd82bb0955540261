"""Results on disk while a run is going: one line a case, so that an interruption loses only what was not finished."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import msgspec

from fragscope.errors import UsageError, printable
from fragscope.results import Case
from fragscope.suite.sources import file_hash
from fragscope.trace.containers import write_atomically

_JOURNAL = "cases.jsonl"


class Journal:
    """``cases.jsonl`` in the run's folder.

    Args:
        folder: the run's folder; created if missing.
        kept: cases of an earlier run to begin with.
    """

    def __init__(self, folder: Path, kept: Iterable[Case] = ()) -> None:
        file = folder / _JOURNAL
        # Written anew instead of appended to: the last line of a run that was killed may be cut off in the middle.
        write_atomically(file, b"".join(_line(c) for c in kept))
        self._handle = file.open("ab")

    def add(self, case: Case) -> None:
        """Append a finished case and make sure it is on disk."""
        self._handle.write(_line(case))
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """No more cases."""
        self._handle.close()


def _line(case: Case) -> bytes:
    return msgspec.json.encode(case) + b"\n"


def finished_cases(folder: Path) -> dict[str, Case]:
    """Cases of an earlier run that are still valid, by digest.

    A case is valid if every source file it ran is unchanged and its trace is where it should be. One that crashed or
    took too long, in its numeric step too, may well go differently the next time and is not kept. A last line cut off
    by a crash is ignored, as is a line of another version.
    """
    try:
        lines = (folder / _JOURNAL).read_bytes().splitlines()
    except OSError:
        return {}
    hash_now = cache(file_hash)
    out: dict[str, Case] = {}
    for line in lines:
        try:
            case = msgspec.json.decode(line, type=Case)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        out.pop(case.digest, None)
        if case.outcome in ("crash", "timeout") or (case.numeric or {}).get("message"):
            continue
        unchanged = bool(case.sources) and all(hash_now(p) == h for p, h in case.sources.items())
        if unchanged and (case.trace is None or (folder / case.trace).is_file()):
            out[case.digest] = case
    return out


def _leave_out_of_commits(folder: Path) -> None:
    """What runs write to the default folder is no file of a repository's; one that users name may be."""
    ours = next((f for f in (folder, *folder.parents) if f.name == ".fragscope"), None)
    if ours is not None:
        with contextlib.suppress(FileExistsError), (ours / ".gitignore").open("x") as f:
            f.write("*\n")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a run's folder and hold it for this process; the lock ends with the process, however that ends.

    Raises:
        UsageError: it cannot be made or written, or another run holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _leave_out_of_commits(folder)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise UsageError(f"--out {printable(str(folder))}: {(e.strerror or type(e).__name__).lower()}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = printable(os.read(handle, 20).decode(errors="replace").strip()) or "unknown"
            raise UsageError(
                f"--out {printable(str(folder))}: another run is writing there (process {holder}); "
                "wait for it, or choose another folder"
            ) from None
        except OSError:
            pass  # a file system without locks: two runs at once cannot be told there
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)
