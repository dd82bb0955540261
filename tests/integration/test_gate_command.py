"""``fragscope gate`` as a CI job calls it: exit code, stdout, stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fragscope.cli import run
from fragscope.results import Case, Peak, Results, Run, save_results

MIB = 2**20


def _case(variant: str, **changes: object) -> Case:
    return Case(
        **{
            "id": f"moe-fp8-shuffle/deepseek-v3-tp8/{variant}",
            "digest": "d",
            "scenario": "moe-fp8-shuffle",
            "preset": "deepseek-v3-tp8",
            "variant": variant,
            "role": "original",
            "torch": "2.11.0",
            "torch_installed": "2.11.0",
            "card": "h100-80gb",
            "device": "virtual",
            "outcome": "ok",
            "exact": True,
            "allocs": 9,
            "peak": Peak(requested=8000 * MIB, allocated=8000 * MIB, reserved=9012 * MIB),
            "transient": 3636 * MIB,
            **changes,
        }
    )


def _write(folder: Path, *cases: Case, complete: bool = True) -> None:
    now = Run(started="2025-01-01T00:00:00Z", seconds=1.0, complete=complete, planned=len(cases))
    save_results(Results(run=now, cases=list(cases)), folder / "results.json")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A user's repository: a project file of its own, results where `fragscope run` leaves them, and budgets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    _write(tmp_path / ".fragscope", _case("list-stack"), _case("preallocated", transient=2300 * MIB))
    _budgets(tmp_path, 'transient = "2300 MiB"')
    return tmp_path


def _budgets(folder: Path, limits: str, pattern: str = "moe-fp8-shuffle/*/*", name: str = "budgets.toml") -> None:
    (folder / name).write_text(f'[budget."{pattern}"]\n{limits}\n', encoding="utf-8")


def test_over_budget(repository, capsys):
    assert run(["gate"]) == 3
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "over  moe-fp8-shuffle/deepseek-v3-tp8/list-stack  transient  budget 2,300.00 MiB  value 3,636.00 MiB  "
        "excess 1,336.00 MiB (+58.1 %)  [budgets.toml:2]",
        "fail: 1 value over budget; 2 values of 2 cases held against 1 budget",
    ]
    assert err == ""


def test_results_that_are_not_there_are_named_as_given_with_what_to_do(repository, capsys):
    (repository / "l.json").symlink_to("nothere")
    (repository / "empty").mkdir()
    for given, said in (
        ("l.json", "l.json: is a link to what is not there"),
        ("missing.json", "missing.json: is not there"),
        ("empty", "empty: holds no results.json"),
    ):
        assert run(["gate", given]) == 5
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"fragscope: {said}; write results with 'fragscope run' first\n")


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("9" * 5000, "line 2: holds a number of 5,000 digits"),
        (f'"{"9" * 5000}"', "line 2: transient: '" + "9" * 59 + "… (5002 characters) is not a byte count; use an"),
        ("-" + "9" * 4000, "line 2: transient: -" + "9" * 59 + "… (4001 characters) is negative"),
        ("9" * 4000, "line 2: transient: the limit is beyond any memory"),
    ],
)
def test_a_limit_of_thousands_of_digits_is_one_short_line(repository, capsys, limit, said):
    _budgets(repository, f"transient = {limit}")
    assert run(["gate"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fragscope: budgets.toml: {said}")
    assert err.count("\n") == 1
    assert len(err) < 300


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["gone%0Aa.json"], 5, "gone%250Aa.json: is not there"),
        (["--only", "x"], 2, "--only goes with --against REF"),
        (["--budgets", "none.toml"], 2, "--budgets none.toml: there is no such file"),
    ],
)
def test_an_error_without_a_verdict_is_an_annotation_too(repository, capsys, arguments, code, said):
    assert run(["gate", *arguments]) == code
    plain, err = capsys.readouterr()
    assert plain == ""
    assert run(["gate", "--format", "github", *arguments]) == code
    out, same = capsys.readouterr()
    assert same == err
    assert out.startswith(f"::error title=fragscope gate::{said}")
    assert out.count("\n") == 1


def test_an_annotation_of_an_error_ends_no_line(repository, capsys):
    assert run(["gate", "--format", "github", "x\n::stop-commands::y"]) == 5
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    assert out.startswith("::error title=fragscope gate::x\\n::stop-commands::y: is not there")


def test_a_pass(repository, capsys):
    _budgets(repository, 'peak_reserved = "9 GiB"')
    assert run(["gate"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("pass: 2 values of 2 cases held against 1 budget\n", "")


def test_results_may_be_named_by_folder_or_file(repository):
    _write(repository / "other", _case("preallocated", transient=1))
    assert run(["gate", "other"]) == 0
    assert run(["gate", "other/results.json"]) == 0
    assert run(["gate", ".fragscope"]) == 3


def test_the_project_file_names_budgets_and_results(repository, monkeypatch, capsys):
    (repository / "pyproject.toml").write_text('[tool.fragscope]\nbudgets = "ci/memory.toml"\nout = "build"\n')
    (repository / "ci").mkdir()
    _budgets(repository, "transient = 0", name="ci/memory.toml")
    _write(repository / "build", _case("only", transient=1))
    assert run(["gate"]) == 3
    assert "[ci/memory.toml:2]" in capsys.readouterr().out
    monkeypatch.chdir(repository / "ci")
    assert run(["gate"]) == 3
    assert "[memory.toml:2]" in capsys.readouterr().out


def test_the_option_wins_over_the_project_file(repository):
    (repository / "pyproject.toml").write_text('[tool.fragscope]\nbudgets = "none.toml"\n')
    _budgets(repository, 'transient = "4 GiB"', name="loose.toml")
    assert run(["gate", "--budgets", "loose.toml"]) == 0


@pytest.mark.parametrize(
    ("arguments", "table", "words"),
    [
        ([], "", ["no budgets file", "--budgets FILE"]),
        (["--budgets", "none.toml"], "", ["none.toml", "no such file"]),
        ([], 'budgets = "none.toml"', ["none.toml", "pyproject.toml", "--budgets FILE"]),
        ([], 'budget = "none.toml"', ["did you mean 'budgets'?"]),
        (["--format", "yaml"], "", ["yaml"]),
    ],
)
def test_a_call_without_usable_budgets_is_a_usage_error(repository, capsys, arguments, table, words):
    (repository / "budgets.toml").unlink()
    (repository / "pyproject.toml").write_text(f"[tool.fragscope]\n{table}\n")
    assert run(["gate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for word in words:
        assert word in err


@pytest.mark.parametrize("text", ["", "# later\n", "[budget]\n"])
def test_budgets_that_say_nothing_are_not_a_pass(repository, capsys, text):
    (repository / "budgets.toml").write_text(text)
    assert run(["gate"]) == 4
    assert "nothing was held against a budget" in capsys.readouterr().out


def test_a_case_that_was_skipped_is_not_a_pass(repository, capsys):
    _write(repository / ".fragscope", _case("list-stack", outcome="skipped", message="needs 39,454 MiB"))
    assert run(["gate"]) == 4
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "not measured  moe-fp8-shuffle/deepseek-v3-tp8/list-stack  skipped: needs 39,454 MiB  [budgets.toml:1]",
        "not measured: 1 thing not measured; 0 values of 0 cases held against 1 budget",
    ]


def test_a_budget_without_a_case_is_not_a_pass(repository, capsys):
    _budgets(repository, "retained = 0", pattern="moe-fp8-shuffel/*/*")
    assert run(["gate"]) == 4
    out = capsys.readouterr().out
    assert "not measured  budget moe-fp8-shuffel/*/*  no case matches" in out
    assert "did you mean moe-fp8-shuffle?  [budgets.toml:1]" in out


def test_an_interrupted_run_is_not_a_pass(repository, capsys):
    _write(repository / ".fragscope", _case("preallocated", transient=1), complete=False)
    assert run(["gate"]) == 4
    assert "1 of 1 planned cases" in capsys.readouterr().out


def test_an_undeclared_outcome(repository, capsys):
    _budgets(repository, 'transient = "4 GiB"')
    _write(repository / ".fragscope", _case("list-stack", outcome="oom", message="tried to allocate 2 GiB"))
    assert run(["gate"]) == 3
    assert (
        "undeclared  moe-fp8-shuffle/deepseek-v3-tp8/list-stack  outcome oom, declared ok  tried to allocate 2 GiB\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[budget."a/b/c"]\nretained = 0\ntransent = 1\n', ["line 3", "'transent'", "did you mean 'transient'?"]),
        ('[budget."a/b/c"]\ntransient = "2 gib"\n', ["line 2", "transient", "'2 gib'"]),
        ('[budget."a/b/c"]\nretained = 0\n[budget."a/b/c"]\n', ["line 3", "twice", "line 1"]),
        ("retained = \n", ["line 1"]),
        ('["\\u001b[2J"]\n', ["line 1"]),
    ],
)
def test_a_malformed_budgets_file(repository, capsys, text, words):
    (repository / "budgets.toml").write_text(text)
    assert run(["gate"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fragscope: budgets.toml: ")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    for word in words:
        assert word in err


def test_unusable_results(repository, capsys):
    assert run(["gate", "nowhere"]) == 5
    assert "nowhere: is not there; write results with 'fragscope run'" in capsys.readouterr().err
    (repository / "bad.json").write_text("{}")
    assert run(["gate", "bad.json"]) == 5
    assert "bad.json" in capsys.readouterr().err


def test_json(repository, capsys):
    assert run(["gate", "--format", "json"]) == 3
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["schema_version"] == 1
    assert (verdict["decision"], verdict["exit_code"]) == ("over", 3)
    worst, within = verdict["checks"]
    assert (worst["over"], within["over"]) == (True, False)
    assert {key: worst[key] for key in ("metric", "limit", "value", "excess")} == {
        "metric": "transient",
        "limit": 2300 * MIB,
        "value": 3636 * MIB,
        "excess": 1336 * MIB,
    }
    assert worst["case"]["id"] == "moe-fp8-shuffle/deepseek-v3-tp8/list-stack"
    assert worst["budget"] == {"pattern": "moe-fp8-shuffle/*/*", "file": "budgets.toml", "line": 2}


def test_markdown(repository, capsys):
    assert run(["gate", "--format", "markdown"]) == 3
    out = capsys.readouterr().out
    assert out.startswith("### fragscope gate: failed\n")
    assert "| 2,300.00 MiB | 3,636.00 MiB | 1,336.00 MiB (+58.1 %) | `budgets.toml:2` |" in out


def test_the_process_exits_with_the_code_and_never_imports_torch(repository):
    code = "import sys; sys.modules['torch'] = None; from fragscope.cli import main; main(['gate'])"
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith("over  ")


def test_help_says_what_the_exit_codes_mean(capsys):
    assert run(["gate", "--help"]) == 0
    out = capsys.readouterr().out
    for code in ("0", "3", "4", "5"):
        assert f"\n    {code}  " in out
