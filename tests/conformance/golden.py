"""Programs kept with a binary's answers: the corpus, and programs that once failed (see tests/data/golden)."""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from answers import Answers
from binary import COUNTERS
from programs import Program

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
CORPUS = GOLDEN / "programs.json.xz"
FAILURES = GOLDEN / "failures"


@dataclass(frozen=True, slots=True)
class Kept:
    """A program with what the binary of a release answered to it."""

    release: str
    program: Program
    answers: Answers

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"release": self.release, **self.program.to_json(), **self.answers.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Kept:
        """From plain data."""
        rest = dict(data)
        release = rest.pop("release")
        answers = Answers.from_json({key: rest.pop(key) for key in ("entries", "changes", "layouts")})
        return cls(release, Program.from_json(rest), answers)


def write_corpus(kept: Sequence[Kept]) -> None:
    """Write the corpus: every program once, with the answers of one release beside those of the next."""
    programs: dict[str, dict[str, Any]] = {}
    for one in kept:
        entry = programs.setdefault(one.program.name, {"program": one.program.to_json(), "answers": {}})
        entry["answers"][one.release] = one.answers.to_json()
    text = json.dumps({"counters": COUNTERS, "programs": list(programs.values())}, separators=(",", ":"))
    CORPUS.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


@cache
def read_corpus() -> tuple[Kept, ...]:
    """The corpus: each program as often as there are releases that answered it."""
    data = json.loads(lzma.decompress(CORPUS.read_bytes()))
    assert data["counters"] == COUNTERS, "the corpus has other counters; make it again"
    return tuple(
        Kept(release, Program.from_json(entry["program"]), Answers.from_json(answers))
        for entry in data["programs"]
        for release, answers in entry["answers"].items()
    )


def write_failure(kept: Kept) -> Path:
    """Keep a program that failed, so that it is run with the corpus from now on."""
    FAILURES.mkdir(parents=True, exist_ok=True)
    path = FAILURES / f"{kept.release}-{kept.program.name}.json"
    path.write_text(json.dumps(kept.to_json(), separators=(",", ":")) + "\n")
    return path


def read_failures() -> list[Kept]:
    """Programs that failed at some time."""
    return [Kept.from_json(json.loads(path.read_text())) for path in sorted(FAILURES.glob("*.json"))]
