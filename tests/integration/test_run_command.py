"""``fragscope run`` as a user calls it: what it refuses, what it prints, how it exits."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from scenario_files import SMALL, cases_in, command, results_in, run_in, write_scenarios

from fragscope.cli import run

pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with one scenario file and no pyproject.toml."""
    (tmp_path / "scenario_small.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    modules, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("fragscope_scenarios."):
            del sys.modules[name]


def refused(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert run(["run", "--device", "virtual", "--out", "out", *arguments]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert not Path("out", "results.json").exists()
    return err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "no scenarios are configured: name a file or folder, or set scenarios"),
        (["small"], "small is no file or folder here, and no scenarios are configured"),
        (["./nowhere.py"], "nowhere.py: no such file"),
        (["x" * 5000], "is no file or folder here"),
        ([".", "smal"], "no scenario named 'smal'; did you mean small"),
        ([".", "small/onee"], "no preset named 'onee'; did you mean one"),
        ([".", "small/one/othr"], "no variant named 'othr'; did you mean other"),
        ([".", "--preset", "tow"], "--preset tow: nothing matches; did you mean two"),
        ([".", "--variant", "ether"], "--variant ether: nothing matches; did you mean other"),
        ([".", "--set", "m=1"], "no selected scenario has a parameter 'm'"),
        ([".", "--set", "mod=slow"], "did you mean mode"),
        ([".", "--set", "n"], "--set n: write NAME=VALUE"),
        ([".", "--set", "n=many"], "small takes a int here"),
        ([".", "--set", "mode=medium"], "small takes one of fast, slow"),
        ([".", "--card", "h100-80"], "did you mean h100-80gb"),
        ([".", "--torch", "two"], "is not a torch release"),
        ([".", "--torch", "1.13"], "older than the oldest rules known"),
        ([".", "--conf", "expandable_segment:True"], "expandable_segment"),
        ([".", "--conf", "backend:cudaMallocAsync"], "backend"),
        ([".", "--capacity", "many"], "--capacity"),
        ([".", "--capacity", "200 GiB"], "more than h100-80gb has"),
        ([".", "--timeout", "0"], "--timeout"),
        ([".", "--timeout", "nan"], "nan is not a time"),
        ([".", "--jobs", "0"], "--jobs"),
        ([".", "--device", "tpu"], "'tpu' is not one of"),
    ],
)
def test_what_is_mistyped_is_named_with_what_comes_near(
    capfd: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    assert why in refused(capfd, *arguments)


def test_nothing_to_measure(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    assert "no scenario files in empty" in refused(capfd, "empty", code=4)
    (folder / "notes.txt").touch()
    assert "notes.txt: is not a Python file" in refused(capfd, "notes.txt")


def test_a_file_that_cannot_be_imported_stops_the_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_scenarios(folder, "broken", "print('importing')\nimport os\nos.write(1, b'low level')\n1 / 0\n")
    assert run(["run", ".", "--device", "virtual"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "importing" in err
    assert "low level" in err
    assert "line 10: ZeroDivisionError: division by zero" in err


def test_out_must_be_a_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "taken").touch()
    for out in ("taken", "taken/below"):
        assert run(["run", ".", "--device", "virtual", "--out", out]) == 2
        assert f"--out {folder}/{out}: " in capfd.readouterr().err


def test_names_that_are_no_text_stand_in_the_results_escaped(folder: Path) -> None:
    run_in(folder, ".", "small/one/original", "--out", os.fsdecode(b"o\xff"))
    results = json.loads((folder / os.fsdecode(b"o\xff") / "results.json").read_bytes())
    assert results["run"]["command"][-2:] == ["--out", r"o\udcff"]


def test_list_runs_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", ".", "small/two", "--device", "virtual", "--torch", "2.11", "--set", "mode=slow", "--list"]
    assert run(arguments) == 0
    assert capfd.readouterr().out.splitlines() == [
        "small/two/original[mode=slow]@default,torch-2.11,h100-80gb,virtual",
        "small/two/other[mode=slow]@default,torch-2.11,h100-80gb,virtual",
    ]
    assert not (folder / ".fragscope").exists()


NOISY = """
    import os, sys
    from helper_shapes import SIZE

    print("printed while imported")
    os.write(1, b"written while imported")

    @fragscope.scenario("noisy", presets={"p": {"size": SIZE}})
    def _(case):
        print("printed while measured")
        os.write(1, b"written while measured")
        os.system("echo echoed while measured")
        print("and to stderr", file=sys.stderr)
        with case.measure():
            kept = on_card(case.size)
"""


def test_stdout_is_results_json_and_nothing_else(tmp_path: Path) -> None:
    """From another folder than the scenario's, which imports a module beside it, with a configured folder too."""
    project = tmp_path / "project"
    write_scenarios(project / "checks", "noisy", NOISY)
    (project / "checks" / "helper_shapes.py").write_text("SIZE = 1234\n")
    (project / "pyproject.toml").write_text('[tool.fragscope]\nscenarios = ["checks"]\ntorch = "2.12"\n')
    (project / "below").mkdir()
    done = run_in(project / "below", "noisy", "--format", "json", "--jobs", "1")
    assert done.stdout.encode() == (project / "below" / "out" / "results.json").read_bytes()
    content = json.loads(done.stdout)
    assert content["run"]["complete"] is True
    assert content["run"]["planned"] == len(content["cases"]) == 1
    (case,) = content["cases"]
    assert (case["torch"], case["params"], case["peak"]["requested"]) == ("2.12", {"size": 1234}, 1234)
    assert set(case["sources"]) == {
        str(project / "checks" / "scenario_noisy.py"), str(project / "checks" / "helper_shapes.py")
    }  # fmt: skip
    log = (project / "below" / "out" / "logs" / f"{case['digest']}.log").read_text()
    for line in ("printed while measured", "written while measured", "echoed while measured", "and to stderr"):
        assert line in log
        assert line not in done.stderr
    # Once, although the workers' server imports the file too; and a progress bar is for terminals.
    assert done.stderr.count("printed while imported") == 1
    assert "\x1b" not in done.stderr
    assert "━" not in done.stderr
    assert sorted(p.name for p in (project / "below" / "out").iterdir()) == [
        ".lock", "cases.jsonl", "logs", "results.json", "traces"
    ]  # fmt: skip


HOSTILE = """
    import os, subprocess, sys
    print("::stop-commands::zz")
    print("one \\x1b[31m two ##[error]three", file=sys.stderr)
    os.write(1, b"::error::low\\r\\n")
    os.write(2, b"::error::\\xff lower\\n\\n")
    subprocess.run(["echo", "::error::started"], check=True)
    subprocess.Popen(["sleep", "10"])  # holds the output open
    os.write(2, b"::warning::without an end")

    @fragscope.scenario("hostile", presets={"p": {}})
    def _(case):
        with case.measure():
            pass
"""


@pytest.mark.parametrize("command", [["run", ".", "--device", "virtual", "--list"], ["upstream", "."]])
def test_what_files_print_while_imported_is_shown_and_is_no_command(command: list[str], tmp_path: Path) -> None:
    """A runner of GitHub reads lines that begin with two colons, and ``##[`` anywhere (docs of ActionCommand.cs)."""
    write_scenarios(tmp_path, "hostile", HOSTILE)
    done = subprocess.run(
        [sys.executable, "-m", "fragscope", *command],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    shown = [line for line in done.stderr.splitlines() if "printed at import" in line]
    assert shown == [
        f"fragscope: printed at import: {text}"
        for text in (
            "::stop-commands::zz",
            r"one \x1b[31m two ##\x5b" "error]three",
            "::error::low",
            r"::error::\xff lower",
            "",
            "::error::started",
            "::warning::without an end",
        )
    ]
    for line in (done.stdout + done.stderr).splitlines():
        assert not line.lstrip().startswith("::")
        assert "##[" not in line


UNDECLARED = """
    @fragscope.scenario("fails", presets={"p": {}})
    def _(case):
        raise ValueError("no")

    @fragscope.scenario("succeeds", presets={"p": {}}, expect="oom")
    def _(case):
        with case.measure():
            pass

    @fragscope.scenario("skips", presets={"p": {}})
    def _(case):
        case.skip("no card of that kind")

    @fragscope.scenario("works", presets={"p": {}})
    def _(case):
        with case.measure():
            pass
"""


def test_exit_codes_of_outcomes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_scenarios(folder, "undeclared", UNDECLARED)
    base = ["run", "scenario_undeclared.py", "--device", "virtual", "--out", "out", "--no-report"]
    assert run([*base, "fails", "succeeds", "skips"]) == 3
    err = capfd.readouterr().err
    assert "crash: fails/p/original@" in err
    assert "ValueError: no (at scenario_undeclared.py:10)" in err
    assert "(log: out/logs/" in err
    assert "ok: succeeds/p/original@" in err
    assert run([*base, "skips", "works"]) == 4
    assert "skipped: skips/p/original@" in capfd.readouterr().err
    assert [c["outcome"] for c in results_in(folder)["cases"]] == ["skipped", "ok"]


def test_results_of_an_earlier_run_are_replaced_as_a_whole(folder: Path) -> None:
    base = ["run", "scenario_small.py", "--device", "virtual", "--out", "out", "--no-report"]
    assert run([*base, "small/one"]) == 0
    before = {c["trace"] for c in cases_in(folder).values()}
    (folder / "out" / "report.html").write_text("of the earlier run")
    assert run([*base, "small/two/other", "--set", "n=5", "--resume"]) == 0
    (case,) = results_in(folder)["cases"]
    assert (case["params"]["n"], case["peak"]["requested"]) == (5, 5)
    traces = {f"traces/{p.name}" for p in (folder / "out" / "traces").iterdir()}
    assert traces == {case["trace"]}
    assert not traces & before
    assert not (folder / "out" / "report.html").exists()


def test_a_temporary_folder_too_long_for_sockets_is_no_obstacle(folder: Path, tmp_path: Path) -> None:
    """``sun_path`` of unix(7) holds 107 bytes, and so would end the start of every worker."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    done = subprocess.run(
        [*command("."), "small/one", "--no-report"],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, "too long" in done.stderr) == (0, False)
    assert len(cases_in(folder)) == 2


def test_where_no_socket_fits_one_line_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    monkeypatch.setattr("fragscope.suite.server._SHORT_FOLDERS", (str(tmp_path / "none"),))
    assert run(["run", ".", "small/one", "--device", "virtual"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "set TMPDIR to a folder with a shorter path" in said


def test_a_closed_stdout_is_no_traceback(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*command("."), "--list"], cwd=folder, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )
    os.close(write)
    assert "Traceback" not in done.stderr


def test_the_nightly_matrix_is_measured_and_what_a_release_refuses_is_not_a_failure(tmp_path: Path) -> None:
    write_scenarios(
        tmp_path,
        "cells",
        """
        OOM = fragscope.Expect("oom", conf="max_split*", torch="2.13")

        @fragscope.scenario("cells", presets={"one": {}}, expect=OOM)
        def _(case):
            with case.measure():
                kept = on_card(1)
        """,
    )
    done = run_in(tmp_path, "scenario_cells.py", "--matrix", "nightly", code=3)
    cases = results_in(tmp_path)["cases"]
    cells = [(c["torch"], c["conf"], c["expected_outcome"]) for c in cases]
    confs = ("", "max_split_size_mb:20", "expandable_segments:True")
    assert cells == [
        (release, conf, "oom" if (release, conf[:9]) == ("2.13", "max_split") else "ok")
        for release in ("2.11", "2.13")
        for conf in confs
    ]
    assert done.stderr.count("fragscope: ok: ") == 1
    arguments = ("--conf", "", "--conf", "large_segment_size_mb:32", "--torch", "2.10", "--torch", "2.11")
    done = run_in(tmp_path, "scenario_cells.py", *arguments)
    assert len(results_in(tmp_path)["cases"]) == 3
    assert "fragscope: not applicable: --conf large_segment_size_mb:32 --torch 2.10: " in done.stderr
    assert [n["torch"] for n in results_in(tmp_path)["run"]["not_applicable"]] == ["2.10"]
