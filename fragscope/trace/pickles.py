"""Reading a pickle that may be hostile: only builtin containers, strings and numbers, and bounded memory.

Two walls. First the opcode stream is walked without building anything: every opcode must be one that containers,
strings and numbers need, every length must lie inside the data, what is taken from the stack or the memo must have been
put there, keys must be text, memo slots must be plausible, and the containers announced must stand in proportion to the
bytes. Then the C unpickler builds the value with a class whose ``find_class`` refuses, so that nothing can be called
even if the first wall had a hole.
"""

from __future__ import annotations

import gc
import io
import pickle
import re
from pathlib import Path
from typing import Any

from fragscope.errors import InputFileError, printable
from fragscope.units import MIB

# Opcodes that import, call, or reach outside the stream, and what to tell the user about them.
_CALLS = {
    b"c": "GLOBAL", b"\x93": "STACK_GLOBAL", b"R": "REDUCE", b"b": "BUILD", b"i": "INST", b"o": "OBJ",
    b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4",
    b"P": "PERSID", b"Q": "BINPERSID", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER",
}  # fmt: skip

# What an opcode leaves on the stack, as far as anything here depends on it.
_SCALAR, _TEXT, _LIST, _DICT, _TUPLE = range(5)

# Opcodes with an argument of fixed length that push a number, a boolean or None: opcode -> bytes in all.
_PUSHES = bytearray(256)
for _opcode, _length in {b"N": 1, b"\x88": 1, b"\x89": 1, b"K": 2, b"M": 3, b"J": 5, b"G": 9}.items():
    _PUSHES[_opcode[0]] = _length
# Length-prefixed payloads: opcode -> bytes of the length field.
_SIZED = {
    ord("X"): 4, ord("\x8c"): 1, ord("\x8d"): 8,  # text
    ord("T"): 4, ord("U"): 1,  # text of Python 2
    ord("B"): 4, ord("C"): 1, ord("\x8e"): 8, ord("\x96"): 8,  # bytes
    ord("\x8a"): 1, ord("\x8b"): 4,  # long integers
}  # fmt: skip
_IS_TEXT = frozenset(b"X\x8c\x8dTU")
_IS_LONG = frozenset(b"\x8a\x8b")
_TUPLES = {ord(")"): 0, ord("\x85"): 1, ord("\x86"): 2, ord("\x87"): 3, ord("t"): 0}  # opcode -> items, "t" by mark
_ONE_BYTE_SLOTS = 256  # memo slots that BINGET reaches
_PLAIN_VALUE = (
    rb"(?:K.|M..|J....|\x8a(?:\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}|\x09.{9})"  # integers
    rb"|N|\x88|\x89|G.{8}|h.|j....)"  # None, booleans, float, anything from the memo
)
_SHORT_TEXT = rb"\x8c(?:\x00|\x01.|\x02.{2}|\x03.{3}|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8})"
_LONGEST_INTEGER = 16  # bytes; addresses, sizes and times need 8 and a sign
# CPython's bytes for a container with one item; what it holds beyond that stands in proportion to the file anyway.
_DICT_BYTES, _LIST_BYTES, _TUPLE_BYTES = 232, 88, 48
_CONTAINER_SHARE = 24  # bytes of containers per byte of file: recorded snapshots stay below 9
_CONTAINER_FREE = 16 * MIB


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
    """Walk the opcodes with a stack of kinds; see the module's docstring for what must hold."""
    if not data.startswith(b"\x80") or len(data) < 3:
        raise InputFileError(path, "is not a PyTorch memory snapshot (no binary pickle inside)")
    if data[1] > pickle.HIGHEST_PROTOCOL:
        raise InputFileError(path, f"is a pickle of protocol {data[1]}; this Python reads up to 5")
    try:
        end = _walk(data, path)
    except (IndexError, KeyError):
        raise InputFileError(path, "is truncated or damaged: the pickle is not well-formed") from None
    if data.count(b"\0", end) != len(data) - end:
        raise InputFileError(path, "has data after the pickle's end")


def _walk(data: bytes, path: Path) -> int:
    """Check up to the STOP opcode and return the position after it.

    Where an opcode reaches below a mark, the unpickler itself stops; up to there both see the same stack.

    Raises:
        InputFileError: an opcode, a length or a structure that no snapshot has.
        IndexError, KeyError: the pickle ends too early, or takes what was never put on its stack or into its memo.
    """
    end, at = len(data), 2
    stack = bytearray()
    marks: list[int] = []
    memo: dict[int, int] = {}
    cost, budget = 0, _CONTAINER_FREE + _CONTAINER_SHARE * end
    pushes, sized, push = _PUSHES, _SIZED, stack.append
    flat: re.Pattern[bytes] | None = None  # made once, when the one-byte memo slots are full; dropped if one changes
    tried = False
    while True:
        opcode = data[at]
        if opcode == 0x68:  # BINGET, half of all opcodes
            push(memo[data[at + 1]])
            at += 2
        elif length := pushes[opcode]:
            push(_SCALAR)
            at += length
        elif opcode == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
            at += 1
        elif (width := sized.get(opcode)) is not None:
            start = at + 1 + width
            length = int.from_bytes(data[at + 1 : start], "little")
            if start + length > end:
                raise InputFileError(path, "is truncated: a value reaches past the end of the pickle")
            if opcode in _IS_LONG and length > _LONGEST_INTEGER:
                raise InputFileError(path, f"holds an integer of {length} bytes; refused")
            push(_TEXT if opcode in _IS_TEXT else _SCALAR)
            at = start + length
        elif opcode == 0x28:  # MARK
            marks.append(len(stack))
            at += 1
        elif opcode == 0x75:  # SETITEMS
            mark = marks.pop()
            if stack[mark - 1] != _DICT or (len(stack) - mark) % 2:
                raise _not_a_snapshot(data, at, path)
            _check_keys(stack[mark::2], path)
            del stack[mark:]
            at += 1
        elif opcode == 0x7D:  # EMPTY_DICT
            push(_DICT)
            if not tried and len(memo) >= _ONE_BYTE_SLOTS:
                flat, tried = _flat_dict(memo), True
            if flat is not None and (whole := flat.match(data, at)):
                memo[len(memo)] = _DICT
                if whole[1]:
                    memo[len(memo)] = _TEXT
                at = whole.end()
            else:
                at += 1
            cost += _DICT_BYTES
            if cost > budget:
                raise _too_many(path)
        elif opcode == 0x71:  # BINPUT
            index = data[at + 1]
            if index in memo:
                flat = None
            memo[index] = stack[-1]
            at += 2
        elif opcode == 0x6A:  # LONG_BINGET
            push(memo[int.from_bytes(data[at + 1 : at + 5], "little")])
            at += 5
        elif opcode == 0x72:  # LONG_BINPUT
            index = int.from_bytes(data[at + 1 : at + 5], "little")
            if index > end:  # the unpickler allocates that many slots
                raise InputFileError(path, f"wants a memo of {index} slots, more than the file has bytes; refused")
            if index in memo:
                flat = None
            memo[index] = stack[-1]
            at += 5
        elif opcode == 0x5D:  # EMPTY_LIST
            push(_LIST)
            at += 1
            cost += _LIST_BYTES
            if cost > budget:
                raise _too_many(path)
        elif opcode == 0x65:  # APPENDS
            mark = marks.pop()
            if stack[mark - 1] != _LIST:
                raise _not_a_snapshot(data, at, path)
            del stack[mark:]
            at += 1
        elif opcode == 0x61:  # APPEND
            stack.pop()
            if stack[-1] != _LIST:
                raise _not_a_snapshot(data, at, path)
            at += 1
        elif opcode == 0x73:  # SETITEM
            if stack[-3] != _DICT:
                raise _not_a_snapshot(data, at, path)
            _check_keys(stack[-2:-1], path)
            del stack[-2:]
            at += 1
        elif opcode in _TUPLES:  # EMPTY_TUPLE, TUPLE, TUPLE1 to TUPLE3
            mark = marks.pop() if opcode == 0x74 else len(stack) - _TUPLES[opcode]
            if mark < 0:
                raise IndexError
            del stack[mark:]
            push(_TUPLE)
            at += 1
            cost += _TUPLE_BYTES
            if cost > budget:
                raise _too_many(path)
        elif opcode == 0x95:  # FRAME: a hint, verified by the unpickler
            at += 9
        elif opcode == 0x30:  # POP, which takes the mark where nothing stands above it
            if marks and len(stack) == marks[-1]:
                marks.pop()
            else:
                stack.pop()
            at += 1
        elif opcode == 0x2E:  # STOP
            if len(stack) != 1 or marks:
                raise IndexError
            return at + 1
        else:
            name = _CALLS.get(data[at : at + 1])
            if name is not None:
                raise InputFileError(
                    path, f"tries to run code (pickle opcode {name} at byte {at}); refused, nothing was called"
                )
            raise _not_a_snapshot(data, at, path)


def _flat_dict(memo: dict[int, int]) -> re.Pattern[bytes] | None:
    """A pattern for a whole dict of known keys and plain values, as nearly every event of a snapshot is.

    It matches what the walk would accept opcode by opcode, and saves most of its time. One value may be a short string,
    which takes a memo slot of its own (group 1): releases write ``compile_context`` anew for every event.
    """
    known = b"".join(b"\\x%02x" % i for i in range(_ONE_BYTE_SLOTS) if memo.get(i) == _TEXT)
    if not known:
        return None
    key = b"h[" + known + b"]"
    pairs = b"(?:" + key + _PLAIN_VALUE + b")*+"
    return re.compile(rb"\}\x94\(" + pairs + b"(" + key + _SHORT_TEXT + rb"\x94)?" + pairs + b"u", re.DOTALL)


def _too_many(path: Path) -> InputFileError:
    return InputFileError(path, "announces far more containers than a snapshot of its size holds; refused")


def _check_keys(kinds: bytearray, path: Path) -> None:
    """Only text may be a key. Its hash is seeded; numbers could be chosen to collide, tuples nested without end."""
    if kinds.strip(bytes([_TEXT])):
        raise InputFileError(path, "is not a PyTorch memory snapshot (a dict has a key that is not text)")


def _not_a_snapshot(data: bytes, at: int, path: Path) -> InputFileError:
    return InputFileError(path, f"is not a PyTorch memory snapshot (byte {at} holds 0x{data[at]:02x} out of place)")
