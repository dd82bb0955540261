"""The facts about the machine at hand."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fragscope.allocator.cards import DEFAULT_CARD
from fragscope.allocator.engine.compiled import is_compiled_before
from fragscope.cache import cache_folder
from fragscope.doctor.machine import Flashinfer, Folder, Machine, Missing, NvmlFacts, TorchFacts
from fragscope.doctor.probe import ask
from fragscope.errors import NotMeasuredError, printable
from fragscope.record.cuda.non_torch import load_nvml

_CUDA = Path("/usr/local/cuda")  # where CUDA is installed unless somebody says otherwise
_PREBUILT = ("flashinfer-jit-cache", "flashinfer-cubin")


def this_machine(
    environ: Mapping[str, str], out: Path, out_chosen_by: str = "", default_card: str = DEFAULT_CARD
) -> Machine:
    """Look at everything; takes as long as importing torch, and on a GPU a few seconds more.

    Args:
        environ: the environment.
        out: where results would go.
        out_chosen_by: what names that folder; empty where it is the default.
        default_card: the profile that commands take without ``--card``.
    """
    has_torch = importlib.util.find_spec("torch") is not None
    answers: dict[str, Any] = ask(environ) if has_torch else {}
    not_installed = Missing("torch is not installed")
    torch: TorchFacts | Missing = answers.get("torch", not_installed)
    return Machine(
        fragscope=_version("fragscope"),
        environ=environ,
        torch_release=torch.release if isinstance(torch, TorchFacts) else _version("torch"),
        torch=torch,
        recording=answers.get("recording", not_installed),
        memory=answers.get("memory", not_installed),
        nvml=_nvml(),
        tracker=_tracker(),
        flashinfer=_flashinfer(answers.get("flashinfer")),
        programs=_programs(environ),
        numba=_version("numba"),
        compiled=is_compiled_before(),
        cache=look_at(
            cache_folder(), next((v for v in ("FRAGSCOPE_CACHE_DIR", "XDG_CACHE_HOME") if environ.get(v)), "")
        ),
        out=look_at(out, out_chosen_by),
        default_card=default_card,
    )


def look_at(folder: Path, chosen_by: str = "") -> Folder:
    """A folder that is there, or is going to be made in the nearest one above it that is."""
    there = next((f for f in (folder, *folder.absolute().parents) if f.exists()), folder)
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        free = None
    try:
        with tempfile.TemporaryFile(dir=there):
            writable = True
    except OSError:
        writable = False
    return Folder(folder, free, writable, chosen_by)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _nvml() -> NvmlFacts | Missing:
    try:
        nvml = load_nvml()
    except NotMeasuredError as e:
        return Missing(str(e))
    try:
        devices = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            try:
                total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            except nvml.NVMLError:
                total = None  # a MIG device's memory belongs to its instances
            devices.append((printable(str(nvml.nvmlDeviceGetName(handle)), 100), total))
        return NvmlFacts(printable(str(nvml.nvmlSystemGetDriverVersion()), 60), tuple(devices))
    except nvml.NVMLError as e:
        return Missing(f"NVML: {printable(str(e), 200)}", broken=True)


def _tracker() -> Missing | None:
    from fragscope.record.cuda.native import why_not  # noqa: PLC0415 - only where somebody asks

    reason = why_not()
    return None if reason is None else Missing(reason)


def _flashinfer(imported: Any) -> Flashinfer | None:
    release = _version("flashinfer-python")
    if release is None:
        return None
    tried = imported if not isinstance(imported, Missing) or imported.broken else None
    return Flashinfer(release, tuple(name for name in _PREBUILT if _version(name)), tried)


def _programs(environ: Mapping[str, str]) -> dict[str, str]:
    """Where flashinfer's build looks for each program."""
    path = environ.get("PATH")
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc", path=path) or f"{_CUDA}/bin/nvcc"
    found = {
        "nvcc": shutil.which(nvcc),
        "ninja": shutil.which("ninja", path=path),
        "c++": shutil.which(environ.get("CXX") or "c++", path=path),
    }
    return {name: where for name, where in found.items() if where}
