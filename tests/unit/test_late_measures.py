"""What is measured of recordings that began late is what the allocator model counts, from what stood then on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import case_of, late_part, own_settings, pickled, results_of, with_phase
from driven_traces import Driven, as_recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from late_cuts import Watched, cut
from test_timeline_properties import COUNTERS, IDLE, MIB, Program, confs, releases, sizes

from fragscope.allocator import CARDS, Counters, ReplaySettings, Tape, replay, rules_for, settle, tape_of
from fragscope.errors import InputFileError
from fragscope.measure import layout_at, lifetimes, timeline
from fragscope.report import write_html
from fragscope.report.figures import map_scale, raster
from fragscope.report.memory_map import Canvas, CellState, address_ranges, cell_shares
from fragscope.report.traces import Recording, open_recording
from fragscope.trace import DecisionKind, RequestKind, RequestLog, SegmentState, Trace, write_trace

BASE, GIB = 0x3_0200_0000, 2**30
CARD = CARDS["h100-80gb"]
OWN, DEFAULT, EXPANDABLE, PAGES, SMALLER, LARGER = "own", "default", "expandable", "pages", "smaller", "larger"


def assert_counters(trace: Trace, now: Sequence[Counters], first: int = 0) -> None:
    line = timeline(trace)
    for counter in COUNTERS:
        assert getattr(line, counter)[first:].tolist() == [getattr(c, counter) for c in now], counter
    parts = (line.requested, line.internal, line.releasable, line.stranded, line.pool_idle)
    assert line.reserved.tolist() == sum(parts).tolist()
    assert all(part.min(initial=0) >= 0 for part in parts)
    for counter in ("reserved", *IDLE):
        assert (getattr(line, f"{counter}_peak") >= getattr(line, counter)).all(), counter


def assert_agrees(watched: Watched) -> None:
    made = watched.replay
    assert_counters(made.trace, watched.now)
    line, lives = timeline(made.trace), lifetimes(made.trace)
    for counter in COUNTERS:
        assert getattr(line.peak(), counter) == getattr(made.whole.peak, counter), counter
    assert line.at(-1).releasable == made.whole.end.reserved - made.whole.reserved_after_empty_cache
    for row, expected in watched.segments.items():
        assert layout(made.trace, row) == expected
        for counter in IDLE:
            held = sum(getattr(s, counter) for s in layout_at(made.trace, row, lives))
            assert held == getattr(line, counter)[row], counter


def layout(trace: Trace, row: int) -> tuple[SegmentState, ...]:
    return tuple(
        SegmentState(s.addr, s.size, s.stream, s.pool, tuple((b.addr, b.size, b.state) for b in s.blocks), s.page)
        for s in layout_at(trace, row)
    )


@cache
def late_tape(name: str, share: float) -> tuple[Tape, ReplaySettings]:
    late = late_part(name, pickled(name), share)
    own = own_settings(late)
    return settle(tape_of(late), own), own


def asked(own: ReplaySettings, what: str) -> ReplaySettings:
    """Settings to replay under: those of the recording, or others."""
    if what == OWN:
        return own
    free = replace(own, limit=None, memory_fraction=None)
    expandable = replace(free, conf="expandable_segments:True")
    return {
        DEFAULT: replace(free, conf=""),
        EXPANDABLE: expandable,
        PAGES: replace(expandable, conf="expandable_segments:True,large_segment_size_mb:64", rules=rules_for("2.13")),
        SMALLER: replace(expandable, card="16 GiB", total=16 * GIB, capacity=16 * GIB),
        LARGER: replace(expandable, card="141 GiB", total=141 * GIB, capacity=140 * GIB),
    }[what]


@pytest.mark.parametrize("what", [OWN, DEFAULT, EXPANDABLE, PAGES, SMALLER, LARGER])
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("train_vit-expandable", 0.85), ("streams-default", 0.8), ("confs/fill-split", 0.7),
        ("confs/fill-expandable", 0.7), ("confs/graphs-default", 0.3), ("confs/graphs-expandable", 0.3),
        ("confs/graphs-expandable", 0.75), ("confs/oom-explarge32", 0.6), ("confs/oom-roundlist", 0.6),
    ],
)  # fmt: skip
def test_recordings_cut_off_at_the_front_have_the_models_counters_at_every_event(
    name: str, share: float, what: str
) -> None:
    tape, own = late_tape(name, share)
    assert tape.trace.initial
    assert_agrees(Watched(tape, asked(own, what), every=397))


@pytest.mark.parametrize(
    ("name", "share", "conf", "part"),
    [
        ("confs/oom-split64nsr100", 0.85, "max_split_size_mb:21", 20), ("confs/oom-fractionkey", 0.1, "", 1),
        ("train_vit-default", 0.1, "max_split_size_mb:21", 20),
    ],
)  # fmt: skip
def test_segments_that_nobody_recorded_are_put_where_none_stands(name: str, share: float, conf: str, part: int) -> None:
    """A recorded one reaches beyond what those before it showed of the driver's region, into the next."""
    tape, own = late_tape(name, share)
    free = replace(own, conf=conf, limit=None, memory_fraction=None, capacity=own.capacity // part)
    watched = Watched(tape, free, every=397)
    assert_agrees(watched)
    d = watched.replay.trace.decisions
    assert d is not None
    standing: dict[int, int] = {}
    for kind, addr, size in zip(d.kind.tolist(), d.addr.tolist(), d.size.tolist(), strict=True):
        if kind == DecisionKind.SEGMENT_ALLOC:
            assert all(addr + size <= other or other + length <= addr for other, length in standing.items())
            standing[addr] = size
        elif kind == DecisionKind.SEGMENT_FREE:
            del standing[addr]


@pytest.mark.parametrize("name", ["train_vit-default", "confs/graphs-expandable"])
def test_a_measured_phase_of_a_late_recording_has_the_models_figures(name: str) -> None:
    late = late_part(name, pickled(name), 0.5)
    made = replay(with_phase(late, 10), own_settings(late))
    line = timeline(made.trace)
    assert line.measured is not None
    assert made.measured is not None
    for counter in COUNTERS:
        assert getattr(line.at(line.measured.start), counter) == getattr(made.measured.base, counter), counter
        assert getattr(line.peak(line.measured), counter) == getattr(made.measured.peak, counter), counter
        assert getattr(line.at(-1), counter) == getattr(made.measured.end, counter), counter


# --- programs -----------------------------------------------------------------------------------------------------


class PoolsMadeFirst(Program):
    """A program that takes memory of private pools only while they have users, and opens no scopes."""

    def alloc(self, size: int, choice: int) -> None:
        pool = (0, 0, 1, 2)[choice // 4 % 4]
        pool = pool if self.users.get(pool) else 0
        if self.driven.alloc(self.next_id, size, (0, 0, 0x5100, 0x5200)[choice % 4], pool):
            self.live.append(self.next_id)
        self.next_id += 1

    def pool(self, size: int, choice: int) -> None:
        pool = 1 + choice % 2
        if choice // 2 % 3:
            self.driven.create_pool(pool)
            self.users[pool] += 1
        else:
            self.release(pool)


kinds = st.sampled_from(["alloc", "alloc", "alloc", "alloc", "free", "free", "free", "use", "done", "empty", "pool"])
programs = st.lists(st.tuples(kinds, sizes, st.integers(0, 255)), min_size=30, max_size=120)


def half_recorded(torch: str, conf: str, capacity: int, program: Any, share: float) -> tuple[Driven, int, Trace, int]:
    """An allocator after a program, the row of its second part, that part as a late Trace and where it begins there."""
    made = Driven(torch, 512 * MIB, capacity * MIB, conf)
    doing = PoolsMadeFirst(made, scopes=True)
    made.alloc(-2 + 10**6, 3 * MIB)  # so that something stands
    at, stood, users = 0, (), dict(doing.users)
    for number, (kind, size, choice) in enumerate(program):
        if number == int(len(program) * share):
            at, stood, users = len(made.now), as_recorded(made.allocator.segments()), dict(doing.users)
        getattr(doing, kind)(size, choice)
    made.empty_cache()
    return made, at, *cut(made, at, stood, users)


@given(releases, confs, st.sampled_from([70, 130, 480]), programs, st.floats(0.1, 0.9))
@settings(max_examples=60, deadline=None)
def test_counters_from_the_middle_of_a_program_on_are_those_of_the_allocator_that_ran_all_of_it(
    torch: str, conf: str, capacity: int, program: Any, share: float
) -> None:
    made, at, late, before = half_recorded(torch, conf, capacity, program, share)
    assert_counters(late, made.now[at - 1 :], before - 1)
    made.look()
    assert layout(late, len(late.requests) - 1) == as_recorded(made.allocator.segments())


@given(releases, confs, confs, st.sampled_from([70, 480]), programs, st.floats(0.1, 0.9))
@settings(max_examples=60, deadline=None)
def test_replays_from_the_middle_of_a_program_on_have_the_models_counters(
    torch: str, conf: str, other: str, capacity: int, program: Any, share: float
) -> None:
    _, _, late, _ = half_recorded(torch, conf, capacity, program, share)
    asked = ReplaySettings(rules_for(torch), "card", 512 * MIB, capacity * MIB, conf=other)
    assert_agrees(Watched(late, asked, every=7))


@given(releases, confs, programs, st.sampled_from([(40, 70), (7, 11)]))
@settings(max_examples=20, deadline=None)
def test_the_areas_of_a_late_memory_map_add_up_to_the_counters(
    torch: str, conf: str, program: Any, shape: tuple[int, int]
) -> None:
    _, _, late, _ = half_recorded(torch, conf, 480, program, 0.5)
    rows = slice(late.requests.start_rows - 1, len(late.requests))
    line, lives = timeline(late), lifetimes(late)
    ranges = address_ranges(lives, rows)
    canvas = Canvas(ranges, rows, rows.start, ranges.extent / shape[0], shape[1])
    shares = cell_shares(lives, canvas)
    cell = canvas.bytes_per_cell * canvas.events_per_cell
    sums: dict[str, Any] = {name: getattr(shares, name).sum() * cell for name in ("reserved", "stranded", "pool_idle")}
    sums["active"] = (shares.base + shares.phase).sum() * cell
    largest = line.reserved.max() * len(late.requests)
    for counter, area in sums.items():
        assert area == pytest.approx(getattr(line, counter)[rows].sum(), abs=1e-9 * largest), counter


# --- the page -----------------------------------------------------------------------------------------------------


def test_a_page_shows_a_late_recording_from_what_stood_on(tmp_path: Path) -> None:
    late = late_part("confs/graphs-default", pickled("confs/graphs-default"), 0.4)
    told = late.requests.start_rows
    made = replay(late, own_settings(late))
    write_trace(made.trace, tmp_path / "late.fscope")
    case = case_of(replace(made, measured=made.whole), trace="late.fscope")
    opened = open_recording(case, tmp_path)
    assert isinstance(opened, Recording)
    assert opened.events == len(late.requests) - told
    standing = sum(size for s in late.initial for _, size, state in s.blocks if state != "free")
    assert opened.timeline.allocated[opened.rows][0] == case.base == standing
    shown = raster(opened, map_scale([opened]))
    assert shown.canvas.rows == slice(told - 1, len(late.requests))
    first = set(np.unique(shown.cells[:, 0]).tolist())
    assert first & {CellState.BASE, CellState.BASE_WITH_HOLES}
    assert not first & {CellState.PHASE, CellState.PHASE_WITH_HOLES}
    write_html(results_of([case]), tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "No phase is marked" in page
    assert "dotted line" not in page


# --- by hand ------------------------------------------------------------------------------------------------------


def begun_with(*stood: SegmentState, pools: Sequence[int] = (), then: Sequence[tuple[int, ...]]) -> Trace:
    """A replay of a recording on an H100 that began with segments.

    Args:
        stood: ids of their blocks are 0, 1, ... in address order.
        pools: private ones.
        then: kind, id and size of the requests, and their pool if it is a private one.
    """
    log = RequestLog()
    log.append(RequestKind.START)
    for pool in pools:
        log.append(RequestKind.POOL_CREATE, pool=pool)
    held = [(s, size) for s in stood for _, size, state in s.blocks if state != "free"]
    for id_, (s, size) in enumerate(held):
        log.append(RequestKind.HELD, id=id_, size=size, stream=s.stream, pool=s.pool)
    for kind, id_, size, *pool in then:
        log.append(RequestKind(kind), id=id_, size=size, pool=sum(pool))
    names = ((0, 0), *((0, pool) for pool in pools))
    trace = Trace(log.finish(), pools=names, initial=stood, card=CARD.name, device_total=CARD.total)
    conf = "expandable_segments:True"
    return replay(trace, ReplaySettings(rules_for("2.11"), CARD.name, CARD.total, CARD.free, conf=conf)).trace


def test_what_stood_is_there_from_the_first_event_on_and_never_was_less() -> None:
    """20 MiB with blocks of 5 and 14 MiB: 1 MiB is stranded, not the 15 MiB beside the first block alone."""
    blocks = ((BASE, 5 * MIB, "allocated"), (BASE + 5 * MIB, MIB, "free"), (BASE + 6 * MIB, 14 * MIB, "allocated"))
    trace = begun_with(
        SegmentState(BASE, 20 * MIB, 0, 0, blocks), then=[(RequestKind.FREE, 1, 0), (RequestKind.FREE, 0, 0)]
    )
    line = timeline(trace)
    assert line.reserved.tolist() == [20 * MIB] * 5
    assert line.allocated.tolist() == [19 * MIB] * 3 + [5 * MIB, 0]
    assert line.stranded.tolist() == [MIB] * 3 + [15 * MIB, 0]
    assert line.releasable.tolist() == [0] * 4 + [20 * MIB]
    assert line.peak(slice(0, 3)).stranded == MIB
    assert line.peak(slice(0, 3)).releasable == 0


def test_idle_memory_of_a_private_pool_that_stood_is_kept_by_it() -> None:
    blocks = ((BASE, 5 * MIB, "allocated"), (BASE + 5 * MIB, 15 * MIB, "free"))
    trace = begun_with(SegmentState(BASE, 20 * MIB, 0, 1, blocks), pools=[1], then=[(RequestKind.FREE, 0, 0)])
    line = timeline(trace)
    assert line.pool_idle.tolist() == [15 * MIB] * 3 + [20 * MIB]
    assert line.peak().stranded == line.peak().releasable == 0
    assert [s.held for s in layout_at(trace, 0)] == [True]


def test_a_pool_that_stood_is_forgotten_once_it_is_released_and_empty() -> None:
    """The allocation that comes then makes it anew, with a user (get_pool in c10/cuda/CUDACachingAllocator.cpp)."""
    blocks = ((BASE, 10 * MIB, "allocated"), (BASE + 10 * MIB, 10 * MIB, "allocated"))
    then = [
        (RequestKind.FREE, 0, 0), (RequestKind.FREE, 1, 0), (RequestKind.POOL_RELEASE, -1, 0, 1),
        (RequestKind.EMPTY_CACHE, -1, 0), (RequestKind.ALLOC, 2, 5 * MIB, 1), (RequestKind.FREE, 2, 0),
    ]  # fmt: skip
    line = timeline(begun_with(SegmentState(BASE, 20 * MIB, 0, 1, blocks), pools=[1], then=then))
    first = [0, 0, 0, 0, 10 * MIB, 20 * MIB, 0, 0]
    assert line.pool_idle.tolist() == [*first, 15 * MIB, 20 * MIB]
    assert line.releasable.tolist() == [0, 0, 0, 0, 0, 0, 20 * MIB, 0, 0, 0]


def test_idle_memory_alone_is_releasable_from_the_first_event_on() -> None:
    idle = SegmentState(BASE, 60 * MIB, 0, 0, ((BASE, 60 * MIB, "free"),), 20 * MIB)
    line = timeline(begun_with(idle, then=[(RequestKind.EMPTY_CACHE, -1, 0)]))
    assert line.releasable.tolist() == [60 * MIB, 0]
    assert line.peak().releasable == line.peak().reserved == 60 * MIB


def test_pages_count_from_where_the_mapped_range_begins_and_have_the_size_that_they_had() -> None:
    """Pages of 12 MiB from BASE + 12 on: of 36 MiB the block reaches 1 MiB into the second."""
    at = BASE + 12 * MIB
    blocks = ((at, 13 * MIB, "allocated"), (at + 13 * MIB, 23 * MIB, "free"))
    trace = begun_with(SegmentState(at, 36 * MIB, 0, 0, blocks, 12 * MIB), then=[(RequestKind.EMPTY_CACHE, -1, 0)])
    line = timeline(trace)
    assert line.stranded.tolist() == [11 * MIB] * 3
    assert line.releasable.tolist() == [12 * MIB, 12 * MIB, 0]


def test_a_range_of_which_lower_pages_are_mapped_later_is_one_segment() -> None:
    """The block of 44 MiB lies across a page that was mapped below what stood."""
    at = BASE + 20 * MIB
    idle = SegmentState(at, 40 * MIB, 0, 0, ((at, 40 * MIB, "free"),), 20 * MIB)
    made = begun_with(idle, then=[(RequestKind.ALLOC, 0, 44 * MIB)])
    assert made.decisions is not None
    moved = made.decisions.addr.copy()
    mapped = (made.decisions.kind == DecisionKind.SEGMENT_MAP) & (made.decisions.request == 1)
    moved[mapped] = BASE
    moved[made.decisions.kind == DecisionKind.ALLOC] = BASE
    lower = replace(made, decisions=replace(made.decisions, addr=moved))
    (segment,) = layout_at(lower, 1)
    assert (segment.base, segment.size, segment.active, segment.stranded) == (BASE, 60 * MIB, 44 * MIB, 16 * MIB)
    assert timeline(lower).stranded.tolist() == [0, 16 * MIB]


def test_memory_that_is_not_whole_pages_away_from_what_stood_is_another_segment() -> None:
    idle = SegmentState(BASE, 12 * MIB, 0, 0, ((BASE, 12 * MIB, "free"),), 12 * MIB)
    made = begun_with(idle, then=[(RequestKind.ALLOC, 0, 40 * MIB)])
    assert made.decisions is not None
    d, other = made.decisions, BASE + 30 * MIB
    mapped = (d.kind == DecisionKind.SEGMENT_MAP) & (d.request == 1)
    addr, size = d.addr.copy(), d.size.copy()
    addr[mapped | (d.kind == DecisionKind.ALLOC)], size[mapped] = other, 40 * MIB
    layout = layout_at(replace(made, decisions=replace(d, addr=addr, size=size)), 1)
    assert [(s.base, s.size, s.page) for s in layout] == [(BASE, 12 * MIB, 12 * MIB), (other, 40 * MIB, 20 * MIB)]


def test_decisions_of_a_start_that_shows_no_such_memory_are_refused() -> None:
    idle = SegmentState(BASE, 20 * MIB, 0, 0, ((BASE, 20 * MIB, "free"),), 20 * MIB)
    trace = begun_with(idle, then=[(RequestKind.EMPTY_CACHE, -1, 0)])
    with pytest.raises(InputFileError, match="decision 0 maps what did not stand when recording began"):
        timeline(replace(trace, initial=(replace(idle, addr=BASE + 20 * MIB),)))
