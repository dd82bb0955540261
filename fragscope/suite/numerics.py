"""The numeric step: whether all variants of a scenario compute the same, on real data at a small size."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from fragscope.errors import UsageError, printable
from fragscope.suite.process import enter, leave, log_path, report_path
from fragscope.suite.scenario import Scenario
from fragscope.suite.sources import loaded_sources
from fragscope.suite.worker import Task, scenario_of
from fragscope.trace.containers import write_atomically


class NumericReport(msgspec.Struct):
    """Outcome of a numeric step.

    Attributes:
        numeric: facts for results.json.
        wrong: variants that are wrong, with the reason; ``"*"`` where the step itself failed.
        sources: SHA-256 of the source files it ran.
    """

    numeric: dict[str, Any]
    wrong: dict[str, str]
    sources: dict[str, str] = {}


def run_numeric(task: Task, device: str, key: str) -> None:
    """Process entry: compare all variants on real data and write the report."""
    enter(log_path(task.out, key), task.timeout)
    report = compare_numerics(scenario_of(task), device)
    report.sources = loaded_sources(task.file)
    write_atomically(report_path(task.out, key), msgspec.json.encode(report))
    leave()


def compare_numerics(scenario: Scenario, device: str) -> NumericReport:
    """Whether every variant computes what the reference, or else the first variant, computes.

    Bit for bit, or within the scenario's tolerance. A variant that is declared wrong should not. One whose installed
    code cannot be imported is not compared.
    """
    assert scenario.outputs is not None
    outputs, reference = scenario.outputs, scenario.expected
    torch.set_num_threads(1)
    variants = [v.name for v in scenario.variants.values() if v.installed is None or v.installed.importable]
    against = "reference" if reference is not None else variants[0]

    def tensors(what: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        made: Any = outputs(what, device) if what != "reference" or reference is None else reference(device)
        if isinstance(made, torch.Tensor):
            return [made]
        if not isinstance(made, list | tuple) or not all(isinstance(t, torch.Tensor) for t in made):
            raise UsageError(f"returns a {type(made).__name__}, not a sequence of tensors")
        return list(made)

    wrong: dict[str, str] = {}
    try:
        expected = tensors(against)
    except (Exception, SystemExit) as e:
        problem = printable(f"{against} cannot be computed: {_described(e)}", 300)
        failed = {"device": device, "compared_with": against, "agree": False, "message": problem}
        return NumericReport(failed, {"*": problem})
    for variant in variants:
        try:
            problem = _difference(tensors(variant), expected, scenario.tolerance)
        except (Exception, SystemExit) as e:
            problem = _described(e)
        if problem:
            wrong[variant] = printable(problem, 300)
    facts = {
        "device": device,
        "compared_with": against,
        "variants": len(variants),
        "tensors": len(expected),
        "bytes": sum(t.nbytes for t in expected),
        "agree": not wrong,
    }
    if scenario.tolerance is not None:
        facts["tolerance"] = list(scenario.tolerance)
    if wrong:
        facts["differ"] = sorted(wrong)
    return NumericReport(facts, wrong)


def _described(error: BaseException) -> str:
    if isinstance(error, UsageError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def _difference(
    got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: tuple[float, float] | None
) -> str:
    if len(got) != len(expected):
        return f"makes {len(got)} tensors, not {len(expected)}"
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape:
            return f"tensor {number} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        if a.dtype != b.dtype:
            return f"tensor {number} is of type {a.dtype}, not {b.dtype}"
        if tolerance is not None and a.is_floating_point():
            far = ~torch.isclose(a.detach().cpu().double(), b.detach().cpu().double(), *tolerance, equal_nan=True)
            if bool(far.any()):
                return f"tensor {number} is out of tolerance in {int(far.sum())} of {far.numel()} numbers"
            continue
        x, y = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b))
        differing = int((x != y).sum())
        if differing:
            return f"tensor {number} differs in {differing} of {x.numel()} bytes"
    return ""
