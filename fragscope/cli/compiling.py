"""Telling that the allocator's loop is being compiled, which takes a while and happens once."""

from __future__ import annotations

import sys


def announce_compilation(requests: int) -> None:
    """Compile now, and say so, if the loop is going to run compiled for the first time on this machine.

    Args:
        requests: rows of the longest trace that is going to be replayed.
    """
    from fragscope.allocator import worth_compiling
    from fragscope.allocator.engine.compiled import compile_now, is_compiled_before

    if not worth_compiling(requests) or is_compiled_before():
        return
    print("fragscope: compiling the allocator model for this machine; that takes a while, once", file=sys.stderr)
    seconds = compile_now()
    print(f"fragscope: compiled in {seconds:.0f} s, and kept for the next time", file=sys.stderr)
