"""The .fscope file: what goes in comes out, and what is damaged, hostile or inconsistent is refused."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import BASE, MIB, small_snapshot

from fragscope.errors import InputFileError, UsageError
from fragscope.trace import (
    DecisionKind,
    DecisionLog,
    Frame,
    Loss,
    Observation,
    RequestKind,
    RequestLog,
    SegmentState,
    Settings,
    StackTable,
    Trace,
    load_trace,
    write_trace,
)
from fragscope.trace.snapshot import snapshot_to_trace
from fragscope.trace.store import read_trace

TRACES = Path(__file__).parent.parent / "data" / "traces"


def full_trace() -> Trace:
    """A Trace that has something in every place."""
    log, decided = RequestLog(), DecisionLog()
    log.append(RequestKind.PHASE_BEGIN, phase=1)
    log.append(RequestKind.ALLOC, id=0, size=400, stream=5, pool=0, thread=2, stack=0, phase=1)
    decided.append(DecisionKind.SEGMENT_ALLOC, -1, 2**46, 2**21, 5, 0)
    decided.append(DecisionKind.ALLOC, 0, 2**46, 512, 5, 0)
    log.append(RequestKind.OBSERVATION, size=0, stack=1)
    log.append(RequestKind.FREE, id=0, stack=1)
    return Trace(
        requests=log.finish(),
        decisions=decided.finish(),
        stacks=StackTable(((Frame("/home/someone/model.py", 3, "f"),), (Frame("/home/someone/loop.py", 4, "g"),))),
        phases=("", "load"),
        pools=((0, 0), (0, 3)),
        observations=(Observation("torch.cuda.mem_get_info", "/home/someone/loop.py:9"),),
        settings=Settings(
            conf="backend:native", memory_fraction=0.25, capacity=2**36, recorded={"max_split_size": "-1"}
        ),
        torch="2.11.0",
        card="h100-80gb",
        device=3,
        device_total=85_017_493_504,
        confs=("", "expandable_segments:True"),
        final=(SegmentState(2**46, 2**21, 5, 0, ((2**46, 512, "free"), (2**46 + 512, 2**21 - 512, "pending"))),),
        lost=(Loss("late_start", "began late", 4),),
        placement="recorded",
        source="cuda",
        provenance={"command": "python train.py", "commit": "abc"},
    )


def late_trace() -> Trace:
    """A Trace whose recording began when two segments stood, one of them a mapped range."""
    log, decided = RequestLog(), DecisionLog()
    log.append(RequestKind.START)
    decided.append(DecisionKind.SEGMENT_ALLOC, -1, BASE, 2 * MIB, 0, 0)
    decided.append(DecisionKind.SEGMENT_MAP, -1, 2 * BASE, 20 * MIB, 5, 0)
    for number, (addr, size, stream) in enumerate([(BASE + 512, 400, 0), (2 * BASE, 12 * MIB, 5)]):
        decided.request = log.append(RequestKind.HELD, id=number, size=size, stream=stream)
        decided.append(DecisionKind.ALLOC, number, addr, -1, stream, 0)
    log.append(RequestKind.SETTINGS, size=1)
    initial = (
        SegmentState(
            BASE,
            2 * MIB,
            0,
            0,
            ((BASE, 512, "free"), (BASE + 512, 512, "allocated"), (BASE + 1024, 2 * MIB - 1024, "free")),
        ),
        SegmentState(
            2 * BASE,
            20 * MIB,
            5,
            0,
            ((2 * BASE, 12 * MIB, "pending"), (2 * BASE + 12 * MIB, 8 * MIB, "free")),
            20 * MIB,
        ),
    )
    return Trace(
        requests=log.finish(),
        decisions=decided.finish(),
        confs=("expandable_segments:False", "expandable_segments:True"),
        initial=initial,
        lost=(Loss("start_state", "recording began late", 2),),
        placement="recorded",
        source="snapshot",
    )


def equal(a: Trace, b: Trace) -> bool:
    for f in fields(Trace):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name in ("requests", "decisions"):
            if (x is None) != (y is None):
                return False
            if x is not None and not all(np.array_equal(getattr(x, c.name), getattr(y, c.name)) for c in fields(x)):
                return False
        elif f.name == "stacks":
            if list(x) != list(y):
                return False
        elif x != y:
            return False
    return True


def small() -> Trace:
    return snapshot_to_trace(small_snapshot(), Path("s"))


def refusal(path: Path) -> str:
    with pytest.raises(InputFileError) as caught:
        load_trace(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(
    "make", [full_trace, small, late_trace, lambda: replace(full_trace(), decisions=None, final=None)]
)
def test_a_trace_comes_back_equal(make: Callable[[], Trace], tmp_path: Path) -> None:
    write_trace(make(), tmp_path / "t.fscope")
    assert equal(load_trace(tmp_path / "t.fscope"), make())


def test_a_recorded_trace_comes_back_equal(tmp_path: Path) -> None:
    trace = load_trace(TRACES / "streams-default.pickle.xz")
    write_trace(trace, tmp_path / "t.fscope")
    assert equal(load_trace(tmp_path / "t.fscope"), trace)


def test_an_empty_trace_comes_back(tmp_path: Path) -> None:
    write_trace(Trace(RequestLog().finish()), tmp_path / "t.fscope")
    assert len(load_trace(tmp_path / "t.fscope").requests) == 0


@given(rows=st.lists(st.tuples(st.integers(0, 2**62 - 1), st.integers(-1, 2**63 - 1)), max_size=30))
@settings(max_examples=30)
def test_any_sizes_and_streams_come_back(rows: list[tuple[int, int]], tmp_path_factory: Any) -> None:
    log = RequestLog()
    for number, (size, stream) in enumerate(rows):
        log.append(RequestKind.ALLOC, id=number, size=size, stream=stream)
    path = tmp_path_factory.mktemp("t") / "t.fscope"
    write_trace(Trace(log.finish()), path)
    assert equal(load_trace(path), Trace(log.finish()))


def test_equal_traces_give_equal_files(tmp_path: Path) -> None:
    write_trace(full_trace(), tmp_path / "a")
    write_trace(full_trace(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_stripping_stacks_removes_every_path(tmp_path: Path) -> None:
    write_trace(full_trace().strip_stacks(), tmp_path / "t.fscope")
    raw = (tmp_path / "t.fscope").read_bytes()
    for secret in (b"someone", b"model.py", b"loop.py"):
        assert secret not in raw


def test_columns_are_aligned_for_mapping(tmp_path: Path) -> None:
    write_trace(full_trace(), tmp_path / "t.fscope")
    raw = (tmp_path / "t.fscope").read_bytes()
    with zipfile.ZipFile(tmp_path / "t.fscope") as z:
        for info in z.infolist():
            name, extra = struct.unpack("<HH", raw[info.header_offset + 26 : info.header_offset + 30])
            assert (info.header_offset + 30 + name + extra) % 64 == 0


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.fscope"
    write_trace(small(), path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_trace(full_trace(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_another_device_than_the_files_is_refused(tmp_path: Path) -> None:
    write_trace(full_trace(), tmp_path / "t.fscope")
    assert load_trace(tmp_path / "t.fscope", 3).device == 3
    with pytest.raises(UsageError, match="no events for device 0"):
        load_trace(tmp_path / "t.fscope", 0)


@cache
def small_file() -> bytes:
    with TemporaryDirectory() as folder:
        write_trace(small(), Path(folder) / "t")
        return (Path(folder) / "t").read_bytes()


# --- files made by hand -------------------------------------------------------------------------------------------


def with_initial(change: Callable[[list[Any]], None]) -> dict[str, bytes]:
    """A file whose segments at the start are changed as they stand in the manifest."""
    content = members(late_trace())
    manifest = json.loads(content["manifest.json"])
    change(manifest["initial"])
    content["manifest.json"] = json.dumps(manifest).encode()
    return content


def members(trace: Trace | None = None) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        write_trace(trace or full_trace(), Path(folder) / "t")
        with zipfile.ZipFile(Path(folder) / "t") as z:
            return {n: z.read(n) for n in z.namelist()}


def pack(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in content.items():
            z.writestr(name, data)
    return path


def with_manifest(**changes: Any) -> dict[str, bytes]:
    content = members()
    content["manifest.json"] = json.dumps(json.loads(content["manifest.json"]) | changes).encode()
    return content


def with_column(name: str, values: list[int]) -> dict[str, bytes]:
    content = members()
    dtype = {"kind": "u1", "stack": "<i4", "phase": "<i4", "pool": "<i4"}.get(name.split("/")[1], "<i8")
    content[name] = np.array(values, dtype=dtype).tobytes()
    return content


def test_hand_made_files_are_read_as_those_written(tmp_path: Path) -> None:
    assert equal(load_trace(pack(tmp_path / "t", members())), full_trace())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda: {"data.pkl": b"x"}, "no .fscope has: 'data.pkl'"),
        (lambda: {**members(), "/etc/passwd": b"x"}, "no .fscope has: '/etc/passwd'"),
        (lambda: {**members(), "../x": b"x"}, "no .fscope has: '../x'"),
        (lambda: {"requests/kind": b""}, "no manifest.json"),
        (lambda: {"manifest.json": b"{"}, "damaged manifest"),
        (lambda: {"manifest.json": b"[]"}, "damaged manifest"),
        (lambda: {"manifest.json": b"\xff\xfe"}, "damaged manifest"),
        (lambda: {"manifest.json": b"[" * 200_000}, "damaged manifest"),
        (lambda: {"manifest.json": b'{"settings":' + b"[" * 200_000}, "damaged manifest"),
        (lambda: {"manifest.json": b"{}"}, "its manifest says otherwise"),
        (lambda: with_manifest(format="other"), "its manifest says otherwise"),
        (lambda: with_manifest(version=2), ".fscope version 2; this fragscope reads version 1"),
        (lambda: with_manifest(version=10**30), "this fragscope reads version 1"),
        (lambda: {"manifest.json": b'{"format":"fscope","version":' + b"1" * 9000 + b"}"}, "manifest"),
        (lambda: with_manifest(version="1"), "damaged manifest"),
        (lambda: with_manifest(requests=5), "not 5 rows"),
        (lambda: with_manifest(requests=10**15), "rows of u1"),
        (lambda: with_manifest(requests=-1), "not -1 rows"),
        (lambda: with_manifest(decisions=3), "not 3 rows"),
        (lambda: with_manifest(surprise=1), "damaged manifest"),
        (lambda: with_manifest(stacks=[[0], [9]]), "a stack refers to a frame"),
        (lambda: with_manifest(stacks=[[0]]), "a request's stack refers"),
        (lambda: with_manifest(phases=[""]), "a request's phase refers"),
        (lambda: with_manifest(pools=[]), "a request's pool refers"),
        (lambda: with_manifest(observations=[]), "an observation refers"),
        (lambda: with_manifest(settings={"conf": 3}), "damaged settings"),
        (lambda: with_manifest(settings={"conf": "", "memory_fraction": "x"}), "damaged settings"),
        (lambda: with_manifest(final=[[0, 1, 0, 7, []]]), "a segment has an unknown pool or block state"),
        (
            lambda: with_manifest(final=[[0, 1, 0, 0, [[0, 1, "asleep"]]]]),
            "a segment has an unknown pool or block state",
        ),
        (lambda: with_manifest(lost=[["a"]]), "damaged manifest"),
        (lambda: {k: v for k, v in members().items() if k != "requests/size"}, "lacks the column 'requests/size'"),
        (lambda: with_column("requests/kind", [8, 1, 10, 99]), "a request's kind"),
        (
            lambda: with_column("requests/size", [0, 2**63 - 1, 0, 0]),
            "size 9223372036854775807 is not between",
        ),
        (lambda: with_column("requests/size", [0, -1, 0, 0]), "an allocation has no size"),
        (lambda: with_column("requests/id", [0, -1, 0, 0]), "or one has none"),
        (lambda: with_column("requests/pool", [0, 0, 0, 5]), "a request's pool"),
        (lambda: with_column("decisions/kind", [1, 0]), "a decision's kind"),
        (lambda: with_column("decisions/request", [0, 4]), "a decision's request"),
        (lambda: with_column("decisions/pool", [0, -1]), "a decision's pool"),
    ],
)
def test_foreign_lying_and_inconsistent_files_are_refused(
    content: Callable[[], dict[str, bytes]], why: str, tmp_path: Path
) -> None:
    assert why in refusal(pack(tmp_path / "t", content()))


START_DIFFERS = "what stood at the start is not what its events say"
NOT_COVERED = "blocks at the start do not cover their segment"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda initial: initial.clear(), START_DIFFERS),
        (lambda initial: initial.pop(), START_DIFFERS),
        (lambda initial: initial[1][4][0].__setitem__(2, "free"), START_DIFFERS),
        (lambda initial: initial[0][4].pop(), "segments at the start overlap or have gaps"),
        (lambda initial: initial[0][4].pop(0), NOT_COVERED),
        (lambda initial: initial[0][4][0].__setitem__(1, 1024), NOT_COVERED),
        (lambda initial: initial[0][4][0].__setitem__(1, 0), NOT_COVERED),
        (lambda initial: initial[0][4][0].__setitem__(1, -512), NOT_COVERED),
        (lambda initial: initial[0].__setitem__(1, 4 * MIB), "segments at the start overlap or have gaps"),
        (lambda initial: initial.reverse(), "segments at the start overlap or have gaps"),
        (lambda initial: initial[0].__setitem__(3, 7), "unknown pool or block state"),
        (lambda initial: initial[0][4][0].__setitem__(2, "asleep"), "unknown pool or block state"),
        (lambda initial: initial[0].__setitem__(5, True), "damaged manifest"),
        (lambda initial: initial[0].__setitem__(5, 3), "pages of an impossible size"),
        (lambda initial: initial[1].__setitem__(5, MIB), "pages of an impossible size"),
        (lambda initial: initial[1].__setitem__(5, 2**60), "pages of an impossible size"),
    ],
)
def test_an_inconsistent_start_is_refused(change: Callable[[list[Any]], None], why: str, tmp_path: Path) -> None:
    assert why in refusal(pack(tmp_path / "t", with_initial(change)))


def test_a_start_that_is_not_the_first_row_is_refused(tmp_path: Path) -> None:
    trace = late_trace()
    columns = {f.name: np.roll(getattr(trace.requests, f.name), 1) for f in fields(trace.requests)}
    write_trace(replace(trace, requests=replace(trace.requests, **columns)), tmp_path / "t")
    assert START_DIFFERS in refusal(tmp_path / "t")


def test_a_change_to_settings_that_the_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    write_trace(replace(late_trace(), confs=("",)), tmp_path / "t")
    assert "a change of settings refers" in refusal(tmp_path / "t")


def test_files_without_a_start_or_confs_are_read(tmp_path: Path) -> None:
    content = members(small())
    manifest = json.loads(content["manifest.json"])
    del manifest["initial"], manifest["confs"]
    content["manifest.json"] = json.dumps(manifest).encode()
    assert equal(load_trace(pack(tmp_path / "t", content)), small())


def test_two_allocations_with_one_id_are_refused(tmp_path: Path) -> None:
    log = RequestLog()
    log.append(RequestKind.ALLOC, id=1, size=1)
    log.append(RequestKind.ALLOC, id=1, size=1)
    write_trace(Trace(log.finish()), tmp_path / "t")
    assert "same id" in refusal(tmp_path / "t")


def test_compressed_members_are_refused_whatever_they_expand_to(tmp_path: Path) -> None:
    content = {**members(), "requests/size": bytes(50 * 2**20)}
    path = pack(tmp_path / "t", content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    assert "is compressed; .fscope members never are" in refusal(path)


def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "t", members())
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as z:
        z.writestr("requests/size", b"")
    assert "holds 'requests/size' twice" in refusal(path)


def central_entries(raw: bytearray) -> list[int]:
    """Offsets of the central directory's entries."""
    at = struct.unpack("<I", raw[-6:-2])[0]
    out = []
    while raw[at : at + 4] == b"PK\x01\x02":
        out.append(at)
        name, extra, comment = struct.unpack("<HHH", raw[at + 28 : at + 34])
        at += 46 + name + extra + comment
    return out


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "t", members())
    raw = bytearray(path.read_bytes())
    entries = central_entries(raw)
    raw[entries[2] + 42 : entries[2] + 46] = raw[entries[3] + 42 : entries[3] + 46]  # another member's header
    path.write_bytes(raw)
    assert refusal(path)


@pytest.mark.parametrize("lie", [2**31, 2**32 - 2, 1])
def test_a_length_that_is_not_the_members_is_refused(lie: int, tmp_path: Path) -> None:
    path = pack(tmp_path / "t", members())
    raw = bytearray(path.read_bytes())
    at = central_entries(raw)[1]
    raw[at + 20 : at + 28] = struct.pack("<II", lie, lie)
    path.write_bytes(raw)
    assert refusal(path)


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "t", members())
    raw = bytearray(path.read_bytes())
    for at in central_entries(raw):
        raw[at + 8] |= 1
    path.write_bytes(raw)
    assert refusal(path)


def test_a_changed_byte_in_a_column_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_trace(full_trace(), path)
    raw = bytearray(path.read_bytes())
    at = raw.index(struct.pack("<q", 400))
    raw[at] ^= 1
    path.write_bytes(raw)
    assert "damaged (its checksum differs)" in refusal(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_trace(small(), tmp_path / "whole")
    raw = (tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut"
    for length in range(0, len(raw), 7):
        cut.write_bytes(raw[:length])
        refusal(cut)


@given(at=st.integers(0), bit=st.integers(0, 7))
@settings(max_examples=300)
def test_a_flipped_bit_gives_the_same_trace_or_a_refusal(at: int, bit: int, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    raw = bytearray(small_file())
    raw[at % len(raw)] ^= 1 << bit
    (folder / "flip").write_bytes(raw)
    try:
        trace = load_trace(folder / "flip")
    except InputFileError as e:
        assert "\n" not in str(e)
    else:
        assert equal(trace, small()), "whatever is not checked must not matter"


def test_checksums_are_those_of_the_zip(tmp_path: Path) -> None:
    write_trace(full_trace(), tmp_path / "t")
    with zipfile.ZipFile(tmp_path / "t") as z:
        assert z.testzip() is None
        assert zlib.crc32(z.read("manifest.json")) == z.getinfo("manifest.json").CRC


def test_columns_are_mapped_not_copied(tmp_path: Path) -> None:
    write_trace(full_trace(), tmp_path / "t")
    assert isinstance(read_trace(tmp_path / "t").requests.size, np.memmap)
