"""What the virtual device said of each case beside what a card did, as a Markdown table.

    fragscope run --device cuda --out FOLDER ...
    python tests/gpu/prediction_table.py FOLDER/results.json [...] [--virtual RESULTS.json]

``--virtual`` names a run of the same cases on the virtual device under the card's release, for cases whose results hold
no prediction.

Sizes are MiB. *Difference* is measured minus predicted over every figure of the phase: base, transient, retained,
number of allocations, and nine counters at the peak and at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from fragscope.cli.tables import markdown_table
from fragscope.report.summary import refutation
from fragscope.results import Case, Prediction, load_results
from fragscope.units import format_bytes, mib


def with_predictions(cases: list[Case], virtual: list[Case]) -> list[Case]:
    """The cases, with what another run said where nothing was said beforehand."""
    said = {(c.scenario, c.preset, c.variant, c.conf): c for c in virtual}
    return [
        case if case.predicted else _with(case, said.get((case.scenario, case.preset, case.variant, case.conf)))
        for case in cases
    ]


def _with(case: Case, other: Case | None) -> Case:
    if other is None or not other.measured or other.outcome == "oom":
        return case
    figures = {name: getattr(other, name) for name in Prediction.__struct_fields__ if name != "exact"}
    exact = not other.estimated_ops and all(a.effect != "unknown" for a in other.assumptions)
    return msgspec.structs.replace(case, predicted=Prediction(exact=exact, **figures))


def difference(case: Case) -> str:
    """What there is to say of one case."""
    if not case.measured:
        return case.outcome
    if case.refuted:
        return refutation(case)
    if case.outcome == "oom":
        return "memory ran out"
    if case.predicted is None:
        return "not predicted"
    differing = [f"{name} {format_bytes(count)}" for name, count in case.surprises.items()]
    rough = "" if case.predicted.exact else " (estimated)"
    return (", ".join(differing) or "0 B") + rough


def row(case: Case) -> tuple[str, ...]:
    """One line of the table."""
    name = f"{case.scenario}/{case.preset}/{case.variant}"
    said = case.predicted
    figures = ["-"] * 4
    if said is not None and case.measured and case.outcome != "oom":
        figures = [mib(said.peak.allocated), mib(case.peak.allocated), mib(said.peak.reserved), mib(case.peak.reserved)]
    outcome = case.outcome if case.as_expected else f"{case.outcome} (declared {case.expected_outcome})"
    return (name, case.conf or "default", outcome, *figures, difference(case))


def main() -> None:
    files = sys.argv[1:]
    virtual: list[Case] = []
    if "--virtual" in files:
        at = files.index("--virtual")
        virtual = load_results(Path(files[at + 1])).cases
        del files[at : at + 2]
    cases = with_predictions([case for file in files for case in load_results(Path(file)).cases], virtual)
    heading = ("case", "conf", "outcome", "allocated, said", "measured", "reserved, said", "measured", "difference")
    print("\n".join(markdown_table([heading, *map(row, cases)])))
    predicted = [c for c in cases if c.predicted is not None and c.measured]
    same = sum(not c.surprises for c in predicted)
    compared = sum(c.verify.compared for c in cases if c.verify is not None)
    wrong = sum(c.verify.mismatches for c in cases if c.verify is not None)
    print(f"\n{same} of {len(predicted)} predicted cases without any difference; ", end="")
    print(f"the model against the card's own decisions: {wrong} of {compared:,} differ.")


if __name__ == "__main__":
    main()
