"""A folder of recordings is listed by name, in the order people count."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_ins import stand_in_readers

from fragscope.errors import InputFileError
from fragscope.trace.rank_set import expand, members

__all__ = ["stand_in_readers"]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("not opened")


def chunks(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "beginning").write_text("{}")


@pytest.mark.usefixtures("stand_in_readers")
def test_ranks_come_first_and_numbers_count_as_numbers(tmp_path):
    touch(tmp_path, "rank10.fscope", "rank2.fscope", "rank2-10.fscope", "rank2-2.fscope", "pid9.fscope", "pid10.fscope")
    touch(tmp_path, "rank3-cuda10.fscope", "rank3-cuda2.fscope", "baseline.fscope")
    chunks(tmp_path, "rank0", "pid7")
    assert [m.name for m in members(tmp_path)] == [
        "rank0", "rank2", "rank2-2", "rank2-10", "rank3-cuda2", "rank3-cuda10", "rank10", "pid7", "pid9", "pid10",
        "baseline",
    ]  # fmt: skip


@pytest.mark.usefixtures("stand_in_readers")
def test_what_is_no_recording_is_left_alone(tmp_path):
    touch(tmp_path, "rank0.fscope", "notes.txt", "rank1", ".rank2.fscope.77.part", ".fscope", ".hidden.fscope")
    (tmp_path / "rank3").mkdir()
    (tmp_path / "rank4.fscope").mkdir()
    chunks(tmp_path, "kept")  # not a name that a process gets
    assert [m.name for m in members(tmp_path)] == ["rank0"]


@pytest.mark.usefixtures("stand_in_readers")
def test_a_file_that_is_whole_counts_instead_of_its_chunks(tmp_path):
    touch(tmp_path, "rank0.fscope")
    chunks(tmp_path, "rank0")
    (member,) = members(tmp_path)
    assert member.path == tmp_path / "rank0.fscope"


@pytest.mark.usefixtures("stand_in_readers")
def test_a_path_stands_for_itself_or_for_what_is_in_it(tmp_path):
    touch(tmp_path, "rank1.fscope", "rank0.fscope")
    chunks(tmp_path, "rank2")
    both = tuple(str(tmp_path / name) for name in ("rank0.fscope", "rank1.fscope", "rank2"))
    assert expand(str(tmp_path)) == both
    (tmp_path / "empty").mkdir()
    for alone in (str(tmp_path / name) for name in ("rank1.fscope", "rank2", "not-there", "empty")):
        assert expand(alone) == (alone,)


def test_a_folder_that_cannot_be_read_is_a_bad_file(tmp_path):
    with pytest.raises(InputFileError, match="no such file"):
        members(tmp_path / "not-there")
