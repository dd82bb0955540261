"""Whatever a program asks, the decisions alone give the counters that the allocator model keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from driven_traces import Driven
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fragscope.measure import layout_at, lifetimes, timeline
from fragscope.report.memory_map import Canvas, address_ranges, cell_shares
from fragscope.trace import SegmentState

MIB = 2**20
COUNTERS = ("requested", "allocated", "active", "reserved", "stranded", "pool_idle", "raw", "hbm")
IDLE = ("stranded", "releasable", "pool_idle")
CONFS = (
    "",
    "expandable_segments:True",
    "max_split_size_mb:21",
    "max_split_size_mb:21,expandable_segments:True",
    "roundup_power2_divisions:4",
    "expandable_segments:True,roundup_power2_divisions:[1:8,4:2,>:1]",
    "garbage_collection_threshold:0.5",
)
LARGE_PAGES = ("expandable_segments:True,large_segment_size_mb:32", "expandable_segments:True,large_segment_size_mb:12")
EDGES = (1, 512, 513, MIB - 1, MIB, MIB + 1, 2 * MIB, 3 * MIB, 10 * MIB, 19 * MIB, 20 * MIB, 20 * MIB + 1, 41 * MIB)
STREAMS = (0, 0x5100, 0x5200)

sizes = st.one_of(st.sampled_from(EDGES), st.integers(1, 4096), st.integers(1, 3 * MIB), st.integers(1, 60 * MIB))
releases = st.sampled_from(["2.9", "2.11", "2.12", "2.13", "2.14"])
confs = st.sampled_from(CONFS)


class Program:
    """Interprets numbers as requests that make sense where they come, so that any list of steps is a program."""

    def __init__(self, driven: Driven, *, scopes: bool) -> None:
        self.driven = driven
        self.scopes = scopes  # whether pools are made before they are used; recordings may not show it
        self.live: list[int] = []
        self.freed: list[int] = []
        self.open: list[int] = []
        self.users = {1: 0, 2: 0}
        self.raw: list[tuple[int, int]] = []  # id and bytes
        self.next_id = 0

    def alloc(self, size: int, choice: int) -> None:
        stream = STREAMS[choice % 3] if choice % 4 == 0 else 0
        opened = self.open[-1] if self.open else 0
        if self.driven.alloc(self.next_id, size, stream, opened if self.scopes else (0, 0, 1, 2)[choice // 4 % 4]):
            self.live.append(self.next_id)
        self.next_id += 1

    def free(self, size: int, choice: int) -> None:
        if self.live:
            id_ = self.live.pop(choice % len(self.live))
            self.driven.free(id_)
            self.freed.append(id_)

    def use(self, size: int, choice: int) -> None:
        if self.live:
            self.driven.record_stream(self.live[choice % len(self.live)], STREAMS[choice % 3])

    def done(self, size: int, choice: int) -> None:
        if self.freed:
            self.driven.uses_done(self.freed[-1 - choice % min(3, len(self.freed))])

    def empty(self, size: int, choice: int) -> None:
        self.driven.empty_cache((0, 0, 1, 2)[choice % 4])

    def take(self, size: int, choice: int) -> None:
        """Memory of the driver itself."""
        if self.driven.take_raw(self.next_id, size):
            self.raw.append((self.next_id, size))
        self.next_id += 1

    def give(self, size: int, choice: int) -> None:
        if self.raw:
            self.driven.give_raw(*self.raw.pop(choice % len(self.raw)))

    def limit(self, size: int, choice: int) -> None:
        self.driven.limit((0.4, 0.7, 1.0)[choice % 3])

    def pool(self, size: int, choice: int) -> None:
        pool = 1 + choice % 2
        if not self.scopes or choice // 2 % 2:
            self.release(pool)
        elif self.open and choice // 4 % 2:
            self.driven.close_scope(self.open.pop())
        elif choice // 8 % 2:
            self.driven.create_pool(pool, use_on_oom=choice // 16 % 3 == 0, no_split=choice // 16 % 5 == 0)
            self.users[pool] += 1
        else:
            self.driven.open_scope(pool)
            self.open.append(pool)
            self.users[pool] += 1

    def release(self, pool: int) -> None:
        """An owner lets go; scopes that are open keep theirs."""
        if self.users[pool] > self.open.count(pool):
            self.driven.release_pool(pool)
            self.users[pool] -= 1


KINDS = (
    "alloc", "alloc", "alloc", "alloc", "free", "free", "free", "use", "done", "empty", "limit", "pool", "pool",
    "take", "give",
)  # fmt: skip
step = st.tuples(st.sampled_from(KINDS), sizes, st.integers(0, 255))
# Left alone, lists are some five long: too short for memory to run out and pools to change hands.
steps = st.one_of(st.lists(step, max_size=20), st.lists(step, min_size=60, max_size=200))


def driven(torch: str, conf: str, capacity: int, program: list[tuple[str, int, int]], *, scopes: bool) -> Driven:
    """An allocator after a program."""
    out = Driven(torch, 512 * MIB, capacity * MIB, conf)
    asked = Program(out, scopes=scopes)
    for number, (kind, size, choice) in enumerate(program):
        getattr(asked, kind)(size, choice)
        if number % 7 == 0:
            out.look()
    return out


def assert_counters_agree(made: Driven) -> None:
    line = timeline(made.trace)
    for counter in COUNTERS:
        assert getattr(line, counter).tolist() == [getattr(now, counter) for now in made.now], counter
        assert getattr(line.peak(), counter) == getattr(made.peaks, counter), counter
    parts = (line.requested, line.internal, line.releasable, line.stranded, line.pool_idle)
    assert np.array_equal(line.reserved, sum(parts))
    assert all(part.min(initial=0) >= 0 for part in parts)
    for counter in ("reserved", *IDLE):
        assert np.all(getattr(line, f"{counter}_peak") >= getattr(line, counter)), counter


def assert_layouts_agree(made: Driven) -> None:
    trace = made.trace
    line, lives = timeline(trace), lifetimes(trace)
    for row, expected in made.segments.items():
        layout = layout_at(trace, row, lives)
        ours = tuple(
            SegmentState(s.addr, s.size, s.stream, s.pool, tuple((b.addr, b.size, b.state) for b in s.blocks), s.page)
            for s in layout
        )
        assert ours == expected
        for counter in IDLE:
            assert sum(getattr(s, counter) for s in layout) == getattr(line, counter)[row], counter


def assert_memory_maps_agree(made: Driven, shape: tuple[int, int]) -> None:
    trace = made.trace
    rows = slice(len(made.now) // 4, len(made.now))
    line, lives = timeline(trace), lifetimes(trace)
    ranges = address_ranges(lives, rows)
    canvas = Canvas(ranges, rows, len(made.now) // 2, max(ranges.extent, 1) / shape[0], shape[1])
    shares = cell_shares(lives, canvas)
    cell = canvas.bytes_per_cell * canvas.events_per_cell
    largest = line.reserved.max(initial=1) * len(made.now)
    sums: dict[str, Any] = {name: getattr(shares, name).sum() * cell for name in ("reserved", "stranded", "pool_idle")}
    sums["active"] = (shares.base + shares.phase).sum() * cell
    for counter, area in sums.items():
        assert area == pytest.approx(getattr(line, counter)[rows].sum(), abs=1e-9 * largest), counter


@given(releases, confs, st.sampled_from([24, 70, 130, 480]), steps)
@settings(max_examples=80, deadline=None)
def test_counters_at_every_event_and_their_peaks(torch: str, conf: str, capacity: int, program: Any) -> None:
    assert_counters_agree(driven(torch, conf, capacity, program, scopes=True))


@given(releases, confs, st.sampled_from([24, 70, 130, 480]), steps)
@settings(max_examples=80, deadline=None)
def test_counters_where_nobody_saw_pools_being_made(torch: str, conf: str, capacity: int, program: Any) -> None:
    assert_counters_agree(driven(torch, conf, capacity, program, scopes=False))


@given(st.sampled_from(LARGE_PAGES), st.sampled_from([70, 480]), steps)
@settings(max_examples=40, deadline=None)
def test_counters_with_pages_of_another_size(conf: str, capacity: int, program: Any) -> None:
    assert_counters_agree(driven("2.13", conf, capacity, program, scopes=True))


@given(releases, confs, st.sampled_from([24, 70, 480]), steps, st.booleans())
@settings(max_examples=60, deadline=None)
def test_layouts_are_those_of_the_model(torch: str, conf: str, capacity: int, program: Any, scopes: bool) -> None:
    assert_layouts_agree(driven(torch, conf, capacity, program, scopes=scopes))


@given(releases, confs, st.sampled_from([70, 480]), steps, st.sampled_from([(40, 70), (7, 11), (1, 300)]))
@settings(max_examples=30, deadline=None)
@example("2.13", "", 70, [], (40, 70))
def test_the_areas_of_a_memory_map_add_up_to_the_counters(
    torch: str, conf: str, capacity: int, program: Any, shape: tuple[int, int]
) -> None:
    assert_memory_maps_agree(driven(torch, conf, capacity, program, scopes=True), shape)
