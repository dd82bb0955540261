"""The published JSON Schemas are those of the code. ``python tests/unit/test_schemas.py`` writes them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fragscope.doctor import Diagnosis
from fragscope.gate.verdict import Verdict
from fragscope.results import Results, SweepResults
from fragscope.suite.replayed import UpstreamReport

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"
PUBLISHED = {
    "doctor.schema.json": Diagnosis,
    "results.schema.json": Results,
    "sweep.schema.json": SweepResults,
    "upstream.schema.json": UpstreamReport,
    "verdict.schema.json": Verdict,
}


def dedented(value: Any) -> Any:
    """Descriptions come from docstrings, whose indentation is kept up to Python 3.12 only."""
    if isinstance(value, dict):
        return {k: inspect.cleandoc(v) if k == "description" else dedented(v) for k, v in value.items()}
    return value


def text(kind: type[Any]) -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **dedented(msgspec.json.schema(kind))}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schema_is_current(name):
    assert (FOLDER / name).read_text() == text(PUBLISHED[name])


if __name__ == "__main__":
    for name, kind in PUBLISHED.items():
        (FOLDER / name).write_text(text(kind))
