"""action.yml: its form, and its scripts run as a GitHub runner runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
INSTALL, GATE = STEPS
_FENCE = re.compile(r"^```yaml[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WORKFLOWS: list[dict[str, Any]] = [
    yaml.load(text, yaml.BaseLoader)  # not safe_load, to which the key "on" is true
    for text in _FENCE.findall((ROOT / "docs" / "github.md").read_text())
]
DOCUMENTED = [
    step["run"] for flow in WORKFLOWS for job in flow["jobs"].values() for step in job["steps"] if "run" in step
]
_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


# --- form ---------------------------------------------------------------------------------------------------------


def test_it_is_a_composite_action_of_scripts_alone():
    assert ACTION["runs"]["using"] == "composite"
    for step in STEPS:
        assert step["shell"] == "bash"
        assert "uses" not in step


def test_no_expression_stands_in_a_script():
    scripts = [step["run"] for step in STEPS]
    scripts += DOCUMENTED
    assert len(scripts) > len(STEPS)
    for script in scripts:
        assert "${{" not in script


def test_every_script_is_a_script():
    for script in [*(step["run"] for step in STEPS), *DOCUMENTED]:
        assert subprocess.run(["bash", "-n", "-c", script], capture_output=True, check=False).stderr == b""


def test_every_input_is_described_used_and_the_only_thing_that_is_passed_in():
    used = {
        name for step in STEPS for value in (*step.get("env", {}).values(), step.get("working-directory", ""))
        for name in _EXPRESSION.findall(value)
    }  # fmt: skip
    assert used == {f"inputs.{name}" for name in ACTION["inputs"]}
    for name, declared in ACTION["inputs"].items():
        assert declared["description"], name
        assert isinstance(declared["default"], str), name


def test_outputs_are_those_that_the_script_writes():
    for name, output in ACTION["outputs"].items():
        assert output["value"] == f"${{{{ steps.{GATE['id']}.outputs.{name} }}}}"
        assert f'echo "{name}=$' in GATE["run"]


def test_no_workflow_of_the_docs_runs_the_code_of_a_fork_with_rights():
    assert WORKFLOWS
    for flow in WORKFLOWS:
        assert "pull_request_target" not in str(flow)
        rights = [flow["permissions"], *(job.get("permissions", {}) for job in flow["jobs"].values())]
        steps = [step for job in flow["jobs"].values() for step in job["steps"]]
        if any("write" in right.values() for right in rights):
            assert set(flow["on"]) == {"workflow_run"}
            assert not any("checkout" in step.get("uses", "") for step in steps)
            assert not any("fragscope" in step.get("run", "").split() for step in steps)
        else:
            assert not any("secrets." in str(step) for step in steps)


def test_inputs_that_the_docs_give_are_those_of_the_action():
    given = [
        step["with"] for flow in WORKFLOWS for job in flow["jobs"].values() for step in job["steps"]
        if step.get("uses", "").startswith("OWNER/fragscope@")
    ]  # fmt: skip
    assert given
    for inputs in given:
        assert set(inputs) <= set(ACTION["inputs"])


def test_a_pull_request_is_compared_with_the_base_that_it_is_merged_into():
    steps = [step for flow in WORKFLOWS for job in flow["jobs"].values() for step in job["steps"]]
    bases = [step["with"]["against"] for step in steps if "against" in step.get("with", {})]
    depths = [step["with"]["fetch-depth"] for step in steps if "checkout" in step.get("uses", "")]
    assert set(bases) == {"HEAD^1"}, "the event's base.sha may be older, and HEAD holds what was merged since"
    assert set(depths) == {"2"}


# --- scripts ------------------------------------------------------------------------------------------------------


class Runner:
    """As much of a GitHub runner as a composite step sees."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "checkout"
        self.temporary = folder / "temp"
        for made in (self.workspace, self.temporary):
            made.mkdir()
        self.summary, self.output = folder / "summary.md", folder / "output"
        self.calls = folder / "calls"
        for file in (self.summary, self.output, self.calls):
            file.touch()

    def step(self, step: dict[str, Any], **inputs: str) -> subprocess.CompletedProcess[str]:
        values = {name: declared["default"] for name, declared in ACTION["inputs"].items()}
        values |= {name.replace("_", "-"): value for name, value in inputs.items()}

        def filled(text: str) -> str:
            return _EXPRESSION.sub(lambda m: values[m[1].removeprefix("inputs.")], text)

        script = self.temporary / "script.sh"
        script.write_text(step["run"])
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GITHUB_ACTIONS": "true",
            "GITHUB_WORKSPACE": str(self.workspace),
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_OUTPUT": str(self.output),
            "RUNNER_TEMP": str(self.temporary),
            "CALLS": str(self.calls),
            **{name: filled(value) for name, value in step["env"].items()},
        }
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.workspace / filled(step.get("working-directory", ".")),
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def python(
        self,
        *,
        torch: bool = True,
        run: int = 0,
        gate: int = 0,
        writes: bool = True,
        pip: bool = True,
        own: bool = True,
    ) -> str:
        """A Python that only notes what it is asked to do, and writes the files that a gate would."""
        file = self.temporary / "python"
        file.write_text(
            f"""#!{sys.executable}
import os, sys
if sys.argv[1] == "-c":
    sys.exit({int(own)} if "EXTERNALLY-MANAGED" in sys.argv[2] else {int(not torch)})
if sys.argv[1:] == ["-m", "pip", "--version"]:
    sys.exit({int(not pip)})
with open(os.environ["CALLS"], "a") as f:
    print(*map(repr, sys.argv[1:]), file=f)
for option, name in zip(sys.argv, sys.argv[1:]):
    if {writes} and option in ("--junit", "--comment"):
        open(name, "w").write("something")
sys.exit({{"run": {run}, "gate": {gate}}}.get(sys.argv[3], 0))
"""
        )
        file.chmod(0o755)
        return str(file)

    @property
    def called(self) -> list[list[str]]:
        """What that Python noted."""
        return [[word.strip("'") for word in line.split()] for line in self.calls.read_text().splitlines()]

    @property
    def outputs(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.output.read_text().splitlines())


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path)


def test_torch_is_installed_only_where_there_is_none(runner):
    assert runner.step(INSTALL, python=runner.python(torch=True)).returncode == 0
    assert runner.called == [["-m", "pip", "install", "--quiet", "--", str(ROOT)]]
    runner.calls.write_text("")
    assert runner.step(INSTALL, python=runner.python(torch=False), fragscope="fragscope==0.1.0").returncode == 0
    cpu = "https://download.pytorch.org/whl/cpu"
    assert runner.called == [
        ["-m", "pip", "install", "--quiet", "--index-url", cpu, "--", "torch"],
        ["-m", "pip", "install", "--quiet", "--", "fragscope==0.1.0"],
    ]


@pytest.mark.parametrize(
    ("made", "system", "advice"),
    [
        ({"pip": False}, "Linux", "'uv venv --seed'"),
        ({"own": False}, "Linux", "put actions/setup-python before this action"),
        ({}, "Windows", "runs-on: ubuntu-latest"),
    ],
)
def test_a_python_that_nothing_can_be_installed_into_is_told_so(runner, monkeypatch, made, system, advice):
    monkeypatch.setenv("RUNNER_OS", system)
    monkeypatch.delenv("PIP_BREAK_SYSTEM_PACKAGES", raising=False)
    done = runner.step(INSTALL, python=runner.python(**made))
    assert (done.returncode, runner.called) == (1, [])
    assert done.stdout.startswith("::error title=fragscope gate::")
    assert advice in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_python_that_is_not_there_is_told_so(runner):
    done = runner.step(INSTALL, python="python-of-nobody")
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "actions/setup-python installs one" in done.stdout


def test_whether_a_python_is_the_systems_is_asked_of_it(runner):
    """The question of the script, put to this Python and to one whose library is marked as PEP 668 has it."""
    question = re.search(r"-c '(import os.*?)'; then", INSTALL["run"], re.DOTALL)[1]
    assert subprocess.run([sys.executable, "-c", question], check=False).returncode == 1, "a virtual environment"
    (runner.temporary / "EXTERNALLY-MANAGED").touch()
    marked = (
        f"import sys, sysconfig\nsys.prefix = sys.base_prefix\nsysconfig.get_path = lambda _: {str(runner.temporary)!r}"
    )
    assert subprocess.run([sys.executable, "-c", f"{marked}\n{question}"], check=False).returncode == 0


def test_scenarios_are_run_and_their_results_gated(runner):
    lines = "\n  scenarios\n\none.py  \n"
    options = {"budgets": "ci/b.toml", "comment": "true", "warn_only": "true"}
    done = runner.step(GATE, python=runner.python(), scenarios=lines, **options)
    assert done.returncode == 0, done.stderr
    run, gate = runner.called
    out = Path(runner.outputs["junit"]).parent
    assert out.parent == runner.temporary
    assert run == ["-m", "fragscope", "run", "--device", "virtual", "--no-report", "--out", f"{out}/results", "--",
                   "scenarios", "one.py"]  # fmt: skip
    assert gate == [
        "-m", "fragscope", "gate", "--format", "github", "--summary", str(runner.summary), "--junit", f"{out}/gate.xml",
        "--budgets=ci/b.toml", "--warn-only", "--comment", f"{out}/comment.md", "--", f"{out}/results",
    ]  # fmt: skip
    assert runner.outputs == {"exit-code": "0", "junit": f"{out}/gate.xml", "comment": f"{out}/comment.md"}


def test_a_comparison_runs_what_it_compares(runner):
    done = runner.step(GATE, python=runner.python(gate=3), against="origin/main")
    assert done.returncode == 3
    ((*_, last),) = runner.called
    assert last == "--against=origin/main"
    assert runner.outputs["exit-code"] == "3"
    assert "comment" not in runner.outputs


def test_scenarios_and_a_commit_exclude_each_other(runner):
    done = runner.step(GATE, python=runner.python(), against="main", scenarios="a.py")
    assert (done.returncode, runner.called, runner.outputs) == (2, [], {"exit-code": "2"})
    assert done.stdout.startswith("::error title=fragscope gate::")


@pytest.mark.parametrize(
    ("run", "gate", "code", "calls"), [(3, 3, 3, 2), (4, 4, 4, 2), (4, 0, 0, 2), (2, 0, 2, 1), (1, 0, 1, 1)]
)
def test_a_run_that_could_not_be_made_ends_the_step_and_the_rest_is_left_to_the_gate(runner, run, gate, code, calls):
    assert runner.step(GATE, python=runner.python(run=run, gate=gate)).returncode == code
    assert len(runner.called) == calls
    assert runner.outputs["exit-code"] == str(code)
    assert ("junit" in runner.outputs) == (calls == 2)


def test_outputs_name_only_files_that_the_gate_wrote(runner):
    done = runner.step(GATE, python=runner.python(gate=5, writes=False), comment="true", against="main")
    assert (done.returncode, runner.outputs) == (5, {"exit-code": "5"})


def test_a_step_without_a_folder_to_write_to_says_so(runner):
    python = runner.python()
    step = GATE | {"env": GATE["env"] | {"RUNNER_TEMP": str(runner.temporary / "none")}}
    assert (runner.step(step, python=python).returncode, runner.outputs) == (1, {"exit-code": "1"})


def test_a_relative_python_is_the_same_for_both_steps(runner):
    project = runner.workspace / "project"
    (project / "venv").mkdir(parents=True)
    Path(runner.python()).rename(project / "venv/python")
    for step in STEPS:
        done = runner.step(step, python="venv/python", working_directory="project")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["against", "scenarios", "budgets", "python", "fragscope", "torch", "torch_index"])
@pytest.mark.parametrize(
    "value", ["$(touch ../owned)", "`touch ../owned`", "'; touch ../owned; '", '"; touch ../owned; "']
)
def test_no_input_is_run(runner, name, value):
    for step in STEPS:
        runner.step(step, **{"python": runner.python(torch=False), name: value})
    assert not (runner.workspace.parent / "owned").exists()


SCENARIO = """\
import fragscope, torch

@fragscope.scenario("loader", presets={"small": {"rows": 1024}}, variant="as-it-is")
def loader(case):
    with case.measure():
        kept = [torch.empty(case.rows, 1024, device="cuda") for _ in range(4)]
        torch.stack(kept)
"""


@pytest.mark.torch
def test_a_failing_gate_as_a_runner_sees_it(runner):
    pytest.importorskip("torch")
    project = runner.workspace / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text('[tool.fragscope]\nscenarios = ["scenario_loader.py"]\n')
    (project / "scenario_loader.py").write_text(SCENARIO)
    (project / "budgets.toml").write_text('[budget."loader/*/*"]\npeak_requested = "16 MiB"\n')
    runner.summary.write_text("# Something before\n")
    done = runner.step(GATE, python=sys.executable, working_directory="project", comment="true")
    assert done.returncode == 3, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("::")]
    # Four tensors of 1024 x 1024 float32 and the stack made of them: 32 MiB, of which 16 are allowed.
    assert commands == [
        "::error file=project/budgets.toml,line=2,title=over%3A loader/small/as-it-is peak_requested::"
        "over: budget 16.00 MiB, value 32.00 MiB, excess 16.00 MiB (+100.0 %25) [budgets.toml:2]"
    ]
    summary = runner.summary.read_text()
    assert summary.startswith("# Something before\n### fragscope gate: failed\n")
    assert Path(runner.outputs["comment"]).read_text() == f"<!-- fragscope-gate -->\n{summary.partition(chr(10))[2]}"
    assert len(ElementTree.parse(runner.outputs["junit"]).findall("testsuite/testcase/failure")) == 1


@pytest.mark.torch
def test_a_checkout_of_another_user_is_trusted(runner, monkeypatch):
    """As in a job with ``container:``, where the runner's user owns the files and root runs the steps."""
    pytest.importorskip("torch")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("HOME", str(runner.temporary))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "2")
    for n, (key, value) in enumerate((("user.name", "a"), ("user.email", "a@example.org"))):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{n}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{n}", value)
    (runner.workspace / "pyproject.toml").write_text('[tool.fragscope]\nscenarios = ["scenario_loader.py"]\n')
    (runner.workspace / "scenario_loader.py").write_text(SCENARIO)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "one"]):
        trusted = ["-c", f"safe.directory={runner.workspace}"]
        subprocess.run(["git", *trusted, *command], cwd=runner.workspace, check=True)
    untrusted = subprocess.run(
        [sys.executable, "-m", "fragscope", "gate", "--against", "HEAD"], cwd=runner.workspace, capture_output=True,
        text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert untrusted.returncode == 2
    assert "git config --global --add safe.directory" in untrusted.stderr
    done = runner.step(GATE, python=sys.executable, against="HEAD")
    assert done.returncode == 0, done.stdout + done.stderr


# --- the workflow that may write comments -------------------------------------------------------------------------

COMMENT = next(text for text in DOCUMENTED if "gh api" in text)


def test_no_comment_is_no_failure():
    ((get, post),) = (
        job["steps"] for flow in WORKFLOWS if "workflow_run" in flow["on"] for job in flow["jobs"].values()
    )
    assert get["continue-on-error"] == "true", "a gate that could not be held leaves no artifact"
    assert post["if"] == f"steps.{get['id']}.outcome == 'success'"
    assert post["run"] == COMMENT


MARKER = "<!-- fragscope-gate -->"


def comment(folder: Path, body: str, *, pull: str = "17", old: str = "", **event: str) -> tuple[int, list[str]]:
    """Run its script where GitHub answers this; the exit code and what GitHub was asked, one call a line."""
    (folder / "comment").mkdir()
    (folder / "comment/comment.md").write_text(body)
    gh = folder / "gh"
    gh.write_text(
        f"""#!/bin/bash
printf '%s|' "$@" | tr '\\n' ' ' >> "{folder}/asked"
echo >> "{folder}/asked"
case "$*" in
  *'/pulls '*) echo '{pull}';;
  *--paginate*) printf '%s\\n' {old};;
esac
"""
    )
    gh.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "RUNNER_TEMP": str(folder), "GITHUB_REPOSITORY": "us/ours"}
    environment |= {"HEAD": "them:branch", "SHA": "0" * 40, "GH_TOKEN": "t", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["bash", "-e", "-c", COMMENT], env=environment | event, cwd=folder, capture_output=True, text=True, check=False
    )
    asked = folder / "asked"
    return done.returncode, asked.read_text().splitlines() if asked.exists() else []


def test_a_first_comment_is_made_and_a_later_one_replaces_it(tmp_path):
    for name, old, last in (
        ("first", "", "api|-X|POST|repos/us/ours/issues/17/comments|-F|body=@"),
        ("later", "5 6", "api|-X|PATCH|repos/us/ours/issues/comments/5|-F|body=@"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        code, asked = comment(folder, f"{MARKER}\n### hi\n", old=old)
        assert code == 0
        assert asked[-1].startswith(f"{last}{folder}/comment/comment.md|")


@pytest.mark.parametrize("body", ["", "hi\n", f"hi\n{MARKER}\n", f"{MARKER}\n" + "x" * 65_536])
def test_what_is_no_comment_of_the_gate_is_not_posted(tmp_path, body):
    code, asked = comment(tmp_path, body)
    assert code != 0
    assert asked == []


def test_nothing_is_posted_where_the_pull_request_moved_on(tmp_path):
    code, asked = comment(tmp_path, f"{MARKER}\n", pull="")
    assert code == 0
    assert len(asked) == 1


def test_the_name_of_a_branch_is_not_run(tmp_path):
    code, asked = comment(tmp_path, f"{MARKER}\n", HEAD='them:$(touch "owned")`touch owned`";touch owned;"')
    assert code == 0
    assert not list(tmp_path.rglob("owned"))
    assert 'head=them:$(touch "owned")`touch owned`";touch owned;"|' in asked[0]
