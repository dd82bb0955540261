"""What a run finished survives it: the journal, and when a finished case may be used again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fragscope.errors import UsageError
from fragscope.results import Case
from fragscope.suite.journal import Journal, finished_cases, locked


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "module.py"
    file.write_text("x = 1\n")
    return file


def case(source: Path, digest: str = "d1", **changes: Any) -> Case:
    values: dict[str, Any] = {
        "id": f"s/p/{digest}@default", "digest": digest, "scenario": "s", "preset": "p", "variant": "v",
        "role": "original", "torch": "2.13.0", "torch_installed": "2.13.0", "card": "h100-80gb", "device": "virtual",
        "outcome": "ok", "sources": {str(source): hashlib.sha256(source.read_bytes()).hexdigest()},
    }  # fmt: skip
    return Case(**(values | changes))


def write(folder: Path, *cases: Case) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    for each in cases:
        journal.add(each)
    journal.close()


def test_cases_come_back_as_they_were(tmp_path: Path, source: Path) -> None:
    one, two = case(source), case(source, "d2", message="über \x1b[31m")
    write(tmp_path / "out", one, two)
    assert finished_cases(tmp_path / "out") == {"d1": one, "d2": two}


def test_a_case_is_on_disk_before_the_journal_is_closed(tmp_path: Path, source: Path) -> None:
    journal = Journal(tmp_path)
    journal.add(case(source))
    assert set(finished_cases(tmp_path)) == {"d1"}
    journal.close()


def test_there_may_be_no_journal(tmp_path: Path) -> None:
    assert finished_cases(tmp_path) == finished_cases(tmp_path / "nowhere") == {}


def test_an_edited_or_deleted_source_makes_a_case_stale(tmp_path: Path, source: Path) -> None:
    write(tmp_path, case(source))
    source.write_text("x = 2\n")
    assert finished_cases(tmp_path) == {}
    source.write_text("x = 1\n")
    assert set(finished_cases(tmp_path)) == {"d1"}
    source.unlink()
    assert finished_cases(tmp_path) == {}


def test_a_case_that_does_not_know_its_sources_is_not_used_again(tmp_path: Path, source: Path) -> None:
    write(tmp_path, case(source, sources={}))
    assert finished_cases(tmp_path) == {}


def test_a_case_needs_its_trace(tmp_path: Path, source: Path) -> None:
    write(tmp_path, case(source, trace="traces/d1.fscope"))
    assert finished_cases(tmp_path) == {}
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "d1.fscope").touch()
    assert set(finished_cases(tmp_path)) == {"d1"}


@pytest.mark.parametrize(
    "changes",
    [{"outcome": "crash"}, {"outcome": "timeout"}, {"outcome": "wrong", "numeric": {"message": "took too long"}}],
)
def test_what_may_go_differently_is_tried_again(tmp_path: Path, source: Path, changes: dict[str, Any]) -> None:
    write(tmp_path, case(source, **changes))
    assert finished_cases(tmp_path) == {}


def test_the_last_result_of_a_case_counts(tmp_path: Path, source: Path) -> None:
    write(tmp_path, case(source), case(source, allocs=5))
    assert finished_cases(tmp_path)["d1"].allocs == 5
    write(tmp_path, case(source), case(source, outcome="crash"))
    assert finished_cases(tmp_path) == {}


@pytest.mark.parametrize("rest", [b'{"id": "s/p/d2@def', b"\xff\xfe\n", b"\n", b"[" * 100_000, b'{"id": 1}\n'])
def test_a_damaged_line_is_ignored_and_does_not_spoil_the_next(tmp_path: Path, source: Path, rest: bytes) -> None:
    write(tmp_path, case(source))
    with (tmp_path / "cases.jsonl").open("ab") as f:
        f.write(rest)
    kept = finished_cases(tmp_path)
    assert set(kept) == {"d1"}
    journal = Journal(tmp_path, kept.values())
    journal.add(case(source, "d2"))
    journal.close()
    assert set(finished_cases(tmp_path)) == {"d1", "d2"}


def test_a_new_run_begins_anew(tmp_path: Path, source: Path) -> None:
    write(tmp_path, case(source))
    write(tmp_path, case(source, "d2"))
    assert set(finished_cases(tmp_path)) == {"d2"}


def test_a_folder_is_held_by_one_run_and_free_again_afterwards(tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from fragscope.suite.journal import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"another run is writing there \(process {other.pid}\)"):
            locked(tmp_path / "out").__enter__()
        other.kill()
    with locked(tmp_path / "out"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"--out .*file"):
            locked(path).__enter__()


def test_what_goes_to_the_default_folder_is_not_committed(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "reports", tmp_path / ".fragscope" / "sweep"
    for folder in (theirs, ours, ours):
        with locked(folder):
            pass
    assert (tmp_path / ".fragscope" / ".gitignore").read_text() == "*\n"
    assert not list(tmp_path.glob("**/reports/.gitignore"))
    (tmp_path / ".fragscope" / ".gitignore").write_text("!results.json\n")  # a user's own stays
    with locked(ours):
        pass
    assert (tmp_path / ".fragscope" / ".gitignore").read_text() == "!results.json\n"
