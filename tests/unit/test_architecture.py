"""The arrows between rooms point one way, and only two rooms know torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fragscope"

# A room may import from itself and from those listed.
BASE = {"errors", "units", "cache"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "cache": set(),
    "toml": BASE,
    "units": {"errors"},
    "config": BASE,
    "trace": BASE,
    "results": BASE | {"trace"},
    "allocator": BASE | {"trace", "toml"},
    "measure": BASE | {"trace", "allocator"},
    "search": BASE | {"trace", "allocator", "measure"},
    "record": BASE | {"trace", "allocator"},
    "doctor": BASE | {"trace", "allocator", "record"},
    "suite": BASE | {"trace", "allocator", "measure", "record", "results", "fragscope"},
    "gate": BASE | {"trace", "results", "config", "toml"},
    "against": BASE | {"trace", "allocator", "measure", "results", "config", "suite", "gate", "fragscope"},
    "thresholds": BASE | {"trace", "allocator", "toml"},
    "starter": BASE | {"config", "toml"},
    "report": BASE | {"trace", "allocator", "measure", "results", "thresholds"},
    "testing": BASE | {"trace", "allocator", "measure", "gate", "record", "config", "toml"},
    "pytest_plugin": BASE | {"testing"},
    "cli": BASE
    | {"trace", "allocator", "measure", "results", "config", "suite", "gate", "report", "search", "record"}
    | {"doctor", "thresholds", "against", "starter"},
    "fragscope": BASE | {"trace", "record", "suite"},  # the public face: fragscope/__init__.py
    "__main__": {"cli"},
}
MAY_IMPORT_TORCH = {"record", "suite"}
# These may ask torch what it is; it is imported when they run, never at the top.
MAY_IMPORT_TORCH_LATE = {"cli/run.py", "doctor/probe.py"}


def room(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return "fragscope" if parts == ("__init__",) else parts[0]


def imports(file: Path) -> list[tuple[str, bool]]:
    """Modules imported, and whether at the top of the file."""
    tree = ast.parse(file.read_text())
    top = set(ast.walk(ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)], [])))
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(a.name, node in top) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            out += [(f"{node.module}", node in top)]
    return out


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(file):
    here = room(file)
    for name, _ in imports(file):
        first, _, rest = name.partition(".")
        if first == "fragscope":
            there = rest.partition(".")[0] or "fragscope"
            assert there == here or there in ARROWS[here], f"{here} must not import {there}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_record_and_suite_import_torch(file):
    for name, top in imports(file):
        if name.partition(".")[0] in ("torch", "flashinfer"):
            late = str(file.relative_to(PACKAGE)) in MAY_IMPORT_TORCH_LATE and not top
            assert room(file) in MAY_IMPORT_TORCH or late


def test_every_room_has_its_arrows_written_down():
    assert {room(f) for f in FILES} == set(ARROWS)


@pytest.mark.parametrize(
    "module",
    [
        "fragscope",
        "fragscope.cli",
        "fragscope.against.judge",
        "fragscope.against.run",
        "fragscope.cli.against",
        "fragscope.cli.doctor",
        "fragscope.cli.cards",
        "fragscope.cli.fit",
        "fragscope.cli.card_answers",
        "fragscope.cli.fit_cards",
        "fragscope.cli.gate",
        "fragscope.cli.init",
        "fragscope.cli.lock",
        "fragscope.cli.report",
        "fragscope.cli.record",
        "fragscope.cli.thresholds",
        "fragscope.cli.replay",
        "fragscope.cli.tune",
        "fragscope.cli.upstream",
        "fragscope.doctor",
        "fragscope.record.launch.process",
        "fragscope.search",
        "fragscope.testing.devices",
        "fragscope.testing.sections",
    ],
)
def test_importing_does_not_import_torch_or_the_report_libraries(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'bokeh', 'jinja2', 'flashinfer'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
