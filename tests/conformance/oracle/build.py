"""Build the oracle of a torch release: its own allocator on a CUDA runtime without a GPU.

usage: python tests/conformance/oracle/build.py RELEASE [DIR]

Downloads the release's CUDA wheel from the package index that pip is set up with (about 1 GB, of which the allocator's
two libraries and its headers are kept, 7 MB in all) and the CUDA headers, then compiles with gcc and g++ 12 or newer.
What is already in DIR is not downloaded again. Without DIR the oracle goes where the harness looks for it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from oracles import RELEASES, OracleError, default_directory

HERE = Path(__file__).parent
# Major version of the CUDA runtime that the release's default wheel is linked with -> the wheels with its headers.
HEADER_WHEELS = {
    12: ("nvidia-cuda-runtime-cu12==12.8.90", "nvidia-cuda-nvcc-cu12==12.8.93"),
    13: ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88"),
}
# What cuda.h and cuda_runtime.h include.
CUDA_HEADERS = frozenset(
    {
        "builtin_types.h", "channel_descriptor.h", "crt/host_config.h", "crt/host_defines.h", "cuda.h",
        "cuda_device_runtime_api.h", "cuda_runtime.h", "cuda_runtime_api.h", "device_types.h", "driver_functions.h",
        "driver_types.h", "library_types.h", "surface_types.h", "texture_types.h", "vector_functions.h",
        "vector_functions.hpp", "vector_types.h",
    }
)  # fmt: skip


def build(release: str, directory: Path) -> None:
    """Make, or complete, the oracle of a release in a directory.

    Raises:
        OracleError: a download failed, or a compiler is missing or refuses.
    """
    if release not in RELEASES:
        raise OracleError(f"no oracle for torch {release}; there is one for {', '.join(RELEASES)}")
    allocator = directory / "torch/lib/libc10_cuda.so"
    if not allocator.exists():
        _take(f"torch=={release}", directory, _kept_of_torch)
    if not allocator.exists():
        raise OracleError(
            f"the wheel of torch {release} that pip found holds no libc10_cuda.so: it is not a CUDA build"
        )
    cuda = _cuda_version(allocator)
    for wheel in HEADER_WHEELS[cuda]:
        if not all((directory / "cuda" / name).exists() for name in CUDA_HEADERS):
            _take(wheel, directory, _kept_of_cuda)
    _compile_runtime(directory, allocator, cuda)
    _compile_shim(directory, cuda)


def _kept_of_torch(name: str) -> str | None:
    libraries = ("torch/lib/libc10.so", "torch/lib/libc10_cuda.so")
    headers = ("torch/include/c10/", "torch/include/torch/headeronly/")
    return name if name in libraries or name.startswith(headers) else None


def _kept_of_cuda(name: str) -> str | None:
    header = name.rpartition("/include/")[2]
    return f"cuda/{header}" if header in CUDA_HEADERS else None


def _take(requirement: str, directory: Path, kept: Callable[[str], str | None]) -> None:
    """Download a wheel and keep the members for which ``kept`` gives a path."""
    with tempfile.TemporaryDirectory(prefix="fragscope-oracle-") as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        _run([*pip, requirement, "--dest", folder], f"download {requirement}")
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            for name in (name for name in archive.namelist() if not name.endswith("/")):
                target = kept(name)
                if target is not None:
                    (directory / target).parent.mkdir(parents=True, exist_ok=True)
                    (directory / target).write_bytes(archive.read(name))


def _cuda_version(allocator: Path) -> int:
    match = re.search(rb"libcudart\.so\.(\d+)", allocator.read_bytes())
    if match is None or int(match[1]) not in HEADER_WHEELS:
        raise OracleError(f"{allocator} is linked with a CUDA runtime other than 12 and 13")
    return int(match[1])


def _compile_runtime(directory: Path, allocator: Path, cuda: int) -> None:
    """The fake runtime, completed by functions that abort for what the allocator links but never calls."""
    built = directory / "runtime.o"
    compiler = ["g++", "-std=c++20", "-O2", "-fPIC", f"-I{directory / 'cuda'}"]
    _run([*compiler, "-c", HERE / "runtime.cpp", "-o", built], "compile runtime.cpp")
    missing = _symbols(allocator, "--undefined-only", "--dynamic") - _symbols(built, "--defined-only")
    lines = ["#include <stdio.h>", "#include <stdlib.h>"]
    lines += [
        f'int {name}(void) {{ fputs("fake CUDA runtime: {name} is not implemented\\n", stderr); abort(); }}'
        for name in sorted(missing)
    ]
    rest, versions = directory / "unused.c", directory / "versions.map"
    rest.write_text("\n".join(lines) + "\n")
    soname = f"libcudart.so.{cuda}"
    versions.write_text(f"{soname} {{ global: *; }};\n")
    _run(["gcc", "-O2", "-fPIC", "-c", rest, "-o", directory / "unused.o"], "compile the unused functions")
    link = ["g++", "-shared", f"-Wl,--version-script={versions}", f"-Wl,-soname,{soname}"]
    _run([*link, built, directory / "unused.o", "-o", directory / soname], f"link {soname}")


def _symbols(library: Path, *which: str) -> set[str]:
    """The CUDA functions that a library defines or wants."""
    listing = _run(["nm", *which, library], f"list the symbols of {library.name}")
    return set(re.findall(r" (cuda[A-Z]\w+)", listing))


def _compile_shim(directory: Path, cuda: int) -> None:
    headers = [f"-I{directory / 'torch/include'}", f"-I{directory / 'cuda'}"]
    libraries = [f"-L{directory / 'torch/lib'}", "-lc10", "-lc10_cuda", f"-L{directory}", f"-l:libcudart.so.{cuda}"]
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared"]
    _run(["g++", *flags, *headers, HERE / "shim.cpp", *libraries, "-o", directory / "libshim.so"], "compile shim.cpp")


def _run(command: Sequence[str | Path], what: str) -> str:
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OracleError(f"cannot {what}: {command[0]} is not installed") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise OracleError(f"cannot {what}: {errors[0].strip() if errors else f'exit code {done.returncode}'}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    release = arguments[0]
    directory = Path(arguments[1]) if len(arguments) > 1 else default_directory(release)
    try:
        build(release, directory)
    except OracleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
