"""Where a test can be recorded: on this machine's GPU, or on a card that exists only as an allocator model."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fragscope.testing.recording import Recording, Source
from fragscope.trace import Trace

_NO_TORCH = "torch is not installed (pip install 'fragscope[torch]')"


class Gpu(Protocol):
    """A place where tests are recorded on a GPU."""

    def why_not(self) -> str | None:
        """Why nothing can be recorded; None where it can."""

    def prepare(self) -> None:
        """Undo what earlier tests change about what later ones ask for."""

    def start(self) -> Source:
        """Record from now on.

        Raises:
            NotMeasuredError: recording cannot work here; one line.
        """


class CudaGpu:
    """The GPU of this process, recorded through PyTorch's allocator."""

    def why_not(self) -> str | None:
        """Why nothing can be recorded; None where it can."""
        if find_spec("torch") is None:
            return _NO_TORCH
        from fragscope.record.process import why_no_cuda

        return why_no_cuda()

    def prepare(self) -> None:
        """Undo what earlier tests change about what later ones ask for."""
        from fragscope.record.process import forget_earlier_work

        forget_earlier_work()

    def start(self) -> Source:
        """Record from now on, with the stacks that a failure shows."""
        from fragscope.record.cuda import Recorder, RecorderOptions, Stacks

        recorder = Recorder(RecorderOptions(stacks=Stacks.PYTHON))
        recorder.start()
        source: Source = recorder
        return source


gpu: Callable[[], Gpu] = CudaGpu
"""What tests without the virtual card are recorded on; fragscope's own tests put a stand-in here."""


def record_on_gpu() -> Recording:
    """Record from now on.

    Raises:
        NotMeasuredError: recording cannot work here.
    """
    card = gpu()
    card.prepare()
    gc.collect()  # earlier tests' garbage is theirs
    return Recording(card.start(), "the GPU")


def why_no_virtual_card() -> str | None:
    """Why the virtual card cannot be had; None where it can."""
    return _NO_TORCH if find_spec("torch") is None else None


@contextlib.contextmanager
def on_virtual_card(card: str | None, release: str | None, root: Path) -> Iterator[Recording]:
    """Let the code inside run on a virtual card, under the conf that the environment gives.

    Args:
        card: its name, None for the default one.
        release: torch release whose allocator decides, None for the installed one.
        root: folder that file names in stacks are relative to.

    Raises:
        UsageError: there is no such card, or the conf is none.
    """
    from fragscope.allocator import (
        DEFAULT_CARD,
        ReplaySettings,
        card_named,
        conf_from_environment,
        rules_for,
    )
    from fragscope.record.process import installed_release
    from fragscope.record.virtual import VirtualDevice

    rules = rules_for(release or installed_release())
    profile = card_named(card or DEFAULT_CARD, "--fragscope-card")
    _, conf = conf_from_environment(os.environ, rules.rules)
    device = VirtualDevice(profile, ReplaySettings.on(profile, rules, conf), root)
    gc.collect()  # earlier tests' garbage is theirs
    with device:
        source = _OnCard(device)
        recording = Recording(source, f"the virtual {profile.name}", source.uncertain)
        try:
            yield recording
        finally:
            recording.stop()


class _OnCard:
    """The requests of a virtual card."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def begin_phase(self, name: str) -> None:
        self._device.memory.begin_phase(name)

    def end_phase(self) -> None:
        self._device.memory.end_phase()

    def stop(self) -> Trace:
        trace: Trace = self._device.trace()
        return trace

    def uncertain(self) -> list[str]:
        """Operators with unknown temporaries, and what the program asked for in vain and caught."""
        return [*self._device.estimated, *(f"caught: {what}" for what in self._device.refused)]
