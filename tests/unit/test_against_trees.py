"""The tree of another commit, and whose code a side imports."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from repositories import Team, git

from fragscope.against.git import Repository
from fragscope.against.imports import (
    Foreign,
    Own,
    dotted,
    folders_in_use,
    installed_files,
    is_environment,
    own_names,
    packages_of,
    refusal,
)
from fragscope.errors import NotMeasuredError, UsageError


@pytest.fixture
def team(tmp_path: Path) -> Team:
    return Team.made(tmp_path / "theirs", {"a.py": "old\n", "deep/b.py": "1\n", ".gitignore": "ignored/\n"})


def test_the_tree_of_a_commit_is_there_and_gone(team: Team):
    first = git(team.folder, "rev-parse", "HEAD").strip()
    team.write({"a.py": "new\n"})
    team.commit()
    repository = Repository.at(team.folder / "deep")
    assert (repository.top, repository.commit_of("base")) == (team.folder.resolve(), first)
    with repository.checked_out(first) as tree:
        assert (tree / "a.py").read_text() == "old\n"
        assert (team.folder / "a.py").read_text() == "new\n"
        assert repository.other_trees() == [tree]
    assert not tree.exists() and not tree.parent.exists()
    assert repository.other_trees() == []


@pytest.mark.parametrize("how", ["error", "interrupt", "gone already"])
def test_it_is_gone_however_that_ends(team: Team, how: str):
    repository = Repository.at(team.folder)
    ends = KeyboardInterrupt if how == "interrupt" else ValueError
    with pytest.raises(ends), repository.checked_out(repository.commit) as tree:
        if how == "gone already":
            (tree / ".git").unlink()
        raise ends
    assert not tree.parent.exists()
    assert git(team.folder, "worktree", "list").count("\n") == 1
    worktrees = team.folder / ".git" / "worktrees"
    assert not worktrees.exists() or list(worktrees.iterdir()) == []


def test_a_worktree_of_the_users_that_is_not_mounted_now_stays(team: Team, tmp_path: Path):
    git(team.folder, "worktree", "add", "-q", str(tmp_path / "disk"), "base")
    (tmp_path / "disk").rename(tmp_path / "away")
    repository = Repository.at(team.folder)
    with repository.checked_out(repository.commit) as tree:
        (tree / ".git").unlink()
    assert [p.name for p in (team.folder / ".git" / "worktrees").iterdir()] == ["disk"]


def test_settings_of_a_hook_that_runs_the_command_do_not_lead_elsewhere(team: Team, tmp_path: Path, monkeypatch):
    from fragscope.against.git import environment

    other = Team.made(tmp_path / "other", {"a.py": "other\n"})
    monkeypatch.setenv("GIT_DIR", str(other.folder / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other.folder / ".git" / "index"))
    environment.cache_clear()
    try:
        repository = Repository.at(team.folder)
        assert repository.top == team.folder.resolve()
        assert not repository.dirty(but=team.folder / ".fragscope")
    finally:
        environment.cache_clear()


def test_dirty_is_what_differs_from_the_commit_but_not_what_is_written_or_ignored(team: Team):
    repository = Repository.at(team.folder)

    def dirty() -> bool:
        return repository.dirty(but=team.folder / "out")

    assert not dirty()
    team.write({"out/results.json": "", "ignored/x": ""})
    assert not dirty()
    team.write({"new.py": ""})
    assert dirty()
    (team.folder / "new.py").unlink()
    assert not dirty()
    team.write({"a.py": "edited\n"})
    assert dirty()


def test_commits_that_the_tree_lacks_are_counted(team: Team):
    git(team.folder, "checkout", "-q", "--detach", "base")
    for text in ("1", "2"):
        team.write({"a.py": text})
        team.commit()
    git(team.folder, "branch", "ahead")
    git(team.folder, "checkout", "-q", "work")
    repository = Repository.at(team.folder)
    assert repository.missing_from_here(repository.commit_of("ahead")) == 2
    assert repository.missing_from_here(repository.commit_of("base")) == 0


def test_a_submodule_without_the_commit_says_how_to_get_it(team: Team, tmp_path: Path):
    library = Team.made(tmp_path / "library", {"x.py": "1\n"})
    git(team.folder, "-c", "protocol.file.allow=always", "submodule", "-q", "add", str(library.folder), "lib")
    missing = "1" * 40
    git(team.folder, "update-index", "--cacheinfo", f"160000,{missing},lib")
    git(team.folder, "commit", "-q", "-m", "a commit that nobody has")
    repository = Repository.at(team.folder)
    with (
        pytest.raises(
            NotMeasuredError, match=f"submodule lib lacks the commit {missing[:12]}.*git -C lib fetch origin"
        ),
        repository.checked_out(git(team.folder, "rev-parse", "HEAD").strip()),
    ):
        pytest.fail("it was checked out")
    assert git(team.folder, "worktree", "list").count("\n") == 1


def test_a_partial_clone_fetches_nothing(team: Team, tmp_path: Path):
    """The blobs of its first commit are only at the remote."""
    first = git(team.folder, "rev-parse", "HEAD").strip()
    team.write({"a.py": "new\n"})
    team.commit()
    git(team.folder, "config", "uploadpack.allowFilter", "true")
    git(team.folder, "config", "uploadpack.allowAnySHA1InWant", "true")
    git(tmp_path, "clone", "-q", "--filter=blob:none", f"file://{team.folder}", "partial")
    repository = Repository.at(tmp_path / "partial")
    packs = sorted((tmp_path / "partial" / ".git" / "objects" / "pack").iterdir())
    with pytest.raises(NotMeasuredError, match="git worktree failed"), repository.checked_out(first):
        pytest.fail("it was checked out")
    assert sorted((tmp_path / "partial" / ".git" / "objects" / "pack").iterdir()) == packs


def test_a_folder_in_no_repository_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="--against needs a git repository"):
        Repository.at(tmp_path)


# --- whose code ---------------------------------------------------------------------------------------------------


def test_folders_of_the_repository_that_python_imports_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By its import path, and by an editable install (PEP 610), which may be that of another working tree."""
    top, other, site = tmp_path / "top", tmp_path / "other", tmp_path / "env" / "site-packages"
    for folder in (top / "on_path", other / "packages" / "acme" / "src", top / ".venv" / "site-packages"):
        folder.mkdir(parents=True)
    information = site / "acme-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    origin = {"url": f"file://{other}/packages/acme", "dir_info": {"editable": True}}
    (information / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr(sys, "path", [str(top / "on_path"), str(top / ".venv" / "site-packages"), str(site)])
    assert folders_in_use([top, other]) == [Path("packages/acme/src"), Path("packages/acme"), Path("on_path")]
    assert folders_in_use([top]) == [Path("on_path")]
    (information / "direct_url.json").write_text('{"url": 5}')
    assert folders_in_use([top, other]) == [Path("on_path")]


def loaded(*files: Path) -> dict[str, ModuleType | None]:
    found: dict[str, ModuleType | None] = {"builtin": ModuleType("builtin"), "none": None}
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        module = ModuleType(file.stem)
        module.__file__ = str(file)
        found[f"m_{len(found)}"] = module
    return found


def own(top: Path, *others: Path, packages: tuple[str, ...] = ()) -> Own:
    return Own(top=str(top), others=[str(o) for o in others], distributions=[], packages=list(packages))


def test_modules_of_the_other_tree_are_found_and_those_of_an_environment_in_it_are_not(tmp_path: Path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    modules = loaded(mine / "a.py", other / "b.py", other / ".venv/lib/python3/site-packages/numpy/__init__.py")
    found = own(mine, other).foreign(modules)
    assert [(f.file, f.installed) for f in found] == [(str(other / "b.py"), False)]
    assert own(other, mine).foreign(modules)[0].file == str(mine / "a.py")


def test_a_tree_inside_the_other_one_is_not_the_other_one(tmp_path: Path):
    """Where temporary folders lie in the working tree."""
    inside = tmp_path / "top" / "tmp" / "tree"
    assert own(inside, tmp_path / "top").foreign(loaded(inside / "a.py")) == []


def test_a_package_of_the_repository_that_comes_from_a_clone_of_it_is_found(tmp_path: Path):
    file = tmp_path / "clone" / "acme" / "loader.py"
    module = ModuleType("acme.loader")
    module.__file__ = str(file)
    assert own(tmp_path / "mine", packages=("acme",)).foreign({"acme.loader": module}) == [
        Foreign("acme.loader", str(file), installed=False)
    ]
    assert own(tmp_path / "mine", packages=("other",)).foreign({"acme.loader": module}) == []


def test_folders_that_a_side_takes_off_its_import_path(tmp_path: Path):
    mine, other = tmp_path / "top" / "tmp" / "tree", tmp_path / "top"
    entries = [other, other / "src", mine, mine / "src", other / ".venv/lib/python3/site-packages", tmp_path / "more"]
    assert [e for e in entries if own(mine, other).is_others(e)] == [other, other / "src"]


def installed(site: Path, *files: str, **information: str) -> None:
    """A distribution acme-kernels that is installed there."""
    folder = site / "acme_kernels-1.dist-info"
    texts = {"METADATA": "Metadata-Version: 2.1\nName: Acme_Kernels\nVersion: 1\n", **information}
    texts |= {"RECORD": "".join(f"{file},,\n" for file in files)} if files else {}
    for name, text in {
        **{f"{folder.name}/{name}": text for name, text in texts.items()},
        **dict.fromkeys(files, ""),
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)


def foreign_of(site: Path, *names: str) -> list[str]:
    asked = Own(top=str(site.parent / "tree"), others=[], distributions=["acme-kernels"], packages=["acme"])
    return [Path(f.file).relative_to(site).as_posix() for f in asked.foreign(loaded(*(site / n for n in names)))]


def test_another_part_of_a_namespace_package_is_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site = tmp_path / "site-packages"
    installed(site, "acme/kernels/__init__.py", "acme/kernels/gemm.py")
    (site / "left-1.dist-info").mkdir()  # what a removal may leave behind
    monkeypatch.setattr(sys, "path", [str(site)])
    assert foreign_of(site, "acme/core.py", "acme/kernels/gemm.py") == ["acme/kernels/gemm.py"]


def test_the_loader_of_an_editable_install_is_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As setuptools writes it where a .pth file will not do; there is no top_level.txt."""
    site = tmp_path / "site-packages"
    finder = "__editable___acme_kernels_1_finder.py"
    installed(site, finder, **{"direct_url.json": '{"url": "file:///acme", "dir_info": {"editable": true}}'})
    monkeypatch.setattr(sys, "path", [str(site)])
    assert installed_files({"acme-kernels"}) == set()
    assert foreign_of(site, finder) == []
    (site / "acme_kernels-1.dist-info" / "direct_url.json").write_text('{"url": "file:///acme", "dir_info": {}}')
    assert foreign_of(site, finder) == [finder]


def test_a_copy_that_lists_no_files_is_known_by_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As distributions of Linux make them."""
    site = tmp_path / "dist-packages"
    installed(site, **{"top_level.txt": "acme\nsingle\n"})
    monkeypatch.setattr(sys, "path", [str(site)])
    assert foreign_of(site, "acme/core.py", "single.py", "other.py") == ["acme/core.py", "single.py"]


def test_names_that_are_not_utf8_are_no_packages(team: Team):
    """What the sides are asked is written as JSON, which is UTF-8."""
    odd = os.fsdecode(b"caf\xe9")
    team.write({f"{odd}/__init__.py": "", "acme/__init__.py": ""})
    repository = Repository.at(team.folder)
    files = repository.files_below(team.folder)
    assert Path(odd, "__init__.py") in files
    assert packages_of(files) == ["acme"]


def test_packages_of_a_tree_are_its_outermost_ones():
    names = ["src/acme/__init__.py", "src/acme/sub/__init__.py", "tests/helpers/__init__.py", "setup.py", "__init__.py"]
    assert packages_of(map(Path, names)) == ["acme", "helpers"]


def test_what_is_an_environment(tmp_path: Path):
    assert is_environment(Path("/repo/.venv/lib/python3.11/site-packages/numpy/core.py"))
    assert is_environment(Path("/usr/lib/python3/dist-packages/numpy.py"))
    assert not is_environment(Path("/repo/my-packages/acme/loader.py"))
    assert is_environment(Path(sys.prefix).resolve() / "lib" / "python3.11" / "json" / "__init__.py")
    assert not is_environment(tmp_path / "acme.py")


def test_the_projects_name_is_compared_as_packaging_does(tmp_path: Path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "Acme_Loader.Core"\n')
    assert own_names(tmp_path) == {"acme-loader-core"}
    for text in ("[project]\nname = 5\n", "[project", "", '[project]\nname = "fragscope"\n'):
        (tmp_path / "pyproject.toml").write_text(text)
        assert own_names(tmp_path) == set()
    assert own_names(tmp_path / "none") == set()


def test_the_refusal_says_what_where_and_what_helps(tmp_path: Path):
    text = refusal(Foreign("acme.loader", str(tmp_path / "acme" / "loader.py"), installed=False), "main", tmp_path)
    assert text.startswith("main imports acme.loader from another tree of the repository, acme/loader.py: both sides")
    assert "the folder that acme lies in with import_paths = [...]" in text
    text = refusal(Foreign("acme", "/env/site-packages/acme\x1b/__init__.py", installed=True), "main", tmp_path)
    assert "from the copy that is installed, /env/site-packages/acme\\x1b/__init__.py" in text
    assert text.endswith("or uninstall acme")


def test_a_module_is_called_as_it_is_imported(tmp_path: Path):
    for name in ("pkg/__init__.py", "pkg/sub/__init__.py", "pkg/sub/mod.py", "alone.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [dotted(tmp_path / n) for n in ("pkg/__init__.py", "pkg/sub/mod.py", "alone.py")] == [
        "pkg",
        "pkg.sub.mod",
        "alone",
    ]
