"""A rank set: the recordings of several processes of one job, in one folder.

Members are found by name, nothing is opened: a folder of a thousand ranks lists in no time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fragscope.errors import InputFileError

SUFFIX = ".fscope"
_PROCESS = re.compile(r"(rank|pid)(\d{1,18})(?:-(\d{1,18}))?(?:-cuda(\d{1,18}))?")


@dataclass(frozen=True, slots=True)
class Member:
    """The recording of one process.

    Attributes:
        name: ``rank3`` or ``pid1234``; ``rank3-2`` where the same rank was started again,
            ``rank3-cuda1`` where the process used several devices.
        path: its ``.fscope`` file, or the folder of chunks that a recorder left.
    """

    name: str
    path: Path


def of_device(name: str, device: int | str) -> str:
    """The name of the recording of one device, where a process used several."""
    return f"{name}-cuda{device}"


def process_of(name: str) -> str:
    """The name of the process by that of its recording."""
    return name.partition("-cuda")[0]


def members(folder: Path) -> tuple[Member, ...]:
    """The recordings in a folder: ranks first, then processes without a rank, then others, each in natural order.

    A recording that is there as a file and as chunks (its packing was interrupted) counts once, as the file, which is
    whole once it has its name.

    Raises:
        InputFileError: the folder cannot be read.
    """
    try:
        found = {entry.name: entry.is_dir() for entry in folder.iterdir()}
    except OSError as e:
        raise InputFileError(folder, (e.strerror or type(e).__name__).lower()) from None
    files = {name.removesuffix(SUFFIX) for name, is_folder in found.items() if name.endswith(SUFFIX) and not is_folder}
    files.discard("")
    out = [Member(name, folder / f"{name}{SUFFIX}") for name in files if not name.startswith(".")]
    for name, is_folder in found.items():
        if is_folder and name not in files and _PROCESS.fullmatch(name) and _is_recording(folder / name):
            out.append(Member(name, folder / name))
    return tuple(sorted(out, key=_order))


def expand(path: str) -> tuple[str, ...]:
    """The traces that a user means by a path: those of a rank set, or what opens under that path itself.

    Raises:
        InputFileError: a folder that cannot be read.
    """
    found = members(Path(path)) if Path(path).is_dir() else ()
    return tuple(str(member.path) for member in found) or (path,)


def _is_recording(folder: Path) -> bool:
    from fragscope.trace.recording import is_recording  # noqa: PLC0415

    return bool(is_recording(folder))


def _order(member: Member) -> tuple[int, int, int, int, str]:
    match = _PROCESS.fullmatch(member.name)
    if match is None:
        return (2, 0, 0, 0, member.name)
    device = -1 if match[4] is None else int(match[4])
    return (0 if match[1] == "rank" else 1, int(match[2]), int(match[3] or 1), device, member.name)
