"""The model against the real allocator binary of each release, on programs kept as data (see tests/data/golden)."""

from __future__ import annotations

import json
import lzma
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from snapshots import entry, segment, snapshot

from fragscope.allocator import (
    CachingAllocator,
    Device,
    OutOfMemoryError,
    ReplaySettings,
    final_state,
    replay,
    rules_for,
)
from fragscope.trace import DecisionKind, DecisionLog
from fragscope.trace.snapshot import snapshot_to_trace

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
RELEASES = ("2.11.0", "2.12.0", "2.13.0", "2.14.1")
BY_USER = (DecisionKind.ALLOC, DecisionKind.FREE_REQUESTED, DecisionKind.FREE_COMPLETED)


def corpus(release: str) -> dict[str, Any]:
    return json.loads(lzma.decompress((GOLDEN / release / "programs.json.xz").read_bytes()))


class AnsweredAddresses:
    """Gives the model the addresses that the fake driver gave the binary for the same operation."""

    def __init__(self) -> None:
        self.next: list[int] = []

    def place(self, size: int) -> int:
        return self.next.pop(0)

    def remove(self, addr: int, size: int) -> None:
        pass


class Player:
    """Plays a program on the model and answers each operation in the form the corpus has."""

    def __init__(self, program: dict[str, Any], release: str) -> None:
        self.addresses = AnsweredAddresses()
        self.log = DecisionLog()
        self.device = Device(program["total"], program["capacity"], self.addresses)
        self.model = CachingAllocator(self.device, rules_for(release).rules, log=self.log)
        self.blocks: dict[int, Any] = {}
        self.sizes: dict[int, int] = {}
        self.uses: dict[int, set[int]] = {}  # live allocation -> other streams that use it
        self.waiting: dict[int, set[int]] = {}  # freed allocation -> streams that have not finished
        self.deferred: set[int] = set()  # freed allocations that are not completed

    def play(self, op: list[Any], segment_addresses: list[int]) -> list[list[Any]]:
        self.addresses.next = segment_addresses
        before = len(self.log)
        getattr(self, "_" + op[0])(*op[1:])
        assert not self.addresses.next, "the model took fewer segments than the binary"
        return self._entries(before)

    def _alloc(self, id_: int, size: int, stream: int) -> None:
        self.sizes[id_] = size
        with suppress(OutOfMemoryError):
            self.blocks[id_] = self.model.malloc(size, stream, id_)

    def _free(self, id_: int) -> None:
        block = self.blocks.pop(id_, None)
        if block is None:
            return
        streams = self.uses.pop(id_, set())
        if streams:
            self.waiting[id_] = streams
            self.deferred.add(id_)
        self.model.free(block)

    def _use(self, id_: int, stream: int) -> None:
        block = self.blocks.get(id_)
        if block is None:
            return
        self.model.record_stream(block, stream)
        if stream != block.segment.stream:
            self.uses.setdefault(id_, set()).add(stream)

    def _done(self, stream: int) -> None:
        for id_ in list(self.waiting):
            self.waiting[id_].discard(stream)
            if not self.waiting[id_]:
                del self.waiting[id_]
                self.model.uses_done(id_)

    def _empty(self) -> None:
        self.model.empty_cache()

    def _fraction(self, fraction: float) -> None:
        self.model.set_memory_fraction(fraction)

    def _entries(self, start: int) -> list[list[Any]]:
        rows = self.log.finish()
        out = []
        for row in range(start, len(self.log)):
            kind, id_ = DecisionKind(rows.kind[row]), int(rows.id[row])
            if kind is DecisionKind.FREE_COMPLETED:
                self.deferred.discard(id_)
                self.waiting.pop(id_, None)
            size = self.sizes[id_] if kind in BY_USER else int(rows.size[row])
            out.append([kind.name.lower(), int(rows.addr[row]), size, int(rows.stream[row])])
        return out

    def counters(self) -> list[int]:
        meter, model = self.model.meter, self.model
        return [
            # torch takes requested bytes back when a free completes, fragscope when the program lets go
            meter.requested + sum(self.sizes[i] for i in self.deferred),
            meter.allocated, meter.peak_allocated, meter.active, meter.peak_active,
            meter.reserved, meter.peak_reserved, meter.inactive_split, meter.peak_inactive_split,
            meter.segments, meter.peak_segments, model.retries, model.ooms,
            model.calls.sync, model.calls.alloc, model.calls.free, self.device.used,
        ]  # fmt: skip


def differences(program: dict[str, Any], names: list[str], release: str) -> list[str]:
    """Every operation at which the model's answer is not the binary's; stops where they can no longer be compared."""
    player = Player(program, release)
    expected_counters = [0] * len(names)
    used_by_several = len({op[2] for op in program["ops"] if op[0] == "use"}) > 1
    peak_of_split = names.index("inactive_split_bytes.peak")
    found = []
    for number, (op, entries, changes) in enumerate(
        zip(program["ops"], program["entries"], program["counters"], strict=True)
    ):
        expected = list(entries)
        for index, value in zip(changes[::2], changes[1::2], strict=True):
            expected_counters[index] = value
        try:
            got = player.play(op, [e[1] for e in entries if e[0] == "segment_alloc"])
        except (IndexError, AssertionError):
            return [*found, f"operation {number} {op}: other segments than {entries}"]
        counters, wanted = player.counters(), list(expected_counters)
        if used_by_several:
            # Frees that complete together do so in the order of a hash table: the set is compared, not the order,
            # nor the one peak that depends on it.
            got, expected = sorted(got), sorted(expected)
            counters[peak_of_split] = wanted[peak_of_split] = 0
        if got != expected:
            found.append(f"operation {number} {op}: model {got}, binary {expected}")
        if counters != wanted:
            found.append(f"operation {number} {op}: counters {counters}, binary {wanted}")
    end = [[s.addr, s.size, s.stream, [list(b) for b in s.blocks]] for s in final_state(player.model)]
    if end != program["end"]:
        found.append("the segments at the end differ")
    return found


@pytest.mark.parametrize("release", RELEASES)
def test_every_address_decision_and_counter_equals_the_binary(release: str) -> None:
    data = corpus(release)
    assert data["release"] == release
    operations = 0
    for program in data["programs"]:
        assert differences(program, data["counters"], release) == []
        operations += len(program["ops"])
    assert operations > 2000


@pytest.mark.parametrize("release", RELEASES)
def test_the_corpus_holds_what_it_claims(release: str) -> None:
    programs = corpus(release)["programs"]
    operations = {op[0] for p in programs for op in p["ops"]}
    actions = {e[0] for p in programs for entries in p["entries"] for e in entries}
    assert operations == {"alloc", "free", "use", "done", "empty", "fraction"}
    assert actions == {"alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "oom"}


@pytest.mark.parametrize(
    ("release", "wrong"),
    [("2.11.0", "2.12.0"), ("2.11.0", "2.13.0"), ("2.12.0", "2.11.0"), ("2.12.0", "2.13.0"), ("2.13.0", "2.11.0"),
     ("2.13.0", "2.12.0"), ("2.14.1", "2.11.0"), ("2.14.1", "2.12.0")],
)  # fmt: skip
def test_the_corpus_tells_the_tie_break_rules_apart(release: str, wrong: str) -> None:
    data = corpus(release)
    assert any(differences(program, data["counters"], wrong) for program in data["programs"])


def as_snapshot(program: dict[str, Any], release: str) -> dict[str, Any]:
    """The binary's trace entries in the form in which torch writes them into a snapshot."""
    short = release.rpartition(".")[0]
    states = {"allocated": "active_allocated", "pending": "active_pending_free", "free": "inactive"}
    return snapshot(
        [entry(*e, release=short) for entries in program["entries"] for e in entries],
        [
            segment(addr, size, [(length, states[state]) for _, length, state in blocks], stream)
            for addr, size, stream, blocks in program["end"]
        ],
        short,
    )


@pytest.mark.parametrize("release", RELEASES)
def test_a_snapshot_of_the_binarys_trace_replays_to_itself(release: str) -> None:
    """The reader must infer from trace entries alone what the program did: deferred frees, empty_cache, retries."""
    read = 0
    for program in corpus(release)["programs"]:
        fractions = [n for n, op in enumerate(program["ops"]) if op[0] == "fraction"]
        if fractions not in ([], [0]):
            continue  # a snapshot does not show that the limit changed on the way
        trace = snapshot_to_trace(as_snapshot(program, release), Path("golden.pickle"))
        settings = ReplaySettings(
            rules=rules_for(release),
            card="golden",
            total=program["total"],
            capacity=program["capacity"],
            memory_fraction=program["ops"][0][1] if fractions else None,
        )
        outcome = replay(trace, settings, verify=True).verify
        assert outcome is not None
        assert outcome.first is None, program["name"]
        read += 1
    assert read >= 2
