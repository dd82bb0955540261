"""Processes that replay: what goes wrong in them arrives as one of our errors, in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from snapshots import small_snapshot, write

from fragscope.errors import (
    FragscopeError,
    InputFileError,
    NotMeasuredError,
    UnmodelledError,
    UnsupportedError,
    UsageError,
    from_plain,
    to_plain,
)
from fragscope.search import Given, load_subject, play, play_one, player


@contextmanager
def workers(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two processes that replay the trace, interpreted."""
    monkeypatch.setattr(play, "worth_compiling", lambda events, jobs=1: False)
    with player([load_subject(str(path), Given())], jobs=2, tries=10**7) as started:
        assert type(started).__name__ == "_Workers"
        yield started


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write(tmp_path / "trace.pickle", small_snapshot())


def test_processes_answer_as_this_one_does(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    confs = ["", "expandable_segments:True", None, "max_split_size_mb:64"]
    subject = load_subject(str(trace), Given())
    with workers(trace, monkeypatch) as ask:
        assert ask(confs) == [(play_one(subject, conf),) for conf in confs]


def test_a_conf_that_is_not_modelled_is_refused_as_here(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = "backend:cudaMallocAsync"
    with pytest.raises(UnmodelledError) as here:
        play_one(load_subject(str(trace), Given()), conf)
    with workers(trace, monkeypatch) as ask, pytest.raises(UnmodelledError) as there:
        ask([conf])
    assert (str(there.value), there.value.key, there.value.exit_code) == (str(here.value), here.value.key, 2)


def test_a_file_that_is_bad_when_the_process_reads_it_is_named(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load_subject(str(trace), Given())
    monkeypatch.setattr(play, "worth_compiling", lambda events, jobs=1: False)
    trace.write_bytes(b"overwritten meanwhile")
    with player([subject], jobs=2, tries=10**7) as ask, pytest.raises(InputFileError) as caught:
        ask(["", ""])
    assert caught.value.path == str(trace)
    assert caught.value.exit_code == 5
    assert str(caught.value).startswith(f"{trace}: is not a PyTorch memory snapshot")


def test_a_process_that_is_killed_is_one_clear_line(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with workers(trace, monkeypatch) as ask:
        os.kill(ask._processes[0].pid, signal.SIGKILL)
        with pytest.raises(FragscopeError) as caught:
            ask(["", ""])
    assert str(caught.value) == (
        "a process that replays traces was ended by SIGKILL; if memory was short, --jobs 1 needs less"
    )


def test_an_error_that_nobody_foresaw_is_one_line_too() -> None:
    task = {"cards": [], "subjects": [["trace.pickle", {"no such field": "a\nb"}]], "compiled": False}
    done = subprocess.run(
        [sys.executable, "-m", "fragscope.search.worker"],
        input=json.dumps(task) + "\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    error = from_plain(json.loads(line)["error"])
    assert type(error) is FragscopeError
    assert "worker.py:" in str(error)
    assert "TypeError" in str(error)
    assert "this is a bug in fragscope" in str(error)


@pytest.mark.parametrize(
    "error",
    [
        FragscopeError("broken"),
        UsageError("--jobs: no"),
        UnmodelledError("backend", "is not modelled"),
        NotMeasuredError("nothing"),
        InputFileError("a\nb.pickle", "is empty"),
        UnsupportedError("item()", "model.py:3"),
        UnsupportedError("item()"),
    ],
)
def test_errors_come_back_as_they_went(error: FragscopeError) -> None:
    back = from_plain(json.loads(json.dumps(to_plain(error))))
    assert type(back) is type(error)
    assert (str(back), vars(back), back.exit_code) == (str(error), vars(error), error.exit_code)


def test_only_classes_of_the_tree_are_made() -> None:
    assert type(from_plain({"class": "SystemExit", "text": "x", "attributes": {}})) is FragscopeError
