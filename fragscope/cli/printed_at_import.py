"""What scenario files print while they are imported, shown so that it can do no harm.

In a job of GitHub's, a line that begins with ``::`` is a command to the runner: ``::stop-commands::`` of a scenario
file would hide every annotation of the gate after it. So such lines never reach the terminal or the log as they are.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from fragscope.errors import printable

PREFIX = "fragscope: printed at import: "
_LONGEST = 4096  # characters of a line that are shown, and bytes after which one that goes on is shown in parts


@contextlib.contextmanager
def shown_on_stderr() -> Iterator[None]:
    """While files of strangers are imported, stdout stays clean, and what they print goes to stderr line by line.

    That holds for what is written past Python, and by processes that they start. Each line has a prefix and is escaped.
    """
    sys.stdout.flush()
    try:
        kept = os.dup(1), os.dup(2)
    except OSError:  # one of the two is closed, and nobody reads the other as commands
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    read, write = os.pipe()
    # A process that the import leaves running holds the pipe: its end alone does not say that all was read until now.
    end, reached = os.urandom(16), threading.Event()
    threading.Thread(target=_relay, args=(read, os.dup(kept[1]), end, reached), daemon=True).start()
    os.dup2(write, 1)
    os.dup2(write, 2)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        for number, standard in zip(kept, (1, 2), strict=True):
            os.dup2(number, standard)
            os.close(number)
        os.write(write, end)
        os.close(write)
        reached.wait()


def _relay(read: int, out: int, end: bytes, reached: threading.Event) -> None:
    """Show what comes through a pipe until nobody holds its other end; closes both files.

    Args:
        read: the pipe.
        out: where it is shown.
        end: what is written to the pipe where all that came before is to be shown, though a line may be unfinished.
        reached: set when that is so.
    """
    rest = b""
    try:
        while part := os.read(read, 1 << 16):
            before, found, rest = (rest + part).rpartition(end)
            if found:
                _show(before.removesuffix(b"\n").split(b"\n") if before else [], out)
                reached.set()
            *lines, rest = rest.split(b"\n")
            if len(rest) > _LONGEST + len(end):
                lines, rest = [*lines, rest[: -len(end)]], rest[-len(end) :]
            _show(lines, out)
        if rest:
            _show([rest], out)
    finally:
        reached.set()
        os.close(read)
        os.close(out)


def _show(lines: list[bytes], out: int) -> None:
    said = (line.removesuffix(b"\r").decode(errors="backslashreplace") for line in lines)
    text = "".join(f"{PREFIX}{printable(line, _LONGEST)}\n" for line in said)
    left = memoryview(text.encode(errors="backslashreplace"))
    with contextlib.suppress(OSError):  # whoever read it is gone; what is imported goes on
        while left:
            left = left[os.write(out, left) :]
