"""The facts that checks look at, as plain values. What gathers them is in ``gather`` and ``probe``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fragscope.allocator.cards import DEFAULT_CARD
from fragscope.record.cuda.non_torch import Scope


class Missing(msgspec.Struct, frozen=True):
    """Something that gave no facts.

    Attributes:
        reason: why, one line.
        broken: it is there and does not work, as opposed to not there.
    """

    reason: str
    broken: bool = False


class Device(msgspec.Struct, frozen=True):
    """A GPU as torch sees it; bytes.

    Attributes:
        name: the name CUDA reports.
        total: device memory.
        free: free memory of the first device when a CUDA context stands and nothing is allocated; None where not asked.
        capability: compute capability.
        multiprocessors: streaming multiprocessors.
        l2: L2 cache size.
    """

    name: str
    total: int
    free: int | None
    capability: tuple[int, int]
    multiprocessors: int
    l2: int


class TorchFacts(msgspec.Struct, frozen=True):
    """What an imported torch says.

    Attributes:
        release: its own version, such as ``2.11.0+cu130``.
        cuda: the CUDA it was built with; None for a build without.
        hip: the same for ROCm.
        devices: in the order of CUDA's indices; empty where torch can use none.
        no_devices: why there are none, one line.
        conf: the conf string in force as torch reports it; None where it reports none.
    """

    release: str
    cuda: str | None
    hip: str | None
    devices: tuple[Device, ...] = ()
    no_devices: str = ""
    conf: str | None = None


class Trial(msgspec.Struct, frozen=True):
    """A tiny recording on the first device.

    Attributes:
        events: requests recorded.
        seen: the requests that were made are among them.
        compared: decisions compared with the model's.
        mismatches: how many of them differ.
    """

    events: int
    seen: bool
    compared: int
    mismatches: int


class MemorySource(msgspec.Struct, frozen=True):
    """How device memory outside the allocator can be sampled (``record.non_torch``).

    Attributes:
        scope: of this process, or of the device.
        source: what gives the number.
        microseconds: that one sample took.
        passed_over: why better sources do not give it.
    """

    scope: Scope
    source: str
    microseconds: int
    passed_over: tuple[str, ...] = ()


class ImportTime(msgspec.Struct, frozen=True):
    """A package that can be imported.

    Attributes:
        seconds: that the import took.
    """

    seconds: float


@dataclass(frozen=True, slots=True)
class NvmlFacts:
    """What NVML says.

    Attributes:
        driver: the driver's version.
        devices: name and total memory in bytes (None where NVML does not tell) of each GPU, whether or not CUDA may
            use it.
    """

    driver: str
    devices: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True, slots=True)
class Flashinfer:
    """An installed flashinfer.

    Attributes:
        release: of flashinfer-python.
        prebuilt: packages with kernels built beforehand.
        imported: how an import went; None where none was tried.
    """

    release: str
    prebuilt: tuple[str, ...]
    imported: ImportTime | Missing | None


@dataclass(frozen=True, slots=True)
class Folder:
    """Where files are going to be written.

    Attributes:
        path: the folder; it need not be there yet.
        free: bytes left on its disk; None where that cannot be told.
        writable: whether files can be made there.
        chosen_by: the variable or key that names it; empty for a default.
    """

    path: Path
    free: int | None
    writable: bool
    chosen_by: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything checks may ask.

    Attributes:
        fragscope: its release; None where it runs from its sources without being installed.
        environ: the environment.
        torch_release: of the installed torch as its package says, without importing it; None where there is none.
        torch: what it says when it is imported.
        recording, memory: what a process with a CUDA context found out.
        nvml: what NVML says.
        tracker: why the allocator tracker cannot be built; None where it can.
        flashinfer: None where it is not installed.
        programs: paths of compilers and build programs, by name; those that are not there are left out.
        numba: its release; None where it is not installed.
        compiled: whether the allocator's loop was compiled before.
        cache, out: the cache folder and the folder of results.
        default_card: the profile that commands take without ``--card``.
    """

    fragscope: str | None
    environ: Mapping[str, str]
    torch_release: str | None
    torch: TorchFacts | Missing
    recording: Trial | Missing
    memory: MemorySource | Missing
    nvml: NvmlFacts | Missing
    tracker: Missing | None
    flashinfer: Flashinfer | None
    programs: Mapping[str, str]
    numba: str | None
    compiled: bool
    cache: Folder
    out: Folder
    default_card: str = DEFAULT_CARD

    @property
    def devices(self) -> tuple[Device, ...]:
        """The GPUs that torch can use."""
        return () if isinstance(self.torch, Missing) else self.torch.devices

    @property
    def no_devices(self) -> str:
        """Why torch can use no GPU."""
        return self.torch.reason if isinstance(self.torch, Missing) else self.torch.no_devices
