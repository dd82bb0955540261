"""Makes the files of reports/ and tests/data/scenarios from a run on a card.

    fragscope run --device cuda --out RUN ...
    python tests/gpu/reference_run.py RUN REPORT.json DATA.json

REPORT.json is the run without traces and source hashes; DATA.json has what the tests hold the virtual device to:
figures, and a digest of all requests in order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from fragscope.results import Case, load_results, save_results
from fragscope.results.model import Results
from fragscope.trace import load_trace

sys.path.insert(0, str(Path(__file__).parents[1]))
from request_digest import counted_and_digested

FIGURES = (
    "base", "end_live", "transient", "retained", "peak", "end", "after_empty_cache", "segments_peak", "allocs",
    "driver_calls", "verify",
)  # fmt: skip


def data_of(case: Case, folder: Path) -> dict[str, Any]:
    """Figures of one case, and what it asked for."""
    assert case.trace is not None
    count, digest = counted_and_digested(load_trace(folder / case.trace).requests)
    figures = {name: msgspec.to_builtins(getattr(case, name)) for name in FIGURES}
    return figures | {"requests": count, "requests_sha256": digest}


def main() -> None:
    folder = Path(sys.argv[1])
    results = load_results(folder)
    kept = [msgspec.structs.replace(c, trace=None, sources={}) for c in results.cases]
    save_results(Results(run=results.run, cases=kept), Path(sys.argv[2]))
    cases = {
        f"{c.scenario}/{c.preset}/{c.variant}": data_of(c, folder)
        for c in results.cases
        if c.outcome == "ok" and not c.conf and c.trace is not None
    }
    facts = {
        "gpu": str(results.run.cards[results.cases[0].card]["product"]),
        "torch": results.cases[0].torch_installed,
        "flashinfer": results.run.versions.get("flashinfer-python"),
        "command": " ".join(results.run.command),
    }
    Path(sys.argv[3]).write_text(json.dumps(facts | {"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
