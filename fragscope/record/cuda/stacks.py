"""Call stacks of events, from PyTorch's own history.

The history and the tracker see the same events in the same order. The history is a ring and may have begun later, so
the two are laid side by side from their ends, and held against each other event by event.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from fragscope.trace.chunks import KINDS, NOTE, EventKind, Records, read_chunks
from fragscope.trace.recording import DeviceStacks, FrameRow


class StackCollector:
    """Numbers call stacks, each distinct one once, and remembers which event has which."""

    def __init__(self) -> None:
        self._frames: dict[FrameRow, int] = {}
        self._stacks: dict[tuple[int, ...], int] = {}
        self._of = array("q")

    def add(self, entries: list[dict[str, Any]]) -> None:
        """The events of history entries, in order; those of one snapshot share their lists of frames."""
        numbers: dict[int, int] = {}
        for entry in entries:
            listed = entry.get("frames") or ()
            number = numbers.get(id(listed)) if listed else -1
            if number is None:
                rows = ((str(f["filename"]), int(f["line"]), str(f["name"])) for f in listed)
                stack = tuple(self._frames.setdefault(row, len(self._frames)) for row in rows)
                number = numbers[id(listed)] = self._stacks.setdefault(stack, len(self._stacks))
            self._of.append(number)

    def finish(self, device: int, parted: int = 0) -> DeviceStacks:
        """All of them, in the form that a recording stores."""
        return DeviceStacks(
            device=device,
            parted=parted,
            frames=list(self._frames),
            stacks=[list(stack) for stack in self._stacks],
            of=self._of.tolist(),
        )


def stacks_of(device_traces: list[list[dict[str, Any]]], folder: Path) -> list[DeviceStacks]:
    """The stacks of each device's tracked events, from the history as it stands and the chunks written so far."""
    chunks = list(read_chunks(folder))
    if not chunks:
        return []
    records = np.concatenate(chunks)
    return [
        _of_device(device, listed, _events_before_last_snapshot(records, device))
        for device, entries in enumerate(device_traces)
        if (listed := [e for e in entries if e["action"] in KINDS and e["action"] != "snapshot"])
    ]


def _events_before_last_snapshot(records: Records, device: int) -> Records:
    """The events that the snapshot which gave the entries can have seen; threads go on while it is being made."""
    mine = records[(records["kind"] < NOTE) & (records["device"] == device)]
    snapshots = np.flatnonzero(mine["kind"] == EventKind.SNAPSHOT)
    if len(snapshots):
        mine = mine[: snapshots[-1]]
    events: Records = mine[mine["kind"] != EventKind.SNAPSHOT]
    return events


def _of_device(device: int, entries: list[dict[str, Any]], events: Records) -> DeviceStacks:
    common = min(len(entries), len(events))
    entries, events = entries[len(entries) - common :], events[len(events) - common :]
    agree = np.fromiter((KINDS[e["action"]] for e in entries), dtype=np.int64, count=common) == events["kind"]
    agree &= np.fromiter((e["size"] for e in entries), dtype=np.int64, count=common) == events["size"]
    parted = int(np.flatnonzero(~agree)[-1]) + 1 if not agree.all() else 0
    collected = StackCollector()
    collected.add(entries[parted:])
    return collected.finish(device, parted)
