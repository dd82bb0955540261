"""The allocator tracker in the releases' own allocators: what it writes is every event, in order.

Needs a C++ compiler and a built oracle (``nox -s conformance`` builds them); skipped where there is none.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracles import RELEASES, OracleError, oracle_of

from fragscope.record.cuda.native import Toolchain, build
from fragscope.trace.chunks import KINDS, EventKind, Records, read_chunks

HERE = Path(__file__).parent
OPERATIONS = 1500
PROGRAM = """
import ctypes, json, os, shutil, signal, sys
from pathlib import Path
sys.path[:0] = [{here!r}]
from answers import run
from binary import Libraries
from generator import generate

library, folder, kill_at, remove_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
libraries = Libraries(Path({oracle!r}))
tracker = ctypes.CDLL(library)
tracker.fragscope_start.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64]

def at(number):
    if number == 0:
        assert tracker.fragscope_start(folder.encode(), 256, 0) == 0
    if number == remove_at:
        shutil.rmtree(folder)
    if number == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

answers = run(libraries, generate(11, {release!r}, {operations}), 0, at)
tracker.fragscope_stop()
print(json.dumps([[list(e) for e in entries] for entries in answers.entries]))
"""


def toolchain(release: str) -> Toolchain:
    try:
        oracle = oracle_of(release)
    except OracleError as e:
        pytest.skip(str(e))
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is on PATH")
    return Toolchain(compiler, oracle / "torch", oracle / "cuda")


def track(release: str, folder: Path, kill_at: int = -1, remove_at: int = -1) -> tuple[list[list[list[object]]], int]:
    """Run a random program with the tracker; the allocator's entries by operation, and how the process ended."""
    tools = toolchain(release)
    program = PROGRAM.format(here=str(HERE), oracle=str(tools.torch.parent), release=release, operations=OPERATIONS)
    command = [sys.executable, "-c", program, str(build(tools)), str(folder), str(kill_at), str(remove_at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return (json.loads(done.stdout) if done.stdout else []), done.returncode


def records_of(folder: Path) -> Records:
    records = np.concatenate(list(read_chunks(folder)))
    return records[records["kind"] != EventKind.SNAPSHOT]


def rows(records: Records) -> list[tuple[int, ...]]:
    names = ("kind", "addr", "size", "stream", "pool_second")
    return list(zip(*(records[name].tolist() for name in names), strict=True))


def expected(entries: list[list[list[object]]]) -> list[tuple[object, ...]]:
    return [(int(KINDS[str(action)]), *rest) for of_one in entries for action, *rest in of_one]


@pytest.mark.parametrize("release", RELEASES)
def test_every_event_is_written_in_order(release, tmp_path):
    entries, _ = track(release, tmp_path)
    records = records_of(tmp_path)
    assert rows(records) == expected(entries)
    assert len(records) > 1900
    assert len(list(tmp_path.glob("events-*.bin"))) > 5
    assert np.all(np.diff(records["clock"].astype(np.int64)) >= 0)
    assert set(records["thread"].tolist()) != {0}


@pytest.mark.parametrize("release", [RELEASES[0], RELEASES[-1]])
def test_what_was_written_before_a_kill_is_there(release, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    entries, _ = track(release, whole)
    _, ended = track(release, killed, kill_at=OPERATIONS // 2)
    assert ended == -signal.SIGKILL
    # The modelled driver places segments alike in both processes.
    assert rows(records_of(killed)) == expected(entries[: OPERATIONS // 2])


def test_a_folder_that_is_gone_ends_the_writing_and_not_the_program(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    entries, ended = track("2.11.0", folder, remove_at=1)
    assert ended == 0
    assert len(entries) == OPERATIONS
    assert not folder.exists()
