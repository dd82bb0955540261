"""The engine's functions, compiled with numba from the source that also runs interpreted.

The compiled code is kept in the user's cache folder under a digest of all the sources, so that an edited file is never
served by code compiled from another.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from fragscope.allocator.engine.tables import new_state
from fragscope.cache import cache_folder

_ENGINE = (
    "kinds", "state", "counters", "sizes", "free_lists", "driver", "blocks", "expandable", "memory", "requests",
    "raw", "decide",
)  # fmt: skip
_MODULES = ("fragscope.trace.sizes", *(f"fragscope.allocator.engine.{name}" for name in _ENGINE))

# What every request goes through; calls cost as much as their work does. The rest is compiled once.
_INLINED = frozenset(
    {
        "log", "new_block", "drop_block", "link", "is_split", "is_expandable", "put_idle", "take_idle", "is_held",
        "change_active", "merge", "up", "down", "up_idle", "note_peak", "up_class", "down_class", "change_class",
        "count_up", "count_down", "floor_log2", "interval_of", "block_bytes", "round_size", "segment_size",
        "segment_bytes", "is_looking_away", "malloc", "search", "candidate", "_should_split", "_hand_out", "free",
        "_free_block", "process_events", "is_full", "lacks_blocks",
        "lacks_log", "before",
    }
)  # fmt: skip


def can_compile() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def is_compiled_before() -> bool:
    """Whether the cache holds compiled code for these sources."""
    return any(_cache_folder().rglob("*.nbc"))


@cache
def compiled_decide() -> Callable[..., int]:
    """``decide.decide`` compiled.

    Raises:
        ImportError: numba is not installed.
    """
    import numba  # noqa: PLC0415 - optional, and half a second to import

    folder = _cache_folder()
    keeps = True
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        keeps = False  # compiled anew in every process
    replaced: dict[int, Any] = {}
    scopes: list[dict[str, Any]] = []
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        for name in _MODULES:
            module = importlib.import_module(name)
            scope = dict(vars(module))
            scopes.append(scope)
            for function in vars(module).values():
                if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
                    copy.__module__ = module.__name__
                    copy.__qualname__ = function.__qualname__
                    # Only the outermost function is kept on disk: the others are compiled into it. None of them makes
                    # an array, so that nothing needs to be counted: without ``_nrt`` they are several times faster.
                    compile_: Any = numba.njit
                    replaced[id(function)] = compile_(
                        copy,
                        _nrt=False,
                        cache=keeps and function.__name__ == "decide",
                        forceinline=function.__name__ in _INLINED,
                    )
        for scope in scopes:
            for name, value in scope.items():
                scope[name] = replaced.get(id(value), value)
    finally:
        config.CACHE_DIR = before
    decide: Callable[..., int] = scopes[-1]["decide"]
    return decide


def _cache_folder() -> Path:
    return cache_folder() / "compiled" / _digest()


@cache
def _digest() -> str:
    """Of the sources, the Python and the numba that compile them."""
    digest = hashlib.sha256()
    for name in _MODULES:
        digest.update(Path(str(importlib.import_module(name).__file__)).read_bytes())
    digest.update(repr((sys.version_info[:3], _numba_version())).encode())
    return digest.hexdigest()[:16]


def _numba_version() -> str:
    try:
        return version("numba")
    except PackageNotFoundError:
        return ""


def compile_now() -> float:
    """Compile, or load what was compiled before; returns the seconds that took."""
    start = time.perf_counter()
    nothing = np.zeros(0, dtype=np.int64)
    state = new_state(1, 1, compiled=True)
    compiled_decide()(state, nothing, nothing, nothing, nothing, nothing, 0, 0)
    return time.perf_counter() - start
