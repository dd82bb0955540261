"""The tracker extension: what it is built with, and what is said where it cannot be."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fragscope.errors import NotMeasuredError
from fragscope.record.cuda import native
from fragscope.record.cuda.native import Toolchain, build


@pytest.fixture
def toolchain(tmp_path, monkeypatch) -> Toolchain:
    """A compiler that says what it is told to, a torch and CUDA headers that are folders."""
    monkeypatch.setenv("FRAGSCOPE_CACHE_DIR", str(tmp_path / "cache"))
    torch, cuda = tmp_path / "torch", tmp_path / "cuda"
    for folder in (torch / "lib", cuda / "crt"):
        folder.mkdir(parents=True)
    (torch / "lib" / "libc10_cuda.so").touch()
    (torch / "version.py").write_text("__version__ = '2.11.0'")
    for header in ("cuda_runtime_api.h", "crt/host_config.h"):
        (cuda / header).touch()
    return Toolchain(str(compiler(tmp_path, 'for last; do :; done; echo "built $@" > "$last"')), torch, cuda)


def compiler(folder: Path, body: str) -> Path:
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_it_is_built_once(toolchain, tmp_path):
    library = build(toolchain)
    first = library.read_text()
    assert f"-I{toolchain.torch}/include" in first
    assert "-lc10_cuda" in first
    compiler(tmp_path, "exit 1")
    assert build(toolchain) == library
    assert library.read_text() == first


def test_another_torch_gets_another(toolchain):
    library = build(toolchain)
    (toolchain.torch / "version.py").write_text("__version__ = '2.12.0'")
    assert build(toolchain) != library


def test_what_the_compiler_says_is_one_line(toolchain, tmp_path):
    compiler(tmp_path, "echo 'In file included from x:' >&2; echo 'x.h:3: fatal error: no such thing' >&2; exit 1")
    with pytest.raises(NotMeasuredError, match=r"does not compile: x\.h:3: fatal error: no such thing"):
        build(toolchain)
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_one_line(toolchain, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FRAGSCOPE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(NotMeasuredError, match="cannot be kept in"):
        build(toolchain)


def found(torch: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spec:
        origin = None if torch is None else str(torch / "__init__.py")

    monkeypatch.setattr(native, "find_spec", lambda name: None if torch is None else Spec())


def test_it_needs_torch_and_a_cuda_build_of_it(toolchain, monkeypatch):
    found(None, monkeypatch)
    assert native.why_not() == "the allocator tracker needs torch, which is not installed"
    found(toolchain.torch, monkeypatch)
    (toolchain.torch / "lib" / "libc10_cuda.so").unlink()
    assert native.why_not() == "the allocator tracker needs a CUDA build of torch"


def test_it_needs_a_compiler_and_headers(toolchain, tmp_path, monkeypatch):
    found(toolchain.torch, monkeypatch)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "needs a C++ compiler" in str(native.why_not())
    monkeypatch.setenv("PATH", str(tmp_path))
    if not Path("/usr/local/cuda/include").exists():
        assert "needs the CUDA runtime's headers" in str(native.why_not())
    (tmp_path / "toolkit").mkdir()
    (tmp_path / "toolkit" / "include").symlink_to(toolchain.cuda)
    assert native.why_not() is None
