"""When the compiled loop is worth its start: one rule for single replays and for searches of many."""

from __future__ import annotations

from fragscope.allocator.engine.compiled import can_compile, is_compiled_before

INTERPRETED, COMPILED = 20e-6, 1.5e-6  # seconds a request, about; it grows with what is live
LOADING = 1.0  # seconds until code that was compiled before is there, about
COMPILING = 60.0  # seconds that compiling takes, about


def worth_compiling(requests: int, jobs: int = 1) -> bool:
    """Whether the compiled loop serves so many requests sooner, loading or even compiling it included.

    Args:
        requests: to be served in all, by all processes.
        jobs: processes that share them; each loads the code.
    """
    if not can_compile():
        return False
    gained = requests * (INTERPRETED - COMPILED) / jobs
    return gained > (LOADING if is_compiled_before() else COMPILING)
