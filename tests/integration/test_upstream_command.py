"""``fragscope upstream``: scenarios, and a package that changes underneath them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scenario_files import write_scenarios

from fragscope.suite.upstream import digest_of

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

WEIGHTS = "def shuffle(w):\n    return w.flip(0)\n"
NEWER = "def shuffle(w):\n    return w.flip(1)\n"
FUNCTION = "theirs.weights:shuffle"


def upstream(folder: Path, *arguments: str, code: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "fragscope", "upstream", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def install(folder: Path, version: str, source: str) -> None:
    package = folder / "theirs"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("raise RuntimeError('nobody should import this')\n")
    (package / "weights.py").write_text(source)
    for old in folder.glob("*.dist-info/METADATA"):
        old.unlink()
    facts = folder / f"theirs-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: theirs\nVersion: {version}\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scenarios(
        tmp_path,
        "theirs",
        f"""
        def of(version, digest):
            return fragscope.Replays("theirs", version, "{FUNCTION}", digest)

        @fragscope.scenario("shuffles", presets={{"one": {{}}}}, replays=of("1.0", "{digest_of(WEIGHTS, "shuffle")}"))
        def made(case):
            print("imported while stdout is data")

        @made.variant("newer", role="newest", replays=of("2.0", "{digest_of(NEWER, "shuffle")}"))
        def _(case): ...
        """,
    )
    return tmp_path


def test_a_release_that_a_variant_replays_is_the_same(folder: Path) -> None:
    install(folder, "1.0", WEIGHTS)
    done = upstream(folder, "scenario_theirs.py", code=0)
    assert done.stdout.splitlines() == [
        f"same           shuffles  {FUNCTION}",
        "               installed: theirs 1.0",
        f"               original: theirs 1.0, {digest_of(WEIGHTS, 'shuffle')} = installed",
        f"               newer: theirs 2.0, {digest_of(NEWER, 'shuffle')}",
        "1 function replayed: 1 same",
    ]
    install(folder, "2.0.1", f"# no change of what it does\n{NEWER}")
    assert "newer: theirs 2.0" in upstream(folder, "scenario_theirs.py", code=0).stdout


def test_one_that_no_variant_replays_fails_and_names_its_digest(folder: Path) -> None:
    source = "def shuffle(w):\n    return w\n"
    install(folder, "3.0", source)
    done = upstream(folder, "scenario_theirs.py", code=3)
    assert done.stdout.startswith("changed ")
    assert f"installed: theirs 3.0, digest {digest_of(source, 'shuffle')}" in done.stdout
    (folder / "theirs" / "weights.py").write_text("def shuffled(w):\n    return w\n")
    assert upstream(folder, "scenario_theirs.py", code=3).stdout.startswith("gone ")


def test_one_that_cannot_be_read_is_not_gone(folder: Path) -> None:
    install(folder, "3.0", "def shuffle(w: broken\n")
    done = upstream(folder, "scenario_theirs.py", code=4)
    assert done.stdout.startswith("cannot be read shuffles")
    assert "installed: theirs 3.0, cannot be read: line 1: " in done.stdout
    refused = upstream(folder, "--digest", FUNCTION, code=4).stderr
    assert "weights.py cannot be read: line 1: " in refused
    assert refused.count("\n") == 1


def test_without_the_package_nothing_is_compared(folder: Path) -> None:
    (folder / "theirs").mkdir()  # a folder of that name is none
    done = upstream(folder, "scenario_theirs.py", "--format", "json", code=4)
    (function,) = json.loads(done.stdout)["functions"]
    assert (function["state"], function["version"], function["digest"]) == ("not installed", None, None)
    assert [v["variant"] for v in function["variants"]] == ["original", "newer"]


def test_the_digest_for_a_new_replay(folder: Path) -> None:
    install(folder, "1.0", WEIGHTS)
    done = upstream(folder, "--digest", FUNCTION, code=0)
    assert done.stdout == f"{digest_of(WEIGHTS, 'shuffle')}\n"
    assert f"theirs 1.0, {folder / 'theirs' / 'weights.py'}" in done.stderr
    assert "does not define it" in upstream(folder, "--digest", "theirs.weights:missing", code=4).stderr
    assert "has no such module" in upstream(folder, "--digest", "theirs.missing:shuffle", code=4).stderr
    assert "others is not installed" in upstream(folder, "--digest", "others:shuffle", code=4).stderr
    assert "write module:function" in upstream(folder, "--digest", "a b", code=2).stderr
    assert "--digest os names a module: write module:function" in upstream(folder, "--digest", "os", code=2).stderr
    assert "takes no scenarios" in upstream(folder, "shuffles", "--digest", FUNCTION, code=2).stderr
    assert "belongs to --digest" in upstream(folder, "--package", "theirs", code=2).stderr
