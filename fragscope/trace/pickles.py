"""Reading a pickle that may be hostile: only builtin containers, strings and numbers, and bounded memory.

Two walls. First the opcode stream is walked without building anything: every opcode must be one that containers,
strings and numbers need, every length must lie inside the data, memo slots must be plausible, and the containers
announced must stand in proportion to the bytes. Then the C unpickler builds the value with a class whose
``find_class`` refuses, so that nothing can be called even if the first wall had a hole.
"""

from __future__ import annotations

import gc
import io
import pickle
import re
from pathlib import Path
from typing import Any

from fragscope.errors import InputFileError, printable

# Opcodes that import, call, or reach outside the stream, and what to tell the user about them.
_CALLS = {
    b"c": "GLOBAL", b"\x93": "STACK_GLOBAL", b"R": "REDUCE", b"b": "BUILD", b"i": "INST", b"o": "OBJ",
    b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4",
    b"P": "PERSID", b"Q": "BINPERSID", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER",
}  # fmt: skip

# Fixed-length opcodes with harmless meaning. LONG_BINPUT ('r') is bounded separately: its argument sizes the memo.
_FIXED = (
    rb"[N\x88\x89()\]}t\x85\x86\x87aesu\x94012]"  # None, booleans, MARK, containers, APPEND(S), SETITEM(S), MEMOIZE, POP
    rb"|K.|M..|J....|G.{8}|h.|j....|q."  # integers, float, memo reads, BINPUT
    rb"|\x95.{8}"  # FRAME: only a hint, verified by the unpickler
)
# Length-prefixed payloads: opcode -> bytes of length field
_SIZED = {
    ord("X"): 4, ord("\x8c"): 1, ord("\x8d"): 8,  # unicode
    ord("T"): 4, ord("U"): 1, ord("B"): 4, ord("C"): 1, ord("\x8e"): 8, ord("\x96"): 8,  # bytes
    ord("\x8a"): 1, ord("\x8b"): 4,  # long integers
}  # fmt: skip
_LONGEST_INTEGER = 64  # bytes; addresses, sizes and times need 8
_CONTAINER_BYTES = 64  # an empty list or dict in CPython
_CONTAINER_SHARE = 12  # bytes of containers per byte of file: real snapshots stay below 4
_CONTAINER_FREE = 16 * 1024 * 1024


def load_plain_pickle(data: bytes, path: Path) -> Any:
    """The value of a pickle made of dicts, lists, tuples, strings, bytes, numbers, booleans and None.

    Args:
        data: the pickle.
        path: the file it came from, for errors.

    Raises:
        InputFileError: the data is not a pickle, is truncated, tries to import or call anything (nothing is called),
            or would need far more memory than a snapshot of its size.
    """
    _check_opcodes(data, path)
    was_enabled = gc.isenabled()
    gc.disable()  # millions of small dicts: the collector would walk them over and over
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except InputFileError:
        raise
    except MemoryError:
        raise InputFileError(path, "needs more memory than this machine has") from None
    except Exception as e:  # a damaged pickle raises nearly anything
        raise InputFileError(path, f"is not a readable pickle ({type(e).__name__}: {printable(str(e), 120)})") from None
    finally:
        if was_enabled:
            gc.enable()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refers to a persistent object")


def _check_opcodes(data: bytes, path: Path) -> None:
    if not data.startswith(b"\x80") or len(data) < 3:
        raise InputFileError(path, "is not a PyTorch memory snapshot (no binary pickle inside)")
    if data[1] > pickle.HIGHEST_PROTOCOL:
        raise InputFileError(path, f"is a pickle of protocol {data[1]}; this Python reads up to 5")
    containers = sum(data.count(c) for c in (b"}", b"]", b"\x85", b"\x86", b"\x87"))
    if containers * _CONTAINER_BYTES > _CONTAINER_FREE + _CONTAINER_SHARE * len(data):
        raise InputFileError(path, "announces far more containers than a snapshot of its size holds; refused")
    # LONG_BINPUT makes the C unpickler allocate a memo of that many slots: allow indices below the file's length.
    top, second = len(data) >> 24, (len(data) >> 16) & 0xFF
    put = rb"r...[\x00-%b]" % _escaped(min(top, 255)) if top else rb"r..[\x00-%b]\x00" % _escaped(second)
    run = re.compile(b"(?:" + _FIXED + b"|" + put + b")*+", re.DOTALL)
    position, end = 2, len(data)
    while True:
        found = run.match(data, position)
        assert found is not None  # the pattern matches the empty string
        position = found.end()
        if position >= end:
            raise InputFileError(path, "is truncated: the pickle has no end")
        opcode = data[position]
        if opcode == ord("."):
            if data[position + 1 :].strip(b"\0"):
                raise InputFileError(path, "has data after the pickle's end")
            return
        width = _SIZED.get(opcode)
        if width is not None:
            start = position + 1 + width
            length = int.from_bytes(data[position + 1 : start], "little")
            if start + length > end:
                raise InputFileError(path, "is truncated: a value reaches past the end of the pickle")
            if opcode in (0x8A, 0x8B) and length > _LONGEST_INTEGER:
                raise InputFileError(path, f"holds an integer of {length} bytes; refused")
            position = start + length
            continue
        name = _CALLS.get(data[position : position + 1])
        if name is not None:
            raise InputFileError(
                path, f"tries to run code (pickle opcode {name} at byte {position}); refused, nothing was called"
            )
        if end - position < 9 and opcode in b"KMJGhjqr\x95":
            raise InputFileError(path, "is truncated: the pickle ends inside a value")
        raise InputFileError(
            path, f"is not a PyTorch memory snapshot (byte {position} holds 0x{opcode:02x}, which no snapshot has)"
        )


def _escaped(value: int) -> bytes:
    return rb"\x%02x" % value
