"""The smallest program that still shows a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from programs import Op, Program

Fails = Callable[[Program], bool]
_SIZES = (512, 4096, 2**20, 2**21, 10 * 2**20, 20 * 2**20, 64 * 2**20)


def shrink(program: Program, fails: Fails, attempts: int = 2000) -> Program:
    """Leave out operations in ever smaller chunks, then make sizes smaller, as long as it still fails.

    Args:
        program: it fails.
        fails: whether a program shows the failure.
        attempts: how many programs to try at most.
    """
    left = attempts

    def tried(candidate: Program) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and fails(candidate)

    before = None
    while before != (len(program.ops), _bytes(program)) and left > 0:
        before = (len(program.ops), _bytes(program))
        program = _fewer_operations(program, tried)
        program = _smaller_sizes(program, tried)
    if program.seed and tried(plain := replace(program, seed=0)):
        program = plain
    return program


def _fewer_operations(program: Program, fails: Fails) -> Program:
    chunk = max(1, len(program.ops) // 2)
    while True:
        start = 0
        while start < len(program.ops):
            candidate = program.with_ops([*program.ops[:start], *program.ops[start + chunk :]])
            if fails(candidate):
                program = candidate
            else:
                start += chunk
        if chunk == 1:
            return program
        chunk //= 2


def _smaller_sizes(program: Program, fails: Fails) -> Program:
    for number, op in enumerate(program.ops):
        if op[0] != "alloc":
            continue
        for size in _SIZES:
            if size >= program.ops[number][2]:
                break
            smaller: Op = ["alloc", op[1], size, op[3]]
            candidate = program.with_ops([*program.ops[:number], smaller, *program.ops[number + 1 :]])
            if fails(candidate):
                program = candidate
                break
    return program


def _bytes(program: Program) -> int:
    return sum(op[2] for op in program.ops if op[0] == "alloc")
