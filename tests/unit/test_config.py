"""[tool.fragscope] of the nearest pyproject.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

from fragscope.config import Config, load_config
from fragscope.errors import InputFileError, UsageError


def _project(folder: Path, table: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(table, encoding="utf-8")
    return folder.resolve()


def test_every_key_is_read_and_paths_are_relative_to_the_file(tmp_path):
    root = _project(
        tmp_path,
        '[tool.fragscope]\nscenarios = ["scenarios", "more/one.py"]\nbudgets = "ci/budgets.toml"\n'
        'card = "h100-80gb"\ntorch = "2.11"\nout = "build/mem"\nimport_paths = ["lib"]\ntolerance = "2 %"\n'
        'lock = "ci/memory.lock"\nwarn_only = true\n',
    )
    assert load_config(tmp_path) == Config(
        root=root,
        scenarios=(root / "scenarios", root / "more/one.py"),
        budgets=root / "ci/budgets.toml",
        lock=root / "ci/memory.lock",
        warn_only=True,
        card="h100-80gb",
        torch="2.11",
        out=root / "build/mem",
        import_paths=(root / "lib",),
        tolerance="2 %",
    )


def test_code_is_imported_from_the_project_and_from_src_unless_it_says_where(tmp_path):
    root = _project(tmp_path, "")
    assert load_config(tmp_path).import_folders(root) == [root]
    (root / "src").mkdir()
    assert load_config(tmp_path).import_folders(root) == [root, root / "src"]
    _project(tmp_path, '[tool.fragscope]\nimport_paths = ["lib", "python"]\n')
    assert load_config(tmp_path).import_folders(root) == [root, root / "lib", root / "python"]


def test_the_nearest_file_upward_counts(tmp_path):
    _project(tmp_path, '[tool.fragscope]\ncard = "outer"\n')
    inner = _project(tmp_path / "a", '[tool.fragscope]\ncard = "inner"\n')
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    found = load_config(deep)
    assert (found.root, found.card) == (inner, "inner")


def test_a_nearer_project_without_the_table_sets_nothing(tmp_path):
    _project(tmp_path, '[tool.fragscope]\ncard = "outer"\n')
    inner = _project(tmp_path / "a", '[project]\nname = "a"\n')
    assert load_config(inner) == Config(root=inner)


def test_the_working_directory_is_where_the_search_begins(tmp_path, monkeypatch):
    root = _project(tmp_path, '[tool.fragscope]\ntorch = "2.9"\n')
    monkeypatch.chdir(tmp_path)
    assert load_config() == Config(root=root, torch="2.9")


def test_no_project_file_is_an_empty_config(tmp_path, monkeypatch):
    # Folders above the test's own may hold anything, so none of them counts as a file here.
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert load_config(tmp_path) == Config()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('budget = "b.toml"', "did you mean 'budgets'?"),
        ("zebra = 1", "known keys: scenarios, budgets, lock, warn_only, card, torch, out"),
        ('scenarios = "scenarios"', "scenarios: 'scenarios' is not a list of paths"),
        ('scenarios = ["a", 3]', "scenarios[1]: 3 is not a non-empty string"),
        ("warn_only = 1", "warn_only: 1 is neither true nor false"),
        ("torch = 2.11", "torch: 2.11 is not a non-empty string"),
        ('card = ""', "card: '' is not a non-empty string"),
        ('out = "a\\u0000b"', "out: 'a\\x00b' is not a non-empty string"),
    ],
)
def test_what_means_nothing_is_a_usage_error_that_names_the_file_and_the_key(tmp_path, table, message):
    root = _project(tmp_path, f"[tool.fragscope]\n{table}\n")
    with pytest.raises(UsageError) as caught:
        load_config(tmp_path)
    assert message in str(caught.value)
    assert str(root / "pyproject.toml") in str(caught.value)


def test_tool_fragscope_must_be_a_table(tmp_path):
    _project(tmp_path, "[tool]\nfragscope = 3\n")
    with pytest.raises(UsageError, match="not a table"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"[tool.fragscope\n", b"\xff\xfe", b"x = " + b"[" * 100_000, b"x = " + b"9" * 100_000, b"#" * (5 << 20)],
    ids=["syntax", "encoding", "nesting", "digits", "size"],
)
def test_a_file_that_is_not_usable_toml_is_a_bad_input_file(tmp_path, content):
    (tmp_path / "pyproject.toml").write_bytes(content)
    with pytest.raises(InputFileError, match=r"pyproject\.toml"):
        load_config(tmp_path)
