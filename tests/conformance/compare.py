"""A model against a binary's answers, after every operation of a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from answers import Answers, Counters
from completions import Completions
from model import Entry, Model, SegmentView
from programs import Op, Pools, Program, version

from fragscope.allocator import Conf, Rules, TieBreak, parse_conf, rules_for

MakeModel = Callable[[int, int, Rules, Conf], Model]
SCOPES_OLDEST_FIRST = (2, 9)  # up to here the scope opened first selects the pool
SCOPES_HOLD = (2, 12)  # up to here an open scope holds back frees that wait for streams
_ORDER_SHOWS = ("inactive_split.", "inactive_split_bytes.")  # counters with peaks and sums that depend on it


@dataclass(slots=True)
class Outcome:
    """How a comparison went.

    Attributes:
        operations: how many were compared.
        ooms: requests that the binary refused.
        uses: times that a block was used on a stream other than its own.
        together: operations in which more than one deferred free completed.
        reordered: those of them in another order than that of the frees.
        unknown: those of them that the model had to order by itself, and did so differently: the set of entries was
            compared instead of their order, and from there on not the peaks and sums of the split counters.
        held_reordered: operations in which frees that a scope held back completed in another order than that of the
            frees: that of heap addresses.
        pools_reordered: operations in which released pools returned their memory in another order than the model's:
            that of a hash table.
        cut: whether the comparison ended after an unknown order, as in 2.12 that order decides later ties.
        difference: the first one, with its operation; None if there is none.
        at: number of the operation that differs.
    """

    operations: int = 0
    ooms: int = 0
    uses: int = 0
    together: int = 0
    reordered: int = 0
    unknown: int = 0
    held_reordered: int = 0
    pools_reordered: int = 0
    cut: bool = False
    difference: str | None = None
    at: int | None = None


class _DifferenceError(Exception):
    pass


def compare(program: Program, answers: Answers, make: MakeModel, release: str) -> Outcome:
    """Drive a model through a program and hold it against the binary's answers.

    Args:
        program: the program.
        answers: the binary's.
        make: builds the model from total bytes, capacity in bytes, rules and the Conf at the start.
        release: whose rules the model is given, such as ``"2.13.0"``.
    """
    return _Comparison(program, answers, make, release).run()


class _Comparison:
    def __init__(self, program: Program, answers: Answers, make: MakeModel, release: str) -> None:
        self.program, self.answers = program, answers
        self.rules = rules_for(release).rules
        self.release = version(release)
        self.conf = parse_conf(program.conf, self.rules)
        self.make = make
        self.pools = Pools()
        self.completions = Completions(program, answers, self.release <= SCOPES_HOLD)
        self.counters = Counters()
        self.live: set[int] = set()
        self.freed_at: dict[int, int] = {}  # id -> number of the operation
        self.outcome = Outcome()

    def run(self) -> Outcome:
        outcome = self.outcome
        number = 0
        try:
            model = self.make(self.program.total, self.program.capacity, self.rules, self.conf)
            for number, op in enumerate(self.program.ops):
                self._step(model, number, op)
                outcome.operations += 1
                if outcome.cut:
                    break
        except _DifferenceError as difference:
            outcome.difference = f"operation {number} {self.program.ops[number]}: {difference}"
        except Exception as error:  # a model that cannot go on differs; where it raised says more than that it did
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = f" ({frame.tb_frame.f_code.co_name}, line {frame.tb_lineno})" if frame else ""
            outcome.difference = (
                f"operation {number} {self.program.ops[number]}: model raised {type(error).__name__}: {error}{where}"
            )
        if outcome.difference is not None:
            outcome.at = number
        outcome.uses = self.completions.cross_stream_uses
        outcome.held_reordered = self.completions.held_reordered
        return outcome

    def _step(self, model: Model, number: int, op: Op) -> None:
        entries = self.answers.entries[number]
        syncs = self.counters.by_name["num_sync_all_streams"]
        self.counters.apply(self.answers.changes[number])
        synchronized = self.counters.by_name["num_sync_all_streams"] != syncs
        scope_open = bool(self.pools.open)
        holds = scope_open and self.release <= SCOPES_HOLD
        asks_to_wait = synchronized and op[0] in ("empty", "empty_pool")

        for id_ in self.completions.before(number, asks_to_wait):
            model.uses_done(id_)
        model.give_addresses(
            [(entry.addr, entry.size) for entry in entries if entry.action == "segment_alloc"],
            [entry.addr for entry in entries if entry.action == "segment_map"],
        )
        served = self._perform(model, op, entries)
        looked = synchronized or (op[0] == "alloc" and not holds)
        self.completions.after(number, op, served, scope_open, looked)
        self._count(number, op, entries)
        self._check_entries(model.take_entries(), entries, number)
        if not self.outcome.cut:
            self._check_counters(model.stats())
            if number in self.answers.layouts:
                self._check_layout(model.segments(), self.answers.layouts[number])

    def _perform(self, model: Model, op: Op, entries: list[Entry]) -> bool:
        """Perform an operation; whether the binary did anything."""
        match op:
            case ["alloc", id_, size, stream]:
                served = any(entry.action == "alloc" for entry in entries)
                pool = self.pools.selected(self.release <= SCOPES_OLDEST_FIRST)
                if model.malloc(id_, size, stream, pool) != served:
                    raise _DifferenceError(
                        f"the binary {'served' if served else 'refused'} it, the model did not; {_show(entries)}"
                    )
                if served:
                    self.live.add(id_)
                return served
            case ["free", id_]:
                if id_ not in self.live:
                    return False
                self.live.remove(id_)
                model.free(id_)
            case ["use", id_, stream]:
                if id_ not in self.live:
                    return False
                model.record_stream(id_, stream)
            case ["done", _]:
                pass  # the model hears of it before it next looks
            case ["empty"]:
                model.empty_cache()
            case ["empty_pool", pool]:
                model.empty_cache(pool)
            case ["fraction", fraction]:
                model.set_memory_fraction(fraction)
            case ["conf", text]:
                self.conf = parse_conf(text, self.rules, self.conf)
                model.set_conf(self.conf)
            case ["pool_create", pool, use_on_oom, no_split]:
                model.create_pool(pool, use_on_oom, no_split)
            case ["pool_begin", pool]:
                model.begin_pool(pool)
            case ["pool_end", pool]:
                model.end_pool(pool)
            case ["pool_release", pool]:
                model.release_pool(pool)
            case _:
                raise ValueError(f"unknown operation {op}")
        self.pools.apply(op)
        return True

    def _count(self, number: int, op: Op, entries: list[Entry]) -> None:
        if op[0] == "free":
            self.freed_at[op[1]] = number
        elif op[0] == "alloc" and not any(entry.action == "alloc" for entry in entries):
            self.outcome.ooms += 1
        completed = [self.freed_at[id_] for id_ in self.completions.noticed[number]]
        self.outcome.together += len(completed) > 1
        self.outcome.reordered += completed != sorted(completed)

    def _check_entries(self, got: list[Entry], expected: list[Entry], number: int) -> None:
        if got == expected:
            return
        if _by_pool(got) == _by_pool(expected):
            self.outcome.pools_reordered += 1
            return
        several = len(self.completions.noticed[number]) > 1
        if several and _without_order(_by_pool(got)) == _without_order(_by_pool(expected)):
            self.outcome.unknown += 1
            self.outcome.cut = self.rules.tie_break is TieBreak.BLOCK_ORDER
            return
        for place, (mine, theirs) in enumerate(zip(got, expected, strict=False)):
            if mine != theirs:
                raise _DifferenceError(
                    f"entry {place} of {len(expected)}: model {_show([mine])}, binary {_show([theirs])}"
                )
        more, which = (got, "model") if len(got) > len(expected) else (expected, "binary")
        raise _DifferenceError(f"only the {which} has {_show(more[min(len(got), len(expected)) :])}")

    def _check_counters(self, got: dict[str, tuple[int, ...]]) -> None:
        for name, expected in self.counters.by_name.items():
            mine = tuple(got[name])
            if mine == expected or (self.outcome.unknown and name.startswith(_ORDER_SHOWS) and mine[0] == expected[0]):
                continue
            raise _DifferenceError(f"{name}: model {mine}, binary {expected}")

    def _check_layout(self, got: list[SegmentView], expected: list[SegmentView]) -> None:
        if got == expected:
            return
        mine, theirs = set(got), set(expected)
        raise _DifferenceError(
            f"segments: only in the model {[_compact(v) for v in got if v not in theirs]}, "
            f"only in the binary {[_compact(v) for v in expected if v not in mine]}"
        )


def _by_pool(entries: list[Entry]) -> list[Entry]:
    """With what released pools return in the order of their numbers; each pool's own order stays."""
    runs = groupby(entries, key=lambda entry: entry.action in ("segment_free", "segment_unmap") and entry.pool != 0)
    return [entry for returns, run in runs for entry in (sorted(run, key=lambda e: e.pool) if returns else run)]


def _without_order(entries: list[Entry]) -> list[list[Entry]]:
    """Runs of completed frees without their order, everything else as it is."""
    runs = groupby(entries, key=lambda entry: entry.action == "free_completed")
    return [sorted(run) if frees else list(run) for frees, run in runs]


def _show(entries: list[Entry]) -> str:
    return (
        "; ".join(f"{e.action} {e.addr:#x} {e.size} stream {e.stream:#x} pool {e.pool}" for e in entries) or "nothing"
    )


def _compact(view: SegmentView) -> Any:
    return (hex(view.addr), view.size, [(hex(addr), size, state) for addr, size, state in view.blocks])
