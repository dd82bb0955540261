"""A recorder of what the stand-in torch allocates, with the shape of the real one; and the reader of its folders.

``STAND_IN_RECORDER`` makes it fail: ``start`` with a message, or with ENOSPC at ``stop`` or in both (``full``).
"""

from __future__ import annotations

import errno
import json
import os
import sys
import types
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fragscope.errors import NotMeasuredError
from fragscope.trace import Frame, Observation, RequestKind, RequestLog, StackTable, Trace


class Stacks(StrEnum):
    NONE = "none"
    PYTHON = "python"
    ALL = "all"


@dataclass(frozen=True)
class RecorderOptions:
    stacks: Stacks = Stacks.NONE
    device: int | None = None
    max_entries: int = 1_000_000
    sample_non_torch: float | None = None
    keep: Path | None = None
    gives_way: bool = False


class Recorder:
    def __init__(self, options: RecorderOptions) -> None:
        self.options = options

    def start(self) -> None:
        import torch

        assert torch.cuda.is_initialized()
        mode = os.environ.get("STAND_IN_RECORDER", "")
        if mode.startswith("start:"):
            raise NotMeasuredError(mode.removeprefix("start:"))
        assert self.options.keep is not None
        begin = {
            "device": torch.cuda.current_device() if self.options.device is None else self.options.device,
            "stacks": self.options.stacks,
            "max_entries": self.options.max_entries,
            "sample_non_torch": self.options.sample_non_torch,
        }
        (self.options.keep / "beginning").write_text(json.dumps(begin))
        self.events = (self.options.keep / "events").open("w", buffering=1)
        torch.cuda._listeners.append(lambda device, size: print(device, size, file=self.events))
        torch.cuda._observers = [lambda: print(begin["device"], -1, file=self.events)]

    def stop(self, provenance: dict[str, str]) -> Trace:
        import torch

        torch.cuda._observers = []
        if os.environ.get("STAND_IN_RECORDER") == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.options.keep))
        (self.options.keep / "end").write_text(json.dumps(provenance))
        return open_recording(self.options.keep)


def is_recording(folder: Path) -> bool:
    return (folder / "beginning").is_file()


def open_recording(folder: Path, device: int | None = None) -> Trace:
    begin = json.loads((folder / "beginning").read_text())
    wanted = begin["device"] if device is None else device
    log = RequestLog()
    for number, line in enumerate((folder / "events").read_text().splitlines()):
        at, size = map(int, line.split())
        if at == wanted and size < 0:
            log.append(RequestKind.OBSERVATION, size=0)
        elif at == wanted:
            log.append(RequestKind.ALLOC, id=number, size=size, stack=-1 if begin["stacks"] == "none" else 0)
    requests = log.finish()
    if not len(requests):
        raise NotMeasuredError("nothing was allocated")
    end = folder / "end"
    provenance = json.loads(end.read_text()) if end.exists() else {}
    stacks = StackTable() if begin["stacks"] == "none" else StackTable([(Frame("program.py", 1, "f"),)])
    return Trace(
        requests=requests, stacks=stacks, torch="2.11.0", card="h100-80gb", device=wanted, source="cuda",
        observations=(Observation("torch.cuda.memory_stats"),), provenance={**provenance, "options": json.dumps(begin)},
    )  # fmt: skip


def devices_of(folder: Path) -> tuple[int, ...]:
    return tuple(sorted({int(line.split()[0]) for line in (folder / "events").read_text().splitlines()}))


for name in "recording", "open_recording":
    reader = types.ModuleType(f"fragscope.trace.{name}")
    vars(reader).update(is_recording=is_recording, open_recording=open_recording, devices_of=devices_of)
    sys.modules[reader.__name__] = reader
