"""Make the golden corpus: short random programs with the answers of each release's binary.

usage: python tests/conformance/corpus.py

Needs the oracles of all releases (tests/conformance/oracle/build.py). From the oldest release on, programs are added
for what a release brings: one of every theme, and then those that bring an obvious implementation of the allocator to
lines that none has reached so far. Every newer release answers them too. The answers come from the binaries alone.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, NamedTuple

import obvious
from answers import CrashError, ask
from binary import Libraries
from compare import compare
from generator import generate, themes_of
from golden import CORPUS, Kept, write_corpus
from oracles import RELEASES, OracleError, oracle_of
from programs import Program, version

OPERATIONS = 250
CANDIDATES = 20  # of each theme
OF_A_THEME = {"default": 4}  # programs that are kept; otherwise one. These are also replayed as recordings.
LAYOUT_EVERY = 100  # operations
Lines = set[int]


class Candidate(NamedTuple):
    """A program with a binary's answers, and the lines of the obvious implementation that it reaches."""

    theme: str
    kept: Kept
    lines: Lines


def answered(libraries: Libraries, release: str, theme: str, program: Program) -> Candidate | None:
    """None if the answers depend on the order of a hash table, which may be another one the next time."""
    try:
        answers = ask(libraries, program, LAYOUT_EVERY)
    except CrashError as error:
        print(f"torch {release}, {program.name}: {error}", file=sys.stderr)
        return None
    with lines_of(obvious.__file__) as lines:
        outcome = compare(program, answers, obvious.ObviousAllocator, release)
    if outcome.difference is not None:
        print(f"torch {release}, {program.name}: {outcome.difference}", file=sys.stderr)
    if outcome.unknown or outcome.held_reordered or outcome.pools_reordered:
        return None
    return Candidate(theme, Kept(release, program, answers), lines)


@contextmanager
def lines_of(file: str) -> Iterator[Lines]:
    """The lines of a file that run."""
    lines: Lines = set()

    def local(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            lines.add(frame.f_lineno)
        return local

    def globally(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return local if frame.f_code.co_filename == file else None

    sys.settrace(globally)
    try:
        yield lines
    finally:
        sys.settrace(None)


def choose(found: Sequence[Candidate], newest: str, reached: Lines) -> list[Kept]:
    """Of every theme what reaches most with what the release brought; then whatever reaches something new."""
    chosen: list[Kept] = []
    for theme in dict.fromkeys(candidate.theme for candidate in found):
        new = [c for c in found if c.theme == theme and version(c.kept.program.since) == version(newest)]
        new.sort(key=lambda candidate: len(candidate.lines), reverse=True)
        for candidate in new[: OF_A_THEME.get(theme, 1)]:
            chosen.append(candidate.kept)
            reached |= candidate.lines
    while found:
        best = max(found, key=lambda candidate: len(candidate.lines - reached))
        if best.lines <= reached:
            break
        chosen.append(best.kept)
        reached |= best.lines
    return chosen


def of_release(release: str, programs: Sequence[Program]) -> list[Kept]:
    """The answers of a release to programs of older ones, and to those that it adds. Runs in a process of its own."""
    libraries = Libraries(oracle_of(release))
    old = [answered(libraries, release, "", program) for program in programs]
    kept = [candidate.kept for candidate in old if candidate is not None]
    reached: Lines = set().union(*(candidate.lines for candidate in old if candidate is not None))
    found = []
    for theme in themes_of(release):
        for seed in range(CANDIDATES):
            program = generate(seed, release, OPERATIONS, theme)
            candidate = answered(libraries, release, theme, replace(program, name=f"{program.name}-of-{release}"))
            if candidate is not None:
                found.append(candidate)
    return kept + choose(found, release, reached)


def main() -> int:
    """The command; returns its exit code."""
    try:
        for release in RELEASES:
            oracle_of(release)
    except OracleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kept: list[Kept] = []
    for release in RELEASES:
        programs = list({one.program.name: one.program for one in kept}.values())
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            kept += process.submit(of_release, release, programs).result()
        print(f"torch {release}: {sum(one.release == release for one in kept)} programs", flush=True)
    write_corpus(kept)
    print(f"{CORPUS}: {CORPUS.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
