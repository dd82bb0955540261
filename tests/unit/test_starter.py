"""What ``fragscope init`` finds in a repository, and how it writes."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from fragscope.errors import FragscopeError, InputFileError, UsageError
from fragscope.starter import find_loader, look_at, plan_files, write_all


def made(root: Path, *names: str, **texts: str) -> Path:
    """A folder with empty files, and those with a text."""
    root.mkdir(exist_ok=True)
    for name, text in (dict.fromkeys(names, "") | texts).items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


# --- what there is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "no package; no pytest, nox or tox; no git"),
        ({"acme/__init__.py": ""}, "acme; no pytest, nox or tox; no git"),
        ({"src/acme/__init__.py": "", "tests/test_a.py": ""}, "acme in src/; pytest; no git"),
        ({"acme/weights.py": "", "docs/conf.py": ""}, "acme; no pytest, nox or tox; no git"),
        ({"acme.py": "", "setup.py": "", "noxfile.py": ""}, "acme; nox; no git"),
        ({"tests/conftest.py": "", "tox.ini": "", ".git/HEAD": ""}, "no package; pytest, tox; git"),
        ({"pytest.ini": "", ".git/config": "[remote]\nurl = git@github.com:a/b"}, "no package; pytest; GitHub"),
        (
            {"pyproject.toml": "[tool.pytest.ini_options]\n", ".git/HEAD": "", ".github/x": ""},
            "no package; pytest; GitHub",
        ),
        ({"setup.cfg": "[tool:pytest]\n", ".github/x": ""}, "no package; pytest; no git"),
        (
            {"pyproject.toml": '[project]\nname = "b-pkg"\n', "a_pkg/__init__.py": "", "b_pkg/__init__.py": ""},
            "b_pkg, a_pkg; no pytest, nox or tox; no git",
        ),
    ],
)
def test_what_a_repository_uses_is_read_off_its_files(files: dict[str, str], found: str, tmp_path: Path) -> None:
    assert look_at(made(tmp_path, **files)).found == found


def test_a_repository_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        look_at(tmp_path / "none")
    with pytest.raises(InputFileError, match=r"pyproject.toml: line 2"):
        look_at(made(tmp_path, **{"pyproject.toml": "[project]\nname = \n"}))


# --- the function -------------------------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import zeros
raise SystemExit("this is never run")

def load(layers: int, w: torch.Tensor, ws: list[torch.Tensor], m: "torch.nn.Module", x: dict, device, free,
         /, scale: float, flag: bool, name: str, maybe: torch.Tensor | None, done: int = 3, *, by: "int", dtype): ...
class Model: ...
async def later(): ...
def stream(n: int):
    for i in range(n):
        yield i
def gather_all():
    def inner():
        yield 1
    return list(inner()) + [lambda: (yield)]
"""


def test_a_function_is_found_with_what_it_needs(tmp_path: Path) -> None:
    repository = look_at(made(tmp_path, **{"src/acme/__init__.py": "", "src/acme/sub/loader.py": SOURCE}))
    loader = find_loader(repository, "acme.sub.loader:load")
    assert (loader.file, loader.line) == ("src/acme/sub/loader.py", 6)
    assert [(p.name, p.kind, p.by_name) for p in loader.parameters] == [
        ("layers", "size", False),
        ("w", "tensor", False),
        ("ws", "tensors", False),
        ("m", "module", False),
        ("x", "other", False),
        ("device", "device", False),
        ("free", "tensor", False),
        ("scale", "number", False),
        ("flag", "flag", False),
        ("name", "text", False),
        ("maybe", "tensor", False),
        ("by", "size", True),
        ("dtype", "dtype", True),
    ]
    plan = plan_files(repository, loader, github=False)
    text = plan.files["scenarios/scenario_load.py"]
    ast.parse(text)
    assert "x = None  # to be made: dict" in text
    assert (
        'load(case.layers, w, ws, m, x, "cuda", free, 1.0, False, "", maybe, by=case.by, dtype=torch.bfloat16)' in text
    )
    assert 'PRESETS = {"example": {"layers": 16, "rows": 1024, "columns": 1024, "by": 1024}}' in text


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("load", "write MODULE:FUNCTION"),
        ("../x:load", "write MODULE:FUNCTION"),
        ('acme:__import__("os")', "write MODULE:FUNCTION"),
        ("acme.nope:load", "there is neither acme/nope.py nor acme/nope/__init__.py; packages here are acme"),
        ("acme.loader:laod", "acme/loader.py defines no function laod; did you mean load?"),
        ("acme.loader:Model", "Model in acme/loader.py, line 8, is a class"),
        ("acme.loader:Model.load", "acme/loader.py, line 8, is a class; name a function that calls Model.load"),
        ("acme.loader:Nope.load", "acme/loader.py defines no function Nope.load"),
        ("acme.loader:stream", "acme/loader.py, line 10, is a generator, and a call alone runs nothing of it; name a"),
        ("acme.loader:later", "later in acme/loader.py, line 9, is asynchronous"),
        ("acme.loader:zeros", "acme/loader.py, line 3, imports zeros from torch; name it there"),
        ("acme.broken:f", "acme/broken.py: line 1: is not Python"),
        ("acme.null:f", "acme/null.py"),
    ],
)
def test_what_is_no_function_is_refused_in_one_line(named: str, said: str, tmp_path: Path) -> None:
    files = {"acme/__init__.py": "", "acme/loader.py": SOURCE, "acme/broken.py": "def (", "acme/null.py": "x\0"}
    with pytest.raises(UsageError) as found:
        find_loader(look_at(made(tmp_path, **files)), named)
    assert said in str(found.value)
    assert str(found.value).isprintable()


def test_a_function_with_a_generator_in_it_is_none(tmp_path: Path) -> None:
    assert find_loader(look_at(made(tmp_path, **{"acme.py": SOURCE})), "acme:gather_all").function == "gather_all"


@pytest.mark.parametrize("name", ["torch", "case", "loaded", "fragscope", "Path", "device"])
def test_names_that_the_scenario_uses_itself_do_not_clash(name: str, tmp_path: Path) -> None:
    source = f"import torch as t\ndef {name}({name}: t.Tensor, values: int): ..."
    repository = look_at(made(tmp_path, **{"src/acme/__init__.py": source}))
    text = plan_files(repository, find_loader(repository, f"acme:{name}"), github=False).files
    module = ast.parse(next(iter(text.values())))
    (function,) = (n for n in module.body if isinstance(n, ast.FunctionDef))
    imported = {a.asname or a.name for n in module.body if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert not stored & (imported | {"case"})
    assert stored == {"loaded", *(n for n in stored if n.strip("_") == name)}, "one for the tensor, one for the result"
    assert len(stored) == 2 - (name == "device")
    assert function.name not in imported
    assert '"values_": 1024' in next(iter(text.values()))


def test_made_up_sizes_are_what_kernels_take(tmp_path: Path) -> None:
    """Dimensions are multiples of all blocks, and what loops count off stays small."""
    names = ("hidden_size", "intermediate_size", "N", "vocab", "num_experts", "n_layers", "top_k", "tp_size", "E",
             "block_k", "group_size", "num_blocks", "n_shared")  # fmt: skip
    source = f"def load({', '.join(f'{name}: int' for name in names)}): ..."
    repository = look_at(made(tmp_path, **{"acme.py": source}))
    plan = plan_files(repository, find_loader(repository, "acme:load"), github=False)
    text = plan.files["scenarios/scenario_load.py"]
    (line,) = (line for line in text.splitlines() if line.startswith("PRESETS = "))
    example = ast.literal_eval(line.removeprefix("PRESETS = "))["example"]
    sizes = {name: example[name] for name in names[:4]}
    assert all(size % (4 * 128) == 0 for size in sizes.values()), "a packed scale stands for 4 blocks of 128"
    assert {example[name] for name in (*names[4:9], "n_shared")} == {16}
    assert (example["block_k"], example["group_size"], example["num_blocks"]) == (128, 128, 16)
    (said,) = (line for line in plan.left_to_do if "PRESETS" in line)
    assert said.startswith("put a real model's shapes in PRESETS of scenarios/scenario_load.py: ")


# --- what is written ----------------------------------------------------------------------------------------------


def test_where_things_go(tmp_path: Path) -> None:
    plain = plan_files(look_at(made(tmp_path / "a")), None, github=False)
    assert list(plain.files) == ["scenarios/scenario_loader.py", "budgets.toml"]
    assert tomllib.loads(plain.table)["tool"]["fragscope"] == {"scenarios": ["scenarios"], "budgets": "budgets.toml"}
    tested = plan_files(
        look_at(made(tmp_path / "b", ".git/HEAD", "tests/test_x.py", "acme/__init__.py")), None, github=True
    )
    assert list(tested.files) == ["tests/scenario_acme.py", "budgets.toml", ".github/workflows/fragscope.yml"]
    table = '[tool.fragscope]\nscenarios = ["perf/mem"]\nbudgets = "ci/mem.toml"\n'
    configured = plan_files(look_at(made(tmp_path / "c", ".git/HEAD", **{"pyproject.toml": table})), None, github=True)
    assert list(configured.files)[:2] == ["perf/mem/scenario_loader.py", "ci/mem.toml"]
    assert configured.table == ""


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a\\u001bb"])
def test_configured_places_elsewhere_are_refused(path: str, tmp_path: Path) -> None:
    table = f'[tool.fragscope]\nscenarios = ["{path}"]\n'
    with pytest.raises(UsageError):
        plan_files(look_at(made(tmp_path, **{"pyproject.toml": table})), None, github=False)


def test_the_workflow_is_yaml_and_holds_the_gate(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    files = {"pyproject.toml": '[project]\nname = "acme"\nversion = "0"\n', "acme/__init__.py": "", "tests/x": ""}
    plan = plan_files(look_at(made(tmp_path, ".git/HEAD", **files)), None, github=True, action="us/fork@v2")
    workflow = yaml.safe_load(plan.files[".github/workflows/fragscope.yml"])
    assert workflow["permissions"] == {"contents": "read"}, "no more than reading"
    steps = workflow["jobs"]["fragscope"]["steps"]
    assert steps[-1] == {"uses": "us/fork@v2", "with": {"scenarios": "tests", "budgets": "budgets.toml"}}
    assert steps[0]["with"] == {"fetch-depth": 2, "persist-credentials": False}, "a comparison needs HEAD^1"
    assert "base.sha" not in plan.files[".github/workflows/fragscope.yml"]
    assert plan.left_to_do == ()
    runs = [step["run"] for step in steps if "run" in step]
    assert runs == ["pip install torch --index-url https://download.pytorch.org/whl/cpu", "pip install -e ."]
    bare = plan_files(look_at(made(tmp_path / "bare", ".git/HEAD", "scenarios/x")), None, github=True)
    workflow = yaml.safe_load(bare.files[".github/workflows/fragscope.yml"])
    assert not [step for step in workflow["jobs"]["fragscope"]["steps"] if "run" in step], "there is nothing to install"
    used = workflow["jobs"]["fragscope"]["steps"][-1]["uses"]
    release = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["version"]
    assert used == f"OWNER/fragscope@v{release}", "nobody says who publishes it"
    (said,) = bare.left_to_do
    assert said.startswith("replace OWNER in .github/workflows/fragscope.yml ")


@pytest.mark.parametrize(
    ("table", "adds_table", "given"),
    [
        ("", False, {"scenarios": "scenarios", "budgets": "budgets.toml"}),
        ("", True, {"against": "HEAD^1"}),
        ('scenarios = ["mem"]\nbudgets = "ci/mem.toml"', False, {"against": "HEAD^1"}),
        # A comparison would not run the new scenario, which nothing configured holds.
        ('scenarios = ["a.py"]\nbudgets = "b.toml"', False, {"scenarios": "scenarios", "budgets": "b.toml"}),
    ],
)
def test_the_workflow_compares_commits_where_the_table_says_what_to_run(
    table: str, adds_table: bool, given: dict[str, str], tmp_path: Path
) -> None:
    yaml = pytest.importorskip("yaml")
    texts = {"pyproject.toml": f"[tool.fragscope]\n{table}\n"} if table else {}
    repository = look_at(made(tmp_path, ".git/HEAD", **texts))
    plan = plan_files(repository, None, github=True, action="us/fork@v2", adds_table=adds_table)
    workflow = yaml.safe_load(plan.files[".github/workflows/fragscope.yml"])
    assert workflow["jobs"]["fragscope"]["steps"][-1]["with"] == given


def test_why_there_is_no_workflow_is_true(tmp_path: Path) -> None:
    elsewhere = plan_files(look_at(made(tmp_path / "a", ".git/HEAD")), None, github=False)
    assert elsewhere.left_to_do == ("no workflow: nothing says that this lies on GitHub (--github writes one)",)
    there = plan_files(look_at(made(tmp_path / "b", ".git/HEAD", ".github/x")), None, github=False)
    assert there.left_to_do == ("no workflow: --no-github",)


def test_a_workflow_that_github_would_not_find_is_refused(tmp_path: Path) -> None:
    made(tmp_path, ".git/HEAD", "below/acme.py")
    with pytest.raises(UsageError, match=r"there is no \.git in .*/below, and GitHub runs only workflows at a"):
        plan_files(look_at(tmp_path / "below"), None, github=True)
    assert plan_files(look_at(tmp_path / "below"), None, github=False).left_to_do == (
        "no workflow: this is not the root of a git repository",
    )


@pytest.mark.parametrize(
    ("configured", "run", "said"),
    [
        ('scenarios = ["tests/scenario_a.py"]', "tests", True),
        ('scenarios = ["mem.d", "tests/scenario_a.py"]', "", False),
        ('budgets = "b.toml"', "tests", True),
        ('scenarios = ["tests/scenario_loader.py"]', "", False),
    ],
)
def test_a_scenario_that_nothing_configured_holds_is_to_be_added(
    configured: str, run: str, said: bool, tmp_path: Path
) -> None:
    files = {"tests/scenario_a.py": "", ".git/HEAD": "", "pyproject.toml": f"[tool.fragscope]\n{configured}\n"}
    plan = plan_files(look_at(made(tmp_path, **files)), None, github=False)
    assert plan.run == run
    line = 'add "tests/scenario_loader.py" to scenarios of [tool.fragscope] in pyproject.toml: nothing there holds it'
    assert (line in plan.left_to_do) == said


@pytest.mark.parametrize("name", ["_4bit_load", "_3d", "__", "größe"])
def test_any_name_of_a_function_gives_a_scenario_that_is_python(name: str, tmp_path: Path) -> None:
    repository = look_at(made(tmp_path, **{"acme.py": f"def {name}(): ..."}))
    plan = plan_files(repository, find_loader(repository, f"acme:{name}"), github=False)
    ast.parse(next(iter(plan.files.values())))
    bare = plan_files(look_at(made(tmp_path / "bare", f"{name}/__init__.py")), None, github=False)
    ast.parse(next(iter(bare.files.values())))


def tree(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*")) if p.is_file()}


FILES = {"a/b/one.py": "1\n", "two.toml": "2\n", ".github/workflows/three.yml": "3\n"}


@pytest.mark.parametrize("there", list(FILES))
def test_nothing_is_written_over_and_then_nothing_at_all(there: str, tmp_path: Path) -> None:
    before = tree(made(tmp_path, **{there: "mine"}))
    with pytest.raises(UsageError, match="is there already") as found:
        write_all(tmp_path, FILES, "[tool.fragscope]\n")
    assert there in str(found.value)
    assert tree(tmp_path) == before


def test_a_link_that_leads_nowhere_is_there_too(tmp_path: Path) -> None:
    (tmp_path / "two.toml").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"two\.toml is there already"):
        write_all(tmp_path, FILES)
    assert not (tmp_path / "a").exists()


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(self: Path, *args: object, **kwargs: object) -> object:
        if self.name == "three.yml":
            raise OSError(28, "No space left on device", str(self))
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(FragscopeError, match=r"three.yml cannot be written \(no space left on device\); nothing was"):
        write_all(tmp_path, FILES)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_lead_out_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = made(tmp_path / "repo", "x")
    (root / "a").symlink_to(outside)
    with pytest.raises(UsageError, match="leads out of the repository"):
        write_all(root, FILES)
    (root / "a").unlink()
    (root / "a").write_text("a file")
    with pytest.raises(UsageError, match="is no folder"):
        write_all(root, FILES)
    assert list(outside.iterdir()) == []


def test_the_table_goes_to_the_end_of_pyproject(tmp_path: Path) -> None:
    text = '[project]\nname = "x"  # kept as it is\n\n[tool.ruff]\nline-length = 100'
    file = made(tmp_path, **{"pyproject.toml": text}) / "pyproject.toml"
    file.chmod(0o640)
    write_all(tmp_path, FILES, '[tool.fragscope]\nscenarios = ["tests"]\n')
    assert file.read_text() == f'{text}\n\n[tool.fragscope]\nscenarios = ["tests"]\n'
    assert file.stat().st_mode & 0o777 == 0o640
    assert tomllib.loads(file.read_text())["tool"]["fragscope"] == {"scenarios": ["tests"]}


@pytest.mark.parametrize("last", ["", "\r\n"])
def test_line_ends_of_pyproject_are_kept(last: str, tmp_path: Path) -> None:
    before = b'[project]\r\nname = "x"' + last.encode()
    (tmp_path / "pyproject.toml").write_bytes(before)
    write_all(tmp_path, FILES, '[tool.fragscope]\nscenarios = ["tests"]\n')
    after = (tmp_path / "pyproject.toml").read_bytes()
    assert after.removeprefix(before).lstrip(b"\r\n") == b'[tool.fragscope]\r\nscenarios = ["tests"]\r\n'
    assert after.startswith(before)
    assert after.count(b"\n") == after.count(b"\r\n") == 5


def test_a_table_that_does_not_go_there_is_left_to_the_user(tmp_path: Path) -> None:
    before = tree(made(tmp_path, **{"pyproject.toml": "tool = { ruff = { line-length = 100 } }\n"}))
    with pytest.raises(UsageError, match="add it by hand"):
        write_all(tmp_path, FILES, "[tool.fragscope]\nx = 1\n")
    assert tree(tmp_path) == before
