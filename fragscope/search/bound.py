"""How little memory a trace's requests could have needed at best: a lower bound, and a packing that comes close to it.

Between the two lies what any allocator could reach that hands out contiguous ranges of one address space and knows the
future. Segments of an ordinary caching allocator stay where they are and with their stream, so it cannot always reach
that; expandable segments come closer. What the bound does not say: that some conf reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fragscope.allocator import Tape, caught_of
from fragscope.allocator.engine.sizes import MIN_BLOCK, SMALL_SIZE
from fragscope.search.packing import Ints, Lives, Packed, pack
from fragscope.trace import RequestKind
from fragscope.units import MIB

PAGE = 2 * MIB  # what the driver gives memory in


@dataclass(frozen=True, slots=True)
class Bound:
    """The best reserved bytes for a trace's requests; bytes.

    Attributes:
        allocations: requests for memory that count.
        left_out: requests that failed when recorded and that the program got over; they are not counted.
        event: the first event at which most bytes were live.
        live: those bytes, each request rounded up to 512 B; freed memory counts until other streams are done with it.
        lower: ``live`` in whole pages of 2 MiB: no allocator needs less, whatever it shares and moves.
        lower_apart: the same where streams, pools and size classes share no page at the same time, as in PyTorch, but
            pages can go from one to another at any time.
        lower_kept: the same where no page ever goes from one to another, as in PyTorch as long as it returns nothing.
        packed: a range of this many bytes, in whole pages, holds all requests at once without moving one.
        packing: where each lies, and what was tried.
        lives: what was packed.
        rows: int64, shape ``(allocations,)``: the request row of each life.
    """

    allocations: int
    left_out: int
    event: int
    live: int
    lower: int
    lower_apart: int
    lower_kept: int
    packed: int
    packing: Packed
    lives: Lives
    rows: Ints

    @property
    def gap(self) -> int:
        """Bytes between the lower bound and the packing: the best lies there."""
        return self.packed - self.lower

    @property
    def gap_percent(self) -> float:
        """The gap as a share of the lower bound."""
        return 100.0 * self.gap / self.lower if self.lower else 0.0


def bound(tape: Tape, budget: float = 20.0) -> Bound:
    """The best reserved bytes for a trace's requests.

    Args:
        tape: the requests.
        budget: about how many seconds the packing may take on a common core; the same budget gives the same answer
            everywhere. 100,000 allocations take about 10 s for each heuristic.
    """
    lives, rows, place, left_out = _lives(tape)
    change = np.zeros(len(tape.kind) + 1, dtype=np.int64)
    np.add.at(change, lives.start, lives.size)
    np.add.at(change, lives.end, -lives.size)
    now = np.cumsum(change)
    live = int(now.max(initial=0))
    together = np.zeros(len(change), dtype=np.int64)
    kept = 0
    for group in range(int(place.max(initial=-1)) + 1):
        here = place == group
        change = np.zeros(len(change), dtype=np.int64)
        np.add.at(change, lives.start[here], lives.size[here])
        np.add.at(change, lives.end[here], -lives.size[here])
        pages = -(-np.cumsum(change) // PAGE)
        together += pages
        kept += int(pages.max(initial=0))
    lower = _in_pages(live)
    packed = pack(lives, lower, budget)
    return Bound(
        allocations=len(lives),
        left_out=left_out,
        event=int(now.argmax()) if len(lives) else -1,
        live=live,
        lower=lower,
        lower_apart=int(together.max(initial=0)) * PAGE,
        lower_kept=kept * PAGE,
        packed=_in_pages(packed.best.height),
        packing=packed,
        lives=lives,
        rows=rows,
    )


def _lives(tape: Tape) -> tuple[Lives, Ints, Ints, int]:
    """What lived when, in rows of requests.

    Returns:
        The lives, their request rows, the number of the stream, pool and size class each belongs to, and how many
        requests are left out.
    """
    kind, ids, rows = tape.kind, tape.id, np.arange(len(tape.kind))
    caught, _ = caught_of(tape.trace, tape.failed)
    begins = (kind == RequestKind.ALLOC) | (kind == RequestKind.HELD)
    begins[caught] = False
    born = np.flatnonzero(begins)
    end = _ends(tape, born)[ids[born]]
    size = np.maximum(1, -(-tape.size[born] // MIN_BLOCK)) * MIN_BLOCK
    key = np.stack([tape.stream[born], tape.pool[born], (size > SMALL_SIZE).astype(np.int64)])
    _, place = np.unique(key, axis=1, return_inverse=True)
    assert bool(np.all(np.diff(rows[born]) > 0))
    return Lives(born.astype(np.int64), end, size), born, place.reshape(-1), len(caught)


def _ends(tape: Tape, born: Ints) -> Ints:
    """By id, the row from which on its memory can be used again: the free, or when other streams were done with it."""
    kind, ids, never = tape.kind, tape.id, len(tape.kind)
    end = np.full(tape.allocations + 1, never, dtype=np.int64)
    freed = np.flatnonzero(kind == RequestKind.FREE)
    end[ids[freed]] = freed
    stream = np.full(tape.allocations + 1, -1, dtype=np.int64)
    stream[ids[born]] = tape.stream[born]
    uses = np.flatnonzero(kind == RequestKind.RECORD_STREAM)
    foreign = uses[tape.stream[uses] != stream[ids[uses]]]
    waiting = np.unique(ids[foreign[foreign < end[ids[foreign]]]])
    done = np.full(tape.allocations + 1, never, dtype=np.int64)
    completed = np.flatnonzero(kind == RequestKind.USES_DONE)
    done[ids[completed]] = completed
    waits = np.flatnonzero((kind == RequestKind.EMPTY_CACHE) & (tape.pool == 0))  # it waits for all streams
    after = np.append(waits, never)[np.searchsorted(waits, end[waiting])]
    end[waiting] = np.maximum(end[waiting], np.minimum(done[waiting], after))
    begun = np.zeros(tape.allocations + 1, dtype=np.int64)
    begun[ids[born]] = born
    return np.maximum(end, begun + 1)


def _in_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
