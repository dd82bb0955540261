"""The published JSON Schemas are those of the code. ``python tests/unit/test_schemas.py`` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fragscope.gate.verdict import Verdict
from fragscope.results import Results

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"
PUBLISHED = {"results.schema.json": Results, "verdict.schema.json": Verdict}


def text(kind: type[Any]) -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(kind)}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schema_is_current(name):
    assert (FOLDER / name).read_text() == text(PUBLISHED[name])


if __name__ == "__main__":
    for name, kind in PUBLISHED.items():
        (FOLDER / name).write_text(text(kind))
