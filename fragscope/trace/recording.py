"""A recording: the folder that a recorder writes while a program runs, opened as a Trace at any time.

It holds chunks of events (``chunks.py``), what stood when it began (``beginning.json``), the texts that notes refer to
(``texts.jsonl``) and, if the recorder came to its end, what stood then (``end.json``) and call stacks
(``stacks-N.json``). A program that was killed leaves all but the last two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fragscope.errors import InputFileError, printable
from fragscope.trace.containers import write_atomically
from fragscope.units import MIB

FORMAT = "fragscope-recording"
VERSION = 1
_FILE_LIMIT = 256 * MIB
_SEGMENT_KEYS = ("device", "address", "total_size", "stream", "segment_type", "segment_pool_id", "is_expandable")
_BLOCK_KEYS = ("size", "requested_size", "state")

FrameRow = tuple[str, int, str]
T = TypeVar("T")


class Beginning(msgspec.Struct, forbid_unknown_fields=True):
    """What was known when the recording began; sizes are bytes.

    Attributes:
        torch: the installed release.
        device: CUDA device index the recorder was asked for.
        gpu: its name.
        total: its memory.
        free: of that, what was free.
        memory_fraction: in force, None where none was set.
        settings: the allocator's, as snapshots report them.
        segments: as snapshots report them, of all devices.
        pid: of the process.
        tracked: whether events come from the tracker, and not from PyTorch's history.
        stacks: ``none``, ``python`` or ``all``.
        device_wide: whether samples of used memory are those of the whole device; None where none are taken.
    """

    torch: str
    device: int
    gpu: str
    total: int
    free: int
    memory_fraction: float | None
    settings: dict[str, Any]
    segments: list[dict[str, Any]]
    pid: int
    tracked: bool
    stacks: str
    device_wide: bool | None
    format: str = FORMAT
    version: int = VERSION


class RecordedLoss(msgspec.Struct, array_like=True):
    """A ``Loss``, stored."""

    code: str
    detail: str
    events: int


class End(msgspec.Struct, forbid_unknown_fields=True):
    """What was known when the recording ended.

    Attributes:
        segments: as snapshots report them, of all devices.
        lost: what the recorder knows to be missing.
        provenance: command and the like.
    """

    segments: list[dict[str, Any]]
    lost: list[RecordedLoss]
    provenance: dict[str, str]


class DeviceStacks(msgspec.Struct, forbid_unknown_fields=True):
    """Call stacks of the last events of a device; notes and snapshots do not count.

    Attributes:
        device: CUDA device index.
        parted: events before those whose history entries are not the same event.
        frames: file, line, function.
        stacks: indices of frames, innermost first.
        of: the stack of each of the last events, -1 for none.
    """

    device: int
    parted: int
    frames: list[FrameRow]
    stacks: list[list[int]]
    of: list[int]


def is_recording(path: Path) -> bool:
    """Whether a path is the folder of a recording."""
    return (path / "beginning.json").is_file()


def write_beginning(folder: Path, beginning: Beginning) -> None:
    """Store what stood at the start; frames of segments are left out."""
    beginning.segments = _plain(beginning.segments)
    write_atomically(folder / "beginning.json", msgspec.json.encode(beginning))


def write_end(folder: Path, end: End) -> None:
    """Store what stood at the end."""
    end.segments = _plain(end.segments)
    write_atomically(folder / "end.json", msgspec.json.encode(end))


def write_stacks(folder: Path, stacks: list[DeviceStacks]) -> None:
    """Store call stacks, a file a device."""
    for of_device in stacks:
        write_atomically(folder / f"stacks-{of_device.device}.json", msgspec.json.encode(of_device))


def _plain(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Segments with what a Trace needs of them."""
    return [
        {
            **{key: segment[key] for key in _SEGMENT_KEYS if key in segment},
            "blocks": [{key: block[key] for key in _BLOCK_KEYS} for block in segment["blocks"]],
        }
        for segment in segments
    ]


def read_beginning(folder: Path) -> Beginning:
    """What is known of the start.

    Raises:
        InputFileError: the file is missing, damaged, or of another version.
    """
    beginning = _read(folder / "beginning.json", Beginning)
    if beginning.format != FORMAT or beginning.version != VERSION:
        raise InputFileError(folder, f"is a recording of version {beginning.version}; this fragscope reads {VERSION}")
    return beginning


def read_end(folder: Path) -> End | None:
    """What is known of the end; None where the recorder did not come to it."""
    path = folder / "end.json"
    return _read(path, End) if path.exists() else None


def read_stacks(folder: Path, device: int) -> DeviceStacks | None:
    """Call stacks of a device's events, if there are any."""
    path = folder / f"stacks-{device}.json"
    if not path.exists():
        return None
    stacks = _read(path, DeviceStacks)
    if any(not -1 <= s < len(stacks.stacks) for s in stacks.of):
        raise InputFileError(path, "is inconsistent: an event's stack is not in the file")
    if any(not 0 <= f < len(stacks.frames) for stack in stacks.stacks for f in stack):
        raise InputFileError(path, "is inconsistent: a stack's frame is not in the file")
    return stacks


def read_texts(folder: Path) -> list[str]:
    """Texts that notes refer to; a line that was not written whole is left out."""
    path = folder / "texts.jsonl"
    texts = []
    try:
        if not path.exists():
            return []
        if path.is_symlink() or not path.is_file():
            raise InputFileError(path, "is not a regular file")
        if path.stat().st_size > _FILE_LIMIT:
            raise InputFileError(path, "is too large for the texts of a recording")
        for line in path.read_bytes().split(b"\n"):
            if line:
                texts.append(msgspec.json.decode(line, type=str))
    except OSError as e:
        raise InputFileError(path, (e.strerror or type(e).__name__).lower()) from None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass  # the last line, cut off
    return texts


def _read(path: Path, kind: type[T]) -> T:
    try:
        if not path.is_file():
            raise InputFileError(path, "is missing, or not a regular file")
        if path.stat().st_size > _FILE_LIMIT:
            raise InputFileError(path, "is too large for what it should be")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as e:
        raise InputFileError(path, (e.strerror or type(e).__name__).lower()) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InputFileError(path, f"is damaged: {printable(str(e), 160)}") from None
