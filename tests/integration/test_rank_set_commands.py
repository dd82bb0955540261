"""Commands on the folder of a rank set."""

from __future__ import annotations

import json

import pytest
from requests_of import MIB, trace_of
from stand_ins import stand_in_readers

from fragscope.cli import run
from fragscope.trace import write_trace

__all__ = ["stand_in_readers"]


@pytest.fixture
def rank_set(tmp_path, stand_in_readers):
    for rank, size in (10, 30 * MIB), (2, 10 * MIB):
        trace = trace_of(("alloc", 1, size), ("free", 1), ("alloc", 2, size))
        write_trace(trace, tmp_path / f"rank{rank}.fscope")
    assert stand_in_readers
    return tmp_path


def documents(text: str) -> list[dict[str, object]]:
    found, at, decoder = [], 0, json.JSONDecoder()
    while at < len(text.rstrip()):
        value, at = decoder.raw_decode(text, at)
        at += 1  # the newline after each
        found.append(value)
    return found


def test_replay_answers_for_every_rank_in_order(rank_set, capsys):
    assert run(["replay", str(rank_set), "--conf", "", "--format", "json"]) == 0
    answers = documents(capsys.readouterr().out)
    assert [a["trace"]["path"] for a in answers] == [str(rank_set / f"rank{r}.fscope") for r in (2, 10)]
    # kMinLargeAlloc: requests from 10 MiB on take segments of their own size, in steps of 2 MiB
    assert [a["replays"][0]["peak"]["reserved"] for a in answers] == [10 * MIB, 30 * MIB]


def test_one_bad_member_does_not_keep_the_others_from_being_answered(rank_set, capsys):
    (rank_set / "rank3.fscope").write_bytes(b"PK\x03\x04 torn")
    (rank_set / "rank4.fscope").write_bytes(b"PK\x03\x04 torn")
    assert run(["replay", str(rank_set), "--format", "json"]) == 5
    out, err = capsys.readouterr()
    assert len(documents(out)) == 2
    first, second = err.splitlines()
    assert first == "fragscope: 2 of 4 traces failed; the first:"
    assert "rank3.fscope" in second


def test_tune_takes_all_ranks(rank_set, capsys):
    assert run(["tune", str(rank_set), "--jobs", "1", "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [t["path"] for t in answer["traces"]] == [str(rank_set / f"rank{r}.fscope") for r in (2, 10)]


def test_a_rank_named_beside_its_set_is_named_twice(rank_set, capsys):
    assert run(["tune", str(rank_set), str(rank_set / "rank2.fscope")]) == 2
    assert "a trace is named twice" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["replay", "tune"])
def test_a_folder_without_recordings_is_a_bad_file(tmp_path, capsys, stand_in_readers, command):
    assert run([command, str(tmp_path)]) == 5
    assert "is a folder" in capsys.readouterr().err
    assert stand_in_readers
