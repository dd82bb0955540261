"""The same point of a program in two recordings of it, found by what was asked for.

A place of the code, that is stacks which count as one, is *steady* if as many requests were made there in both
recordings: its third request in the one is its third in the other, in whatever turn of whatever loop that is. What was
asked for at another place, which may be new or ask otherwise than before, lies between two steady requests, and is
looked for between the same two of the other recording: at the same share of its place's requests there, or, where that
place has none, when most was held.

A program that runs out of memory ends early, so that whole numbers say nothing of it. It is at the point at which most
places had been asked as often as they had been when it failed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fragscope.against.held import Recorded

_Rows = npt.NDArray[np.int64]


class Points:
    """Finds points of one recording in another.

    Args:
        was, now: the recordings.
        places: rows of the requests, before and now, of each place that both have.
    """

    def __init__(self, was: Recorded, now: Recorded, places: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        self._recorded = was, now
        self._places = places

    def before(self, row: int, place: int | None, metric: str) -> int:
        """The row of the earlier recording that is the same point as one of the later.

        Args:
            row: of a request in the measured phase.
            place: whose request it is; None for one that both have not.
            metric: what is compared there.
        """
        return self._same(row, place, metric, here=1)

    def after(self, row: int, place: int | None, metric: str) -> int:
        """The row of the later recording that is the same point as one of the earlier; see ``before``."""
        return self._same(row, place, metric, here=0)

    def before_failure(self, row: int, place: int | None) -> int:
        """The row of the earlier recording up to which it is what the later one is when its request fails.

        Args:
            row: of the request that failed.
            place: whose request it is; None for one that both have not.
        """
        begins, ends = [], []
        for old, new in self._places:
            count = bisect_left(new, row)
            if count <= len(old):
                begins.append(old[count - 1] if count else 0)
                ends.append(old[count] if count < len(old) else len(self._recorded[0].trace.requests))
        if not begins:
            return self._recorded[0].row("peak_allocated")
        at, where = np.unique(np.array([begins, ends]), return_inverse=True)
        agreeing = np.cumsum(np.bincount(where.ravel()[: len(begins)], minlength=len(at)))
        agreeing -= np.cumsum(np.bincount(where.ravel()[len(begins) :], minlength=len(at)))
        best = int(np.argmax(agreeing))
        begin, end = int(at[best]), int(at[min(best + 1, len(at) - 1)])
        if place is not None and end in self._places[place][0]:
            return end - 1  # the request that failed is the next one here
        return self._most_held(0, range(begin, max(end, begin + 1)), "peak_allocated")

    def _same(self, row: int, place: int | None, metric: str, *, here: int) -> int:
        mine, theirs = self._recorded[here], self._recorded[1 - here]
        if row == mine.rows.start:
            return int(theirs.rows.start)
        own, other = (self._places[place][here], self._places[place][1 - here]) if place is not None else ((), ())
        turn = bisect_left(own, row)
        if row not in own[turn : turn + 1]:
            own, other = (), ()  # it failed and was got over: the places' requests are those that were served
        elif len(own) == len(other):
            return int(other[turn])
        steady, counterparts, sorted_counterparts = self._steady[here]
        number = int(np.searchsorted(steady, row))
        after_this = max(int(steady[number - 1]) if number else 0, int(mine.rows.start))
        before_that = int(steady[number]) if number < len(steady) else int(mine.rows.stop)
        begin = max(int(counterparts[number - 1]) if number else 0, int(theirs.rows.start))
        begin = min(begin, int(theirs.rows.stop) - 1)
        following = int(np.searchsorted(sorted_counterparts, begin, side="right"))
        end = int(sorted_counterparts[following]) if following < len(sorted_counterparts) else int(theirs.rows.stop)
        end = max(min(end, int(theirs.rows.stop)), begin + 1)
        asked_here, asked_there = _between(own, after_this, before_that), _between(other, begin, end)
        if not asked_there:
            return self._most_held(1 - here, range(begin, end), metric)
        turn = bisect_left(asked_here, row)
        first = turn * len(asked_there) // len(asked_here)
        past = max((turn + 1) * len(asked_there) // len(asked_here), first + 1)
        return self._most_held(1 - here, asked_there[first:past], metric)

    def _most_held(self, side: int, rows: Sequence[int], metric: str) -> int:
        """Of some rows the first after which most is held: what lines hold, which idle memory is not part of."""
        series = self._recorded[side].series
        values = series.requested if metric == "peak_requested" else series.allocated
        return int(rows[int(np.argmax(values[np.asarray(rows)]))])

    @cached_property
    def _steady(self) -> tuple[tuple[_Rows, _Rows, _Rows], tuple[_Rows, _Rows, _Rows]]:
        """For each recording rows of requests of steady places, the other's rows for them, and these in order."""
        none = [np.zeros(0, dtype=np.int64)]
        both = [(old, new) for old, new in self._places if len(old) == len(new)]
        was = np.concatenate([np.asarray(old, dtype=np.int64) for old, _ in both] or none)
        now = np.concatenate([np.asarray(new, dtype=np.int64) for _, new in both] or none)
        by_was, by_now = np.argsort(was), np.argsort(now)
        return (was[by_was], now[by_was], now[by_now]), (now[by_now], was[by_now], was[by_was])


def _between(rows: Sequence[int], after: int, before: int) -> Sequence[int]:
    return rows[bisect_right(rows, after) : bisect_left(rows, before)]
