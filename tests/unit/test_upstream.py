"""What is installed of a function is found by reading files; a change of what it does is told from one of its looks."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fragscope.suite.upstream import Source, digest_of, installed_source

SOURCE = '''
import torch

def shuffle(w, index=None):
    """Rows in another order."""
    # the kernel wants it so
    return w[index].contiguous()

class Cache:
    def update(self, keys):
        self.keys = torch.cat([self.keys, keys], dim=-2)

if hasattr(torch, "other"):
    def chosen(): return 1
else:
    try:
        from other import chosen
    except ImportError:
        def chosen(): return 2

def outer():
    def inner(): return 3
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that packages can be imported from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] == "theirs"]:
        del sys.modules[name]


def install(site: Path, version: str = "1.2", source: str = SOURCE) -> None:
    package = site / "theirs"
    (package / "layers").mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package needs a GPU to be imported')\n")
    (package / "layers" / "__init__.py").write_text("")
    (package / "layers" / "weights.py").write_text(source)
    facts = site / f"theirs_loaders-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: theirs-loaders\nVersion: {version}\n")


def test_the_digest_is_that_of_the_syntax_tree_without_what_is_empty() -> None:
    """The tree written by hand: what every Python makes of it."""
    tree = [{"FunctionDef": {
        "args": {"arguments": {"args": [{"arg": {"arg": "'a'"}}]}},
        "body": [{"Return": {"value": {"BinOp": {
            "left": {"Name": {"id": "'a'"}}, "op": {"Add": {}}, "right": {"Constant": {"value": "1"}},
        }}}}],
        "name": "'f'",
    }}]  # fmt: skip
    expected = hashlib.sha256(json.dumps(tree, separators=(",", ":")).encode()).hexdigest()[:24]
    assert digest_of("def f(a):\n    return a + 1\n", "f") == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# the kernel wants it so", "# another comment"),
        ('"""Rows in another order."""', '"""Something else."""'),
        ("w[index].contiguous()", "(\n        w [index]\n        .contiguous()\n    )"),
        ("import torch\n", "import torch\nimport numpy\n"),
        ("def outer", "def added(): ...\n\ndef outer"),
    ],
)
def test_looks_and_other_code_do_not_count(before: str, after: str) -> None:
    assert before in SOURCE
    assert digest_of(SOURCE.replace(before, after), "shuffle") == digest_of(SOURCE, "shuffle")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("w[index].contiguous()", "w[index].clone()"),
        ("index=None", "index=0"),
        ("def shuffle", "@torch.no_grad()\ndef shuffle"),
        ("def shuffle(w", "def shuffle(w: torch.Tensor"),
        ("    return w[index]", "    print(w)\n    return w[index]"),
    ],
)
def test_what_it_does_counts(before: str, after: str) -> None:
    assert before in SOURCE
    assert digest_of(SOURCE.replace(before, after), "shuffle") != digest_of(SOURCE, "shuffle")


def test_constants_of_different_kinds_differ() -> None:
    digests = {digest_of(f"def f():\n    return {text}\n", "f") for text in ("1", "1.0", "True", "'1'", "b'1'", "None")}
    assert len(digests) == 6


def test_methods_and_classes_have_digests() -> None:
    method, whole = digest_of(SOURCE, "Cache.update"), digest_of(SOURCE, "Cache")
    assert None not in (method, whole)
    assert method != whole
    changed = SOURCE.replace("dim=-2", "dim=-1")
    assert digest_of(changed, "Cache.update") != method
    assert digest_of(changed, "Cache") != whole


def test_every_definition_that_a_condition_may_choose_counts() -> None:
    first = digest_of(SOURCE, "chosen")
    assert first is not None
    assert digest_of(SOURCE.replace("return 2", "return 4"), "chosen") != first
    assert digest_of(SOURCE.replace("return 1", "return 4"), "chosen") != first


@pytest.mark.parametrize("name", ["missing", "Cache.missing", "missing.update", "inner", "torch", "shuffle.w"])
def test_what_a_module_does_not_define_has_no_digest(name: str) -> None:
    assert digest_of(SOURCE, name) is None


def test_a_package_is_read_and_not_imported(site: Path) -> None:
    install(site)
    found = installed_source("theirs-loaders", "theirs.layers.weights:shuffle")
    assert found == Source("1.2", site / "theirs" / "layers" / "weights.py", digest_of(SOURCE, "shuffle"))
    assert not [name for name in sys.modules if name.startswith("theirs")]


def test_what_is_missing_is_said(site: Path) -> None:
    assert installed_source("theirs-loaders", "theirs.layers.weights:shuffle") is None
    install(site, source="def shuffle(: broken")
    weights = site / "theirs" / "layers" / "weights.py"
    assert installed_source("theirs-loaders", "theirs.layers.weights:shuffle") == Source("1.2", weights, None)
    assert installed_source("theirs-loaders", "theirs.layers.others:shuffle") == Source("1.2", None, None)
    assert installed_source("theirs", "theirs.layers:shuffle") == Source(
        "unknown", weights.with_name("__init__.py"), None
    )


def test_a_folder_of_the_same_name_is_no_package(site: Path) -> None:
    """Python would import it, as a namespace; with a distribution's metadata it is one that is installed."""
    (site / "theirs").mkdir()
    (site / "theirs" / "weights.py").write_text(SOURCE)
    assert installed_source("theirs-loaders", "theirs.weights:shuffle") is None
    facts = site / "theirs_loaders-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs-loaders\nVersion: 1.2\n")
    assert installed_source("theirs-loaders", "theirs.weights:shuffle") == Source(
        "1.2", site / "theirs" / "weights.py", digest_of(SOURCE, "shuffle")
    )


def test_a_package_may_be_a_single_file(site: Path) -> None:
    (site / "theirs.py").write_text(SOURCE)
    assert installed_source("theirs", "theirs:shuffle") == Source(
        "unknown", site / "theirs.py", digest_of(SOURCE, "shuffle")
    )
    assert installed_source("theirs", "theirs.more:shuffle") == Source("unknown", None, None)
