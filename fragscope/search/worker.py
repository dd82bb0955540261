"""A process that replays traces under one conf after the other: ``python -m fragscope.search.worker``.

It reads lines of JSON, first what to load, then a conf each, and answers each conf with a line of JSON: ``figures``,
or ``error``, after which it ends. Errors travel as plain text; nothing that crosses is ever unpickled. It ends with
its standard input, and on Linux with its parent, however that ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fragscope.errors import FragscopeError, printable, to_plain

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def main() -> None:
    """Serve until the input ends or something fails."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does not get between the answers

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        _serve(answer)
    except FragscopeError as e:
        answer({"error": to_plain(e)})
    except MemoryError:
        answer({"error": to_plain(FragscopeError("replaying needs more memory than there is; --jobs 1 needs less"))})
    except Exception as e:
        answer({"error": to_plain(FragscopeError(_bug(e)))})


def _serve(answer: Callable[[dict[str, Any]], None]) -> None:
    import msgspec  # noqa: PLC0415

    from fragscope.allocator.cards import Card, define  # noqa: PLC0415 - takes a while, and the parent may end meanwhile
    from fragscope.search.play import play_one  # noqa: PLC0415
    from fragscope.search.subject import Given, load_subject  # noqa: PLC0415

    task = json.loads(sys.stdin.readline() or "null")
    if task is None:
        return
    define(msgspec.convert(task["cards"], list[Card]))
    subjects = [load_subject(name, Given(**given)) for name, given in task["subjects"]]
    for line in sys.stdin:
        conf = json.loads(line)
        answer({"figures": [asdict(play_one(s, conf, compiled=task["compiled"])) for s in subjects]})


def _bug(error: Exception) -> str:
    """An error that nobody foresaw, as one line."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    what = printable(f"{type(error).__name__}: {error}", 200)
    return (
        f"a process that replays traces failed at {at.filename}:{at.lineno} ({what}); "
        "this is a bug in fragscope, --jobs 1 shows all of it"
    )


if __name__ == "__main__":
    main()
