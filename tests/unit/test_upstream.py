"""What is installed of a function is found by reading files; a change of what it does is told from one of its looks."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fragscope.suite import upstream
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


def install(site: Path, version: str = "1.2", source: str | bytes = SOURCE) -> None:
    package = site / "theirs"
    (package / "layers").mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package needs a GPU to be imported')\n")
    (package / "layers" / "__init__.py").write_text("")
    (package / "layers" / "weights.py").write_bytes(source if isinstance(source, bytes) else source.encode())
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


def chain(branches: int, last: str = "pass") -> str:
    """An ``if`` with one ``elif`` a line, each of which is inside the one before."""
    return "".join(f"{'elif' if i else 'if'} a: pass\n" for i in range(branches)) + f"else: {last}\n"


A = """{"Name":{"id":"'a'"}}"""


def test_a_long_chain_has_the_digest_of_its_tree() -> None:
    """Written by hand, from the innermost outwards."""
    inner = '{"Pass":{}}'
    for _ in range(400):
        inner = f'{{"If":{{"body":[{{"Pass":{{}}}}],"orelse":[{inner}],"test":{A}}}}}'
    tree = f"""[{{"FunctionDef":{{"args":{{"arguments":{{}}}},"body":[{inner}],"name":"'f'"}}}}]"""
    source = "def f():\n" + "".join(f"    {line}\n" for line in chain(400).splitlines())
    assert digest_of(source, "f") == hashlib.sha256(tree.encode()).hexdigest()[:24]


def test_a_long_sum_has_the_digest_of_its_tree() -> None:
    inner = A
    for _ in range(599):
        inner = f'{{"BinOp":{{"left":{inner},"op":{{"Add":{{}}}},"right":{A}}}}}'
    inner = f'{{"Return":{{"value":{inner}}}}}'
    tree = f"""[{{"FunctionDef":{{"args":{{"arguments":{{}}}},"body":[{inner}],"name":"'f'"}}}}]"""
    source = f"def f():\n    return {' + '.join('a' * 600)}\n"
    assert digest_of(source, "f") == hashlib.sha256(tree.encode()).hexdigest()[:24]


def test_what_a_long_chain_defines_is_found() -> None:
    source = chain(1200) + "def f(): pass\n"
    assert digest_of(source, "f") == digest_of("def f(): pass\n", "f") is not None
    source = chain(900, "\n    def f(): pass")
    assert digest_of(source, "f") == digest_of("def f(): pass\n", "f")


@pytest.mark.parametrize(
    "source", [chain(20_000), f"x = {' + '.join('a' * 100_000)}\n"], ids=["chain", "sum"]
)  # beyond what Python itself reads
def test_code_that_is_nested_too_deeply_cannot_be_read(site: Path, source: str) -> None:
    install(site, source=f"{source}{SOURCE}")
    found = installed_source("theirs-loaders", "theirs.layers.weights:shuffle")
    assert found is not None
    assert (found.digest, found.unread) == (None, "its code is nested too deeply")


@pytest.mark.parametrize(
    "source",
    [
        b"\xef\xbb\xbf" + SOURCE.encode(),
        f"# -*- coding: latin-1 -*-\n# \xe9{SOURCE}".encode("latin-1"),
        SOURCE.replace("\n", "\r\n").encode(),
    ],
    ids=["mark", "latin-1", "crlf"],
)
def test_a_file_is_read_in_the_encoding_that_it_declares(site: Path, source: bytes) -> None:
    install(site, source=source)
    found = installed_source("theirs-loaders", "theirs.layers.weights:shuffle")
    assert found is not None
    assert (found.digest, found.unread) == (digest_of(SOURCE, "shuffle"), "")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (b"name = '\xe9'\n" + SOURCE.encode(), "utf-8"),
        (b"# coding: nonsense\n" + SOURCE.encode(), "unknown encoding: nonsense"),
        (SOURCE.encode() + b"\0", "null bytes"),
        (SOURCE.encode() + b"#" * 16 * 2**20, "it is larger than 16 MiB"),
    ],
    ids=["no utf-8", "unknown encoding", "null", "large"],
)
def test_what_cannot_be_read_is_told_from_what_is_gone(site: Path, source: bytes, why: str) -> None:
    install(site, source=source)
    found = installed_source("theirs-loaders", "theirs.layers.weights:shuffle")
    assert found is not None
    assert found.digest is None
    assert why in found.unread


def test_a_file_is_read_once_until_it_changes(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    parse = upstream.ast.parse
    monkeypatch.setattr(upstream.ast, "parse", lambda source: read.append(source) or parse(source))
    install(site)
    weights = site / "theirs" / "layers" / "weights.py"

    def digest() -> str | None:
        found = installed_source("theirs-loaders", "theirs.layers.weights:shuffle")
        assert found is not None
        return found.digest

    first = [digest(), digest(), digest()]
    assert (len(set(first)), len(read)) == (1, 1)
    weights.write_text(SOURCE.replace("contiguous", "clone"))
    assert digest() not in (None, first[0])
    weights.write_text("def shuffle(: broken")
    assert [digest(), digest()] == [None, None]
    assert len(read) == 3


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
    assert installed_source("theirs-loaders", "theirs.layers.weights:shuffle") == Source(
        "1.2", weights, None, "line 1: invalid syntax"
    )
    assert installed_source("theirs-loaders", "theirs.layers.others:shuffle") == Source("1.2", None, None)
    assert installed_source("theirs", "theirs.layers:shuffle") == Source(
        "unknown", weights.with_name("__init__.py"), None
    )


def test_a_folder_of_the_same_name_is_no_package(site: Path) -> None:
    """Python would import it, as a namespace; what is looked for, or a distribution's metadata, make it the package."""
    (site / "theirs").mkdir()
    (site / "theirs" / "scripts.py").write_text(SOURCE)
    assert installed_source("theirs-loaders", "theirs.weights:shuffle") is None
    (site / "theirs" / "weights.py").write_text(SOURCE)
    found = site / "theirs" / "weights.py", digest_of(SOURCE, "shuffle")
    assert installed_source("theirs-loaders", "theirs.weights:shuffle") == Source("unknown", *found)
    facts = site / "theirs_loaders-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs-loaders\nVersion: 1.2\n")
    assert installed_source("theirs-loaders", "theirs.weights:shuffle") == Source("1.2", *found)
    assert installed_source("theirs-loaders", "theirs.gone:shuffle") == Source("1.2", None, None)


def test_a_package_may_be_a_single_file(site: Path) -> None:
    (site / "theirs.py").write_text(SOURCE)
    assert installed_source("theirs", "theirs:shuffle") == Source(
        "unknown", site / "theirs.py", digest_of(SOURCE, "shuffle")
    )
    assert installed_source("theirs", "theirs.more:shuffle") == Source("unknown", None, None)
