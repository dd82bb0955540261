"""Scenario files are found as pytest finds tests, and cases are chosen from them by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fragscope.errors import UsageError
from fragscope.suite.discover import load_scenarios, scenario_files, select
from fragscope.suite.scenario import Scenario

TINY = "import fragscope\n\n@fragscope.scenario('{name}', presets={{'p1': {{}}, 'p2': {{}}}})\ndef _(case): pass\n"


@pytest.fixture(autouse=True)
def _imports_undone() -> Iterator[None]:
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def tiny(folder: Path, *names: str) -> list[Scenario]:
    files = [write(folder / f"scenario_{n}.py", TINY.format(name=n)) for n in names]
    scenarios = [s for file in files for s in load_scenarios(file)]
    for scenario in scenarios:
        scenario.variant("faster", role="fixed")(lambda case: None)
    return scenarios


def test_folders_give_files_by_pattern_and_files_given_are_taken(tmp_path: Path) -> None:
    wanted = [write(tmp_path / "a" / "b" / "scenario_x.py", ""), write(tmp_path / "a" / "scenario_y.py", "")]
    write(tmp_path / "a" / "other.py", "")
    write(tmp_path / "a" / ".hidden" / "scenario_z.py", "")
    (tmp_path / "a" / "scenario_folder.py").mkdir()
    assert scenario_files([tmp_path / "a"]) == wanted
    assert scenario_files([tmp_path / "a" / "other.py"]) == [tmp_path / "a" / "other.py"]


def test_each_file_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "scenario_x.py", "")
    (tmp_path / "scenario_link.py").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    assert scenario_files([Path("scenario_x.py"), tmp_path, Path()]) == [file]


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        scenario_files([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x = 1\n", "defines no scenario"),
        ("", "defines no scenario"),
        ("import fragscope\ndef f(:\n", r"cannot be imported: SyntaxError: .*line 2"),
        ("\nimport not_there_at_all\n", "line 2: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("raise ValueError('two\\nlines')\n", r"line 1: ValueError: two\\nlines"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        ("from . import sibling\n", "cannot be imported: line 1"),
        ("x = '\\ud800'\nraise ValueError(x)\n", "ValueError"),
        ("import fragscope\nfragscope.scenario('Bad', presets={'p': {}})(print)\n", "line 2: scenario name 'Bad'"),
    ],
)
def test_files_that_cannot_be_used_say_why_and_where(tmp_path: Path, text: str, why: str) -> None:
    file = write(tmp_path / "scenario_x.py", text)
    with pytest.raises(UsageError, match=why) as caught:
        load_scenarios(file)
    assert str(file) in str(caught.value)
    with pytest.raises(UsageError, match=why):  # nothing half-imported is left to be taken for a module
        load_scenarios(file)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "scenario_x.py"
    file.write_bytes(b"\x00\xff\x00")
    with pytest.raises(UsageError, match="cannot be imported"):
        load_scenarios(file)


def test_siblings_can_be_imported_and_keep_their_own_scenarios(tmp_path: Path) -> None:
    write(tmp_path / "scenario_lib.py", TINY.format(name="lib"))
    user = write(tmp_path / "scenario_user.py", "import scenario_lib\n" + TINY.format(name="user"))
    assert [s.name for s in load_scenarios(user)] == ["user"]


def test_siblings_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    files = []
    for folder in ("one", "two"):
        write(tmp_path / folder / "shapes.py", f"NAME = '{folder}'\n")
        text = "import shapes\n" + TINY.format(name="shape").replace("'shape'", "'shape-' + shapes.NAME")
        files.append(write(tmp_path / folder / "scenario_x.py", text))
    assert [s.name for file in files for s in load_scenarios(file)] == ["shape-one", "shape-two"]


def test_a_body_wrapped_by_a_decorator_belongs_to_the_file_that_uses_it(tmp_path: Path) -> None:
    wrapper = (
        "import functools\ndef wrap(f):\n    @functools.wraps(f)\n    def inner(*a): return f(*a)\n    return inner\n"
    )
    write(tmp_path / "wrappers.py", wrapper)
    text = TINY.format(name="wrapped").replace("def _", "@wrap\ndef _")
    file = write(tmp_path / "scenario_x.py", "from wrappers import wrap\n" + text)
    (found,) = load_scenarios(file)
    assert found.file == file


def test_a_function_elsewhere_may_make_the_scenarios(tmp_path: Path) -> None:
    write(
        tmp_path / "factory.py", "def make():\n" + "".join(f"    {x}\n" for x in TINY.format(name="made").splitlines())
    )
    file = write(tmp_path / "scenario_x.py", "import factory\nfactory.make()\n")
    (found,) = load_scenarios(file)
    assert (found.name, found.file) == ("made", file)


def test_an_edit_within_a_second_is_seen(tmp_path: Path) -> None:
    """Python's bytecode cache tells files by whole seconds and length."""
    file = write(tmp_path / "scenario_x.py", TINY.format(name="one"))
    os.utime(file, (1_000_000_000, 1_000_000_000))
    (before,) = load_scenarios(file)
    for name in [n for n in sys.modules if n.endswith(".scenario_x")]:
        del sys.modules[name]
    write(file, TINY.format(name="two"))
    os.utime(file, (1_000_000_000, 1_000_000_000))
    (after,) = load_scenarios(file)
    assert (before.name, after.name) == ("one", "two")


def test_no_names_select_everything_in_the_order_of_definition(tmp_path: Path) -> None:
    chosen = select(tiny(tmp_path, "zeta", "alpha"), [], [], [])
    assert [s.name for s in chosen] == [
        f"{s}/{p}/{v}" for s in ("zeta", "alpha") for p in ("p1", "p2") for v in ("original", "faster")
    ]


@pytest.mark.parametrize(
    ("names", "presets", "variants", "count"),
    [
        (["zeta"], [], [], 4),
        (["zeta/p1"], [], [], 2),
        (["zeta/p1/faster"], [], [], 1),
        (["*/p2"], [], [], 4),
        (["zeta", "zeta/p1"], [], [], 4),
        ([], ["p1"], ["fast*"], 2),
        (["*/*/faster"], ["p?"], [], 4),
    ],
)
def test_names_and_globs(tmp_path: Path, names: list[str], presets: list[str], variants: list[str], count: int) -> None:
    assert len(select(tiny(tmp_path, "zeta", "alpha"), names, presets, variants)) == count


@pytest.mark.parametrize(
    ("names", "presets", "variants", "why"),
    [
        (["zeat"], [], [], "no scenario named 'zeat'; did you mean zeta"),
        (["zeta/p3"], [], [], "no preset named 'p3'; did you mean p2 or p1"),
        (["zeta/p1/fastest"], [], [], "no variant named 'fastest'; did you mean faster"),
        (["qqq"], [], [], "known are alpha, zeta"),
        (["a/b/c/d"], [], [], "write NAME, NAME/PRESET or NAME/PRESET/VARIANT"),
        ([], ["p9"], [], "--preset p9: nothing matches; did you mean p[12] or p[12]"),
        ([], [], ["orignal"], "--variant orignal: nothing matches; did you mean original"),
        (["zeta/p1"], ["p2"], [], "--preset p2: nothing matches"),
        (["zeta/p1/faster", "alpha/p2/original"], ["p1"], ["original"], "nothing matches|--variant original"),
    ],
)
def test_what_matches_nothing_is_named_with_what_comes_near(
    tmp_path: Path, names: list[str], presets: list[str], variants: list[str], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        select(tiny(tmp_path, "zeta", "alpha"), names, presets, variants)


def test_two_scenarios_of_one_name(tmp_path: Path) -> None:
    one = write(tmp_path / "scenario_a.py", TINY.format(name="same"))
    two = write(tmp_path / "scenario_b.py", TINY.format(name="same"))
    with pytest.raises(UsageError, match=r"'same' is defined twice: in .*scenario_a\.py and in .*scenario_b\.py"):
        select([*load_scenarios(one), *load_scenarios(two)], [], [], [])
    twice = write(tmp_path / "scenario_c.py", TINY.format(name="twin") * 2)
    with pytest.raises(UsageError, match="'twin' is defined twice"):
        select(load_scenarios(twice), [], [], [])
