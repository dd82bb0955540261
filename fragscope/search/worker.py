"""A process that replays traces under one conf after the other: ``python -m fragscope.search.worker``.

It reads lines of JSON, first what to load, then a conf each, and answers each conf with a line of outcomes. It ends
with its standard input, and on Linux with its parent, however that ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def main() -> None:
    """Serve until the input ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from fragscope.search.play import play_one  # noqa: PLC0415 - takes a while, and the parent may end meanwhile
    from fragscope.search.subject import Given, load_subject  # noqa: PLC0415

    task = json.loads(sys.stdin.readline() or "null")
    if task is None:
        return
    given = Given(**task["given"])
    subjects = [load_subject(name, given) for name in task["names"]]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does not get between the answers
    for line in sys.stdin:
        conf = json.loads(line)
        outcomes = [asdict(play_one(s, conf, compiled=task["compiled"])) for s in subjects]
        print(json.dumps(outcomes), file=answers, flush=True)


if __name__ == "__main__":
    main()
