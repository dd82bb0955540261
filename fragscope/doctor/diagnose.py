"""All checks of a machine, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Callable

from fragscope.doctor import gpu, settings, software
from fragscope.doctor.check import Check, Diagnosis
from fragscope.doctor.machine import Machine

CHECKS: tuple[Callable[[Machine], Check], ...] = (
    gpu.gpu,
    gpu.card,
    software.torch,
    settings.conf_variable,
    settings.conf,
    gpu.recording,
    gpu.tracker,
    gpu.nvml,
    software.flashinfer,
    software.numba,
    software.disk,
)


def diagnose(machine: Machine) -> Diagnosis:
    """Answer every question."""
    return Diagnosis.of(machine.fragscope, [check(machine) for check in CHECKS])
