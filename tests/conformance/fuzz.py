"""Random programs on the real allocator of a release, and on a model that must do the same.

usage: python tests/conformance/fuzz.py --release 2.13.0 --programs 200 --operations 4000 --seed 1 --model obvious

Needs the oracle of the release (tests/conformance/oracle/build.py). Ends with one summary line and exit code 1 if a
program differed; the smallest form of it is then kept in tests/data/golden/failures, where the tests run it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from answers import CrashError, ask
from binary import Libraries
from compare import MakeModel, Outcome, compare
from generator import THEMES, generate
from golden import Kept, write_failure
from oracles import RELEASES, OracleError, oracle_of
from programs import Program
from shrink import shrink

MODELS = {"obvious": ("obvious", "ObviousAllocator"), "engine": ("engine_model", "EngineModel")}
LAYOUT_EVERY = 100  # operations


def model_named(name: str) -> MakeModel:
    """The constructor of one of ``MODELS``."""
    module, attribute = MODELS[name]
    make: MakeModel = getattr(import_module(module), attribute)
    return make


class Fuzzer:
    """Compares programs and counts what they had.

    Args:
        libraries: of the release.
        release: such as ``"2.13.0"``.
        make: builds the model.
    """

    def __init__(self, libraries: Libraries, release: str, make: MakeModel) -> None:
        self.libraries, self.release, self.make = libraries, release, make
        self.programs = self.cut = self.differences = self.crashes = 0
        self.total = Outcome()

    def outcome(self, program: Program) -> Outcome:
        """Compare one program; a crash of the binary is raised."""
        return compare(program, ask(self.libraries, program, LAYOUT_EVERY), self.make, self.release)

    def run(self, program: Program) -> Outcome | None:
        """Compare one program and count it; None if the binary crashed."""
        self.programs += 1
        try:
            outcome = self.outcome(program)
        except CrashError as error:
            self.crashes += 1
            print(f"{program.name}: {error}; conf {program.conf!r}", flush=True)
            return None
        for name in ("operations", "ooms", "uses", "together", "reordered", "unknown", "pools_reordered"):
            setattr(self.total, name, getattr(self.total, name) + getattr(outcome, name))
        self.cut += outcome.cut
        self.differences += outcome.difference is not None
        return outcome

    def smallest(self, program: Program, at: int) -> Program:
        """The program, shrunk to what still differs in the same operation."""
        kind = program.ops[at][0]

        def fails(candidate: Program) -> bool:
            try:
                found = self.outcome(candidate)
            except CrashError:
                return False
            return found.at is not None and candidate.ops[found.at][0] == kind

        return shrink(program.with_ops(program.ops[: at + 1]), fails)

    def keep(self, program: Program) -> Path:
        """Write the program with the binary's answers to where the tests find it."""
        return write_failure(Kept(self.release, program, ask(self.libraries, program, 1)))

    def summary(self) -> str:
        """One line."""
        total = self.total
        return (
            f"torch {self.release}: {self.programs} programs, {total.operations} operations, {total.ooms} OOMs, "
            f"{total.uses} cross-stream uses, {total.together} simultaneous completions ({total.reordered} not in the "
            f"order of the frees, {total.unknown} of them in an order no model can know; {self.cut} programs cut short "
            f"for that), {total.pools_reordered} times pools in hash order, {self.crashes} crashes of the binary, "
            f"{self.differences} differences"
        )


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--release", choices=RELEASES, required=True)
    options.add_argument("--programs", type=int, default=100, help="how many")
    options.add_argument("--operations", type=int, default=2000, help="in each, about")
    options.add_argument("--seed", type=int, default=1, help="of the first program; those after it count up")
    options.add_argument("--model", choices=MODELS, default="obvious")
    options.add_argument("--theme", choices=THEMES, help="only programs of this theme; otherwise the themes take turns")
    options.add_argument("--oracle", type=Path, help="directory of the oracle, where not the usual one")
    options.add_argument("--failures", type=int, default=1, help="stop after so many differing programs")
    options.add_argument("--no-shrink", action="store_true", help="only say where programs differ; keep nothing")
    return options


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        directory = oracle_of(options.release, options.oracle)
    except OracleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fuzzer = Fuzzer(Libraries(directory), options.release, model_named(options.model))
    started = time.monotonic()
    for seed in range(options.seed, options.seed + options.programs):
        program = generate(seed, options.release, options.operations, options.theme)
        outcome = fuzzer.run(program)
        if outcome is not None and outcome.difference is not None and outcome.at is not None:
            print(f"{program.name} (seed {seed}), conf {program.conf!r}: {outcome.difference}", flush=True)
            if not options.no_shrink:
                _report_smallest(fuzzer, program, outcome.at)
            if fuzzer.differences >= options.failures:
                break
        if fuzzer.programs % 25 == 0:
            print(f"{fuzzer.programs} programs, {time.monotonic() - started:.0f} s", flush=True)
    print(fuzzer.summary())
    return 1 if fuzzer.differences or fuzzer.crashes else 0


def _report_smallest(fuzzer: Fuzzer, program: Program, at: int) -> None:
    smallest = replace(fuzzer.smallest(program, at), name=program.name)
    for op in smallest.ops:
        print(f"    {op}")
    print(f"  {fuzzer.outcome(smallest).difference}")
    print(f"  kept as {fuzzer.keep(smallest)}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
