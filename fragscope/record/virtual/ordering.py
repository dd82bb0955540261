"""Whether work on different streams that touches the same memory has an order. Knows no torch.

A card runs the work of one stream in order and that of different streams in any, unless events or the host order them.
Two accesses of the same memory, at least one of them a write, without such an order are a *hazard*: results depend on
who comes first. It is found whether or not it would strike: every stream and the host have a vector clock, and an
access is held against the last ones of the same memory.

Order comes from: the place in a stream; an event that another stream or the host waits for; the host that waits for a
stream or for all, since it launches all later work; and the legacy default stream, which waits for all *blocking*
streams and they for it. Streams that torch makes are not blocking: they are created with ``cudaStreamNonBlocking``
(c10/cuda/CUDAStream.cpp).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from fragscope.record.virtual.extent import Extent
from fragscope.record.virtual.shadow import Access, Clock, Place, Shadow

LEGACY = 0
"""Handle of the legacy default stream."""
_LEGACY_ALIAS = 1
"""``cudaStreamLegacy``, another name of it in driver_types.h."""

_SHOWN = 20
"""Hazards at different places that are kept; all are counted."""

_KEPT = 50_000
"""Launches kept aside while there is one stream, some 40 MB."""

_Touched = Sequence[tuple[int, Extent]]


@dataclass(frozen=True, slots=True)
class Hazard:
    """Two accesses of the same memory that nothing orders; at least one writes.

    Attributes:
        first, second: in the order the program launched them.
        streams: names of both streams.
    """

    first: Access
    second: Access
    streams: tuple[str, str]

    @property
    def reused(self) -> bool:
        """Whether the second belongs to another allocation, which was given the memory of the first."""
        return self.first.owner != self.second.owner

    def __str__(self) -> str:
        first, second = (
            f"{a.what} ({f'{a.where[0]}:{a.where[1]}, ' if a.where else ''}on {stream})"
            for a, stream in zip((self.first, self.second), self.streams, strict=True)
        )
        verb, object_ = ("writes" if a.writes else "reads" for a in (self.second, self.first))
        text = f"{second} {verb} memory that {first} {object_}, and nothing orders them"
        return f"{text}; it was freed and given to another tensor between" if self.reused else text


class Ordering:
    """Follows the order of all work and finds hazards.

    Streams are named by their handles; those that ``independent`` does not know are blocking.

    Attributes:
        hazards: the first of each pair of places.
        pairs: hazards in all: pairs of an access and the last one of a stream before it that it has no order with.
    """

    def __init__(self) -> None:
        self.hazards: list[Hazard] = []
        self.pairs = 0
        self._independent: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._numbers: dict[int, int] = {}
        self._clocks: list[Clock] = []
        self._blocking: list[int] = []
        self._host: Clock = []
        self._shadow = Shadow()
        self._places: set[tuple[object, ...]] = set()
        self._alone: list[tuple[str, Place | None, int, _Touched, _Touched]] = []  # work of the first stream

    def begin(self) -> None:
        """Forget all work so far, as if the host had waited for it."""
        self._begin()
        self.hazards.clear()
        self.pairs = 0

    def summary(self) -> str:
        """The first hazard, and how many there are; empty where there is none."""
        if not self.hazards:
            return ""
        counts = ((self.pairs, "such pair"), (len(self._places), "place"))
        pairs, places = (f"{count:,} {word}{'s' if count > 1 else ''}" for count, word in counts)
        return f"{self.hazards[0]}; {pairs} at {places}"

    def independent(self, handle: int) -> None:
        """A stream was created with ``cudaStreamNonBlocking``."""
        self._independent.add(handle)

    # --- work -----------------------------------------------------------------------------------------------------

    def launch(self, handle: int, what: str, where: Place | None, reads: _Touched, writes: _Touched) -> None:
        """Work on a stream reads and writes memory: lifetime ids of allocations, and bytes by their addresses."""
        stream = self._command(handle)
        clock = self._clocks[stream]
        clock[stream] += 1
        if len(self._clocks) == 1:
            # Nobody to race with yet, and mostly there never is: all that is needed later is kept, and no more done.
            self._alone.append((what, where, clock[stream], reads, writes))
            if len(self._alone) >= _KEPT:
                self._catch_up()
            return
        self._catch_up()
        self._touch(what, where, stream, clock[stream], reads, writes)

    def _catch_up(self) -> None:
        if self._alone:
            alone, self._alone = self._alone, []
            for what, where, tick, reads, writes in alone:
                self._touch(what, where, 0, tick, reads, writes)

    def _touch(self, what: str, where: Place | None, stream: int, tick: int, reads: _Touched, writes: _Touched) -> None:
        clock = self._clocks[stream]
        for accesses, write in ((reads, False), (writes, True)):
            for owner, extent in accesses:
                access = Access(what, where, stream, tick, owner, extent, write)
                earlier = self._shadow.touch(access, clock)
                if earlier:
                    self._found(earlier, access)

    def freed(self, start: int, end: int, handles: Iterable[int]) -> None:
        """Memory was freed that the allocator hands out no sooner than the work so far on these streams is over."""
        over: Clock = []
        for handle in handles:
            if _one_name(handle) in self._numbers:
                _join(over, self.record(handle))
        if over:
            self._catch_up()
            self._shadow.forget(Extent(start, end, end - start), over)

    # --- order ----------------------------------------------------------------------------------------------------

    def record(self, handle: int) -> Clock:
        """What is over when an event recorded now on a stream is."""
        return list(self._clocks[self._command(handle)])

    def wait(self, handle: int, event: Clock) -> None:
        """A stream waits for an event."""
        _join(self._clocks[self._command(handle)], event)

    def host_waits(self, event: Clock) -> None:
        """The host waits for an event."""
        _join(self._host, event)

    def host_waits_for_stream(self, handle: int) -> None:
        """The host waits for all work of a stream."""
        if _one_name(handle) in self._numbers or _one_name(handle) == LEGACY:
            _join(self._host, self._clocks[self._command(handle)])

    def host_waits_for_all(self, besides: Set[int] = frozenset()) -> None:
        """The host waits for the card, or for all of its streams but some."""
        for handle, number in self._numbers.items():
            if handle not in besides:
                _join(self._host, self._clocks[number])

    # --- inside ---------------------------------------------------------------------------------------------------

    def _command(self, handle: int) -> int:
        """The number of a stream that is given a command; it comes after what the host waited for."""
        handle = _one_name(handle)
        number = self._numbers.get(handle)
        if number is None:
            number = self._numbers[handle] = len(self._clocks)
            self._clocks.append([0] * (number + 1))
            if handle not in self._independent and handle != LEGACY:
                self._blocking.append(number)
        clock = self._clocks[number]
        if self._host:
            _join(clock, self._host)
        if handle == LEGACY:
            for other in self._blocking:
                _join(clock, self._clocks[other])
        elif number in self._blocking and LEGACY in self._numbers:
            _join(clock, self._clocks[self._numbers[LEGACY]])
        return number

    def _found(self, earlier: list[Access], access: Access) -> None:
        for first in earlier:
            self.pairs += 1
            place = (first.what, first.where, first.stream, access.what, access.where, access.stream)
            if place in self._places:
                continue
            self._places.add(place)
            if len(self.hazards) < _SHOWN:
                self.hazards.append(Hazard(first, access, (self._name(first.stream), self._name(access.stream))))

    def _name(self, stream: int) -> str:
        if self._numbers.get(LEGACY) == stream:
            return "the default stream"
        others = [number for handle, number in self._numbers.items() if handle != LEGACY]
        return f"stream {others.index(stream) + 1}"


def _one_name(handle: int) -> int:
    return LEGACY if handle == _LEGACY_ALIAS else handle


def _join(clock: Clock, other: Clock) -> None:
    """The later of both."""
    if len(other) > len(clock):
        clock.extend([0] * (len(other) - len(clock)))
    for position, tick in enumerate(other):
        clock[position] = max(clock[position], tick)
