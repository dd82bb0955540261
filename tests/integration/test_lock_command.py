"""``fragscope lock`` and a gate with a lock, as people call them: exit codes, stdout, stderr, files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
from builders import bare_case, results_of

from fragscope.cli import run
from fragscope.results import Case, Peak, save_results

MIB = 2**20


def case(variant: str = "list", **changes: object) -> Case:
    values = {
        "id": f"moe/v3/{variant}@default,torch-2.13,h100-80gb,virtual",
        "scenario": "moe",
        "preset": "v3",
        "variant": variant,
        "torch": "2.13",
        "allocs": 3,
        "peak": Peak(requested=3 * MIB, allocated=4 * MIB, reserved=6 * MIB, hbm=6 * MIB),
        "transient": 2 * MIB,
    }
    return bare_case(**(values | changes))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with results of two cases and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_WORKSPACE", raising=False)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    measure(tmp_path, case(), case("stack"))
    return tmp_path


def measure(folder: Path, *cases: Case, **changes: object) -> None:
    save_results(results_of(list(cases), **changes), folder / ".fragscope" / "results.json")


def said(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def test_the_first_lock_is_written_and_a_second_call_finds_it_as_it_should_be(repository, capsys):
    assert run(["lock"]) == 0
    assert said(capsys) == ([], ["fragscope: locked 2 cases in fragscope.lock"])
    written = (repository / "fragscope.lock").read_bytes()
    assert run(["lock"]) == 0
    assert said(capsys) == (["fragscope.lock holds these figures: 2 cases"], [])
    assert (repository / "fragscope.lock").read_bytes() == written
    assert run(["gate"]) == 0
    assert said(capsys) == (["pass: 2 locked cases compared"], [])


def test_a_lock_that_differs_is_written_only_with_update(repository, capsys):
    run(["lock"])
    written = (repository / "fragscope.lock").read_bytes()
    measure(repository, case(transient=3 * MIB), case("new"))
    capsys.readouterr()
    assert run(["lock"]) == 3
    new, old = case("new").id, case().id
    assert said(capsys) == (
        [f"new  {new}", f"changed  {old}  transient 2.00 MiB -> 3.00 MiB (+1,048,576 B)"],
        [
            "fragscope: 1 case of fragscope.lock not in these results, kept as locked; --prune drops what is not "
            "measured any more",
            "fragscope: not written; review what differs, then run 'fragscope lock --update'",
        ],
    )
    assert (repository / "fragscope.lock").read_bytes() == written
    assert run(["lock", "--update"]) == 0
    assert said(capsys)[1][-1] == "fragscope: locked 3 cases in fragscope.lock"
    assert run(["lock", "--update", "--prune"]) == 0
    assert f"dropped  {case('stack').id}" in said(capsys)[0]
    assert run(["gate"]) == 0


def test_check_never_writes(repository, capsys):
    assert run(["lock", "--check"]) == 3
    assert said(capsys)[1] == ["fragscope: fragscope.lock is not there; 'fragscope lock' writes it"]
    assert not (repository / "fragscope.lock").exists()
    run(["lock"])
    assert run(["lock", "--check"]) == 0
    measure(repository, case(transient=0), case("stack"))
    before = (repository / "fragscope.lock").read_bytes()
    assert run(["lock", "--check"]) == 3
    assert (repository / "fragscope.lock").read_bytes() == before
    assert run(["lock", "--check", "--update"]) == 2


def test_nothing_incomplete_or_undeclared_is_locked(repository, capsys):
    measure(repository, case(), complete=False)
    assert run(["lock"]) == 4
    assert said(capsys) == ([], ["fragscope: the run is incomplete: 1 of 1 planned cases are there; nothing is locked"])
    measure(repository, case(), planned=2)
    assert run(["lock"]) == 4
    measure(repository, case(), case("stack", outcome="crash", message="died"))
    capsys.readouterr()
    assert run(["lock", "--update"]) == 3
    assert said(capsys)[0] == [f"undeclared  {case('stack').id}  outcome crash, declared ok  died"]
    measure(repository, case(device="cuda"))
    assert run(["lock"]) == 4
    assert "nothing that can be locked" in said(capsys)[1][-1]
    assert not (repository / "fragscope.lock").exists()


def test_cases_of_another_release_are_not_left_beside_new_ones(repository, capsys):
    run(["lock"])
    measure(repository, case(), versions={"fragscope": "0.1.0", "torch": "2.14.0"})
    capsys.readouterr()
    assert run(["lock", "--update"]) == 2
    assert "was made with torch 2.13.0, these results with 2.14.0, and 1 of its cases" in said(capsys)[1][-1]
    assert run(["lock", "--update", "--prune"]) == 0
    assert 'torch = "2.14.0"' in (repository / "fragscope.lock").read_text()


def test_the_project_file_names_the_lock(repository, capsys):
    (repository / "pyproject.toml").write_text('[tool.fragscope]\nlock = "ci/memory.lock"\n')
    assert run(["gate"]) == 2
    assert "named by 'lock' in [tool.fragscope] of pyproject.toml, is not there" in said(capsys)[1][0]
    assert run(["lock"]) == 0
    assert (repository / "ci" / "memory.lock").exists()
    measure(repository, case(transient=3 * MIB), case("stack"))
    capsys.readouterr()
    assert run(["gate"]) == 3
    assert "[ci/memory.lock:" in said(capsys)[0][0]


def test_the_gate_without_its_lock(repository, capsys):
    run(["lock"])
    measure(repository, case(transient=3 * MIB), case("stack"))
    assert run(["gate"]) == 3
    assert run(["gate", "--no-lock"]) == 2  # there is no budgets file either
    (repository / "budgets.toml").write_text('[budget."moe/*/*"]\ntransient = "9 MiB"\n')
    assert run(["gate", "--no-lock"]) == 0
    assert run(["gate"]) == 3
    capsys.readouterr()
    assert run(["gate", "--no-lock", "--lock", "fragscope.lock"]) == 2
    assert run(["gate", "--lock", "none.lock"]) == 2
    assert "--lock none.lock: there is no such file" in said(capsys)[1][-1]


def test_a_lock_that_cannot_be_written_is_one_line(repository, capsys):
    (repository / "file").write_text("")
    assert run(["lock", "--lock", "file/fragscope.lock"]) == 1
    assert said(capsys) == ([], ["fragscope: cannot write file/fragscope.lock: File exists"])


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"version = 1\n<<<<<<< HEAD\n", b'version = 1\n[case."\x1b[2J"]\n', b"#" * (5 << 20)]
)
@pytest.mark.parametrize("command", [["gate"], ["lock"], ["lock", "--check"], ["lock", "--update"]])
def test_a_file_that_is_no_lock_is_one_line_and_is_never_replaced(repository, capsys, content, command):
    (repository / "fragscope.lock").write_bytes(content)
    assert run(command) == 5
    out, err = said(capsys)
    assert out == []
    (line,) = err
    assert line.startswith("fragscope: fragscope.lock: ")
    assert line.isprintable()
    assert (repository / "fragscope.lock").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"version = 1\n<<<<<<< HEAD\n", b"version = true\n"])
@pytest.mark.parametrize("options", [[], ["--update"]])
def test_a_broken_lock_says_what_to_do_and_then_that_helps(repository, capsys, content, options):
    (repository / "fragscope.lock").write_bytes(content)
    assert run(["lock", *options]) == 5
    assert said(capsys)[1][0].endswith("; delete it, and 'fragscope lock' writes it anew")
    (repository / "fragscope.lock").unlink()
    assert run(["lock", *options]) == 0


def test_a_lock_of_another_version_is_written_anew_by_the_command_that_the_message_names(repository, capsys):
    assert run(["lock"]) == 0
    own = (repository / "fragscope.lock").read_text()
    other = own.replace("version = 1", "version = 2\nshape = 'another'", 1)
    (repository / "fragscope.lock").write_text(other)
    capsys.readouterr()
    for command in (["gate"], ["lock"], ["lock", "--check"]):
        assert run(command) == 5
        out, (line,) = said(capsys)
        assert out == []
        assert line.startswith("fragscope: fragscope.lock: line 4: version is 2; this fragscope reads 1: ")
        assert line.endswith("'fragscope lock --update' writes the lock anew")
        assert (repository / "fragscope.lock").read_text() == other
    assert run(["lock", "--update"]) == 0
    assert said(capsys)[1] == [
        "fragscope: fragscope.lock is of version 2, and is written anew with nothing but these results",
        "fragscope: locked 2 cases in fragscope.lock",
    ]
    assert (repository / "fragscope.lock").read_text() == own
    assert run(["gate"]) == 0


def test_a_link_to_a_lock_that_is_not_there_is_no_missing_lock(repository, capsys):
    (repository / "fragscope.lock").symlink_to("elsewhere")
    assert run(["gate"]) == 5
    assert said(capsys) == ([], ["fragscope: fragscope.lock: no such file or directory"])


def test_savings_and_new_cases_that_the_repository_allows(repository):
    run(["lock"])
    measure(repository, case(transient=0), case("stack"), case("new"))
    assert run(["gate"]) == 3
    (repository / "budgets.toml").write_text('[lock]\nimprovements = "allow"\nnew = "allow"\n')
    assert run(["gate"]) == 0


def test_a_waiver_with_a_date_that_is_over_and_one_that_is_not(repository, capsys):
    waiver = '[[waiver]]\ncase = "moe/*/*"\nmetrics = ["transient"]\nowner = "@j"\nreason = "later"\nexpires = {}\n'
    run(["lock"])
    measure(repository, case(transient=3 * MIB), case("stack"))
    (repository / "budgets.toml").write_text(waiver.format("9999-12-31"))
    capsys.readouterr()
    assert run(["gate"]) == 0
    assert said(capsys)[0][0].startswith("waived, larger than locked  moe/v3/list  transient  ")
    (repository / "budgets.toml").write_text(waiver.format("2020-01-01"))
    assert run(["gate"]) == 3
    assert "expired on 2020-01-01 and no longer applies to 1 finding" in capsys.readouterr().out


@pytest.mark.parametrize("as_option", [True, False])
def test_warn_only_says_everything_and_ends_with_0_but_for_a_wrong_call_or_file(repository, capsys, as_option):
    if not as_option:
        (repository / "pyproject.toml").write_text("[tool.fragscope]\nwarn_only = true\n")
    option = ["--warn-only"] if as_option else []
    run(["lock"])
    measure(repository, case(transient=3 * MIB))
    capsys.readouterr()
    assert run(["gate", *option]) == 0
    out, _ = said(capsys)
    assert out[0].startswith("larger than locked  ")
    assert out[-1].startswith("fail, and only a warning: 1 value larger than locked, 1 thing not measured; ")
    assert run(["gate", "--no-warn-only"]) == 3
    assert run(["gate", *option, "--budgets", "none.toml"]) == 2
    (repository / "fragscope.lock").write_text("")
    assert run(["gate", *option]) == 5


# --- files beside the verdict -------------------------------------------------------------------------------------


def failing(repository: Path) -> None:
    (repository / "budgets.toml").write_text('[budget."moe/*/*"]\ntransient = "1 MiB"\n')


def test_several_files_at_once_beside_any_format(repository, capsys):
    failing(repository)
    assert run(["gate", "--format", "json", "--summary", "s.md", "--comment", "c.md", "--junit", "sub/j.xml"]) == 3
    assert json.loads(capsys.readouterr().out)["decision"] == "over"
    comment = (repository / "c.md").read_text()
    assert comment.startswith("<!-- fragscope-gate -->\n### fragscope gate: failed\n")
    assert (repository / "s.md").read_text() == comment.partition("\n")[2]
    assert len(ElementTree.parse(repository / "sub/j.xml").findall(".//failure")) == 2


def test_a_summary_is_added_and_never_grows_past_what_github_takes(repository, capsys):
    failing(repository)
    (repository / "s.md").write_text("x" * (MIB - 300))
    assert run(["gate", "--summary", "s.md"]) == 3
    text = (repository / "s.md").read_text()
    assert len(text.encode()) <= MIB
    assert "**2 more findings did not fit here**" in text
    (repository / "s.md").write_text("x" * MIB)
    assert run(["gate", "--summary", "s.md"]) == 3
    assert "fragscope: cannot write s.md: it holds 1,048,576 bytes already" in capsys.readouterr().err
    assert (repository / "s.md").read_text() == "x" * MIB


@pytest.mark.parametrize("option", ["--summary", "--comment", "--junit"])
def test_a_file_that_cannot_be_written_is_one_line_and_never_a_pass(repository, capsys, option):
    (repository / "file").write_text("")
    failing(repository)
    assert run(["gate", option, "file/x"]) == 3
    (repository / "budgets.toml").write_text('[budget."moe/*/*"]\ntransient = "9 MiB"\n')
    capsys.readouterr()
    assert run(["gate", option, "file/x"]) == 1
    out, err = said(capsys)
    assert out[-1].startswith("pass: ")
    (line,) = err
    assert line.startswith("fragscope: cannot write file/x: ")


def test_what_is_no_file_is_written_to_and_stays_what_it_is(repository, capsys):
    failing(repository)
    device, link = repository / "null", repository / "link"
    device.symlink_to("/dev/null")
    (repository / "real").write_text("old")
    link.symlink_to("real")
    os.mkfifo(repository / "pipe")
    reader = os.open(repository / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run(["gate", "--summary", "null", "--comment", "link", "--junit", "pipe"]) == 3
        assert os.read(reader, 100).startswith(b"<?xml ")
    finally:
        os.close(reader)
    assert capsys.readouterr().err == ""
    assert device.is_symlink()
    assert link.is_symlink()
    assert (repository / "real").read_text().startswith("<!-- fragscope-gate -->\n")
    assert run(["gate", "--junit", "/dev/full"]) == 3
    assert Path("/dev/full").is_char_device()
    assert "cannot write /dev/full: No space left on device" in capsys.readouterr().err


def test_a_lock_behind_a_link_stays_behind_it(repository):
    (repository / "fragscope.lock").symlink_to("real.lock")
    assert run(["lock"]) == 0
    assert (repository / "fragscope.lock").is_symlink()
    assert (repository / "real.lock").read_text().startswith("# ")


def test_annotations_name_files_from_the_root_of_the_checkout(repository, capsys, monkeypatch):
    failing(repository)
    monkeypatch.setenv("GITHUB_WORKSPACE", str(repository.parent))
    assert run(["gate", "--format", "github"]) == 3
    assert capsys.readouterr().out.startswith(f"::error file={repository.name}/budgets.toml,line=2,title=over%3A moe/")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(repository / "elsewhere"))
    run(["gate", "--format", "github"])
    assert capsys.readouterr().out.startswith("::error file=budgets.toml,line=2,")


def test_json_holds_no_command_either(repository, capsys):
    failing(repository)
    hostile = "a##[add-mask]b"
    measure(repository, case(hostile))
    run(["gate", "--format", "json"])
    out = capsys.readouterr().out
    assert "##[" not in out
    assert json.loads(out)["checks"][0]["case"]["variant"] == hostile


def test_help_names_the_exit_codes_and_options(capsys):
    assert run(["lock", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("--update", "--check", "--prune", "--lock", "\n    3  ", "\n    4  ", "\n    5  "):
        assert word in out
