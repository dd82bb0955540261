"""Opening files that may be compressed and may be hostile: bounded output, clear refusals.

The format is told by the first bytes, never by the name. A compressed file may expand to at most 64 MiB plus
400 times its own size (real snapshots stay below 100 times), and nothing may exceed ``MAX_BYTES``.
"""

from __future__ import annotations

import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from fragscope.errors import InputFileError
from fragscope.units import GIB, MIB, format_bytes

MAX_BYTES = 8 * GIB
"""Largest snapshot read, unpacked. A larger one does not fit the machines that read it."""
_EXPANSION_FREE = 64 * MIB
_EXPANSION_FACTOR = 400
_CHUNK = 4 * MIB
_XZ_MEMORY = 256 * MIB  # the largest preset, -9, decodes in 65 MiB; a header may claim 4 GiB

_XZ_MAGIC = b"\xfd7zXZ\x00"
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZIP_MAGIC = b"PK\x03\x04"


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def feed(self, data: bytes, limit: int) -> bytes: ...
    def pending(self) -> bool: ...


class _Xz:
    def __init__(self) -> None:
        self._d = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    @property
    def eof(self) -> bool:
        return self._d.eof

    @property
    def unused_data(self) -> bytes:
        return self._d.unused_data

    def feed(self, data: bytes, limit: int) -> bytes:
        return self._d.decompress(data, max_length=limit)

    def pending(self) -> bool:
        return not self._d.needs_input


class _Gzip:
    def __init__(self) -> None:
        self._d = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._d.eof

    @property
    def unused_data(self) -> bytes:
        return self._d.unused_data

    def feed(self, data: bytes, limit: int) -> bytes:
        return self._d.decompress(self._d.unconsumed_tail + data, limit)

    def pending(self) -> bool:
        return bool(self._d.unconsumed_tail)


def first_bytes(path: Path, count: int = 8) -> bytes:
    """The file's first bytes; an unreadable, special or empty file is an ``InputFileError``."""
    with _opened(path) as f:
        head = f.read(count)
    if not head:
        raise InputFileError(path, "is empty")
    return head


def read_at_most(path: Path, limit: int, refusal: str) -> bytes:
    """A regular file's bytes.

    Args:
        path: the file.
        limit: bytes it may hold.
        refusal: what to say of one that holds more.

    Raises:
        InputFileError: it cannot be read, is a folder, a pipe or a device, or holds more.
    """
    with _opened(path) as f:
        data = f.read(limit + 1)
    if len(data) > limit:
        raise InputFileError(path, refusal)
    return data


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file; a pipe or a device has no size that could bound the reading, and opening one may wait forever."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputFileError(path, "is a folder, not a file")
        if not stat.S_ISREG(mode):
            raise InputFileError(path, "is not a regular file")
        with path.open("rb") as f:
            yield f
    except OSError as e:
        raise InputFileError(path, (e.strerror or type(e).__name__).lower()) from None


def read_unpacked(path: Path) -> bytes:
    """The file's bytes, decompressed if it is ``.xz`` or ``.gz`` inside.

    Raises:
        InputFileError: unreadable, empty, truncated, damaged, of an unsupported compression, or expanding beyond
            what a snapshot does.
    """
    head = first_bytes(path)
    if head.startswith(_ZSTD_MAGIC):
        raise InputFileError(path, "is zstd-compressed, which is not read; unpack it first (zstd -d)")
    size = path.stat().st_size
    if head.startswith(_XZ_MAGIC):
        return _decompress(path, size, _Xz)
    if head.startswith(_GZIP_MAGIC):
        return _decompress(path, size, _Gzip)
    if size > MAX_BYTES:
        raise InputFileError(path, f"holds {format_bytes(size)}; at most {format_bytes(MAX_BYTES)} are read")
    with _opened(path) as f:
        return f.read()


def _decompress(path: Path, size: int, new: type[_Xz] | type[_Gzip]) -> bytes:
    bound = min(MAX_BYTES, _EXPANSION_FREE + _EXPANSION_FACTOR * size)
    parts: list[bytes] = []
    total = 0
    decoder: _Decompressor = new()
    with _opened(path) as f:
        try:
            while True:
                data = b"" if decoder.pending() else f.read(_CHUNK)
                if not data and not decoder.pending():
                    raise InputFileError(path, "is truncated: its compressed data ends early")
                part = decoder.feed(data, _CHUNK)
                parts.append(part)
                total += len(part)
                if total > bound:
                    raise InputFileError(
                        path, f"expands from {format_bytes(size)} to more than {format_bytes(bound)}; refused"
                    )
                if decoder.eof:
                    break
        except (lzma.LZMAError, zlib.error) as e:
            raise InputFileError(path, f"has damaged compressed data ({e})") from None
        if decoder.unused_data.strip(b"\0") or f.read(1).strip(b"\0"):
            raise InputFileError(path, "has data after its end")
    return b"".join(parts)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: a temporary neighbour, synced, then renamed over the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
