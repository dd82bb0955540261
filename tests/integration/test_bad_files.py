"""Bad files through the command line: exit code 5, one line naming file and reason, nothing called, bounded memory."""

from __future__ import annotations

import copy
import gzip
import lzma
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshots import MIB, hostile_pickle, small_snapshot, write

from fragscope.allocator import CARDS, ReplaySettings, replay, rules_for
from fragscope.cli import run
from fragscope.errors import InputFileError, UsageError
from fragscope.trace import load_trace, write_trace

GOOD = pickle.dumps(small_snapshot())
CARD = CARDS["h100-80gb"]
SETTINGS = ReplaySettings(rules_for("2.11"), CARD.name, CARD.total, CARD.free)


class Creates:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.path}'",))


def evil(target: Path) -> bytes:
    return pickle.dumps({"segments": [], "device_traces": [[Creates(target)]]})


def zip_with(name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as z:
            z.writestr(name, data)

    return make


def bytes_of(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


BAD: dict[str, Callable[[Path], None]] = {
    "empty": bytes_of(b""),
    "text": bytes_of(b"this is not a snapshot\n"),
    "json": bytes_of(b'{"segments": []}'),
    "png": bytes_of(b"\x89PNG\r\n\x1a\n" + b"\0" * 60),
    "zeros": bytes_of(b"\0" * 1000),
    "half a snapshot": bytes_of(GOOD[: len(GOOD) // 2]),
    "half a snapshot, xz": bytes_of(lzma.compress(GOOD)[:-40]),
    "half a snapshot, gz": bytes_of(gzip.compress(GOOD)[:-20]),
    "half a snapshot inside a whole xz": bytes_of(lzma.compress(GOOD[: len(GOOD) // 2])),
    "zstd": bytes_of(b"\x28\xb5\x2f\xfd" + b"\0" * 60),
    "another pickle": bytes_of(pickle.dumps({"weights": [1.0, 2.0]})),
    "a list": bytes_of(pickle.dumps([1, 2, 3])),
    "old pickle": bytes_of(pickle.dumps(small_snapshot(), protocol=0)),
    "no events": bytes_of(pickle.dumps({"segments": [], "device_traces": [[]]})),
    "xz bomb": bytes_of(lzma.compress(bytes(70 * MIB), preset=0)),
    "gz bomb": bytes_of(gzip.compress(bytes(120 * MIB))),
    "memo bomb": bytes_of(hostile_pickle(b"Nr\xff\xff\xff\x7f")),
    "container bomb": bytes_of(hostile_pickle(b"](" + b"}" * 2_000_000 + b"e")),
    "container bomb, xz": bytes_of(lzma.compress(hostile_pickle(b"](" + b"}" * 2_000_000 + b"e"))),
    "deep lists": bytes_of(hostile_pickle(b"]" * 100_000 + b"a" * 99_999)),
    "deep tuples": bytes_of(hostile_pickle(b"N" + b"\x85" * 100_000)),
    "deep dict": bytes_of(hostile_pickle(b"}X\1\0\0\0a" * 50_000 + b"N" + b"s" * 50_000)),
    "huge integer": bytes_of(hostile_pickle(b"\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000)),
    "foreign zip": zip_with("archive/data.pkl", GOOD),
    "zip bomb": zip_with("manifest.json", bytes(100 * MIB), zipfile.ZIP_DEFLATED),
    "empty manifest": zip_with("manifest.json", b""),
    "absolute path": zip_with("/etc/shadow", b"x"),
}


def one_line(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert str(path) in err
    return err


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_ends_with_code_5_and_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.bin"
    BAD[name](path)
    assert run(["replay", str(path)]) == 5
    one_line(capsys, path)


def test_a_missing_file_and_a_folder_are_bad_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", str(tmp_path / "none")]) == 5
    assert "no such file" in one_line(capsys, tmp_path / "none")
    assert run(["replay", str(tmp_path)]) == 5
    assert "is a folder" in one_line(capsys, tmp_path)


def special(tmp_path: Path) -> dict[str, Path]:
    """Paths that open, or could be waited for, and hold no file of a bounded size."""
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "huge").open("wb") as f:
        f.truncate(10 * 2**30)  # a hole, which takes no room
    return {"fifo": tmp_path / "fifo", "folder": tmp_path, "zero": Path("/dev/zero"), "huge": tmp_path / "huge"}


@pytest.mark.parametrize("as_sidecar", [False, True])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fifo", "is not a regular file"),
        ("zero", "is not a regular file"),
        ("folder", "is a folder, not a file"),
        ("huge", "holds 10.00 GiB; at most"),
    ],
)
def test_what_is_no_file_of_a_bounded_size_is_not_read(
    name: str, why: str, as_sidecar: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = special(tmp_path)[name]
    good = write(tmp_path / "good.pickle", small_snapshot())
    assert run(["replay", str(good), "--sidecar", str(path)] if as_sidecar else ["replay", str(path)]) == 5
    if as_sidecar and name == "huge":
        why = "is too large for what a recording leaves out"
    assert why in one_line(capsys, path)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("replay", "--capacity"),
        ("tune", "--capacity"),
        ("fit", "--total"),
        ("replay", "--memory-fraction"),
        ("tune", "--memory-fraction"),
    ],
)
@pytest.mark.parametrize("value", ["-5", "-0.5", "1e30", "1e308", "nan", "inf", "99999999999 TiB", "9" * 5000, ""])
def test_sizes_and_fractions_that_no_device_has_are_a_usage_error(
    command: str, option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.pickle", small_snapshot())
    assert run([command, str(good), f"{option}={value}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert option in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress])
@pytest.mark.parametrize("arguments", [[], ["--format", "json"], ["--verify"], ["--conf", ""], ["--device-index", "0"]])
def test_nothing_in_a_file_is_ever_called(
    pack: Any, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "created"
    path = tmp_path / "evil.pickle"
    path.write_bytes(pack(evil(target)))
    assert run(["replay", str(path), *arguments]) == 5
    assert "tries to run code" in one_line(capsys, path)
    assert not target.exists()


def test_the_same_pickle_does_create_the_file_when_unpickled_the_ordinary_way(tmp_path: Path) -> None:
    pickle.loads(evil(tmp_path / "created"))
    assert (tmp_path / "created").exists(), "else the test above could not fail"


def test_a_file_name_with_control_characters_stays_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two\nlines\x1b[31m"
    path.write_bytes(b"no")
    assert run(["replay", str(path)]) == 5
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err


def handled(path: Path) -> None:
    """Whatever the file holds, the answer is a Trace that replays, or an error of ours."""
    try:
        trace = load_trace(path)
        replay(trace, SETTINGS, verify=trace.decisions is not None)
    except (InputFileError, UsageError) as e:
        assert "\n" not in str(e)


def test_every_truncation_is_handled(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    for whole in (GOOD, pickle.dumps(small_snapshot("2.14"), protocol=2)):
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises((InputFileError, UsageError)):
                load_trace(path)


@given(changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
def test_changed_bytes_in_a_snapshot_are_handled(changes: list[tuple[int, int]], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "changed"
    data = bytearray(GOOD)
    for at, value in changes:
        data[at % len(data)] = value
    path.write_bytes(data)
    handled(path)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**64) | st.floats() | st.sampled_from(["alloc", "", "inactive", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["addr", "size", "blocks"]), inner),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_in_any_place_of_a_snapshot_is_handled(data: st.DataObject, tmp_path_factory: Any) -> None:
    value = copy.deepcopy(small_snapshot(data.draw(st.sampled_from(["2.9", "2.11", "2.14"]))))
    inner: Any = value
    while True:
        key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        nested = inner[key]
        if not isinstance(nested, dict | list) or not nested or data.draw(st.booleans()):
            inner[key] = data.draw(json_like)
            break
        inner = nested
    handled(write(tmp_path_factory.getbasetemp() / "odd", value))


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 17), st.integers(-1, 4), st.sampled_from([0, 1, 512, 2**21, 2**40, 2**61]),
                  st.integers(-1, 2), st.integers(0, 2)),
        max_size=40,
    )
)  # fmt: skip
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_order_of_requests_is_handled(rows: list[tuple[int, int, int, int, int]], tmp_path_factory: Any) -> None:
    from fragscope.trace import Observation, RequestKind, RequestLog, Trace

    log = RequestLog()
    for kind, id_, size, stream, pool in rows:
        is_index = kind in (RequestKind.OBSERVATION, RequestKind.SETTINGS)
        log.append(RequestKind(kind), id=id_, size=0 if is_index else size, stream=stream, pool=pool)
    path = tmp_path_factory.getbasetemp() / "any.fscope"
    pools, confs = ((0, 0), (0, 1), (2, 0)), ("expandable_segments:True",)
    write_trace(Trace(log.finish(), observations=(Observation("x"),), torch="2.11", pools=pools, confs=confs), path)
    handled(path)


MEMORY = 200 * MIB


@pytest.mark.parametrize(
    "make",
    [
        bytes_of(hostile_pickle(b"](" + b"X\x04\0\0\0abcd" * 2_500_000 + b"e")),
        bytes_of(hostile_pickle(b"](" + b"J\1\2\3\4" * 4_000_000 + b"e")),
        bytes_of(lzma.compress(b"\x80\x04" + b"N" * 18 * MIB, preset=0)),
    ],
    ids=["strings", "integers", "xz"],
)
def test_a_file_that_needs_more_memory_than_there_is_ends_in_one_line(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "large.pickle"
    make(path)
    done = subprocess.run(
        [sys.executable, "-m", "fragscope", "replay", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # its threads' stacks would count against the limit
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    assert done.returncode == 5, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr
