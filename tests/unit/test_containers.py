"""Opening compressed files: what is read, what is refused, and that a failed write leaves the old file."""

from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path

import pytest

from fragscope.errors import InputFileError
from fragscope.trace import containers
from fragscope.trace.containers import first_bytes, read_unpacked, write_atomically

DATA = bytes(range(256)) * 40


def file(tmp_path: Path, data: bytes, name: str = "f") -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def refusal(path: Path) -> str:
    with pytest.raises(InputFileError) as caught:
        read_unpacked(path)
    assert str(path) in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("packed", [DATA, gzip.compress(DATA), lzma.compress(DATA)], ids=["plain", "gz", "xz"])
@pytest.mark.parametrize("name", ["f.pickle", "f.pickle.xz", "f.gz", "f"])
def test_the_content_decides_not_the_name(packed: bytes, name: str, tmp_path: Path) -> None:
    assert read_unpacked(file(tmp_path, packed, name)) == DATA


def test_a_folder_a_missing_an_empty_and_a_special_file_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "is a folder, not a file"
    assert refusal(tmp_path / "none") == "no such file or directory"
    assert refusal(file(tmp_path, b"")) == "is empty"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "is not a regular file"
    assert refusal(Path("/dev/zero")) == "is not a regular file"


def test_zstd_is_refused_with_advice(tmp_path: Path) -> None:
    assert "zstd -d" in refusal(file(tmp_path, b"\x28\xb5\x2f\xfd" + b"\0" * 40))


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_every_truncation_of_a_compressed_file_is_refused(pack: object, tmp_path: Path) -> None:
    packed = pack(b"a small file") if callable(pack) else b""
    whole = len(packed)
    for length in range(6, whole):
        refusal(file(tmp_path, packed[:length]))


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_damage_and_data_after_the_end_are_refused(pack: object, tmp_path: Path) -> None:
    packed = bytearray(pack(DATA)) if callable(pack) else bytearray()
    assert "after its end" in refusal(file(tmp_path, bytes(packed) + b"more"))
    packed[len(packed) // 2] ^= 0xFF
    refusal(file(tmp_path, bytes(packed)))


@pytest.mark.parametrize(
    "packed", [gzip.compress(bytes(120 * 2**20)), lzma.compress(bytes(70 * 2**20), preset=0)], ids=["gz", "xz"]
)
def test_a_bomb_is_refused_before_it_is_unpacked(packed: bytes, tmp_path: Path) -> None:
    assert len(packed) < 130_000
    assert "expands from" in refusal(file(tmp_path, packed))


def test_an_xz_header_that_claims_much_memory_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    packed = bytearray(lzma.compress(b"x" * 100, filters=filters))
    # Block header: LZMA2's dictionary size code is one byte; 40 stands for 4 GiB. Its CRC32 follows in the header.
    import zlib

    start = 12
    length = (packed[start] + 1) * 4
    header = packed[start : start + length - 4]
    header[header.index(b"\x21\x01") + 2] = 40
    packed[start : start + length - 4] = header
    packed[start + length - 4 : start + length] = zlib.crc32(header).to_bytes(4, "little")
    assert "emory" in refusal(file(tmp_path, bytes(packed)))


def test_a_plain_file_above_the_bound_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_BYTES", 1000)
    assert "at most 1000 B" in refusal(file(tmp_path, b"x" * 1001))


def test_first_bytes_reads_no_more(tmp_path: Path) -> None:
    assert first_bytes(file(tmp_path, DATA), 4) == bytes([0, 1, 2, 3])


def test_a_write_creates_its_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b" / "f", b"new")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["f"]
    assert (tmp_path / "a" / "b" / "f").read_bytes() == b"new"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "no space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
