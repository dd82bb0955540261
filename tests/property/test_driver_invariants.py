"""Where the driver puts segments: nothing overlaps, whatever mix of given and modelled addresses there is."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fragscope.allocator.engine import driver, tables
from fragscope.allocator.engine.blocks import drop_segment, new_segment
from fragscope.allocator.engine.state import ALLOCS, DEPARTED, REGIONS, SEG_ADDR, SEG_FIRST, SPARE_HOLES

MIB = 2**20
PAGE = 2 * MIB  # all that the driver hands out is a multiple of it
NEAR = driver.ANY_TOP // PAGE - 400
sizes = st.sampled_from([2, 2, 4, 12, 20, 20, 30, 34, 64, 100, 414, 512]).map(lambda n: n * MIB)
addresses = st.one_of(
    st.integers(NEAR, NEAR + 700).map(lambda n: n * PAGE),  # where modelled segments are
    st.integers(driver.RANGES // PAGE, driver.RANGES // PAGE + 4000).map(lambda n: n * PAGE),  # where ranges are
)
given_addresses = st.one_of(st.none(), addresses)


class Places(RuleBasedStateMachine):
    """The model's driver by itself: segments and address ranges with a size and no blocks."""

    @initialize(process=st.one_of(st.none(), st.tuples(st.sampled_from([-1, 0, 3, 9]), st.integers(-16, 12))))
    def start(self, process: tuple[int, int] | None) -> None:
        self.state = tables.new_state(1, 1, compiled=False)
        self.is_bare = process is None
        if process is not None:
            move_at, units = process
            driver.begin_process(self.state, driver.ANY_TOP + units * driver.REGION, move_at)
        self.standing: list[tuple[int, int, int, bool]] = []  # address, bytes, column, whether it is expandable

    @rule(size=sizes, addr=given_addresses)
    def place(self, size: int, addr: int | None) -> None:
        self.state.n[ALLOCS] += 1
        self.state = tables.with_given(self.state, [] if addr is None else [(addr, size)], [])
        self.state.n[DEPARTED] = 0
        segment = new_segment(self.state, size, 0, 1, 0)
        is_free = addr is not None and all(addr + size <= at or at + n <= addr for at, n, _, _ in self.standing)
        placed = driver.place_segment(self.state, size)
        assert (placed == addr) or not is_free
        assert placed % PAGE == 0
        self._stands(segment, placed, size, expandable=False)

    @rule(size=sizes, addr=given_addresses, pages=st.integers(1, 40))
    def place_range(self, size: int, addr: int | None, pages: int) -> None:
        reserved = size + pages * 20 * MIB
        self.state = tables.with_given(self.state, [], [] if addr is None else [addr])
        modelled = driver.place_range(self.state, reserved)
        segment = new_segment(self.state, reserved, 0, 1, 20 * MIB)
        self.state.t[SEG_ADDR][segment] = modelled
        self.state.t[SEG_FIRST][segment] = 0
        self._stands(segment, driver.place_first_mapping(self.state, segment), reserved, expandable=True)

    def _stands(self, segment: int, addr: int, size: int, *, expandable: bool) -> None:
        self.state.t[SEG_ADDR][segment] = addr
        self.state.t[SEG_FIRST][segment] = 0
        self.standing.append((addr, size, segment, expandable))

    @precondition(lambda self: self.standing)
    @rule(which=st.floats(0, 0.999))
    def remove(self, which: float) -> None:
        _, _, segment, expandable = self.standing.pop(int(which * len(self.standing)))
        if not expandable:
            driver.remove_segment(self.state, segment)
        drop_segment(self.state, segment)

    @invariant()
    def nothing_overlaps(self) -> None:
        end = 0
        for addr, size, _, _ in sorted(self.standing):
            assert addr >= end, "two segments at one address"
            end = addr + size

    def teardown(self) -> None:
        """When all is gone the driver holds what it held before anything was there."""
        while self.standing:
            self.remove(0.0)
        if self.is_bare:
            assert self.state.n[REGIONS] == 0
            assert self.state.n[SPARE_HOLES] == tables.new_state(1, 1, compiled=False).n[SPARE_HOLES]


TestPlaces = Places.TestCase
TestPlaces.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
