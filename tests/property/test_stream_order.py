"""Vector clocks against the definition: two accesses are ordered if a chain of edges leads from one to the other."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragscope.record.virtual.extent import Extent, extent_of, share_a_byte
from fragscope.record.virtual.ordering import LEGACY, Ordering

POOL = (10, 11)  # streams that do not wait for the default stream
BLOCKING = (20,)
STREAMS = (LEGACY, *POOL, *BLOCKING)


class ByDefinition:
    """Every command is a node; ``before[n]`` holds all nodes that come before node n."""

    def __init__(self) -> None:
        self.before: list[set[int]] = []
        self.last: dict[int, int] = {}
        self.host: set[int] = set()

    def command(self, stream: int, after: tuple[int, ...] = ()) -> int:
        direct = {*self.host, *after}
        for other in (stream, *(BLOCKING if stream == LEGACY else (LEGACY,) if stream in BLOCKING else ())):
            if other in self.last:
                direct.add(self.last[other])
        self.before.append(direct.union(*(self.before[n] for n in direct)))
        self.last[stream] = len(self.before) - 1
        return self.last[stream]


def bytes_of(extent: Extent) -> set[int]:
    out = {extent.start + i for i in range(extent.run)}
    for stride, count in extent.steps:
        out = {b + stride * i for b in out for i in range(count)}
    return out


def some_extent(choices: random.Random) -> Extent:
    if choices.random() < 0.7:
        start = choices.randint(0, 12)
        length = choices.randint(1, 8)
        return Extent(start, start + length, length)
    made = extent_of(choices.randint(0, 8), (choices.randint(2, 4), choices.randint(1, 2)), (4, 1), 1)
    assert made is not None
    return made


@pytest.mark.parametrize(("cells", "views"), [(64, 64), (1, 64), (1, 1)])
@settings(max_examples=400)
@given(seed=st.integers(0, 2**32), work=st.sampled_from([0.35, 0.6]))
def test_an_access_is_reported_if_and_only_if_nothing_orders_it(cells: int, views: int, seed: int, work: float) -> None:
    """Joining cells loses nothing; views that are not told apart may be reported in vain, and none is missed."""
    with pytest.MonkeyPatch.context() as limits:
        limits.setattr("fragscope.record.virtual.shadow._CELLS", cells)
        limits.setattr("fragscope.record.virtual.shadow._VIEWS", views)
        follow_both(seed, work, exact=views == 64)


def follow_both(seed: int, work: float, *, exact: bool) -> None:
    choices = random.Random(seed)
    ordering, truth = Ordering(), ByDefinition()
    for handle in POOL:
        ordering.independent(handle)
    events = []
    accesses: list[tuple[int, set[int], bool]] = []
    for _ in range(choices.randint(5, 40)):
        stream = choices.choice(STREAMS)
        action = choices.random()
        if action < work:
            extent, writes = some_extent(choices), choices.random() < 0.5
            touched, reported = [(0, extent)], ordering.pairs
            ordering.launch(stream, "kernel", None, [] if writes else touched, touched if writes else [])
            node = truth.command(stream)
            unordered = any(
                (writes or wrote) and not covered.isdisjoint(bytes_of(extent)) and other not in truth.before[node]
                for other, covered, wrote in accesses
            )
            assert (ordering.pairs > reported) == unordered or (not exact and not unordered)
            accesses.append((node, bytes_of(extent), writes))
            continue
        action = (action - work) / (1 - work)
        if action < 0.3:
            events.append((ordering.record(stream), truth.command(stream)))
        elif action < 0.7 and events:
            clock, node = choices.choice(events)
            ordering.wait(stream, clock)
            truth.command(stream, (node,))
        elif action < 0.8 and events:
            clock, node = choices.choice(events)
            ordering.host_waits(clock)
            truth.host.add(node)
        elif action < 0.95:
            ordering.host_waits_for_stream(stream)
            if stream in truth.last or stream == LEGACY:
                truth.host.add(truth.command(stream))
        else:
            ordering.host_waits_for_all()
            truth.host |= set(truth.last.values())


@settings(max_examples=400)
@given(st.integers(0, 2**32))
def test_extents_are_the_bytes_of_their_tensors_and_share_one_where_those_do(seed: int) -> None:
    choices = random.Random(seed)
    extents = []
    for _ in range(2):
        rank, start, itemsize = choices.randint(0, 3), choices.randint(0, 40), choices.choice([1, 2, 4])
        shape = [choices.randint(1, 4) for _ in range(rank)]
        strides = [choices.choice([0, 1, 2, 3, 4, 6, 8, 12]) for _ in range(rank)]
        starts = {start}
        for count, stride in zip(shape, strides, strict=True):
            starts = {s + stride * itemsize * i for s in starts for i in range(count)}
        extent = extent_of(start, shape, strides, itemsize)
        assert extent is not None
        assert bytes_of(extent) == {s + i for s in starts for i in range(itemsize)}
        assert (extent.start, extent.end) == (min(bytes_of(extent)), max(bytes_of(extent)) + 1)
        extents.append(extent)
    assert share_a_byte(*extents) == (not bytes_of(extents[0]).isdisjoint(bytes_of(extents[1])))


class Watched:
    """Which memory a program touched when, by its own account."""

    def __init__(self) -> None:
        self.truth = ByDefinition()
        self.accesses: list[tuple[int, range, bool]] = []
        self.hazard = False

    def touch(self, stream: int, reads: list[Any], writes: list[Any]) -> None:
        node = self.truth.command(stream)
        now = [(range(t.data_ptr(), t.data_ptr() + t.nbytes), False) for t in reads]
        now += [(range(t.data_ptr(), t.data_ptr() + t.nbytes), True) for t in writes]
        for covered, writes_it in now:
            self.hazard |= any(
                (writes_it or wrote)
                and covered.start < other.stop
                and other.start < covered.stop
                and earlier not in self.truth.before[node]
                for earlier, other, wrote in self.accesses
            )
        self.accesses += [(node, covered, wrote) for covered, wrote in now]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0]))
def test_programs_on_the_virtual_device_are_followed_address_by_address(seed: int, care: float) -> None:
    """Tensors come, go and are reused on several streams; ``care`` is how often a program orders what it does."""
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
    from virtual_cards import h100

    choices = random.Random(seed)
    watched = Watched()
    with h100() as device:
        device.memory.begin_phase("measure")
        streams = {LEGACY: torch.cuda.default_stream(), 1: torch.cuda.Stream(), 2: torch.cuda.Stream()}
        live: list[tuple[Any, set[int]]] = []

        def orders(stream: int, others: set[int]) -> None:
            for other in sorted(others - {stream}):
                if choices.random() < care:
                    streams[stream].wait_stream(streams[other])
                    watched.truth.command(stream, (watched.truth.command(other),))

        for _ in range(30):
            stream = choices.choice(sorted(streams))
            action = choices.random()
            with torch.cuda.stream(streams[stream]):
                if action < 0.35 or not live:
                    made = torch.empty(choices.choice([512, 2**20, 3 * 2**20]), dtype=torch.uint8, device="cuda")
                    made.zero_()
                    watched.touch(stream, [], [made])
                    live.append((made, {stream}))
                    del made
                elif action < 0.75:
                    x, users = choices.choice(live)
                    orders(stream, users)
                    users.add(stream)
                    if choices.random() < 0.5:
                        x.add_(1)
                        watched.touch(stream, [], [x])
                    else:
                        y = x.clone()
                        watched.touch(stream, [x], [y])
                        live.append((y, {stream}))
                        del y
                    del x
                elif action < 0.95:
                    x, users = live.pop(choices.randrange(len(live)))
                    for user in sorted(users):
                        if choices.random() < care:
                            x.record_stream(streams[user])
                    del x
                else:
                    torch.cuda.synchronize()
                    watched.truth.host |= set(watched.truth.last.values())
        assert bool(device.memory.ordering.hazards) == watched.hazard
        if care == 1.0:
            assert not watched.hazard
        live.clear()
