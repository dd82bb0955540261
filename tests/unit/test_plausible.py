"""Numbers that no device and program can have made are refused when the file is opened, whichever the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eventful import eventful, members, pack
from snapshots import BASE, MIB, segment, small_snapshot, write

from fragscope.cli import run
from fragscope.errors import InputFileError
from fragscope.trace import RequestKind, RequestLog, Trace, load_trace, write_trace
from fragscope.trace.events import DECISION_DTYPES, REQUEST_DTYPES

K = RequestKind
REQUESTS = eventful().requests


def with_manifest(change: Callable[[dict[str, Any]], object]) -> dict[str, bytes]:
    out = dict(members())
    manifest = json.loads(out["manifest.json"])
    change(manifest)
    return out | {"manifest.json": json.dumps(manifest).encode()}


def with_cell(member: str, row: int, value: int) -> dict[str, bytes]:
    out = dict(members())
    table, name = member.split("/")
    column = np.frombuffer(out[member], (REQUEST_DTYPES if table == "requests" else DECISION_DTYPES)[name]).copy()
    column[row] = value
    return out | {member: column.tobytes()}


def row_of(kind: RequestKind) -> int:
    return int(np.flatnonzero(REQUESTS.kind == kind)[0])


def setting(key: str, value: Any) -> dict[str, bytes]:
    return with_manifest(lambda m: m["settings"].update({key: value}))


def cell(kind: RequestKind, name: str, value: int) -> dict[str, bytes]:
    return with_cell(f"requests/{name}", row_of(kind), value)


def turned_into(old: RequestKind, new: RequestKind) -> dict[str, bytes]:
    return cell(old, "kind", new)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda: setting("memory_fraction", 1e308), "the memory fraction 1e+308 is not between 0 and 1"),
        (lambda: setting("memory_fraction", -0.5), "the memory fraction -0.5 is not between 0 and 1"),
        (lambda: setting("memory_fraction", float("nan")), "damaged"),
        (lambda: setting("capacity", 10**30), "capacity is 1e+30 bytes; a device has up to 16,384.00 GiB"),
        (lambda: setting("capacity", -1), "capacity is -1 bytes"),
        (lambda: with_manifest(lambda m: m.update(device_total=2**45)), "device_total is 3.518e+13 bytes"),
        (lambda: with_manifest(lambda m: m.update(device_total=0)), "device_total is 0 bytes"),
        (lambda: with_manifest(lambda m: m.update(device=-1)), "the device index is no such"),
        (lambda: with_manifest(lambda m: m["pools"].reverse()), "the default pool is not the first"),
        (lambda: with_manifest(lambda m: m["pools"].append([0, 3])), "or one is there twice"),
        (lambda: with_manifest(lambda m: m["pools"].append([0, 2**63])), "a pool's id is no such"),
        (
            lambda: with_manifest(lambda m: m["pools"].extend([1, n] for n in range(2**16))),
            "it names 65,538 pools; at most 65,536 are read",
        ),
        (lambda: with_manifest(lambda m: m["lost"][0].__setitem__(2, -1)), "a number of lost events is no such"),
        (lambda: with_manifest(lambda m: m["frames"][0].__setitem__(1, 10**30)), "a line number in a call stack"),
        (lambda: with_manifest(lambda m: m["stacks"].append(m["stacks"][0])), "a stack is empty or there twice"),
        (lambda: with_manifest(lambda m: m["initial"][0].__setitem__(0, 2**63)), "a segment at the start lies where"),
        (lambda: with_manifest(lambda m: m["initial"][0].__setitem__(1, -1)), "a segment at the start lies where"),
        (lambda: with_manifest(lambda m: m["initial"][0].__setitem__(2, 2**63)), "a segment at the start is of no"),
        (lambda: with_manifest(lambda m: m["final"][0].__setitem__(0, 2**63)), "a segment at the end lies where"),
        (lambda: with_manifest(lambda m: m["final"].append(m["final"][0])), "segments at the end overlap"),
        (lambda: with_manifest(lambda m: m["final"][0][4].pop()), "segments at the end overlap or have gaps"),
        (lambda: cell(K.ALLOC, "size", 2**62), f"size {2**62} is not between -1 and {2**62 - 1}"),
        (lambda: cell(K.FREE, "id", -2), "id -2 is not between -1"),
        (lambda: cell(K.ALLOC, "stream", -2), "stream -2 is not between -1"),
        (lambda: cell(K.ALLOC, "thread", -1), "thread -1 is not between 0"),
        (lambda: cell(K.MEMORY_FRACTION, "size", 10**9 + 1), "memory fraction in billionths 1000000001 is not"),
        (lambda: cell(K.POOL_CREATE, "size", 4), "pool options 4 is not between 0 and 3"),
        (lambda: cell(K.SCOPE_OPEN, "pool", 0), "private pool 0 is not between 1"),
        (lambda: cell(K.HELD, "size", 513), "request 1: what was held at the start is not what its block holds"),
        (lambda: turned_into(K.SCOPE_OPEN, K.POOL_CREATE), "SCOPE_CLOSE of a scope that was not opened"),
        (lambda: turned_into(K.POOL_CREATE, K.EMPTY_CACHE), "POOL_RELEASE of a private pool that has no user"),
        (lambda: turned_into(K.CAPTURE_BEGIN, K.CAPTURE_END), "CAPTURE_END of a capture that was not begun"),
        (lambda: turned_into(K.PHASE_BEGIN, K.PHASE_END), "a measured phase ends that did not begin"),
        (lambda: turned_into(K.PHASE_END, K.PHASE_BEGIN), "a measured phase begins inside another"),
        (lambda: cell(K.PHASE_END, "phase", 0), "a measured phase ends that did not begin"),
        (lambda: turned_into(K.START, K.EMPTY_CACHE), "what stood at the start is not what its events say"),
        (lambda: turned_into(K.EMPTY_CACHE, K.START), "what stood at the start is not what its events say"),
        (lambda: with_cell("decisions/addr", 0, 2**61), "decision 0: address 2305843009213693952 is not between"),
        (lambda: with_cell("decisions/addr", 0, -1), "decision 0: address -1 is not between"),
        (lambda: with_cell("decisions/size", 0, 2**45), "decision 0: size 35184372088832 is not between"),
        (lambda: with_cell("decisions/size", 0, -1), "decision 0: size -1 is not between 1"),
        (lambda: with_cell("decisions/id", 2, -2), "decision 2: id -2 is not between -1"),
        (lambda: with_cell("decisions/stream", 2, -2), "decision 2: stream -2 is not between -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(
    content: Callable[[], dict[str, bytes]], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pack(tmp_path / "t.fscope", content())
    assert run(["replay", str(path)]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert why in err


def refusal(path: Path) -> str:
    with pytest.raises(InputFileError) as caught:
        load_trace(path)
    return caught.value.reason


def test_a_held_block_comes_before_anything_that_is_asked_for(tmp_path: Path) -> None:
    trace = eventful()
    order = [0, 1, row_of(K.MEMORY_FRACTION), 2, *range(4, len(REQUESTS))]
    columns = {name: getattr(REQUESTS, name)[order] for name in REQUEST_DTYPES}
    write_trace(replace(trace, requests=replace(REQUESTS, **columns), decisions=None), tmp_path / "t")
    assert "what stood at the start is not what its events say" in refusal(tmp_path / "t")


def test_sizes_that_would_wrap_when_summed_are_refused(tmp_path: Path) -> None:
    trace = eventful()
    assert trace.decisions is not None
    rows = 2**18 + 1  # of 2**44 bytes each
    d = replace(trace.decisions, **{n: np.repeat(getattr(trace.decisions, n)[:1], rows) for n in DECISION_DTYPES})
    write_trace(replace(trace, decisions=replace(d, size=np.full(rows, 2**44))), tmp_path / "t")
    assert "more bytes than any program can have moved" in refusal(tmp_path / "t")


def users(*rows: tuple[RequestKind, int]) -> Trace:
    log = RequestLog()
    for kind, pool in rows:
        log.append(kind, pool=pool)
    return Trace(log.finish(), pools=((0, 0), (0, 1), (0, 2)))


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ([(K.POOL_CREATE, 1), (K.SCOPE_OPEN, 1), (K.SCOPE_CLOSE, 1), (K.POOL_RELEASE, 1), (K.POOL_RELEASE, 1)], None),
        ([(K.POOL_CREATE, 2), (K.POOL_CREATE, 1), (K.POOL_RELEASE, 1), (K.POOL_RELEASE, 2)], None),
        ([(K.POOL_CREATE, 2), (K.POOL_CREATE, 2), (K.POOL_RELEASE, 1)], 2),
        ([(K.POOL_CREATE, 1), (K.POOL_RELEASE, 1), (K.POOL_RELEASE, 1), (K.POOL_CREATE, 1)], 2),
        ([(K.POOL_RELEASE, 2), (K.POOL_CREATE, 2), (K.POOL_RELEASE, 1)], 0),
        ([(K.SCOPE_OPEN, 1), (K.SCOPE_CLOSE, 2)], 1),
        ([(K.CAPTURE_BEGIN, 1), (K.CAPTURE_END, 2)], None),
        ([(K.CAPTURE_BEGIN, 0), (K.CAPTURE_END, 0), (K.CAPTURE_END, 0)], 2),
    ],
)
def test_nothing_ends_that_has_not_begun(
    rows: list[tuple[RequestKind, int]], wrong: int | None, tmp_path: Path
) -> None:
    write_trace(users(*rows), tmp_path / "t")
    if wrong is None:
        assert len(load_trace(tmp_path / "t").requests) == len(rows)
    else:
        assert f"request {wrong}: " in refusal(tmp_path / "t")


def test_the_same_bounds_hold_for_snapshots(tmp_path: Path) -> None:
    value = small_snapshot()
    value["device_traces"][0][0]["size"] = 2**45
    assert "size 35184372088832 is not between" in refusal(write(tmp_path / "size", value))
    value = small_snapshot()
    value["segments"].append(segment(BASE + MIB, 2 * MIB, [(2 * MIB, "inactive")]))
    assert "segments at the end overlap" in refusal(write(tmp_path / "overlap", value))
