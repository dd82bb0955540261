"""What is installed, and where files go."""

from __future__ import annotations

from fragscope.allocator import RULES, rules_for
from fragscope.doctor.check import Check, Status
from fragscope.doctor.machine import Folder, ImportTime, Machine, Missing
from fragscope.errors import UsageError, printable
from fragscope.units import GIB, format_bytes

_LITTLE = GIB  # bytes: results with traces of shipped size take a few hundred MiB


def torch(machine: Machine) -> Check:
    """The installed torch, and whether rules for its release are known."""
    name = "torch"
    facts = machine.torch
    if machine.torch_release is None:
        return Check(
            name,
            "absent",
            "not installed; reading, replaying, gating and reporting work without it",
            "pip install 'fragscope[torch]' to run scenarios; a CPU build is enough",
        )
    if isinstance(facts, Missing):
        return Check(name, "fail", f"{machine.torch_release} cannot be imported: {facts.reason}", "reinstall torch")
    if facts.hip is not None:
        return Check(name, "warn", f"{facts.release}, a build for ROCm {facts.hip}, which is not modelled")
    build = "a CPU build: the virtual device works, recording does not" if facts.cuda is None else f"CUDA {facts.cuda}"
    try:
        chosen = rules_for(facts.release)
    except UsageError as e:
        return Check(
            name,
            "warn",
            f"{facts.release}, {build}; {str(e).removeprefix('--torch: ')}",
            f"use torch {RULES[0].release} or newer, or name a release with --torch",
        )
    if chosen.assumed:
        return Check(
            name,
            "warn",
            f"{facts.release}, {build}; newer than the rules known, those of {chosen.rules.release} are assumed",
            "replays say so; --strict refuses",
        )
    return Check(name, "ok", f"{facts.release}, {build}; the rules of {chosen.rules.release} are known")


def flashinfer(machine: Machine) -> Check:
    """Whether the shipped scenarios' functions are there, and whether kernels can be built on a GPU."""
    name = "flashinfer"
    found = machine.flashinfer
    if found is None:
        return Check(
            name, "absent", "not installed; only scenarios that use it need it", "pip install 'fragscope[flashinfer]'"
        )
    if isinstance(found.imported, Missing):
        return Check(name, "fail", f"{found.release} cannot be imported: {found.imported.reason}")
    tried = (
        f"imported in {found.imported.seconds:.1f} s"
        if isinstance(found.imported, ImportTime)
        else "not imported, since nothing of it runs without a GPU"
    )
    missing = [program for program in ("nvcc", "ninja", "c++") if program not in machine.programs]
    prebuilt = f"{' and '.join(found.prebuilt)} installed" if found.prebuilt else ""
    if not missing:
        kernels = f"kernels are built with {machine.programs['nvcc']}"
        return Check(name, "ok", f"{found.release}, {tried}; {'; '.join(filter(None, (prebuilt, kernels)))}")
    lacks = f"no kernels can be built: {', '.join(missing)} not found"
    if "flashinfer-jit-cache" in found.prebuilt or not machine.devices:
        return Check(name, "ok", f"{found.release}, {tried}; {'; '.join(filter(None, (prebuilt, lacks)))}")
    return Check(
        name,
        "warn",
        f"{found.release}, {tried}; {'; '.join(filter(None, (prebuilt, lacks)))}",
        f"put {' and '.join(missing)} on PATH, or install flashinfer-jit-cache",
    )


def numba(machine: Machine) -> Check:
    """Whether long replays run compiled."""
    name = "numba"
    if machine.numba is None:
        return Check(
            name, "absent", "not installed; long traces are replayed interpreted", "pip install 'fragscope[fast]'"
        )
    done = "compiled on this machine before" if machine.compiled else "the first long replay compiles, once"
    return Check(name, "ok", f"{machine.numba}; the allocator model's loop: {done}")


def disk(machine: Machine) -> Check:
    """Whether there is room in the folders that are written to."""
    name = "disk"
    status: Status = "ok"
    said, advice = [], []
    for folder, what in ((machine.cache, "cache"), (machine.out, "results")):
        room = "free space not known" if folder.free is None else f"{format_bytes(folder.free)} free"
        said.append(f"{what} in {printable(str(folder.path), 200)}: {room if folder.writable else 'cannot be written'}")
        if not folder.writable:
            status = "fail" if folder.chosen_by or status == "fail" else "warn"
            advice.append(f"name another folder{_by(folder)}")
        elif folder.free is not None and folder.free < _LITTLE:
            status = "warn" if status == "ok" else status
            advice.append(f"make room for {what}{_by(folder)}")
    return Check(name, status, "; ".join(said), "; ".join(advice))


def _by(folder: Folder) -> str:
    return f" ({folder.chosen_by})" if folder.chosen_by else ""
