"""What ``fragscope record`` adds to every Python process of a command: this folder comes first on PYTHONPATH.

Python's ``site`` imports this file before the program. It must cost next to nothing, since most processes never use
CUDA, so it imports nothing, and all else is in a file beside it that is loaded with torch.cuda. It must work in any
interpreter, also where fragscope is not installed. Nothing here may raise into the program.
"""

from __future__ import annotations

import os
import sys

SESSION_VARIABLE = "FRAGSCOPE_RECORD_SESSION"  # also in launch/session_folder.py
_HERE = os.path.dirname(os.path.abspath(__file__))
_WATCHED = ("torch.cuda", "torch.accelerator")


class _Finder:
    """Waits for torch.cuda to be imported; finds nothing itself."""

    def __init__(self, session: str) -> None:
        self._session = session
        self._start = None

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in _WATCHED:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                break
        else:
            return None
        import contextlib

        with contextlib.suppress(AttributeError):  # a loader of another kind; the process then has no recording
            self._follow(spec.loader)
        return spec

    def _follow(self, loader) -> None:  # type: ignore[no-untyped-def]
        execute = loader.exec_module

        def exec_module(module: object) -> None:
            execute(module)
            self.watch(module)

        loader.exec_module = exec_module

    def watch(self, module: object) -> None:
        import contextlib

        with contextlib.suppress(Exception):  # torch is not as we know it; the process then has no recording
            if self._start is None:
                from importlib.util import module_from_spec, spec_from_file_location

                spec = spec_from_file_location("_fragscope_start", os.path.join(_HERE, "_fragscope_start.py"))
                assert spec is not None and spec.loader is not None
                start = module_from_spec(spec)
                spec.loader.exec_module(start)
                self._start = start.Start(self._session)
            self._start.watch(module)  # type: ignore[attr-defined]


def _enter(session: str) -> None:
    try:
        os.close(os.open(os.path.join(session, "loaded"), os.O_WRONLY | os.O_CREAT, 0o644))
    except OSError:  # the command that records is over, or the disk is full
        return
    finder = _Finder(session)
    sys.meta_path.insert(0, finder)
    for name in _WATCHED:
        if name in sys.modules:  # a .pth file imported torch
            finder.watch(sys.modules[name])


def _run_the_users_own() -> None:
    """The sitecustomize that would have been found without this folder, which stays in the environment for children."""
    from _frozen_importlib_external import PathFinder  # importlib.machinery's, which takes longer to import

    sys.path[:] = [entry for entry in sys.path if entry != _HERE]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


if SESSION_VARIABLE in os.environ:
    _enter(os.environ[SESSION_VARIABLE])
_run_the_users_own()
