"""Begins the recording of a process when torch initialises CUDA; loaded with torch.cuda, by ``sitecustomize.py``.

fragscope itself is imported then, not before. Of torch it needs ``torch.cuda._lazy_init``, which C++ looks up by its
name before the first allocation, and ``is_initialized``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

_CHOOSE_DEVICE = {
    "torch.cuda": ("set_device", "_exchange_device"),
    "torch.accelerator": ("set_device_index",),
}
"""Functions that initialise CUDA and only then choose a device: the recording begins when they have."""

Function = Callable[..., Any]


class Start:
    """Watches torch for its first use of CUDA, begins the recording, and takes itself out of torch again."""

    def __init__(self, session: str) -> None:
        self._session = session
        self._once = threading.Lock()
        self._choosing = 0
        self._replaced: list[tuple[ModuleType, str, Function, Function]] = []

    def watch(self, module: ModuleType) -> None:
        """Wrap what initialises CUDA in a module that has just been imported."""
        for name in _CHOOSE_DEVICE[module.__name__]:
            original = getattr(module, name, None)
            if original is not None:
                self._swap(module, name, original, self._after_choice(original))
        if module.__name__ == "torch.cuda":
            original = module._lazy_init
            wrapped = self._after_initialisation(original)
            # Its submodules took the function by its name when torch.cuda imported them.
            for name, loaded in list(sys.modules.items()):
                if loaded is module or (name.startswith("torch.cuda.") and vars(loaded).get("_lazy_init") is original):
                    self._swap(loaded, "_lazy_init", original, wrapped)

    def _swap(self, module: ModuleType, name: str, original: Function, new: Function) -> None:
        setattr(module, name, new)
        self._replaced.append((module, name, original, new))

    def _after_initialisation(self, original: Function) -> Function:
        @functools.wraps(original)
        def lazy_init(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._begin()
            return result

        return lazy_init

    def _after_choice(self, original: Function) -> Function:
        @functools.wraps(original)
        def choose_device(*args: Any, **kwargs: Any) -> Any:
            self._choosing += 1
            try:
                result = original(*args, **kwargs)
            finally:
                self._choosing -= 1
            self._begin()
            return result

        return choose_device

    def _begin(self) -> None:
        # torch calls _lazy_init from within itself; then it is not yet initialised, and nothing can be recorded.
        if self._choosing or not sys.modules["torch.cuda"].is_initialized() or not self._once.acquire(blocking=False):
            return
        for module, name, original, new in self._replaced:
            if getattr(module, name, None) is new:
                setattr(module, name, original)
        try:
            from fragscope.record.launch.process import begin
        except Exception as e:
            _say_failure(self._session, e)
        else:
            begin(self._session)


def _say_failure(session: str, error: Exception) -> None:
    """One status file, in the form of ``launch/session_folder.py``, where fragscope cannot be loaded."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name == "fragscope":
        reason = f"fragscope is not installed for {sys.executable}"
    status = {"pid": os.getpid(), "state": "failed", "reason": reason}
    try:
        with open(os.path.join(session, f"{os.getpid()}-bootstrap.json"), "w") as f:
            json.dump(status, f)
    except OSError:
        return
