"""Chunks: what a recorder writes while a program runs, in files that stay readable when the process is killed.

A chunk is a header and records of 64 bytes. The header counts the records that are complete; it is raised after each
record, so that whatever ended the process, all counted records are whole. Chunks are written by the allocator tracker
(``record/cuda/tracker.cpp``) or by ``ChunkWriter``; both write the same bytes. A record's ``clock`` is a reading of the
fastest clock there is (the processor's time stamp, for the tracker); each header pairs one with microseconds since the
epoch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fragscope.errors import InputFileError
from fragscope.trace.events import RequestKind

MAGIC = b"FSCHUNK\0"
VERSION = 1
RECORD = np.dtype(
    [
        ("kind", "u1"), ("device", "u1"), ("unused", "<u2"), ("thread", "<u4"), ("addr", "<i8"), ("size", "<i8"),
        ("stream", "<i8"), ("pool_first", "<i8"), ("pool_second", "<i8"), ("clock", "<i8"), ("text", "<i8"),
    ]
)  # fmt: skip
HEADER = np.dtype(
    [
        ("magic", "S8"), ("version", "<u4"), ("record_bytes", "<u4"), ("capacity", "<u8"), ("first", "<u8"),
        ("count", "<u8"), ("clock", "<i8"), ("time_us", "<i8"), ("unused", "S8"),
    ]
)  # fmt: skip
assert RECORD.itemsize == HEADER.itemsize == 64

Records = npt.NDArray[Any]
"""Records of a recording, of dtype ``RECORD`` and shape ``(n,)``."""


class EventKind(IntEnum):
    """What a record is. The value is stored; never renumber."""

    ALLOC = 1
    FREE_REQUESTED = 2
    FREE_COMPLETED = 3
    SEGMENT_ALLOC = 4
    SEGMENT_FREE = 5
    SEGMENT_MAP = 6
    SEGMENT_UNMAP = 7
    OOM = 8
    """``addr`` is the driver's free bytes, ``size`` the rounded request."""
    SNAPSHOT = 9
    """A snapshot was taken; only of use to count along with PyTorch's own history."""


KINDS = {
    "alloc": EventKind.ALLOC,
    "free_requested": EventKind.FREE_REQUESTED,
    "free_completed": EventKind.FREE_COMPLETED,
    "segment_alloc": EventKind.SEGMENT_ALLOC,
    "segment_free": EventKind.SEGMENT_FREE,
    "segment_map": EventKind.SEGMENT_MAP,
    "segment_unmap": EventKind.SEGMENT_UNMAP,
    "oom": EventKind.OOM,
    "snapshot": EventKind.SNAPSHOT,
}
"""By the names that PyTorch's snapshots have for them."""
NO_POOL = -1
"""``pool_first`` of events whose release does not name their pool."""
ANY_DEVICE = 255
"""``device`` of notes that concern whichever device is looked at."""
NOTE = 64
"""From here on, records are the recorder's own: ``NOTE`` plus a ``RequestKind``."""
RELEASED = 128
"""The ``EMPTY_CACHE`` noted last has returned."""
GAP = 129
"""Events were lost here; ``size`` of them, or -1 where nobody knows how many."""


def note(kind: RequestKind) -> int:
    """The kind of the record by which a recorder notes a request."""
    return NOTE + int(kind)


class ChunkWriter:
    """Writes chunks from Python: for recorders that have their events from somewhere else than the tracker.

    Args:
        folder: where chunks go; it exists.
        capacity: records a chunk.

    Raises:
        OSError: the file cannot be written; what was written before stays readable.
    """

    def __init__(self, folder: Path, capacity: int = 1 << 16) -> None:
        self._folder = folder
        self._capacity = capacity
        self._chunk = 0
        self._file = -1
        self._in_chunk = 0
        self.written = 0

    def write(self, records: Records) -> None:
        """Add records and make them count."""
        at = 0
        while at < len(records):
            if self._file < 0 or self._in_chunk == self._capacity:
                self._open_next()
            part = records[at : at + self._capacity - self._in_chunk]
            _write_all(self._file, part.tobytes(), HEADER.itemsize + self._in_chunk * RECORD.itemsize)
            self._in_chunk += len(part)
            self.written += len(part)
            _write_all(self._file, self._in_chunk.to_bytes(8, "little"), HEADER.fields["count"][1])  # type: ignore[index]
            at += len(part)

    def close(self) -> None:
        """Nothing more will be written."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open_next(self) -> None:
        self.close()
        self._chunk += 1
        path = self._folder / f"events-{self._chunk:06d}.bin"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._in_chunk = 0
        header = np.zeros(1, dtype=HEADER)
        now = time.time_ns() // 1000
        header[0] = (MAGIC, VERSION, RECORD.itemsize, self._capacity, self.written, 0, now, now, b"")
        _write_all(self._file, header.tobytes(), 0)


def _write_all(file: int, data: bytes, offset: int) -> None:
    while data:
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done


def read_chunks(folder: Path) -> Iterator[Records]:
    """The records of each chunk of a folder, in order, mapped from the files.

    Where a chunk is missing, a ``GAP`` record stands for what it held.

    Raises:
        InputFileError: a file is no chunk, of another version, or shorter than it says.
    """
    expected = 0
    for path in sorted(folder.glob("events-*.bin")):
        records, first = _read_chunk(path)
        if first < expected:
            raise InputFileError(path, "repeats events of the chunk before it; chunks of two recordings are mixed")
        if first > expected:
            gap = np.zeros(1, dtype=RECORD)
            gap["kind"], gap["size"] = GAP, first - expected
            yield gap
        yield records
        expected = first + len(records)


def _read_chunk(path: Path) -> tuple[Records, int]:
    try:
        size = path.lstat().st_size
        if path.is_symlink() or not path.is_file():
            raise InputFileError(path, "is not a regular file")
        if size < HEADER.itemsize:
            raise InputFileError(path, "is too short for a chunk of events")
        header = np.fromfile(path, dtype=HEADER, count=1)[0]
    except OSError as e:
        raise InputFileError(path, (e.strerror or type(e).__name__).lower()) from None
    if bytes(header["magic"]).ljust(8, b"\0") != MAGIC:
        raise InputFileError(path, "is not a chunk of events")
    if header["version"] != VERSION or header["record_bytes"] != RECORD.itemsize:
        raise InputFileError(path, f"is a chunk of version {header['version']}; this fragscope reads {VERSION}")
    count, first = int(header["count"]), int(header["first"])
    if count > (size - HEADER.itemsize) // RECORD.itemsize:
        raise InputFileError(path, f"says that it holds {count} events, and is too short for that")
    if first > 2**48:
        raise InputFileError(path, f"says that {first} events came before it, which cannot be")
    if count == 0:
        return np.empty(0, dtype=RECORD), first
    return np.memmap(path, dtype=RECORD, mode="r", offset=HEADER.itemsize, shape=(count,)), first
