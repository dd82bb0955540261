"""Small PyTorch memory snapshots, written out by hand with the keys that each release writes."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

MIB = 2**20
BASE = 0x7F00_0000_0000
RELEASES = ("2.9", "2.10", "2.11", "2.12", "2.13", "2.14")
FRAME = {"filename": "model.py", "line": 12, "name": "forward"}


def entry(action: str, addr: int, size: int, stream: int = 0, *, release: str = "2.11", **more: Any) -> dict[str, Any]:
    """One trace entry with the keys of the release."""
    place = {"device_free": addr} if action == "oom" else {"addr": addr}
    out: dict[str, Any] = {"action": action, **place, "size": size, "stream": stream, "time_us": 1_700_000_000_000_000}
    out["compile_context"] = "N/A"
    if release not in ("2.9",):
        out["user_metadata"] = ""
    if release in ("2.12", "2.13", "2.14"):
        out["pool_id"] = (0, 0)
    return {**out, **more}


def segment(addr: int, size: int, blocks: list[tuple[int, str]], stream: int = 0) -> dict[str, Any]:
    """One segment whose blocks are given as (bytes, state)."""
    out: dict[str, Any] = {"device": 0, "address": addr, "total_size": size, "stream": stream}
    out |= {"allocated_size": 0, "active_size": 0, "requested_size": 0, "segment_type": "small", "frames": []}
    out |= {"segment_pool_id": (0, 0), "is_expandable": False, "blocks": []}
    for length, state in blocks:
        block = {"address": addr, "size": length, "requested_size": length, "state": state, "frames": []}
        out["blocks"].append(block)
        addr += length
    return out


def settings(release: str = "2.11", conf: str = "") -> dict[str, Any]:
    """``allocator_settings`` of a run under the default conf."""
    out: dict[str, Any] = {
        "PYTORCH_CUDA_ALLOC_CONF": conf,
        "max_split_size": -1,
        "garbage_collection_threshold": 0.0,
        "expandable_segments": False,
        "pinned_num_register_threads": 1,
        "release_lock_on_cudamalloc": False,
        "pinned_use_cuda_host_register": False,
        "graph_capture_record_stream_reuse": False,
        "roundup_power2_divisions": {str(2**n): 0 for n in range(16)},
    }
    if release in ("2.13", "2.14"):
        out |= {"max_round_threshold": 0, "max_cached_size": 0}
    return out


def snapshot(
    entries: list[dict[str, Any]], segments: list[dict[str, Any]] | None = None, release: str = "2.11"
) -> dict[str, Any]:
    """A snapshot of one device."""
    out: dict[str, Any] = {"segments": segments or [], "device_traces": [entries]}
    out |= {"allocator_settings": settings(release), "external_annotations": []}
    if release == "2.14":
        out |= {"host_segments": [], "host_traces": []}
    return out


def small_snapshot(release: str = "2.11") -> dict[str, Any]:
    """Two allocations in one segment, the first of them freed: what the allocator of every release does with them."""

    def e(action: str, addr: int, size: int, **more: Any) -> dict[str, Any]:
        return entry(action, addr, size, release=release, **more)

    return snapshot(
        [
            e("segment_alloc", BASE, 2 * MIB),
            e("alloc", BASE, 400, frames=[FRAME]),
            e("alloc", BASE + 512, 1000, frames=[FRAME]),
            e("free_requested", BASE, 400),
            e("free_completed", BASE, 400),
        ],
        [segment(BASE, 2 * MIB, [(512, "inactive"), (1024, "active_allocated"), (2 * MIB - 1536, "inactive")])],
        release,
    )


def write(path: Path, value: Any, protocol: int = 4) -> Path:
    """Pickle a value into a file."""
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def text(value: str) -> bytes:
    """The opcode that pushes a string."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def hostile_pickle(body: bytes) -> bytes:
    """A pickle from opcodes written by hand."""
    return b"\x80\x04" + body + b"."
