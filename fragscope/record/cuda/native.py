"""The allocator tracker: a small extension, built for the installed torch when it is first wanted, and kept.

It needs a C++ compiler and the CUDA runtime's headers, which come with CUDA, or with the packages that CUDA builds of
torch depend on. Where it cannot be built, recording goes on with PyTorch's own history (``history.py``).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fragscope.cache import cache_folder
from fragscope.errors import NotMeasuredError, printable

SOURCE = Path(__file__).with_name("tracker.cpp")
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared")
_BUILD_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What the extension is built with.

    Attributes:
        compiler: path of a C++ compiler.
        torch: folder of the installed torch.
        cuda: folder with ``cuda_runtime_api.h``.
    """

    compiler: str
    torch: Path
    cuda: Path


def why_not() -> str | None:
    """Why the tracker cannot be built here, in one line; None where it can, or was built before."""
    try:
        toolchain = _toolchain()
    except NotMeasuredError as e:
        return str(e)
    del toolchain
    return None


@cache
def load_tracker() -> ctypes.CDLL:
    """The extension in this process; torch's CUDA libraries must be loaded.

    Raises:
        NotMeasuredError: it cannot be built or loaded; the message says why in one line.
    """
    library = build(_toolchain())
    try:
        tracker = ctypes.CDLL(str(library))
    except OSError as e:
        raise NotMeasuredError(f"the allocator tracker cannot be loaded: {printable(str(e), 200)}") from None
    u64, i64 = ctypes.c_uint64, ctypes.c_int64
    tracker.fragscope_start.argtypes = [ctypes.c_char_p, u64, u64]
    tracker.fragscope_note.argtypes = [ctypes.c_uint8, ctypes.c_uint8, i64, i64, i64, i64, i64, i64]
    tracker.fragscope_note.restype = i64
    tracker.fragscope_stop.restype = None
    tracker.fragscope_status.argtypes = [ctypes.POINTER(u64), ctypes.POINTER(u64), ctypes.POINTER(ctypes.c_int)]
    tracker.fragscope_status.restype = None
    tracker.fragscope_events.argtypes = [ctypes.c_int]
    tracker.fragscope_events.restype = u64
    return tracker


def build(toolchain: Toolchain) -> Path:
    """Compile the extension, unless a cached one is of the same source, torch and compiler.

    Raises:
        NotMeasuredError: the compiler refuses, or the cache folder cannot be written.
    """
    folder = cache_folder() / "tracker" / _digest(toolchain)
    library = folder / "tracker.so"
    if library.exists():
        return library
    libraries = toolchain.torch / "lib"
    command = [
        toolchain.compiler, *_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={_new_abi(toolchain.torch)}",
        f"-I{toolchain.torch / 'include'}", f"-I{toolchain.cuda}", str(SOURCE),
        f"-L{libraries}", "-lc10", "-lc10_cuda", "-o",
    ]  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "tracker.so"
            done = subprocess.run(  # noqa: S603 - the user's own compiler
                [*command, str(made)], capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False
            )
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
                reason = (errors or done.stderr.splitlines() or ["no reason given"])[0]
                raise NotMeasuredError(f"the allocator tracker does not compile: {printable(reason, 300)}")
            made.replace(library)
    except subprocess.TimeoutExpired:
        raise NotMeasuredError(f"the allocator tracker did not compile within {_BUILD_SECONDS} s") from None
    except OSError as e:
        raise NotMeasuredError(f"the allocator tracker cannot be kept in {folder}: {e.strerror}") from None
    return library


def _toolchain() -> Toolchain:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotMeasuredError("the allocator tracker needs torch, which is not installed")
    torch = Path(spec.origin).parent
    if not (torch / "lib" / "libc10_cuda.so").exists():
        raise NotMeasuredError("the allocator tracker needs a CUDA build of torch")
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotMeasuredError("the allocator tracker needs a C++ compiler, and none is on PATH (CXX)")
    for folder in _cuda_headers(torch):
        if (folder / "cuda_runtime_api.h").exists() and (folder / "crt" / "host_config.h").exists():
            return Toolchain(compiler, torch, folder)
    raise NotMeasuredError("the allocator tracker needs the CUDA runtime's headers, and none were found (CUDA_HOME)")


def _cuda_headers(torch: Path) -> Iterator[Path]:
    """Where the CUDA runtime's headers may be, best first."""
    packages = torch.parent / "nvidia"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "include"
    yield torch.parent / "triton" / "backends" / "nvidia" / "include"  # comes with CUDA builds of torch
    yield from (packages / name / "include" for name in ("cu13", "cu12", "cuda_runtime"))
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parent.parent / "include"
    yield Path("/usr/local/cuda/include")


def _new_abi(torch: Path) -> int:
    """Whether torch was built with libstdc++'s newer strings; all wheels are since 2.6."""
    loaded = sys.modules.get("torch")
    if loaded is not None and Path(loaded.__file__ or "").parent == torch:
        return int(loaded._C._GLIBCXX_USE_CXX11_ABI)
    return 1


def _digest(toolchain: Toolchain) -> str:
    """Of everything the extension depends on."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    version = toolchain.torch / "version.py"
    digest.update(version.read_bytes() if version.exists() else b"")
    digest.update(repr((str(toolchain.torch), str(toolchain.cuda), toolchain.compiler, _FLAGS)).encode())
    return digest.hexdigest()[:16]
