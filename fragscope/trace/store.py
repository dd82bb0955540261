"""The ``.fscope`` file: one Trace in one zip, columns stored uncompressed and aligned for memory mapping.

Members are never compressed, so nothing can expand; names, types and lengths are declared in ``manifest.json`` and
checked against the file before anything is used. A file is written whole or not at all.
"""

from __future__ import annotations

import io
import struct
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from fragscope.errors import InputFileError, printable
from fragscope.trace.containers import MAX_BYTES, ZIP_MAGIC, first_bytes, write_atomically
from fragscope.trace.events import (
    ASKING,
    DECISION_DTYPES,
    REQUEST_DTYPES,
    Column,
    DecisionKind,
    Decisions,
    Frame,
    RequestKind,
    Requests,
    StackTable,
)
from fragscope.trace.sizes import SMALL_SEGMENT
from fragscope.trace.trace import BlockState, Loss, Observation, SegmentState, Settings, Trace
from fragscope.units import MIB

FORMAT = "fscope"
VERSION = 1
_ALIGNMENT = 64
_MANIFEST_LIMIT = 256 * MIB
_PADDING_FIELD = 0x4653  # zip extra field "FS": bytes that align the member's data


class _Segment(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    addr: int
    size: int
    stream: int
    pool: int
    blocks: list[tuple[int, int, str]]
    page: int = 0


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    requests: int
    decisions: int | None
    stacks: list[list[int]]
    frames: list[tuple[str, int, str]]
    phases: list[str]
    pools: list[tuple[int, int]]
    observations: list[tuple[str, str]]
    settings: dict[str, Any]
    torch: str | None
    card: str | None
    device: int
    device_total: int | None
    final: list[_Segment] | None
    lost: list[tuple[str, str, int]]
    placement: Literal["recorded", "modelled"]
    source: str
    provenance: dict[str, str]
    confs: list[str] = []
    initial: list[_Segment] = []


def write_trace(trace: Trace, path: Path) -> None:
    """Write the Trace as one ``.fscope`` file, atomically."""
    frames: dict[Frame, int] = {}
    stacks = [[frames.setdefault(frame, len(frames)) for frame in stack] for stack in trace.stacks]
    manifest = _Manifest(
        format=FORMAT,
        version=VERSION,
        requests=len(trace.requests),
        decisions=None if trace.decisions is None else len(trace.decisions),
        stacks=stacks,
        frames=[(f.file, f.line, f.function) for f in frames],
        phases=list(trace.phases),
        pools=list(trace.pools),
        observations=[(o.what, o.where) for o in trace.observations],
        settings={
            "conf": trace.settings.conf,
            "memory_fraction": trace.settings.memory_fraction,
            "capacity": trace.settings.capacity,
            "recorded": trace.settings.recorded,
        },
        torch=trace.torch,
        card=trace.card,
        device=trace.device,
        device_total=trace.device_total,
        final=None if trace.final is None else _stored(trace.final),
        lost=[(x.code, x.detail, x.events) for x in trace.lost],
        placement=trace.placement,
        source=trace.source,
        provenance=trace.provenance,
        confs=list(trace.confs),
        initial=_stored(trace.initial),
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, buffer, "manifest.json", msgspec.json.encode(manifest))
        for name, dtype in REQUEST_DTYPES.items():
            _add(archive, buffer, f"requests/{name}", _column_bytes(getattr(trace.requests, name), dtype))
        if trace.decisions is not None:
            for name, dtype in DECISION_DTYPES.items():
                _add(archive, buffer, f"decisions/{name}", _column_bytes(getattr(trace.decisions, name), dtype))
    write_atomically(path, buffer.getvalue())


def _stored(segments: tuple[SegmentState, ...]) -> list[_Segment]:
    return [_Segment(s.addr, s.size, s.stream, s.pool, list(s.blocks), s.page) for s in segments]


def _read_back(segments: list[_Segment]) -> tuple[SegmentState, ...]:
    return tuple(
        SegmentState(s.addr, s.size, s.stream, s.pool, tuple(s.blocks), s.page)  # type: ignore[arg-type]
        for s in segments
    )


def _column_bytes(column: Column, dtype: str) -> bytes:
    return np.ascontiguousarray(column, dtype=dtype).tobytes()


def _add(archive: zipfile.ZipFile, buffer: io.BytesIO, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # equal traces give equal files
    start = buffer.tell() + 30 + len(name.encode())
    padding = -(start + 4) % _ALIGNMENT
    info.extra = _PADDING_FIELD.to_bytes(2, "little") + padding.to_bytes(2, "little") + b"\0" * padding
    archive.writestr(info, data)


def is_fscope(path: Path) -> bool:
    """Whether the file begins as a zip does."""
    return first_bytes(path).startswith(ZIP_MAGIC)


def read_trace(path: Path) -> Trace:
    """Read an ``.fscope`` file; columns are mapped from the file, not copied.

    Raises:
        InputFileError: truncated, foreign, damaged, inconsistent, of a newer version, or hostile.
    """
    first_bytes(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = _checked_members(archive, path)
            manifest = _read_manifest(archive, path)
            _check_sums(archive, path)
    except zipfile.BadZipFile as e:
        raise InputFileError(path, f"is not a readable .fscope file ({printable(str(e), 120)})") from None
    except (OSError, EOFError, RuntimeError, ValueError, OverflowError, struct.error) as e:
        raise InputFileError(path, f"is not a readable .fscope file ({printable(str(e), 120)})") from None
    requests = Requests(**_columns(path, members, "requests", REQUEST_DTYPES, manifest.requests))
    decisions = None
    if manifest.decisions is not None:
        decisions = Decisions(**_columns(path, members, "decisions", DECISION_DTYPES, manifest.decisions))
    _check_references(path, manifest, requests, decisions)
    return _assemble(path, manifest, requests, decisions)


def _checked_members(archive: zipfile.ZipFile, path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of each member's data, after checking that none can expand, overlap or escape."""
    allowed = {"manifest.json"}
    allowed |= {f"requests/{n}" for n in REQUEST_DTYPES} | {f"decisions/{n}" for n in DECISION_DTYPES}
    size = path.stat().st_size
    members: dict[str, tuple[int, int]] = {}
    total = 0
    with path.open("rb") as f:
        for info in archive.infolist():
            if info.filename not in allowed:
                raise InputFileError(path, f"holds a member that no .fscope has: {info.filename!r}")
            if info.filename in members:
                raise InputFileError(path, f"holds {info.filename!r} twice")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise InputFileError(path, f"member {info.filename!r} is compressed; .fscope members never are")
            total += info.file_size
            if total > min(size, MAX_BYTES):
                raise InputFileError(path, "announces more data than the file holds")
            f.seek(info.header_offset)
            header = f.read(30)
            if len(header) < 30 or header[:4] != ZIP_MAGIC:
                raise InputFileError(path, f"member {info.filename!r} has no header")
            start = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
            start += int.from_bytes(header[28:30], "little")
            if start + info.file_size > size:
                raise InputFileError(path, "is truncated")
            members[info.filename] = (start, info.file_size)
    spans = sorted(members.values())
    if any(a + n > b for (a, n), (b, _) in pairwise(spans)):
        raise InputFileError(path, "has members that overlap")
    if "manifest.json" not in members:
        raise InputFileError(path, "is a zip, but not an .fscope file (no manifest.json)")
    return members


def _check_sums(archive: zipfile.ZipFile, path: Path) -> None:
    bad = archive.testzip()
    if bad is not None:
        raise InputFileError(path, f"member {bad!r} is damaged (its checksum differs)")


def _read_manifest(archive: zipfile.ZipFile, path: Path) -> _Manifest:
    if archive.getinfo("manifest.json").file_size > _MANIFEST_LIMIT:
        raise InputFileError(path, "has a manifest too large to be real")
    raw = archive.read("manifest.json")
    try:
        head = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        kind = msgspec.json.decode(head.get("format", msgspec.Raw(b"null")), type=str | None)
        version = msgspec.json.decode(head.get("version", msgspec.Raw(b"null")), type=int | None)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InputFileError(path, f"has a damaged manifest ({printable(str(e), 120)})") from None
    if kind != FORMAT or version is None:
        raise InputFileError(path, "is a zip, but not an .fscope file (its manifest says otherwise)")
    if version != VERSION:
        raise InputFileError(path, f"is .fscope version {version}; this fragscope reads version {VERSION}")
    try:
        return msgspec.json.decode(raw, type=_Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InputFileError(path, f"has a damaged manifest ({printable(str(e), 120)})") from None


def _columns(
    path: Path, members: dict[str, tuple[int, int]], table: str, dtypes: dict[str, str], rows: int
) -> dict[str, Column]:
    out: dict[str, Column] = {}
    for name, dtype in dtypes.items():
        member = f"{table}/{name}"
        if member not in members:
            raise InputFileError(path, f"lacks the column {member!r}")
        start, length = members[member]
        if length != rows * np.dtype(dtype).itemsize:
            raise InputFileError(path, f"column {member!r} holds {length} bytes, not {rows} rows of {dtype}")
        if rows:
            out[name] = np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(rows,))
        else:
            out[name] = np.empty(0, dtype=dtype)
    return out


def _check_references(path: Path, manifest: _Manifest, requests: Requests, decisions: Decisions | None) -> None:
    """Indices must point at something; everything after this may rely on it. Numbers are ``plausible``'s."""

    def within(column: Column, low: int, high: int, what: str) -> None:
        if len(column) and (int(column.min()) < low or int(column.max()) >= high):
            raise InputFileError(path, f"is inconsistent: {what} refers to something the file does not hold")

    within(requests.kind, min(RequestKind), max(RequestKind) + 1, "a request's kind")
    within(requests.stack, -1, len(manifest.stacks), "a request's stack")
    within(requests.phase, 0, len(manifest.phases), "a request's phase")
    within(requests.pool, 0, len(manifest.pools), "a request's pool")
    allocs = np.isin(requests.kind, (*ASKING, RequestKind.HELD))
    ids = np.sort(requests.id[allocs])  # much faster than np.unique where they ascend already
    if len(ids) and (int(ids[0]) < 0 or bool(np.any(ids[1:] == ids[:-1]))):
        raise InputFileError(path, "is inconsistent: two allocations have the same id, or one has none")
    if np.any(requests.size[allocs] < 0):
        raise InputFileError(path, "is inconsistent: an allocation has no size")
    observed = requests.size[requests.kind == RequestKind.OBSERVATION]
    within(observed, 0, len(manifest.observations), "an observation")
    changed = requests.size[requests.kind == RequestKind.SETTINGS]
    within(changed, 0, len(manifest.confs), "a change of settings")
    if decisions is not None:
        within(decisions.kind, min(DecisionKind), max(DecisionKind) + 1, "a decision's kind")
        within(decisions.request, 0, len(requests), "a decision's request")
        within(decisions.pool, 0, len(manifest.pools), "a decision's pool")
    if any(not 0 <= f < len(manifest.frames) for stack in manifest.stacks for f in stack):
        raise InputFileError(path, "is inconsistent: a stack refers to a frame the file does not hold")
    if any(abs(line) >= 2**63 for _, line, _ in manifest.frames):
        raise InputFileError(path, "is inconsistent: a line number in a call stack is no such")
    for segment in (*manifest.initial, *(manifest.final or ())):
        states = {state for _, _, state in segment.blocks}
        if not 0 <= segment.pool < len(manifest.pools) or not states <= set(get_args(BlockState)):
            raise InputFileError(path, "is inconsistent: a segment has an unknown pool or block state")
        if segment.page and (segment.page % MIB or not SMALL_SEGMENT <= segment.page <= 2**52):
            raise InputFileError(path, "is inconsistent: a segment is mapped in pages of an impossible size")


def _assemble(path: Path, manifest: _Manifest, requests: Requests, decisions: Decisions | None) -> Trace:
    frames = [Frame(*f) for f in manifest.frames]
    stacks = StackTable(tuple(frames[i] for i in stack) for stack in manifest.stacks)
    if len(stacks) < len(manifest.stacks):  # the table keeps equal ones once, and rows would name others
        raise InputFileError(path, "is inconsistent: a stack is empty or there twice")
    try:
        settings = msgspec.convert(manifest.settings, Settings, strict=True)
    except msgspec.ValidationError as e:
        raise InputFileError(path, f"has damaged settings ({printable(str(e), 120)})") from None
    return Trace(
        requests=requests,
        decisions=decisions,
        stacks=stacks,
        phases=tuple(manifest.phases),
        pools=tuple(manifest.pools),
        observations=tuple(Observation(*o) for o in manifest.observations),
        settings=settings,
        torch=manifest.torch,
        card=manifest.card,
        device=manifest.device,
        device_total=manifest.device_total,
        initial=_read_back(manifest.initial),
        final=None if manifest.final is None else _read_back(manifest.final),
        lost=tuple(Loss(*x) for x in manifest.lost),
        placement=manifest.placement,
        source=manifest.source,
        provenance=manifest.provenance,
        confs=tuple(manifest.confs),
    )
